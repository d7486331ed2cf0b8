import json

import numpy as np
import pytest
import torch
from PIL import Image

from mir_lightning import cli, evaluate_mir
from mir_lightning.llava.backbones import build_packaged_processor
from mir_lightning.probing.pairs import pair_probe
from tests.models import tiny_llava


@pytest.fixture
def folders(tmp_path):
    """A tiny model with a real processor, three pictures and three texts."""
    processor = build_packaged_processor()
    processor.image_processor.size = {"height": 12, "width": 12}
    processor.patch_size = 4
    processor.num_additional_image_tokens = 1  # CLS
    model = tiny_llava(vocab_size=len(processor.tokenizer), image_token=processor.image_token_id)
    for part in (processor, model):
        part.save_pretrained(tmp_path / "model")
    for name in ("images", "texts"):
        (tmp_path / name).mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "texts" / "a.txt").write_text("The tide comes in twice a day.")
    (tmp_path / "texts" / "b.story").write_text("A short story.\n\n@highlight\n\nnot this")
    (tmp_path / "texts" / "c.txt").write_text("Ünïcode, and then some more words.")
    return tmp_path, model, processor


def _eval(root):
    """Arguments of ``mir-lightning eval`` on the fixture's folders."""
    return ["eval", str(root / "model"), "--images", str(root / "images"), "--texts", str(root / "texts")]


def test_eval_prints_and_writes_the_number(folders, capsys):
    root, model, processor = folders
    assert cli.main([*_eval(root), "--num", "3", "--batch-size", "2", "--json", str(root / "out.json")]) == 0
    probe = pair_probe(processor, root / "images", root / "texts", 3, 2)
    expected = evaluate_mir(model, probe)
    written = json.loads((root / "out.json").read_text())
    assert written["mir"] == pytest.approx(expected.mir, rel=1e-6)
    assert written["fingerprint"] == expected.fingerprint
    assert f"MIR {expected.mir:.4f} (paper; 30 vision" in capsys.readouterr().out


def test_a_story_ends_before_its_highlights(folders):
    root, _, processor = folders
    probe = pair_probe(processor, root / "images", root / "texts", 3)
    texts = processor.tokenizer.batch_decode(next(iter(probe))["input_ids"])
    assert "A short story." in texts[1]
    assert "not this" not in texts[1]


def test_failures_are_one_line_and_status_1(folders, capsys):
    root, _, _ = folders
    assert cli.main(_eval(root)) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("mir-lightning: images: ")
    assert "holds 3 files" in error
    assert "100 are needed" in error
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval"])
    assert stop.value.code == 2


def test_bad_numbers(folders):
    root, _, processor = folders
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        pair_probe(processor, root / "images", root / "texts", 0)
    with pytest.raises(ValueError, match="texts must be a folder"):
        pair_probe(processor, root / "images", root / "nowhere", 1)
    assert torch.is_grad_enabled()
