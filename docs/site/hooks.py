"""What the site holds besides its pages: the notebook, run; pages of the repository; formulas as MathML."""

from __future__ import annotations

import html
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).parents[2]
OF_THE_REPOSITORY = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages that are not files of ``docs``."""
    for name, source in OF_THE_REPOSITORY.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    for script in sorted((ROOT / "docs/notebooks").glob("*.py")):
        for name, content in executed(script.read_text(), script.stem).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


@lru_cache
def executed(script: str, name: str) -> dict[str, str | bytes]:
    """A notebook's page, its pictures, and the notebook itself, by file name."""
    notebook = jupytext.reads(script, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": str(ROOT)}})
    for cell in notebook.cells:  # what libraries say of the machine that built the site
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    page, resources = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": f"{name}_files"})
    made: dict[str, str | bytes] = dict(resources["outputs"])
    made[f"{name}.md"] = page
    made[f"{name}.ipynb"] = nbformat.writes(notebook)
    return made


def on_page_content(content: str, **_: Any) -> str:
    """Typeset formulas as MathML, which browsers draw without any script."""
    return FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    kind = "block" if found[1] == "div" else "inline"
    return convert(html.unescape(found[2]).strip(), display=kind)
