import csv
import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from mir_lightning import cli, evaluate_mir
from mir_lightning.callbacks import figures
from mir_lightning.cli.evaluate import _plain, layer_bars
from mir_lightning.probing.choices.probe import ChoiceProbe
from mir_lightning.probing.image_gain import evaluate_image_gain
from mir_lightning.probing.pairs import PairProbe, read_pairs


def test_prints_and_writes_the_number(shared, run, tmp_path):
    files = {suffix: tmp_path / f"out.{suffix}" for suffix in ("json", "csv", "png")}
    done = run(
        "eval", shared.root / "model", "--json", files["json"], "--csv", files["csv"], "--plot", files["png"]
    )
    assert done.status == 0
    pairs = read_pairs(shared.root / "images", shared.root / "texts", 3)
    expected = evaluate_mir(shared.model, PairProbe(shared.processor, shared.model.config, pairs, 3))
    written = json.loads(files["json"].read_text())
    assert written["mir"] == pytest.approx(expected.mir, rel=1e-6)
    assert written["layers"] == pytest.approx(expected.layers.tolist(), rel=1e-5)
    assert written["fingerprint"] == expected.fingerprint
    assert written["checked"]
    assert f"MIR {expected.mir:.4f} (paper;" in done.out
    assert f"tokens    30 vision, {expected.text_tokens} text" in done.out
    ratio = expected.norm_ratio.mean().item()
    norms = f"norms     vision {ratio:.3g} times text (mean over layers); at equal norms MIR"
    assert f"{norms} {expected.mir_equal_norm:.4f}\n" in done.out
    outliers = expected.outliers.sum(dim=0).tolist()
    assert f"outliers  {outliers[0]:.0f} vision, {outliers[1]:.0f} text, over 3 layers\n" in done.out
    assert written["influence"] is written["standard_error"] is None
    assert "100%" in done.err  # the bar
    rows = list(csv.reader(files["csv"].open()))
    assert rows[0][:2] == ["layer", "distance"]
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(written["layers"])
    with Image.open(files["png"]) as picture:
        assert picture.width > 400


def test_batch_size_does_not_matter(run, shared, tmp_path):
    numbers = []
    for size in ("1", "2", "auto"):
        file = tmp_path / f"{size}.json"
        assert run("eval", shared.root / "model", "--batch-size", size, "--json", file).status == 0
        numbers.append(json.loads(file.read_text()))
    assert [n["mir"] for n in numbers] == pytest.approx([numbers[0]["mir"]] * 3, rel=1e-5)
    assert len({n["source"] for n in numbers}) == 1
    assert len({n["fingerprint"] for n in numbers}) == 3


def test_automatic_batches_shrink_where_the_engine_cannot_cut_them(run, shared, tmp_path, monkeypatch):
    forward, tried = type(shared.model).forward, []

    def refuse_three(self, **inputs):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] == 3:
            raise torch.OutOfMemoryError("three samples")
        inputs.pop("not_by_row", None)
        return forward(self, **inputs)

    class Uncut(PairProbe):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "not_by_row": torch.ones(1, 2)}

    monkeypatch.setattr(type(shared.model), "forward", refuse_three)
    monkeypatch.setattr("mir_lightning.cli.evaluate.PairProbe", Uncut)
    assert run("eval", shared.root / "model", "--no-check").status == 0
    assert tried == [3, 1, 1, 1]
    assert (
        "cannot be cut in two by not_by_row"
        in run("eval", shared.root / "model", "--no-check", "--batch-size", 3).err
    )


def test_the_model_is_what_its_weights_are(run, shared):
    float32 = run("eval", shared.root / "model").out
    bfloat16 = run("eval", shared.root / "model", "--dtype", "bfloat16", "--device", "cpu").out
    assert float32.splitlines()[0] != bfloat16.splitlines()[0]
    mapped = run("eval", shared.root / "model", "--device-map", "auto").out
    assert mapped.splitlines()[0] == float32.splitlines()[0]


def test_an_adapter_finds_its_base(run, shared, tmp_path):
    torch.manual_seed(0)
    base = type(shared.model).from_pretrained(shared.root / "model")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(shared.root / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    pairs = read_pairs(shared.root / "images", shared.root / "texts", 3)
    expected = evaluate_mir(adapted.eval(), PairProbe(shared.processor, base.config, pairs, 3)).mir
    assert f"MIR {expected:.4f}" in run("eval", tmp_path / "adapter").out
    assert f"MIR {expected:.4f}" not in run("eval", shared.root / "model").out
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    missing = sorted(tensors)[0]
    kept = {name: tensor for name, tensor in tensors.items() if name != missing}
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
    refused = run("eval", tmp_path / "adapter")
    assert (refused.status, f"weights are missing: {missing}." in refused.err) == (1, True)


def test_a_lightning_checkpoint_of_the_recipe(run, shared, tmp_path):
    checkpoint = {
        "vlm_config": shared.model.config.to_dict(),
        "state_dict": {f"vlm.{key}": value for key, value in shared.model.state_dict().items()},
    }
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(checkpoint, folder / "step.ckpt")
    assert "the command line takes --processor" in run("eval", folder / "step.ckpt").err
    first_line = run("eval", shared.root / "model").out.splitlines()[0]
    for place in ("checkpoints/step", "checkpoints/other", "model"):  # where the recipe exports to
        shared.processor.save_pretrained(tmp_path / place)
        assert run("eval", folder / "step.ckpt").out.splitlines()[0] == first_line
        shutil.rmtree(tmp_path / place)
    shared.processor.save_pretrained(folder / "step")
    torch.save({"state_dict": {}}, folder / "other.ckpt")
    assert "no checkpoint of the recipe" in run("eval", folder / "other.ckpt").err


def test_failures_are_one_line_and_status_1(run, shared, tmp_path):
    done = run("eval", shared.root / "model", "--images", tmp_path, "--texts", tmp_path, pairs=False)
    assert done.status == 1
    last = done.err.splitlines()[-1]
    assert last == f"mir-lightning: images: {tmp_path} holds 0, 100 are needed (num; on the command line --num)."
    assert "Traceback" not in done.err
    assert "Traceback" in run("eval", tmp_path / "nowhere", "--debug").err
    assert run("eval", shared.root / "model", pairs=False).err.endswith("or --data, or --probe.\n")


@pytest.mark.parametrize(
    "arguments", [["eval"], ["eval", "m", "--num", "0"], ["eval", "m", "--variant", "new"], ["nothing"], []]
)
def test_bad_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: mir-lightning" in capsys.readouterr().err


def test_layer_bars():
    assert layer_bars([0.0, 0.5, 1.0]) == "▁▅█"
    assert layer_bars([0.0, 0.0]) == "▁▁"


def test_a_terminal_without_bars(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert layer_bars([0.0, 0.5, 1.0]) == "158"


@pytest.mark.parametrize("part", ["vision_tower", "language_model.layers.1"])
def test_a_model_that_has_diverged_is_told_by_a_weight(run, shared, tmp_path, part):
    model = type(shared.model).from_pretrained(shared.root / "model")
    name, weight = next((n, p) for n, p in model.named_parameters() if part in n)
    weight.data.flatten()[0] = float("nan")
    model.save_pretrained(tmp_path)
    shared.processor.save_pretrained(tmp_path)
    done = run("eval", tmp_path)
    assert done.status == 1
    assert f"the model has diverged: its weight {name} is not finite." in done.err


def test_a_prompt_with_the_image_token_is_refused_before_the_model_is_loaded(run, shared, monkeypatch):
    monkeypatch.setattr("mir_lightning.cli.evaluate.load_model", None)
    token = shared.processor.image_token
    done = run("eval", shared.root / "model", "--prompt", f"{token} {{image}} {{text}}")
    assert done.status == 1
    assert f"prompt (--prompt) holds the image placeholder {token!r}, which {{image}} stands for." in done.err


def test_a_line_break_in_the_prompt(run, shared):
    typed, pasted = (
        run("eval", shared.root / "model", "--prompt", p) for p in ("{image}\n{text}", r"{image}\n{text}")
    )
    assert typed.status == pasted.status == 0
    assert typed.out.splitlines()[:-1] == pasted.out.splitlines()[:-1]


def test_an_interval_and_the_order_of_the_rank(run, shared, tmp_path):
    out = tmp_path / "out.json"
    done = run(
        "eval", shared.root / "model", "--interval", "--rank-order", 1, "--products", "float32", "--json", out
    )
    pairs = read_pairs(shared.root / "images", shared.root / "texts", 3)
    probe = PairProbe(shared.processor, shared.model.config, pairs, 3)
    expected = evaluate_mir(shared.model, probe, interval=True, rank_order=1)
    written = json.loads(out.read_text())
    assert written["products"] == "float32"
    assert written["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)
    assert written["influence"] == pytest.approx(expected.influence.tolist(), rel=1e-3)
    assert written["effective_rank"] == [pytest.approx(row, rel=1e-4) for row in expected.effective_rank.tolist()]
    half = 1.96 * expected.standard_error
    assert f"MIR {expected.mir:.4f} ± {half:.4f} (95 %; paper; lower is better aligned)" in done.out
    assert "text (order 1, mean over layers)" in done.out


def test_the_worst_samples_are_named_and_drawn(run, shared, tmp_path, monkeypatch):
    """A picture that cannot be read is left out, and the others keep their names."""
    images = tmp_path / "images"
    shutil.copytree(shared.root / "images", images)
    (images / "0.png").write_bytes(b"no picture")
    drawn = []
    monkeypatch.setattr(
        figures, "caption_figure", lambda *a, f=figures.caption_figure, **k: drawn.append(a) or f(*a, **k)
    )
    arguments = ["--images", images, "--texts", shared.root / "texts", "--num", 3, "--max-unreadable", 0.5]
    files = ["--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    done = run("eval", shared.root / "model", "--worst", 2, *arguments, *files, pairs=False)
    assert done.status == 0
    influence = json.loads((tmp_path / "out.json").read_text())["influence"]
    texts = ["A short story.", "Ünïcode, and then some more words."]
    named = sorted(zip(influence, ("1.png", "2.png"), texts, strict=True), reverse=True)
    lines = done.out.splitlines()
    assert [lines[-3].split(), lines[-4]] == [["picture", "adds", "to", "MIR", "text"], ""]
    assert [line.split(maxsplit=2) for line in lines[-2:]] == [
        [name, f"{added:+.4f}", text] for added, name, text in named
    ]
    pictures, texts, names = drawn[0]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [
        Image.open(images / name).getpixel((0, 0)) for _, name, _ in named
    ]
    assert names == [f"{added:+.4f}  {name}" for added, name, _ in named]
    assert texts == [text for _, _, text in named]
    with Image.open(tmp_path / "out_worst.png") as picture:
        assert picture.width > 400
    without = run("eval", shared.root / "model", "--worst", 1)
    assert "±" in without.out
    assert len(without.out.splitlines()[-1].split()[0]) == len("0.png")


def test_the_gain_of_the_pictures(run, shared, tmp_path):
    found = {}
    for name, arguments in (("with", ["--gain"]), ("without", [])):
        out = tmp_path / f"{name}.json"
        found[name] = (
            run("eval", shared.root / "model", *arguments, "--json", out).out,
            json.loads(out.read_text()),
        )
    pairs = read_pairs(shared.root / "images", shared.root / "texts", 3)
    probe = PairProbe(shared.processor, shared.model.config, pairs, 3, labels=True)
    expected, loss = evaluate_image_gain(shared.model, probe), evaluate_mir(shared.model, probe).loss
    (printed, with_), (_, without) = found["with"], found["without"]
    gain = with_["image_gain"]
    assert with_["mir"] == without["mir"]
    assert without["image_gain"] is without["loss"] is None
    assert with_["loss"] == pytest.approx(loss, rel=1e-5)
    assert gain["gain"] == pytest.approx(expected.gain, rel=1e-3)
    assert gain["samples"] == pytest.approx(expected.samples.tolist(), rel=1e-3)
    half, half_blank = 1.96 * expected.standard_error, 1.96 * expected.standard_error_blank
    assert (
        f"  gain      {expected.gain:.4f} ± {half:.4f} nats a token with another picture, "
        f"{expected.gain_blank:.4f} ± {half_blank:.4f} with a blank one (95 %; higher is better)" in printed
    )
    assert "gain" not in found["without"][0]


def test_answers_after_examples(run, shared, tmp_path, monkeypatch):
    """With MM1's prompts, the other pairs as examples; the same as through FewShotProbe by hand."""
    prompts = []
    real = ChoiceProbe.__init__

    def watched(self, items, *args, **options):
        prompts.extend((len(item.images), item.prompt) for item in items)
        real(self, items, *args, **options)

    monkeypatch.setattr(ChoiceProbe, "__init__", watched)
    out = tmp_path / "out.json"
    done = run("eval", shared.root / "model", "--shots", 0, 2, "--json", out)
    assert (done.status, done.err.count("Traceback")) == (0, 0)
    assert [pictures for pictures, _ in prompts] == [1] * 3 + [3] * 3
    assert prompts[0][1] == "<image> A photo of"
    lines = prompts[3][1].split("\n")
    assert len(lines) == 3
    assert lines[-1] == "<image> A photo of"
    assert all(line.startswith("<image> A photo of ") for line in lines[:2])
    assert "The tide comes in" not in prompts[3][1]  # its own caption
    rows = json.loads(out.read_text())["few_shot"]
    assert [(row["shots"], row["task"]) for row in rows] == [(k, t) for k in (0, 2) for t in ("all", "caption")]
    assert f"  0 shots   exact match {rows[1]['exact_match']:.3f}, F1 {rows[1]['f1']:.3f} (caption)" in done.out

    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "Two."}]
    records = [{"id": i, "image": f"{i}.png", "conversations": turns} for i in range(3)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    prompts.clear()
    data = ["--data", tmp_path / "data.json", "--image-folder", shared.root / "images", "--num", 3]
    done = run("eval", shared.root / "model", *data, "--shots", 1, pairs=False)
    assert {prompt for _, prompt in prompts} == {
        "<image> Question: How many? Short answer: Two.\n<image> Question: How many? Short answer:"
    }
    assert "  1 shots   exact match" in done.out


def test_more_examples_than_pairs_and_examples_of_a_saved_probe(run, shared, tmp_path):
    done = run("eval", shared.root / "model", "--shots", 3)
    assert (done.status, done.err) == (1, "mir-lightning: --shots 3: there are 2 other pairs to show (--num).\n")
    assert run("probe", shared.root / "model", "-o", tmp_path / "p.safetensors").status == 0
    done = run("eval", shared.root / "model", "--probe", tmp_path / "p.safetensors", "--shots", 1, pairs=False)
    assert "--shots shows pictures and texts" in done.err


def test_unknown_numbers_are_null_in_json():
    found = _plain(SimpleNamespace(gain=0.5, samples=torch.tensor([float("nan"), 0.5]), sources={}))
    assert found == {"gain": 0.5, "samples": [None, 0.5]}


def test_a_saved_probe_has_no_texts_to_label(run, shared, tmp_path):
    assert run("probe", shared.root / "model", "-o", tmp_path / "p.safetensors").status == 0
    arguments = ["--probe", tmp_path / "p.safetensors", "--gain"]
    refused = run("eval", shared.root / "model", *arguments, pairs=False)
    message = f"--gain needs labels, which --probe {tmp_path / 'p.safetensors'} lacks: give pictures and texts."
    assert (refused.status, message in refused.err) == (1, True)
