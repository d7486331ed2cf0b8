"""The commands that README and docs print: they parse, their batches divide, and the page says what they take."""

import re
import runpy
import shlex
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mir_lightning import cli
from mir_lightning.cli.pretrain import _with_files, recipe_folder
from mir_lightning.llava.costs import training_memory
from mir_lightning.llava.data.module import PretrainingData
from mir_lightning.llava.model.stages import Part, Stage
from tests.models import llava_7b

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPE = "recipes/llava_pretrain.py"


def _commands():
    """Page and words of each command line in its shell blocks."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and not line.startswith("#"):
                    yield page, words[1:] if words[0] == "srun" else words


COMMANDS = [(page, words) for page, words in _commands() if "..." not in words]
PRETRAINING = [
    (page, words[words.index("fit") :])
    for page, words in COMMANDS
    if words[:2] in (["python", RECIPE], ["mir-lightning", "pretrain"])
]


def _id(value):
    return value.stem if isinstance(value, Path) else " ".join(value)[:60]


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(recipe_folder() / "llava_pretrain.py"))["main"]


def _config(recipe, capsys, words):
    with pytest.raises(SystemExit) as stop:
        recipe([*_with_files(words, recipe_folder() / "configs"), "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_there_are_such_commands():
    assert len(PRETRAINING) >= 5
    assert {words[0] for _, words in COMMANDS} >= {"make", "pip", "python", "mir-lightning"}


@pytest.mark.parametrize(("page", "words"), PRETRAINING, ids=_id)
def test_a_run_composes_divides_its_batch_and_says_its_memory(recipe, capsys, monkeypatch, page, words):
    monkeypatch.chdir(ROOT)
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            recipe(words)
        assert stop.value.code == 0
        return
    config = _config(recipe, capsys, [word for word in words if word != "--print_config"])
    trainer, data = config["trainer"], config["data"]
    devices = 1 if trainer["devices"] == "auto" else int(trainer["devices"])
    running = SimpleNamespace(world_size=devices * trainer["num_nodes"], accumulate_grad_batches=1)
    sizes = {key: data[key] for key in ("batch_size", "global_batch_size")}
    PretrainingData(**sizes).accumulate(running)
    if sizes["global_batch_size"] is not None:
        published = next(
            (size for name, size in (("mm1", 512), ("finetune", 128)) if name in " ".join(words)), 256
        )
        assert sizes["batch_size"] * running.world_size * running.accumulate_grad_batches == published
    if config["model"]["llm"] == "lmsys/vicuna-7b-v1.5":
        stages = [Stage(tuple(Part(**part) for part in stage["train"])) for stage in config["model"]["stages"]]
        shards = running.world_size if trainer["strategy"] == "fsdp2" else 1
        memory = training_memory(llava_7b(), stages, shards)
        needed = f"{sum(memory) / 1e9:.1f} GB a device"
        assert needed in page.read_text().replace("\n", " ")
        assert sum(memory) < 80e9, "no single accelerator of today holds this"


@pytest.mark.parametrize(
    ("page", "words"),
    [(p, w) for p, w in COMMANDS if w[0] == "mir-lightning" and w[1] != "pretrain"],
    ids=_id,
)
def test_a_command_line_parses(page, words):
    options = cli._parser(words[1:]).parse_args(words[1:])
    assert options.run


@pytest.mark.parametrize(("page", "words"), [(p, w) for p, w in COMMANDS if w[0] in ("make", "pip")], ids=_id)
def test_targets_and_extras_exist(page, words):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        named = re.findall(r"\[(.*?)\]", " ".join(words))
        assert set(named) <= set(metadata("mir-lightning").get_all("Provides-Extra"))


@pytest.mark.slow
def test_the_sweep_runs_what_composes(recipe, capsys):
    """Every value of W&B's sweep, written as its agent writes arguments."""
    page = (ROOT / "docs/sweeps.md").read_text()
    (sweep,) = map(yaml.safe_load, re.findall(r"```yaml\n(method.*?)```", page, re.DOTALL))
    shell, flag, line, name, arguments = sweep["command"]
    assert (shell, flag, name, arguments) == ("sh", "-c", "sh", "${args}")
    words = shlex.split(line)
    assert (words[:2], words[-1]) == (["mir-lightning", "pretrain"], "$@")
    for name, options in sweep["parameters"].items():
        for value in options["values"]:
            config = _config(recipe, capsys, [*words[2:-1], f"--{name}={value}"])
            for key in name.split("."):
                config = config[key]
            if name != "model.stages":
                assert config == value
            else:
                assert config[0]["train"][0]["lr"] == yaml.safe_load(value)[0]["train"][0]["lr"]


def test_a_batch_that_does_not_divide_is_told_what_would():
    devices = SimpleNamespace(world_size=32)
    with pytest.raises(
        ValueError, match=r"times 32 devices: set data.batch_size=8, or data.global_batch_size=1024"
    ):
        PretrainingData(batch_size=32, global_batch_size=256).accumulate(devices)
    with pytest.raises(ValueError, match=r"times 3 devices: set data.global_batch_size to .* such as 264\."):
        PretrainingData(batch_size=8, global_batch_size=256).accumulate(SimpleNamespace(world_size=3))
