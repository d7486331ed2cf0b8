"""What a run leaves is where the next one starts: the whole model, a checkpoint, or a part alone."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from mir_lightning.llava.model.backbones import ModelSource, build_model, build_processor
from mir_lightning.llava.model.module import LlavaPretraining, LoraOptions
from mir_lightning.llava.model.saving import export, load_part, load_vlm, load_whole
from mir_lightning.llava.model.stages import Part, Stage
from mir_lightning.vlm import parameters_of
from tests.models import IMAGE_TOKEN, save_tiny_llava, tiny_batch, tiny_llava

PARTS = ("projector.safetensors", "moca.safetensors", "adapter/adapter_model.safetensors")
LORA = LoraOptions(r=2, alpha=4, targets=("q_proj",))


def _module(folder, **options):
    parts = [Part("projector", 1.0), *([Part("lora", 1.0)] if options.get("lora") else [])]
    module = LlavaPretraining(vlm=str(folder), stages=[Stage(parts)], **options)
    module.configure_model()
    return module


@pytest.fixture
def run(tmp_path, tiny_processor):
    """A base model's folder, a trained module with all parts, and the folder of its export."""
    module = _module(save_tiny_llava(tmp_path / "base", tiny_processor), lora=LORA, moca=True)
    torch.manual_seed(5)
    for name, parameter in module.vlm.named_parameters():
        if "projector" in name or ".lora_" in name or ".moca." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    export(module.vlm, tiny_processor, tmp_path / "export")
    return tmp_path / "base", module, tmp_path / "export"


def _logits(vlm, processor):
    batch = tiny_batch(labels=False)
    ids = batch.pop("input_ids")
    text = ids.masked_fill(ids == processor.image_token_id, 100)
    batch["input_ids"] = text.masked_fill(ids == IMAGE_TOKEN, processor.image_token_id)
    with torch.no_grad():
        return vlm.eval()(**batch).logits


def test_a_run_starts_from_the_parts_of_another(run, tiny_processor):
    base, trained, folder = run
    parts = [
        folder / "projector.safetensors",
        folder / "moca.safetensors",
        folder / "adapter" / "adapter_model.safetensors",
    ]
    again = _module(base, lora=LORA, moca=True, parts=parts)
    torch.testing.assert_close(_logits(again.vlm, tiny_processor), _logits(trained.vlm, tiny_processor))
    without = _module(base, lora=LORA, moca=True, parts=parts[:1])
    for name, parameter in parameters_of(without.vlm, "projector").items():
        assert torch.equal(parameter, parameters_of(trained.vlm, "projector")[name])
    assert not torch.allclose(_logits(without.vlm, tiny_processor), _logits(trained.vlm, tiny_processor))


def test_a_run_starts_from_the_whole_model_or_a_checkpoint_of_another(run, tiny_processor, tmp_path):
    _, trained, folder = run
    whole = _module(folder)
    torch.testing.assert_close(
        _logits(whole.vlm, tiny_processor), _logits(trained.vlm, tiny_processor), rtol=1e-5, atol=1e-6
    )
    checkpoint = {"state_dict": {f"vlm.{k}": v for k, v in whole.vlm.state_dict().items()}}
    (tmp_path / "checkpoints").mkdir()
    torch.save({**checkpoint, "vlm_config": whole.vlm.config.to_dict()}, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match="no processor in the folder of its name"):
        build_processor(ModelSource(vlm=str(tmp_path / "checkpoints" / "last.ckpt")))
    folder.rename(tmp_path / "model")
    again = _module(tmp_path / "checkpoints" / "last.ckpt")
    assert torch.equal(_logits(again.vlm, tiny_processor), _logits(whole.vlm, tiny_processor))


def test_a_part_that_does_not_fit_is_named(run, tmp_path):
    base, trained, folder = run
    projector, adapter = folder / "projector.safetensors", folder / "adapter" / "adapter_model.safetensors"
    plain = _module(base).vlm
    with pytest.raises(ValueError, match=r"holds LoRA adapters: set model\.lora"):
        load_part(plain, adapter)
    with pytest.raises(ValueError, match="MoCa"):
        load_part(plain, folder / "moca.safetensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_part(plain, tmp_path / "missing.safetensors")
    before = copy.deepcopy(plain.state_dict())
    tensors = load_file(projector)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.zeros(3, 3)}, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is \[3, 3\] there"):
        load_part(plain, tmp_path / "wide.safetensors")
    save_file({**tensors, "model.other": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"only the file has model\.other"):
        load_part(plain, tmp_path / "more.safetensors")
    save_file({k: v for k, v in load_file(adapter).items() if "layers.0" in k}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"only the model has .*layers\.1"):
        load_part(trained.vlm, tmp_path / "half.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


def _changed(folder, change):
    """Save a tiny LLaVA, with its tensors changed."""
    tiny_llava().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _first_row(tensors, name):
    tensors[name] = tensors[name][:1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: _first_row(t, next(k for k in t if "q_proj" in k)),
            r"weights are of another shape: .*q_proj\.weight \(\[1, 24\] in the file, \[24, 24\] in the model\)\.",
        ),
        (lambda t: t.pop(next(k for k in t if "q_proj" in k)), r"weights are missing: .*q_proj\.weight\."),
        (lambda t: t.update(extra=torch.zeros(3)), r"weights are unknown to the model: extra\."),
        (lambda t: [t.pop(k) for k in sorted(t) if "mlp" in k], r"weights are missing: .* and \d+ more\."),
    ],
    ids=["shape", "missing", "unknown", "many"],
)
def test_a_model_with_other_weights_than_its_files_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_vlm(_changed(tmp_path, change))


@pytest.mark.parametrize(("name", "content"), [("a.ckpt", b""), ("A.CKPT", b"hello"), ("a.ckpt", None)])
def test_a_run_from_a_damaged_checkpoint_names_it(tmp_path, name, content):
    if content is None:
        vlm = tiny_llava()
        state = {f"vlm.{key}": value for key, value in vlm.state_dict().items()}
        _first_row(state, "vlm.lm_head.weight")
        torch.save({"vlm_config": vlm.config.to_dict(), "state_dict": state}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){name} cannot be loaded: .*Error\)"):
        build_model(ModelSource(vlm=str(tmp_path / name)), None)


def test_the_files_may_hold_more_than_the_encoder_but_not_less(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision)).save_pretrained(tmp_path)
    config = CLIPConfig.from_pretrained(tmp_path).vision_config
    assert load_whole(CLIPVisionModel, tmp_path, parts=True, config=config).config.num_hidden_layers == 2
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"weights are missing: .*layers\.2"):
        load_whole(CLIPVisionModel, tmp_path, parts=True, config=config)
