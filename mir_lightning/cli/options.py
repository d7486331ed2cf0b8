"""Options of the commands: a command is a dataclass, each of its fields an argument."""

from __future__ import annotations

import csv
import inspect
import json
import os
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import torch

from mir_lightning.functional.frechet import RankOrder
from mir_lightning.functional.mir import Rule, Variant
from mir_lightning.probing.evaluate import Products
from mir_lightning.probing.pairs import PAPER_PROMPT, check_prompt
from mir_lightning.vlm import TextPositions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AUTO_BATCH_SIZE = 8  # at most
PRESET_VARIANT: Variant = "official-fast"  # what the released script computes by default
# What is read, and what of it where that is a folder.
_READ = dict.fromkeys(("model", "processor", "sources", "score", "data", "probe"), "*")
_READ |= {"images": "**/*", "texts": "**/*", "image_folder": "**/*", "items": "**/*", "runs": "**/*.[cj]s*"}
_WRITTEN = ("output", "json", "csv", "plot", "worst_plot", "html")


def option(help: str, default: Any = None, **settings: Any) -> Any:
    """A field that is an option, or without default (``MISSING``) a positional argument; settings of argparse."""
    shown = "" if default in (None, False, MISSING) else f" (default: {default})"
    return field(default=default, metadata={"help": help + shown, **settings})


def add_arguments(parser: ArgumentParser, command: type) -> None:
    """The fields of a command as arguments, a group for each class that it inherits from."""
    hints = get_type_hints(command)
    for owner in reversed(command.__mro__[:-1]):
        group = parser if owner is command else parser.add_argument_group((owner.__doc__ or "").rstrip("."))
        own = inspect.get_annotations(owner)
        for item in (item for item in fields(command) if item.name in own and item.metadata):
            settings, kind = dict(item.metadata), hints[item.name]
            if get_origin(kind) is not Literal:
                kind = (get_args(kind) or (kind,))[0]  # of an optional one, or of a list
            names = [f"--{item.name.replace('_', '-')}", *settings.pop("short", ())]
            if kind is bool:
                settings["action"] = "store_true"
            elif get_origin(kind) is Literal:
                settings |= {"choices": get_args(kind), "type": type(get_args(kind)[0])}
            else:
                settings.setdefault("type", kind)
            group.add_argument(*(names if item.default is not MISSING else [item.name]), **settings)


def whole_number(value: str, least: int) -> int:
    """An argument that counts something."""
    if not value.isdigit() or int(value) < least:
        raise ArgumentTypeError(f"must be a whole number of at least {least}, got {value!r}")
    return int(value)


at_least_one = partial(whole_number, least=1)


def output_file(value: str, place: str = "") -> Path:
    """A file to write, looked at before the work that gives its contents."""
    path = Path(value)
    regular = path.is_file() or not path.exists()
    if not regular or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"{place}must be a regular file, or a new one, where one may write, got {value!r}")
    return path


def device(value: str) -> str:
    """A device that can be computed on here."""
    try:
        if value != "auto":
            torch.zeros(1, device=value).tolist()
    except Exception as error:  # each kind of device fails in its own way
        known = "auto, cpu, or another device that torch finds here, such as cuda or cuda:1"
        raise ArgumentTypeError(f"must be {known}, got {value!r}") from error
    return value


def share(value: str) -> float:
    """An argument that is a part of a whole."""
    with suppress(ValueError):
        if 0 <= float(value) < 1:
            return float(value)
    raise ArgumentTypeError(f"must be a share in [0, 1), got {value!r}")


def flags(names: Iterable[str]) -> str:
    """Options as they are typed."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def picture_file(value: str) -> Path:
    """A file to draw into, of a format that matplotlib knows."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ArgumentTypeError('pictures need matplotlib: pip install "mir-lightning[recipes]"') from error
    known = FigureCanvasBase.get_supported_filetypes()
    if Path(value).suffix[1:].lower() not in known:
        raise ArgumentTypeError(f"must end in .{', .'.join(known)}, got {value!r}")
    return output_file(value)


def _identity(path: Path) -> Any:
    """What two paths of one file have in common, hard links too."""
    try:
        return (found := path.stat()).st_dev, found.st_ino
    except OSError:
        return path.resolve()


@dataclass(kw_only=True)
class Command:
    """All commands."""

    debug: bool = option("show the traceback of a failure", False)
    typed: frozenset[str] = frozenset()  # names of the arguments that were not left to their defaults

    def __post_init__(self) -> None:
        """A ``ValueError`` names a file to write that is read or written as another one as well."""
        given: dict[str, Any] = {name: getattr(self, name, None) or [] for name in (*_READ, *_WRITTEN)}
        overwrites = any(Path(given[name]).exists() for name in _WRITTEN if given[name])
        taken: dict[Any, str] = {}
        for name, value in given.items():
            for path in map(Path, value if isinstance(value, list) else [value]):
                for file in (path, *(path.glob(_READ[name]) if overwrites and name in _READ else ())):
                    other = taken.setdefault(_identity(file), name)
                    if name in _WRITTEN and other != name:
                        raise ValueError(f"{name}: {path} is a file of {other} as well; it would be overwritten.")


@dataclass(kw_only=True)
class ProbeOptions(Command):
    """Probe: image i, then text i, of --images and --texts, or of --data."""

    images: Path | None = option("folder of pictures, or a list of them: .txt, .json or .jsonl")
    texts: Path | None = option("folder of .txt, .story (up to @highlight) or .jsonl files, or one .jsonl file")
    data: Path | None = option("LLaVA-format .json or .jsonl file instead")
    image_folder: Path | None = option("folder that the paths in --data, or in a list of --images, start from")
    num: int = option("pairs", 100, type=at_least_one)
    seed: int | None = option("draw the pairs at random; without it, the first by name")
    batch_size: int | None = option(
        "pairs a batch (default: auto)", type=lambda n: None if n == "auto" else at_least_one(n), metavar="N|auto"
    )
    preset: Literal["mir-paper"] | None = option(
        "what the MIR paper's released script feeds and computes: its prompt, --text, and --variant official-fast "
        "unless another is given"
    )
    prompt: str | None = option(
        r"format with {image}, {text}, perhaps {eos}, and \n for a line break, instead of the chat template",
        type=lambda prompt: prompt.replace(r"\n", "\n"),
    )
    text: TextPositions = option("which positions count as text", "after_vision")
    max_unreadable: float = option("share of pairs that may be unreadable", 0.01, type=share, metavar="SHARE")
    processor: str | None = option("folder or hub id of the processor, if it is not beside the model")

    def __post_init__(self) -> None:
        """A ``ValueError`` if ``prompt`` is no format of a pair, or the preset is asked for something else."""
        super().__post_init__()
        if self.preset and (other := flags({"prompt", "text"} & self.typed)):
            raise ValueError(f"--preset {self.preset} says what {other} would: give one of them.")
        if self.preset and self.data is not None:
            raise ValueError(
                f"--preset {self.preset} puts texts behind pictures: --images and --texts, not --data."
            )
        if self.preset:
            self.prompt = PAPER_PROMPT
        check_prompt(self.prompt)


@dataclass(kw_only=True)
class ModelOptions(Command):
    """Model and results."""

    device: str = option("torch device; auto is cuda if there is one", "auto", type=device)
    device_map: str | None = option('"auto" spreads the model over devices (needs accelerate)', metavar="MAP")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "of the weights; auto is the saved one, on a CPU float32 where it would have to emulate that", "auto"
    )
    no_progress: bool = option("show no progress bar", False)
    json: Path | None = option("write everything to this file", type=output_file)
    csv: Path | None = option("write the table to this file", type=output_file)

    def __post_init__(self) -> None:
        """A ``ValueError`` if ``device_map`` would overrule ``device``."""
        super().__post_init__()
        if self.device_map is not None and self.device != "auto":
            raise ValueError(f"--device {self.device} and --device-map {self.device_map} exclude each other.")

    def write(self, result: Any, table: Iterable[Iterable[Any]]) -> None:
        """Write what ``--json`` and ``--csv`` ask for."""
        if self.json:
            self.json.write_text(json.dumps(result, indent=1))
        if self.csv:
            with self.csv.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                csv.writer(file).writerows(table)


@dataclass(kw_only=True)
class EvaluationOptions(ProbeOptions, ModelOptions):
    """Evaluation."""

    probe: Path | None = option(
        'file that "mir-lightning probe" wrote, instead of the pairs of --images or --data'
    )
    variant: Variant = option("of the metric", "paper")
    interval: bool = option("standard error of MIR and influence of each sample, by one more pass", False)
    rank_order: RankOrder = option("of the effective rank: 2, the free one, or 1, the entropy one", 2)
    products: Products = option(
        "of tokens, that covariances are sums of; auto: float32 where float64 is slow", "auto"
    )
    layers: str | None = option("dotted path of the decoder layers inside the model, if not found by itself")
    image_token_id: int | None = option("placeholder of vision tokens, if the config is wrong")
    no_check: bool = option("skip the self-check of the vision mask", False)
    plot: Path | None = option("draw the layers into this file (.png, .pdf, .svg)", type=picture_file)

    def __post_init__(self) -> None:
        """A ``ValueError`` if the variant has no interval."""
        super().__post_init__()
        if self.preset and "variant" not in self.typed:
            self.variant = PRESET_VARIANT
        if self.interval and self.variant not in get_args(Rule):
            raise ValueError(f"--variant {self.variant} has no interval, as it replaces tokens: paper, robust do.")

    def draw(self, figure: Callable[[], Figure]) -> None:
        """Draw what ``--plot`` asks for."""
        if self.plot:
            figure().savefig(self.plot)
