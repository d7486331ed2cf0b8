"""Questions with noise for pictures, to ask tiny models."""

import numpy as np
from PIL import Image

from mir_lightning.probing import ChoiceItem
from mir_lightning.probing.choices.few_shot import CAPTION_PROMPT, QUESTION_PROMPT

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def picture(seed, width=16, height=16):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))


def item(name, prompt, answer, *distractors, images=(), task="colour", ability="perception"):
    return ChoiceItem(name, prompt, answer, distractors, task, ability, tuple(images))


def hard_items():
    """Prompts and candidates of different lengths, several images, none, and boundaries that merge."""
    return [
        item("one", "<image>What colour is the star? Answer:", "red", "green", "light blue", images=[picture(0)]),
        item("first", "Is it small?", "small", "large and to the left of it", images=[picture(1, 24, 16)]),
        item("two", "<image>and<image>How many? Answer: ", "one", "two", images=[picture(2), picture(3, 16, 24)]),
        item("merged", "<image> Answer: ", "red circles", "star", "the", images=[picture(4)]),
        item("glued", "<image>What col\n", "our", "r", images=[picture(5)]),
        item("two again", "<image><image>A photo of", "a star", "a cross", "it", images=[picture(6), picture(7)]),
        item("text", "The star is", "red", "green or blue or yellow", task="relation", ability="reasoning"),
    ]


def open_items(count, task="caption", first=0):
    prompt = CAPTION_PROMPT if task == "caption" else QUESTION_PROMPT.format(question="What colour is the star?")
    return [
        item(f"{task}{i}", prompt, f"answer {i}", "wrong", images=[picture(i)], task=task)
        for i in range(first, first + count)
    ]
