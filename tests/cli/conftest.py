"""A folder with a tiny model and its real processor, pictures and texts; and the command line."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mir_lightning import cli
from tests.models import tiny_llava


@pytest.fixture(scope="session")
def shared(tmp_path_factory, tiny_processor):
    """Made once: nothing in it is changed by a test."""
    root = tmp_path_factory.mktemp("cli")
    processor = tiny_processor
    vocabulary = len(processor.tokenizer)
    models = [tiny_llava(seed, vocab_size=vocabulary, image_token=processor.image_token_id) for seed in (0, 1)]
    for name, model in zip(("model", "other"), models, strict=True):
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    for name in ("images", "texts"):
        (root / name).mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
    (root / "texts" / "a.txt").write_text("The tide comes in twice a day.")
    (root / "texts" / "b.story").write_text("A short story.\n\n@highlight\n\nnot this")
    (root / "texts" / "c.txt").write_text("Ünïcode, and then some more words.")
    return SimpleNamespace(root=root, model=models[0], processor=processor)


@pytest.fixture
def run(shared, capsys):
    """Run a command on the shared folder's pairs; gives status, output and errors."""

    def command(name, *arguments, pairs=True):
        folders = (
            ["--images", shared.root / "images", "--texts", shared.root / "texts", "--num", 3] if pairs else []
        )
        status = cli.main([str(part) for part in (name, *arguments, *folders)])
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return command
