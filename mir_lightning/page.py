"""An HTML page that needs nothing else, and tables as plain lines."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Template
from rich.console import Console
from rich.table import Table

from mir_lightning.callbacks.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TitledTable = tuple[str, list[str], list[list[str]]]  # title, columns, rows


@dataclass(frozen=True)
class Panel:
    """A drawing: what draws it, and its size in inches."""

    draw: Callable[[Axes], None]
    width: float = 4.2
    height: float = 3.0

    @property
    def rows(self) -> int:
        """How many panels of the usual shape are as high at the same width."""
        return max(1, round(self.height / self.width * 4.2 / 3.0))


def write_html(file: Path, page: str) -> None:
    """As UTF-8; what that cannot hold, half a character, as its code."""
    file.write_text(page, encoding="utf-8", errors="backslashreplace")


def html_page(
    title: str,
    panels: Iterable[Panel],
    tables: Sequence[TitledTable],
    notes: Sequence[str] = (),
    colours: Mapping[str, str] | None = None,
) -> str:
    """Panels side by side where there is room, tables that a click on a column sorts, and what is to be known.

    Light or dark as the reader's system is.

    Args:
        title: of the page.
        panels: drawn one by one.
        tables: below them.
        notes: below those, a sentence each without its full stop.
        colours: what they mean, by name, if it is the same in all panels.
    """
    page = Template(Path(__file__).with_suffix(".html").read_text("utf-8"), autoescape=True, trim_blocks=True)
    drawings = [(panel.rows, _readable(_svg(panel))) for panel in panels]
    shown = {name: _readable(colour) for name, colour in (colours or {}).items()}
    return page.render(title=title, drawings=drawings, tables=tables, notes=notes, colours=shown)


def _readable(drawing: str) -> str:
    """Black is the page's colour of text, so that it can be read on a dark page, too."""
    return drawing.replace("#000000", "currentColor")


def _svg(panel: Panel) -> str:
    figure, file = new_figure(panel.width, panel.height), io.StringIO()
    panel.draw(figure.add_subplot())
    figure.savefig(file, format="svg", transparent=True)
    drawing = file.getvalue()
    return drawing[drawing.index("<svg") :]


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain lines of aligned columns, the first and the last to the left."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in (columns[0], columns[-1]) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    plain: Any = dict.fromkeys(("markup", "emoji", "highlight"), False)
    written = io.StringIO()
    Console(file=written, width=10_000, color_system=None, **plain).print(table)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())
