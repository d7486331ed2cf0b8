"""How the released scripts of RADAR (arXiv 2602.12892) ask: what stands around a question and its candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mir_lightning.probing.choices.items import IMAGE, ChoiceItem

StyleName = Literal["llava", "qwen", "internvl"]

# The pictures of these tasks stand on a line of their own.
_OWN_LINE = ("general_visual_question_answering", "multiple_discipline_reasoning", "mathematical_reasoning")
_INTERNVL = (
    "<|im_start|>system\n你是书生·万象，英文名是InternVL，"  # noqa: RUF001
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Style:
    r"""One way to write an item.

    Attributes:
        template: text around the prompt, ``{prompt}`` in it.
        separators: between pictures and question: of the tasks whose pictures stand on a line of their own, and of
            the others.
        every_picture: whether each picture is followed by the separator, or only the last.
        gap: between prompt and candidate; a space unless the prompt ends in white space when None.
        by_count: a candidate begins behind as many tokens as its prompt alone has, even where the boundary merges;
            otherwise with the first token that holds a part of it.
        image_text: what stands for a picture, ``{image}`` being the processor's image token.
        one_distractor: whether one of several distractors is drawn in ``multiple_discipline_reasoning``.
        most_images: items with more pictures are left out.
    """

    template: str = "{prompt}"
    separators: tuple[str, str] = ("\n", "\n")
    every_picture: bool = True
    gap: str | None = None
    by_count: bool = False
    image_text: str = "{image}"
    one_distractor: bool = False
    most_images: int | None = None

    def prompt(self, item: ChoiceItem) -> str:
        """The item's question with ``<image>`` for each of its pictures."""
        if IMAGE in item.prompt:
            return item.prompt
        separator = self.separators[item.task.split("/")[0] not in _OWN_LINE]
        pictures = [IMAGE] * len(item.images)
        before = (separator if self.every_picture else "").join(pictures) + (separator if pictures else "")
        return before + item.prompt


STYLES: dict[StyleName | None, Style] = {
    None: Style(),
    "llava": Style(
        "{prompt}\n", ("\n", " "), every_picture=False, gap="", by_count=True, one_distractor=True, most_images=12
    ),
    "qwen": Style(
        separators=("", ""),
        gap=" ",
        by_count=True,
        image_text="<|vision_start|>{image}<|vision_end|>",
        most_images=12,
    ),
    "internvl": Style(_INTERNVL, ("\n", " "), gap="", by_count=True, most_images=12),
}
