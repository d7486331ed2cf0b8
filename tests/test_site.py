"""The documentation site: strict, complete, and readable from a folder without a network."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.test_commands_of_the_docs import ROOT

NOT_A_PART = {"2509.23024"}  # cited for what it found
API = {
    name
    for page in (ROOT / "docs/api").glob("*.md")
    for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
}
HOMES = [
    "mir_lightning",
    *(f"mir_lightning.{part}" for part in ("functional", "metrics", "callbacks", "probing", "moca")),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pages(site):
    return {name: path.read_text() for name, path in site.items() if name.endswith(".html")}


def _found(name):
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


@pytest.mark.parametrize("home", HOMES)
def test_every_public_name_is_in_the_reference(home):
    documented = {id(_found(name)) for name in API}
    module = importlib.import_module(home)
    assert not [name for name in module.__all__ if id(getattr(module, name)) not in documented]


def test_the_reference_is_rendered_and_linked(pages):
    for name in API:
        assert any(f'id="{name}"' in text for text in pages.values()), name
    assert 'href="probing.html#mir_lightning.evaluate_mir"' in pages["api/callbacks.html"]
    assert not [name for name, text in pages.items() if re.search(r":(?:class|func|meth|attr|mod|data):", text)]


def test_nothing_comes_from_a_server(site, pages):
    fetched = re.compile(
        r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//|<link[^>]*\shref="(?:https?:)?//'
    )
    assert not [name for name, text in pages.items() if fetched.search(text)]
    styles = [path.read_text() for name, path in site.items() if name.endswith(".css")]
    assert not [text for text in styles if re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text)]
    assert {"search/search_index.js", "assets/iframe-worker.js"} <= site.keys()


def test_formulas_are_typeset(pages):
    assert pages["metric.html"].count("<math") >= 10
    assert not [name for name, text in pages.items() if 'class="arithmatex"' in text]


def test_the_notebook_was_run(site, pages):
    text = pages["notebooks/which_is_better.html"]
    assert re.search(r"paired:\s+-0\.\d+ ± 0\.\d+ \(95 %\)", text)
    assert any(name.startswith("notebooks/which_is_better_files/") for name in site)
    assert "notebooks/which_is_better.ipynb" in site
    assert str(ROOT) not in text


def test_versions_agree():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] in (version, "Unreleased")


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    for reference in citation["references"]:
        assert reference["type"] in {"article", "conference-paper", "software"}
        assert reference["title"]
        assert all(author.keys() <= {"name", "family-names", "given-names"} for author in reference["authors"])
    cited = {i["value"].split(":")[1] for r in citation["references"] for i in r.get("identifiers", ())}
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert set(re.findall(r"arXiv (\d{4}\.\d{5})|arxiv\.org/abs/(\d{4}\.\d{5})", text)) <= {
        pair for number in cited | NOT_A_PART for pair in ((number, ""), ("", number))
    }
