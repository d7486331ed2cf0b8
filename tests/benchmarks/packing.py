"""Packing: how much of a batch is padding, and how many tokens a second are learned of, with it and without.

    python -m tests.benchmarks.packing

MM1's mixture of drawn captions, documents and texts, SmolLM2-135M's tokenizer and three layers of its shape; one
forward and backward pass of the same samples each way; the lesser time of two, in turn.
"""

from functools import partial

import torch
import transformers

from mir_lightning.llava.data.batches import ConversationCollator
from mir_lightning.llava.data.mixture import Mixture, Share
from mir_lightning.llava.data.prompts import PlainPrompt
from mir_lightning.llava.demo.shapes import Shapes
from mir_lightning.llava.demo.weights import build_packaged_processor, build_packaged_vision
from mir_lightning.llava.model.connector import connect, llava_config
from mir_lightning.llava.model.module import model_inputs
from tests.benchmarks.timing import best

BATCH, LENGTH = 16, 512


def model_of(processor):
    """A LLaVA with three layers of SmolLM2-135M's width."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "vocab_size": len(processor.tokenizer), "tie_word_embeddings": True},
    )
    vision = build_packaged_vision()
    joint = llava_config(config, vision.config, processor.image_token_id, -1, "full")
    model = connect(transformers.LlamaForCausalLM(config), vision, joint)
    model.model.vision_tower.requires_grad_(False)
    return model


def main():
    processor = build_packaged_processor()
    model = model_of(processor)
    sources = [Share(kind, Shapes(kind)) for kind in ("captions", "interleaved", "text")]
    training, _ = Mixture(sources).split(0, 2 * BATCH, 0)
    order = training.order(torch.Generator().manual_seed(0)).tolist()
    samples = [
        [training[index] for index in order[start : start + BATCH]] for start in range(0, len(order), BATCH)
    ]
    ways = {"a sample a row": False, f"packed into {LENGTH}": True}
    batches = {}
    for way, packed in ways.items():
        collate = ConversationCollator(processor, PlainPrompt(), LENGTH, packed)
        batches[way] = [collate(part) for part in samples]
        for batch in batches[way]:
            batch.pop("unreadable")

    def step(way):
        for batch in batches[way]:
            model(**model_inputs(batch, flash=False), use_cache=False).loss.backward()
            model.zero_grad()

    runs = [{way: best(partial(step, way), runs=1)[0] for way in ways} for _ in range(2)]
    seconds = {way: min(run[way] for run in runs) for way in ways}
    print("|  | positions | padding | learning step, seconds | tokens a second |\n|---|---|---|---|---|")
    for way in ways:
        masks = [batch["attention_mask"] for batch in batches[way]]
        positions, tokens = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
        a_step = seconds[way] / len(masks)
        rate = tokens / seconds[way]
        print(f"| {way} | {positions} | {1 - tokens / positions:.1%} | {a_step:.2f} | {rate:.0f} |")


if __name__ == "__main__":
    main()
