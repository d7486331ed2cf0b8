"""The examples of docs/add_your_own.md, run as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mir_lightning import MIRCallback, Probe, evaluate_mir
from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.prompts import PlainPrompt
from mir_lightning.llava.model.connector import connect, llava_config
from mir_lightning.llava.model.connectors import CONNECTORS
from tests.models import IMAGE_TOKEN, tiny_batch, tiny_llava
from tests.training import fit

PAGE = (Path(__file__).parents[1] / "docs" / "add_your_own.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def _names(index):
    assert len(BLOCKS[index].splitlines()) < 40
    assert sum(bool(line.strip()) for line in BLOCKS[index].splitlines()) <= 30
    names = {"__name__": "example"}
    exec(BLOCKS[index], names)
    return names


def test_a_connector(tmp_path):
    parts = tiny_llava()
    llm, vision = parts.model.language_model, parts.model.vision_tower

    class CausalLM(torch.nn.Module):  # what connect asks of a causal language model
        config, base_model, generation_config = llm.config, llm, parts.generation_config

        def get_output_embeddings(self):
            return parts.lm_head

    joint = (llm.config, vision.config, IMAGE_TOKEN, -1, "full", "gated")
    with pytest.raises(ValueError, match=r"connector must be one of mlp, .*, got 'gated'"):
        llava_config(*joint)
    try:
        connector = _names(0)["Gated"]
        with pytest.raises(ValueError, match="gated makes 10 tokens of a picture, got 4"):
            llava_config(*joint, visual_tokens=4)
        model = connect(CausalLM(), vision, llava_config(*joint)).eval()
        assert isinstance(model.model.multi_modal_projector, connector)
        model.save_pretrained(tmp_path)
        loaded, found = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(found.values())
        probe = Probe([tiny_batch()])
        assert evaluate_mir(loaded, probe).mir == evaluate_mir(model, probe, check=True).mir
    finally:
        CONNECTORS.pop("gated", None)


def test_a_probing_callback(tmp_path):
    probe = Probe([tiny_batch(seed=100), tiny_batch(seed=101)])
    callback, mir = _names(1)["HeldOutLoss"](probe, 2), MIRCallback(probe, 2)
    trainer, _ = fit(tmp_path, [callback, mir])
    assert [row["step"] for row in callback.history] == [0, 2, 4, 6]
    for own, theirs in zip(callback.history, mir.history, strict=True):
        assert own["held_out/loss"] == pytest.approx(theirs["mir_probe/loss"], rel=1e-5)
    assert trainer.callback_metrics["held_out/loss"].item() == pytest.approx(callback.history[-1]["held_out/loss"])


def test_a_logger(tmp_path):
    logger = _names(2)["Notebook"]()
    fit(tmp_path, [MIRCallback(Probe([tiny_batch(seed=100)]), 3)], logger=logger)
    assert [row["step"] for row in logger.rows if "mir" in row] == [0, 3, 6]
    assert {f"mir_media/{name}" for name in ("overview", "layers", "heatmap", "tokens")} == set(logger.pictures)
    assert all(picture.startswith(b"\x89PNG") for picture in logger.pictures.values())


def test_a_source(tiny_processor):
    training, held_out = _names(3)["Words"](["red", "green", "blue"]).split(1, None, 0)
    batch = ConversationCollator(tiny_processor, PlainPrompt())([training[0], training[1], held_out[0]])
    said = {tiny_processor.tokenizer.decode(row[row >= 0]) for row in batch["labels"]}
    assert said == {"It is red.\n", "It is green.\n", "It is blue.\n"}
