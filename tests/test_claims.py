"""Numbers in README and docs stand beside a command that reproduces them."""

import importlib.util
import re

import pytest

from tests.test_commands_of_the_docs import PAGES, ROOT

# Sections whose numbers were measured by nobody here: options, thresholds, published figures.
NOT_MEASURED = {
    ("callback.md", "When it runs"): "an example of growth",
    ("callback.md", "Alarms"): "thresholds of the alarms",
    ("moca.md", "When it helps"): "published by the paper",
}
COMMAND = re.compile(r"`(?:python (?:-m|recipes/|docs/)|make |mir-lightning )[^`]+`|```bash\n")
NUMBER = re.compile(r"(?<![\w./-])\d+\.\d+(?![\w./])|(?<![\w./-])\d+(?:\.\d+)? %")


def _sections():
    """Page, title and text of each section; what stands in code is no claim."""
    for page in PAGES:
        text = re.sub(r"```(?!bash)\w*\n.*?```", "", page.read_text(), flags=re.DOTALL)
        for part in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
            title, _, body = part.partition("\n")
            yield page, title.lstrip("# "), body


def _numbers(body):
    prose = re.sub(r"```bash\n.*?```|`[^`\n]*`|\$[^$]*\$|\]\([^)]*\)", "", body, flags=re.DOTALL)
    names = r"95 %|arXiv \d{4}\.\d{5}|section \d+(\.\d+)*|LLaVA-\d\.\d|(PyTorch|torch|Python|InternVL) \d+\.\d+"
    return NUMBER.findall(re.sub(names, "", prose))


CLAIMS = [(page, title, body) for page, title, body in _sections() if _numbers(body)]


def test_there_are_claims():
    assert len(CLAIMS) >= 15
    assert NOT_MEASURED.keys() <= {(page.name, title) for page, title, _ in CLAIMS}


@pytest.mark.parametrize(("page", "title", "body"), CLAIMS, ids=lambda value: str(value)[-30:])
def test_a_number_stands_beside_its_command(page, title, body):
    if (page.name, title) not in NOT_MEASURED:
        assert COMMAND.search(body), f"{page.name}, {title!r}: no command reproduces {_numbers(body)[:5]}"


def test_the_commands_that_measure_exist():
    named = {
        name for page in PAGES for name in re.findall(r"python -m (tests\.benchmarks\.\w+)", page.read_text())
    }
    assert len(named) >= 9
    for name in named:
        assert importlib.util.find_spec(name), name
    run_by_make = set(re.findall(r"-m (tests\.benchmarks\.\w+)", (ROOT / "Makefile").read_text()))
    assert run_by_make <= named, f"no page shows what {run_by_make - named} measure"


PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+\.png)\)")
PICTURES = [(page, title, name, body) for page, title, body in _sections() for name in PICTURE.findall(body)]


def test_every_picture_is_shown():
    shown = {name.removeprefix("docs/").removeprefix("images/") for _, _, name, _ in PICTURES}
    assert shown == {file.name for file in (ROOT / "docs/images").iterdir()}


@pytest.mark.parametrize(("page", "title", "name", "body"), PICTURES, ids=lambda value: str(value)[-30:])
def test_a_picture_stands_beside_its_command_and_seeds(page, title, name, body):
    assert COMMAND.search(body), f"{page.name}, {title!r}: no command makes {name}"
    assert re.search(r"seed", body), f"{page.name}, {title!r}: {name} has no seeds"
