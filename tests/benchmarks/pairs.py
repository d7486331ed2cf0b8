"""How many pairs are enough: MIR against their number, each with its standard error.

    python -m tests.benchmarks.pairs runs/demo/model [--pairs 8 16 32 64 128 256] [--redraws 4]

Held-out drawn pictures, each with its caption, as the demo asks. Beside the first N pairs: the deviation of MIR
over further sets of as many others, for numbers of which there are enough, to see whether the error is true.
"""

import argparse
from pathlib import Path

import numpy as np

from mir_lightning import Probe, evaluate_mir
from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.prompts import ChatPrompt
from mir_lightning.llava.demo import weights  # noqa: F401  registers the packaged model's vision encoder
from mir_lightning.llava.demo.shapes import ShapesDataset
from mir_lightning.llava.model import saving


def probe(processor, first, count, size=8):
    """As many held-out samples as the demo writes them, from number ``first`` on."""
    prompt = ChatPrompt(processor.tokenizer, "You describe pictures.", processor.chat_template)
    collate = ConversationCollator(processor, prompt, always_pictures=False)
    samples = ShapesDataset("held_out", first + count)
    chunks = (range(start, min(start + size, first + count)) for start in range(first, first + count, size))
    batches = [collate([samples[index] for index in chunk]) for chunk in chunks]
    for batch in batches:
        batch.pop("unreadable")
    return Probe(batches)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--redraws", type=int, default=4)
    options = parser.parse_args()
    model, processor = saving.load_vlm(str(options.model)).eval(), saving.load_processor(str(options.model))
    print(f"{'pairs':>6}{'vision':>8}{'text':>7}{'MIR':>9}{'s.e.':>9}{'redrawn s.d.':>14}")
    most = max(options.pairs)
    for count in options.pairs:
        result = evaluate_mir(model, probe(processor, 0, count), interval=True)
        redrawn = ""
        if count * options.redraws <= most:
            starts = (most + place * count for place in range(options.redraws))
            redrawn = (
                f"{np.std([evaluate_mir(model, probe(processor, s, count)).mir for s in starts], ddof=1):.4f}"
            )
        tokens = f"{result.vision_tokens:>8}{result.text_tokens:>7}"
        print(f"{count:>6}{tokens}{result.mir:>9.4f}{result.standard_error:>9.4f}{redrawn:>14}", flush=True)


if __name__ == "__main__":
    main()
