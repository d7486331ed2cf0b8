"""``mir-lightning``: the number from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from torch import Tensor

from mir_lightning.functional.mir import Variant
from mir_lightning.probing.evaluate import MIRResult, evaluate_mir
from mir_lightning.probing.pairs import pair_probe
from mir_lightning.vlm import TextPositions


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 fine, 1 failure, 2 bad usage)."""
    options = _parser().parse_args(arguments)
    try:
        _evaluate(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"mir-lightning: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mir-lightning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    evaluate = commands.add_parser("eval", help="Modality Integration Rate of a model folder")
    evaluate.add_argument("model", help="folder of a Hugging Face vision-language model and its processor")
    evaluate.add_argument("--images", type=Path, required=True, help="folder of pictures")
    evaluate.add_argument("--texts", type=Path, required=True, help="folder of .txt or .story files")
    evaluate.add_argument("--num", type=int, default=100, help="pairs to evaluate (default: %(default)s)")
    evaluate.add_argument("--batch-size", type=int, default=4, help="pairs a batch (default: %(default)s)")
    evaluate.add_argument("--variant", choices=get_args(Variant), default="paper")
    evaluate.add_argument("--text", choices=get_args(TextPositions), default="after_vision")
    evaluate.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    evaluate.add_argument("--json", type=Path, help="write the whole result to this file")
    return parser


def _evaluate(options: argparse.Namespace) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import mir_lightning.llava.backbones  # noqa: F401  (models saved by the recipe name its vision encoder)

    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model).to(options.device)
    probe = pair_probe(processor, options.images, options.texts, options.num, options.batch_size)
    result = evaluate_mir(model, probe, options.variant, options.text)
    outliers = int(result.outliers.sum())
    print(
        f"MIR {result.mir:.4f} ({result.variant}; {result.vision_tokens} vision and {result.text_tokens} text "
        f"tokens, {len(result.layers)} layers, {outliers} outliers, {result.seconds:.1f} s)"
    )
    if options.json:
        options.json.write_text(json.dumps(_plain(result), indent=1))


def _plain(result: MIRResult) -> dict[str, object]:
    plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(result).items()}
    del plain["sample"]
    return plain


if __name__ == "__main__":
    sys.exit(main())
