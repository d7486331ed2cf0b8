"""The code in the documentation runs."""

import re
from pathlib import Path

import peft
import torch

from mir_lightning.moca import inject_moca, moca_parameters
from tests.moca.families import lay_out, tiny_llama
from tests.models import tiny_llava

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "moca.md").read_text(), re.DOTALL
)


def test_training_script():
    model, logged = tiny_llava().requires_grad_(False), []
    inputs, _ = lay_out("llava", ["tIttIt"])
    names = {
        "model": model,
        "loader": [{**inputs, "labels": inputs["input_ids"]}] * 2,
        "log": lambda values, step: logged.append(values),
    }
    exec(BLOCKS[0], names)
    assert len(logged) == 2
    assert min(logged[-1].values()) > 0
    assert [len(group["params"]) for group in names["optimizer"].param_groups] == [0, 6]


def test_explicit_mask():
    names = {"llm": tiny_llama(), "mask": torch.rand(2, 9) < 0.5, "embeds": torch.randn(2, 9, 24)}
    inject_moca(names["llm"])
    exec(BLOCKS[1], names)


def test_adapter(tmp_path):
    names = {"model": tiny_llava(), "base": tiny_llava(), "folder": tmp_path}
    names |= {"peft": peft, "inject_moca": inject_moca}
    exec(BLOCKS[2].replace("...", "model.save_pretrained(folder)"), names)
    assert len(moca_parameters(names["model"])) == 6
