"""Every schedule by what changed: the names of the parameters that a real run moved."""

import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from torch.utils.data import DataLoader

from mir_lightning.llava.console import stage_table
from mir_lightning.llava.model.module import LlavaPretraining, LoraOptions
from mir_lightning.llava.model.saving import export, load_vlm
from mir_lightning.llava.model.stages import Part, Stage, checkpoint_layers, freeze_all_but, optimizer_groups
from mir_lightning.vlm import parameters_of
from tests.models import tiny_batch, tiny_llava

LLM, TOWER, PROJECTOR = "model.language_model", "model.vision_tower.encoder.layers", "model.multi_modal_projector"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_processor):
    """A LLaVA as upstream has it: features of the encoder's last layer but one; four encoder layers."""
    folder = tmp_path_factory.mktemp("vlm")
    tiny_llava(vision_layers=4, feature_layer=-2).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return str(folder)


def _run(module, folder, steps=4, resume=None, callbacks=(), **options):
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=options.pop("logger", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader([tiny_batch(seed=s) for s in range(8)], batch_size=None), ckpt_path=resume)
    return trainer


def _module(folder, *stages, **options):
    module = LlavaPretraining(vlm=folder, stages=stages, warmup_ratio=0.0, **options)
    module.configure_model()
    return module


def _changed(module, before):
    return {name for name, p in module.vlm.named_parameters() if not torch.equal(p, before[name])}


def _copy(module):
    return {name: p.detach().clone() for name, p in module.vlm.named_parameters()}


def _names(module, *prefixes):
    found = {name for name, _ in module.vlm.named_parameters() if name.startswith(prefixes)}
    return {name for name in found if ".moca." not in name}


def _mlp_only(module):
    return _names(module, PROJECTOR)


def _unfrozen_llm(module):
    return _names(module, PROJECTOR, LLM, "lm_head")


def _unfrozen_vit_half_llm(module):
    """The last layer of the encoder stays: its output is not used."""
    return _unfrozen_llm(module) | _names(module, f"{TOWER}.2.")


def _first_two_llm_layers(module):
    return _names(module, PROJECTOR, f"{TOWER}.2.", f"{LLM}.layers.0.", f"{LLM}.layers.1.")


SCHEDULES = {
    "mlp_only": ([Part("projector", 1e-3)], _mlp_only),
    "unfrozen_llm": ([Part("projector", 1e-3), Part("llm", 1e-3)], _unfrozen_llm),
    "unfrozen_vit_half_llm": (
        [Part("projector", 1e-3), Part("vision", 1e-3, "2:"), Part("llm", 1e-3)],
        _unfrozen_vit_half_llm,
    ),
    "unfrozen_vit_half_llm_16": (
        [Part("projector", 1e-3), Part("vision", 1e-3, "2:"), Part("llm", 1e-3, ":2")],
        _first_two_llm_layers,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_exactly_the_named_parameters_change_after_a_resume_too(folder, tmp_path, name):
    parts, expected = SCHEDULES[name]
    module = _module(folder, Stage(parts))
    before = _copy(module)
    _run(module, tmp_path, 2, callbacks=[ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)])
    assert _changed(module, before) == expected(module)
    again = _module(folder, Stage(parts))
    _run(again, tmp_path, 4, resume=tmp_path / "last.ckpt")
    assert _changed(again, _copy(module)) == expected(module)
    assert {n for n, p in again.vlm.named_parameters() if p.requires_grad} == expected(module)


@pytest.mark.parametrize("name", SCHEDULES)
def test_moca_trains_in_every_schedule(folder, tmp_path, name):
    parts, expected = SCHEDULES[name]
    stages = [Stage(parts, steps=1), Stage(parts)]
    module = _module(folder, *stages, moca=True, moca_lr=1e-2)
    calibration = {name for name, _ in module.vlm.named_parameters() if ".moca." in name}
    assert len(calibration) == 2 * 3
    before = _copy(module)
    _run(module, tmp_path, 2)
    assert _changed(module, before) == expected(module) | calibration
    groups = [group for group in module._groups if calibration & set(group.parameters)]
    assert calibration == {name for group in groups for name in group.parameters}
    assert all(part.lr == 1e-2 for group in groups for part in group.parts)
    assert not any(group.weight_decay(0) for group in groups)


def test_moca_is_logged_by_layer_and_exported(folder, tmp_path, tiny_processor):
    module = _module(folder, Stage([Part("projector", 1e-3)]), moca=True)
    logger = CSVLogger(tmp_path)
    _run(module, tmp_path, 2, logger=logger, log_every_n_steps=1)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert float(rows[0]["moca/scale/layer_01"]) == 0
    assert float(rows[1]["moca/shift/layer_03"]) > 0
    export(module.vlm, tiny_processor, tmp_path / "model")
    loaded = load_vlm(str(tmp_path / "model")).eval()
    batch = {key: value for key, value in tiny_batch().items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, module.vlm.eval()(**batch).logits, rtol=0, atol=0)
    assert (tmp_path / "model" / "moca.safetensors").is_file()
    assert LlavaPretraining(vlm=str(tmp_path / "model"), moca=True).configure_model() is None


def test_the_vision_forward_is_under_grad_exactly_when_something_in_it_trains(folder):
    for name, expected in (("mlp_only", False), ("unfrozen_vit_half_llm", True)):
        module = _module(folder, Stage(SCHEDULES[name][0]))
        seen = []
        module.vlm.model.vision_tower.register_forward_hook(
            lambda _m, _a, output, seen=seen: seen.append(output.hidden_states[-2].requires_grad)
        )
        module.vlm(**tiny_batch()).loss.backward()
        assert seen == [expected]


def test_lora_trains_adapters_of_the_llm_only(folder, tmp_path):
    module = _module(folder, Stage([Part("projector", 1e-3), Part("lora", 1e-3)]), lora=LoraOptions(r=2))
    before = _copy(module)
    _run(module, tmp_path)
    changed = _changed(module, before)
    adapters = {name for name in before if "lora_" in name}
    assert adapters
    assert changed == adapters | _names(module, PROJECTOR)
    assert all(LLM in name for name in adapters)
    with pytest.raises(
        ValueError, match=r"no parameters of lora: looked for LoRA adapters \(give the lora option\)"
    ):
        _module(folder, Stage([Part("lora", 1e-3)]))


def test_stages_keep_the_optimizer_state_and_new_groups_warm_up(folder, tmp_path):
    stages = [
        Stage([Part("projector", 1e-3)], steps=3),
        Stage([Part("projector", 1e-4), Part("llm", 1e-4, weight_decay=0.1)]),
    ]
    module = LlavaPretraining(vlm=folder, stages=stages, warmup_ratio=0.25)
    rates, moments = [], {}

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append([group["lr"] for group in optimizer.param_groups])
            decays = {group["weight_decay"] for group in optimizer.param_groups}
            assert decays == ({0.0} if trainer.global_step < 3 else {0.0, 0.1})
            projector = next(iter(pl_module.vlm.model.multi_modal_projector.parameters()))
            moments[trainer.global_step] = optimizer.state[projector].get("step", torch.tensor(0.0)).item()

    module.configure_model()
    before = _copy(module)
    _run(module, tmp_path, 3, callbacks=[Watch()])
    assert _changed(module, before) == _mlp_only(module)
    rates.clear()
    module = LlavaPretraining(vlm=folder, stages=stages, warmup_ratio=0.25)
    module.configure_model()
    _run(module, tmp_path, 8, callbacks=[Watch()])
    assert _changed(module, before) == _unfrozen_llm(module)
    assert list(moments.values()) == list(range(8))  # one state all along
    groups = optimizer_groups(module.vlm, stages)
    joins = [i for i, group in enumerate(groups) if group.parts[0] is None]
    stays = [i for i in range(len(groups)) if i not in joins]
    assert all(rates[step][i] == 0 for i in joins for step in range(4))  # frozen, then the first step of warm-up
    assert [rates[4][i] / rates[4][stays[0]] for i in joins] == pytest.approx([0.5] * len(joins))
    assert rates[6][joins[0]] == rates[6][stays[0]] > 0
    assert rates[0][stays[0]] == 0
    assert rates[2][stays[0]] == pytest.approx(1e-3)


def test_a_staged_run_resumes_in_its_stage(folder, tmp_path):
    stages = [Stage([Part("projector", 1e-3)], tokens=2 * 74), Stage([Part("llm", 1e-3, ":1")])]
    saving = [ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")]
    whole = _module(folder, *stages)
    _run(whole, tmp_path, 5, callbacks=saving)
    assert whole._starts == [0, 2]
    for step in (1, 2, 3):
        resumed = _module(folder, *stages)
        _run(resumed, tmp_path, 5, resume=tmp_path / f"step={step}.ckpt")
        assert resumed._starts == [0, 2]
        assert {n for n, p in resumed.vlm.named_parameters() if p.requires_grad} == _names(
            resumed, f"{LLM}.layers.0."
        )


def test_norms_and_biases_get_no_weight_decay(folder):
    module = _module(folder, Stage([Part("llm", 1e-3, weight_decay=0.1), Part("vision", 1e-3, weight_decay=0.1)]))
    decayed = [name for group in module._groups for name in group.parameters if group.weight_decay(0)]
    spared = [name for group in module._groups for name in group.parameters if not group.weight_decay(0)]
    assert decayed
    assert all("norm" not in name and not name.endswith("bias") for name in decayed)
    assert all("norm" in name or name.endswith("bias") or "class_embedding" in name for name in spared)
    assert set(decayed) | set(spared) == {n for n, p in module.vlm.named_parameters() if p.requires_grad}


def test_dropout_follows_the_layer_it_is_in(folder):
    module = _module(folder, Stage([Part("llm", 1e-3, ":1")]))
    layers = module.vlm.model.language_model.layers
    modes = [{m.training for m in layer.modules()} for layer in layers]
    assert modes == [{True}, {False}, {False}]
    assert not any(m.training for m in module.vlm.model.vision_tower.modules())


def test_the_table_a_person_reads(folder):
    module = _module(folder, Stage([Part("projector", 1e-3), Part("llm", 2e-5, ":2", 0.1)]))
    rows = [line.split() for line in stage_table(module.vlm, module.stages[0]).splitlines()]
    assert rows[0] == ["module", "layers", "parameters", "trainable", "lr", "weight", "decay"]
    assert [row[:2] for row in rows[1:]] == [["projector", "all"], ["vision", "-"], ["llm", ":2"]]
    trainable = sum(p.numel() for p in parameters_of(module.vlm, "llm", ":2").values())
    assert rows[3][3:] == [f"{trainable:,}", "2e-05", "0.1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Part("encoder", 1e-3), "module must be one of"),
        (lambda: Part("llm", 0), 'lr of llm must be above 0, or "mm1", got 0'),
        (lambda: Part("llm", 1, weight_decay=-1), "weight_decay of llm must be 0 or more"),
        (lambda: Part("projector", 1, "1:"), "layers can be chosen of vision and llm, not of projector"),
        (lambda: Part("llm", 1, "12"), 'must be a slice such as "12:"'),
        (lambda: Stage([]), "train is empty"),
        (lambda: Stage([Part("llm", 1, ":1"), Part("llm", 1, "1:")]), "names a module twice"),
        (lambda: Stage([Part("llm", 1)], steps=1, tokens=1), "for steps or for tokens, not both"),
        (lambda: Stage([Part("llm", 1)], steps=0), "steps must be at least 1"),
    ],
)
def test_bad_parts_and_stages(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_schedules(folder):
    part = [Part("llm", 1e-3)]
    with pytest.raises(ValueError, match="stages is empty"):
        LlavaPretraining(vlm=folder, stages=[])
    with pytest.raises(ValueError, match="stage 1 of 2 must say its steps or tokens"):
        LlavaPretraining(vlm=folder, stages=[Stage(part), Stage(part)])
    with pytest.raises(ValueError, match="stage 1 of 1 is the last and must not say its length"):
        LlavaPretraining(vlm=folder, stages=[Stage(part, steps=1)])
    with pytest.raises(ValueError, match="layers=':9' of llm: the model has 3"):
        _module(folder, Stage([Part("llm", 1e-3, ":9")]))
    with pytest.raises(ValueError, match=r"warmup_ratio must lie in \[0, 1\), got 1"):
        LlavaPretraining(vlm=folder, warmup_ratio=1.0)


def _saved_bytes(model, batch):
    """Of the activations that a forward keeps for its backward pass, by whether they are of the encoder."""
    kept, inside = {True: 0, False: 0}, [False]
    tower = model.model.vision_tower
    handles = [
        tower.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)),
        tower.register_forward_hook(lambda *_: inside.__setitem__(0, False)),
    ]
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[inside[0]] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch, use_cache=False).loss
    for handle in handles:
        handle.remove()
    loss.backward()
    return kept[False], kept[True], loss.item()


@pytest.mark.parametrize("parts", [("projector",), ("projector", "lora"), ("projector", "llm")])
def test_checkpointed_layers_keep_little_and_frozen_ones_stay_as_they_are(parts):
    stage, found = Stage(tuple(Part(part, 1e-3) for part in parts)), {}
    for checkpointed in (False, True):
        model = tiny_llava(layers=6, dropout=0.5)
        if "lora" in parts:
            model.add_adapter(LoraConfig(target_modules=r".*language_model.*q_proj", r=2))
        if checkpointed:
            checkpoint_layers(model)
        freeze_all_but(model, stage)
        ran: list[int] = []
        norm = model.model.language_model.layers[3].input_layernorm
        norm.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        torch.manual_seed(0)
        language, encoder, loss = _saved_bytes(model, tiny_batch())
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[checkpointed] = language, encoder, loss, gradients
        assert len(ran) == 1 + checkpointed
    (whole, encoder, loss, gradients), (less, same, again, others) = found[False], found[True]
    assert less < 0.5 * whole
    assert encoder == same == 0, "a frozen encoder keeps nothing"
    assert loss == again
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient)
