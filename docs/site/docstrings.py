"""Docstrings say ``:class:`~a.b``` and ``.. math::``; the site's Markdown has its own words for these."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`([^`]+)`")
TARGET = re.compile(r"(?:(?P<title>.+?) <(?P<of>.+)>|(?P<short>~)?(?P<path>.+))", re.DOTALL)
FORMULA = re.compile(r"\.\. math:: (.*?)(?=\n\s*\n|\Z)", re.DOTALL)


class Docstrings(griffe.Extension):
    """Rewrites each docstring once it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe with each module, class, function and attribute."""
        if obj.docstring is not None:
            text = re.sub(r":math:`([^`]+)`", r"$\1$", obj.docstring.value)
            text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # the name that is set as code
            text = FORMULA.sub(lambda found: f"$$\n{found[1]}\n$$", text)
            obj.docstring.value = ROLE.sub(lambda found: _link(obj, found[1]), text)


def _link(obj: griffe.Object, reference: str) -> str:
    """A link where the site has the object, else its name."""
    found = TARGET.fullmatch(reference)
    assert found is not None
    path = found["of"] or found["path"]
    title = found["title"] or (path.rsplit(".", 1)[-1] if found["short"] else path)
    if not path.startswith("mir_lightning"):
        try:
            path = obj.resolve(path)
        except griffe.NameResolutionError:
            return f"`{title}`"
    return f'<autoref identifier="{path}" optional><code>{title}</code></autoref>'
