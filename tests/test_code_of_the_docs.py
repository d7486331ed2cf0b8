"""The Python that README and docs print runs: blocks as they stand there, scripts as whole programs."""

import ast
import re
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from transformers import TrainingArguments

from mir_lightning import MIRCallback, Probe, evaluate_mir
from mir_lightning.callbacks.hf import MIRTrainerCallback
from mir_lightning.probing import ChoiceProbe, evaluate_choices
from tests.items import hard_items
from tests.models import IMAGE_TOKEN, tiny_batch, tiny_llava
from tests.processors import build
from tests.test_commands_of_the_docs import PAGES, ROOT
from tests.training import Pretraining, fit

SCRIPTS = sorted((ROOT / "docs/examples").glob("*.py"))
RUN_ELSEWHERE = {"add_your_own.md": "tests/test_add_your_own.py", "moca.md": "tests/moca/test_docs.py"}
BLOCKS = {
    page.name: found
    for page in PAGES
    if page.name not in RUN_ELSEWHERE
    and (found := re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


def run(page, index, **names):
    """What a block's last expression gives, or else the names that it leaves."""

    tree, names = ast.parse(BLOCKS[page][index]), {"__name__": "example", **names}
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, page, "exec"), names)
    return (
        SimpleNamespace(**names)
        if last is None
        else eval(compile(ast.Expression(last.value), page, "eval"), names)
    )


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.norm = nn.LayerNorm(8)


class Net(nn.Module):
    """No Hugging Face model: patches take the places of the placeholders."""

    def __init__(self):
        super().__init__()
        self.words, self.project, self.decoder = nn.Embedding(64, 8), nn.Linear(5, 8), Decoder()
        self.blocks, self.norm = self.decoder.blocks, self.decoder.norm

    def embed(self, patches, ids):
        return torch.where((ids == IMAGE_TOKEN)[..., None], self.project(patches), self.words(ids))

    def forward(self, input_ids, patches, labels=None):
        hidden = self.embed(patches, input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.norm(hidden) @ self.words.weight.T
        return SimpleNamespace(
            logits=logits, loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        )


class Holder(Pretraining):
    def __init__(self):
        pl.LightningModule.__init__(self)
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return self.net(**net_batch(0)).loss


def net_batch(seed):
    batch = tiny_batch(seed=seed, padded=0)
    ids = batch["input_ids"]
    return {"input_ids": ids, "patches": torch.randn(*ids.shape, 5), "labels": ids}


def is_vision(batch):
    return batch["input_ids"] == IMAGE_TOKEN


@pytest.fixture
def batches():
    return [tiny_batch(seed=seed) for seed in (100, 101)]


@pytest.fixture
def few_steps(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    monkeypatch.setattr(pl, "Trainer", partial(pl.Trainer, accelerator="cpu", **options))


def test_readme(few_steps, batches):
    left = run("README.md", 0, my_held_out_batches=batches, my_module=Pretraining(), my_data=None)
    assert left is None


def test_home(few_steps, batches):
    trainer = run("index.md", 0, pl=pl, probe=Probe(batches)).trainer
    trainer.fit(Pretraining())
    assert {"mir", "image_gain"} <= trainer.callback_metrics.keys()


def test_callback(tmp_path, batches):
    callback = run("callback.md", 0, batches=batches)
    gain = run("callback.md", 3, batches_with_labels=batches, Probe=Probe)
    fit(tmp_path, [callback, gain])
    assert [row["step"] for row in callback.history] == [row["step"] for row in gain.history] == [0, 6]


def test_callback_on_another_net(tmp_path):
    made = [net_batch(seed) for seed in (100, 101)]
    masked = Probe([{**batch, "vision_mask": is_vision(batch)} for batch in made])
    by_names = run("callback.md", 1, MIRCallback=MIRCallback, probe=masked)
    by_hand = run("callback.md", 2, MIRCallback=MIRCallback, Probe=Probe, batches=made, is_vision=is_vision)
    for callback in (by_names, by_hand):
        torch.manual_seed(0)
        fit(tmp_path, [callback], Holder())
    assert by_names.history[0]["mir"] == pytest.approx(by_hand.history[0]["mir"], abs=1e-6)


def test_other_loops_hugging_face(tmp_path, batches):
    data = [{key: value[0] for key, value in tiny_batch(seed=s, batch=1, padded=0).items()} for s in range(8)]
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    run("other_loops.md", 0, model=tiny_llava(), arguments=arguments, data=data, batches=batches)


def test_other_loops_trl(tmp_path):
    script = SimpleNamespace(**runpy.run_path(str(ROOT / "docs/examples/trl_sft.py")))
    arguments = script.SFTConfig(tmp_path, max_steps=2, report_to=[], use_cpu=True, bf16=False, save_strategy="no")
    rows = script.rows(64, seed=1)
    names = {
        **{"model": script.tiny_model(), "processor": script.tiny_processor(), "rows": rows, "Probe": Probe},
        **{"SFTTrainer": script.SFTTrainer, "SFTConfig": lambda _: arguments},
        **{"data": script.Dataset.from_list(script.rows(16, seed=2)), "MIRTrainerCallback": MIRTrainerCallback},
    }

    exec(BLOCKS["other_loops.md"][1], names)
    names["trainer"].train()
    assert any("mir" in row for row in names["trainer"].state.log_history)


def test_other_loops_of_ones_own(batches, capsys):
    run(
        "other_loops.md",
        2,
        batches=batches,
        data=batches,
        model=tiny_llava(),
        train_step=lambda model, batch: None,
    )
    assert capsys.readouterr().out.startswith("0 ")


def test_other_loops_a_plain_module():
    net, batch = Net(), net_batch(0)
    vision, names = is_vision(batch), {"Probe": Probe, "evaluate_mir": evaluate_mir}
    masks = {"is_vision": vision, "is_answer": ~vision}
    parts = {"ids": batch["input_ids"], "patches": batch["patches"], "labels": batch["labels"]}
    mir, loss = run("other_loops.md", 3, net=net, **parts, **masks, **names)
    assert loss > 0
    by_hand = run("other_loops.md", 4, net=net, batch=batch, **masks, **names).result
    assert mir == pytest.approx(by_hand.mir, abs=1e-6)


def test_other_loops_fabric(batches):
    fabric, logged = Fabric(accelerator="cpu", devices=1), []
    fabric.log_dict = lambda values, step: logged.append(values)
    model = tiny_llava()
    names = {"fabric": fabric, "model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "step": 0}
    run("other_loops.md", 5, probe=Probe(batches), evaluate_mir=evaluate_mir, **names)
    assert logged[0]["mir"]


def test_metric(batches):
    gain, error = run("metric.md", 0, model=tiny_llava(), probe=Probe(batches))
    assert abs(gain) < 1
    assert error > 0


class Expanding(nn.Module):
    """Puts the patches of a picture into the place of one token, inside its forward."""

    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Embedding(64, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask, pixel_values, output_hidden_states):
        rows = []
        for ids, patches in zip(input_ids, pixel_values, strict=True):
            place = int((ids == IMAGE_TOKEN).nonzero())
            words = self.words(ids)
            rows.append(torch.cat([words[:place], patches, words[place + 1 :]]))
        hidden = torch.stack(rows)
        return SimpleNamespace(hidden_states=(hidden, self.layer(hidden)))


def test_models():
    ids = torch.tensor([[5, IMAGE_TOKEN, 6, 7, 8], [9, IMAGE_TOKEN, 7, 6, 5]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 576, 8)}
    names = {"model": Expanding(), "batch": batch, "placeholder": IMAGE_TOKEN, "torch": torch}
    result = run("models.md", 0, Probe=Probe, evaluate_mir=evaluate_mir, **names)
    assert (result.vision_tokens, result.text_tokens) == (2 * 576, 2 * 4)


def test_discrimination(few_steps):
    model, processor = build("llava")
    trainer = run("discrimination.md", 0, processor=processor, pl=pl).trainer
    assert trainer.callbacks[0].probe.items
    names = {"load_m3_bench": lambda folder, style: hard_items(), "folder": Path("m3_bench")}
    names |= {"evaluate_choices": evaluate_choices, "ChoiceProbe": ChoiceProbe, "processor": processor}
    assert 0 < run("discrimination.md", 1, model=model, **names).result.sds < 1
    assert run("discrimination.md", 2, processor=processor).probe.probes.keys() == {0, 4, 8}


def test_recipe(tmp_path, monkeypatch):
    pytest.importorskip("litdata")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(b"picture")
    sample = run("recipe.md", 0).sample
    record = {"id": "1", "image": "a.jpg", "conversations": []}
    assert sample(record)["image"] == b"picture"
    assert sample({"id": "2", "conversations": []})["image"] == b""


def test_every_block_is_run_by_a_test():
    text = Path(__file__).read_text()
    tested = {(page, int(index)) for page, index in re.findall(r'"([\w.]+\.md)",\s+(\d)', text)}
    tested |= {(page, int(index)) for page, index in re.findall(r'BLOCKS\["([\w.]+)"\]\[(\d)\]', text)}
    assert tested == {(page, index) for page, blocks in BLOCKS.items() for index in range(len(blocks))}
    for page, test in RUN_ELSEWHERE.items():
        assert page in (ROOT / test).read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_and_its_model_learns_to_look(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        runpy.run_path(str(script), run_name="__main__")
    first, *_, last = [line for line in capsys.readouterr().out.splitlines() if re.match(r" +\d+  .*±", line)]
    gains = [[float(number) for number in line.replace("±", "").split()[-2:]] for line in (first, last)]
    assert abs(gains[0][0]) < 4 * gains[0][1], "nothing is learned yet"
    assert gains[1][0] > 4 * gains[1][1]
