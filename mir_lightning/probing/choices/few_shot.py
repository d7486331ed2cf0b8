"""Few-shot in-context score: answers written after k solved examples, a baseline beside MIR and SDS.

Source of prompts and shots: MM1 (arXiv 2403.09611), evaluation.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import string
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.probing.choices.evaluate import batches_of
from mir_lightning.probing.choices.items import IMAGE, ChoiceItem
from mir_lightning.probing.choices.probe import ChoiceProbe
from mir_lightning.probing.choices.scores import CandidateScorer, Forward
from mir_lightning.probing.isolation import leave_no_trace
from mir_lightning.probing.pairs import Pair
from mir_lightning.probing.ranks import fit_into_memory, run_items
from mir_lightning.vlm import find_entrance, find_vlm

CAPTION_PROMPT = f"{IMAGE} A photo of"
QUESTION_PROMPT = f"{IMAGE} Question: {{question}} Short answer:"


class AnswerScore(NamedTuple):
    """Means over answers.

    Attributes:
        exact_match: share that equal the right answer, but for case, punctuation and articles.
        f1: harmonic mean of the shares of words found in the right answer, and of its words found.
    """

    exact_match: float
    f1: float


@dataclass(frozen=True)
class FewShotResult:
    """What a model answers after k examples.

    Attributes:
        scores: by number of shots, then by task; ``""`` is the mean over tasks.
        abilities: by number of shots, then by ability: means over its tasks.
        answers: by number of shots, the answers written, in the order of the items.
        fingerprint: of the probe.
        seconds: wall-clock time of the evaluation.
    """

    scores: dict[int, dict[str, AnswerScore]]
    abilities: dict[int, dict[str, AnswerScore]]
    answers: dict[int, list[str]]
    fingerprint: str
    seconds: float


def pair_items(pairs: Iterable[Pair]) -> list[ChoiceItem]:
    """Pairs asked as MM1 does: for an answer, after its question, or for a caption, where there is no question."""
    items = []
    for number, (pair, (asked, *said)) in enumerate((pair, pair.turns) for pair in pairs):
        question = asked if said else ""
        task = "question" if question else "caption"
        prompt = QUESTION_PROMPT.format(question=question) if question else CAPTION_PROMPT
        first = IMAGE * (len(pair.images) - 1)
        answer = said[0] if said else asked
        items.append(ChoiceItem(f"pair {number}", first + prompt, answer, (), task, "in context", pair.images))
    return items


def short_answers(items: Iterable[ChoiceItem]) -> list[ChoiceItem]:
    """Questions on one picture asked as MM1 does, all of one task."""
    return [
        replace(item, prompt=QUESTION_PROMPT.format(question=item.prompt), task="vqa", ability="in context")
        for item in items
    ]


class FewShotProbe:
    """Items to answer, each after k solved examples of its task.

    Args:
        items: what to answer, their prompts as MM1's (:data:`CAPTION_PROMPT`, :data:`QUESTION_PROMPT`).
        examples: solved items to show first; of an item's task, drawn by the seed and the item's id.
        processor: of the model.
        shots: numbers of examples.
        seed: of the draw.
        options: as :class:`~mir_lightning.probing.ChoiceProbe` takes them.

    Raises:
        ValueError: for shots below 0, a task with fewer examples than shots, or what
            :class:`~mir_lightning.probing.ChoiceProbe` refuses.
    """

    def __init__(
        self,
        items: Iterable[ChoiceItem],
        examples: Sequence[ChoiceItem],
        processor: Any,
        shots: Sequence[int] = (0, 4, 8),
        seed: int = 0,
        **options: Any,
    ) -> None:
        asked = list(items)
        if not shots or min(shots) < 0:
            raise ValueError(f"shots must be numbers from 0 on, at least one, got {list(shots)}.")
        self.probes = {
            count: ChoiceProbe(
                [_with_shots(item, examples, count, seed) for item in asked], processor, open_ended=True, **options
            )
            for count in shots
        }

    @property
    def fingerprint(self) -> str:
        """Hex digest of items and shots."""
        prints = "".join(f"{count}:{probe.fingerprint}" for count, probe in self.probes.items())
        return hashlib.sha256(prints.encode()).hexdigest()


def _with_shots(item: ChoiceItem, examples: Sequence[ChoiceItem], count: int, seed: int) -> ChoiceItem:
    """The item after ``count`` solved examples, a line each."""
    of_task = [example for example in examples if example.task == item.task and example.id != item.id]
    if len(of_task) < count:
        raise ValueError(f"examples: task {item.task!r} has {len(of_task)}, {count} shots were asked for.")
    chosen = random.Random(f"{seed}/{item.id}").sample(of_task, count)
    shown = "".join(f"{example.prompt} {example.answer}\n" for example in chosen)
    images = tuple(image for example in chosen for image in example.images)
    return replace(item, prompt=shown + item.prompt, images=images + item.images)


def evaluate_few_shot(
    model: nn.Module,
    items: FewShotProbe,
    max_new_tokens: int = 16,
    batch_size: int = 8,
    *,
    forward: Forward | None = None,
    distributed: bool = False,
    progress: str | None = None,
) -> FewShotResult:
    """Exact match and F1 of answers that a model writes greedily after k examples.

    An answer ends with its line, or with the tokenizer's end token. The model is left as it was found.

    Args:
        model: a Hugging Face vision-language model, or a module that holds one.
        items: what to answer.
        max_new_tokens: length of an answer.
        batch_size: answers written at a time.
        forward: as :func:`~mir_lightning.probing.evaluate_mir` takes it.
        distributed: likewise.
        progress: likewise.

    Returns:
        A :class:`FewShotResult`, the same on every rank.

    Raises:
        ValueError: for a length or batch size below 1.
    """
    start = time.perf_counter()
    check_at_least_one(max_new_tokens=max_new_tokens, batch_size=batch_size)
    vlm = find_vlm(model)
    answers, scores, abilities = {}, {}, {}
    with leave_no_trace(model):
        for count, probe in items.probes.items():
            scorer = CandidateScorer(vlm, probe, "logit", forward or find_entrance(model), distributed)
            write = partial(written_answers, scorer, max_new_tokens=max_new_tokens, progress=progress)
            answers[count] = fit_into_memory(write, batch_size, lambda size: size // 2 or None)
            scores[count] = _by_task(probe.items, answers[count])
            abilities[count] = _by_ability(probe.items, scores[count])
    return FewShotResult(scores, abilities, answers, items.fingerprint, time.perf_counter() - start)


def written_answers(
    scorer: CandidateScorer, batch_size: int, max_new_tokens: int, progress: str | None = None
) -> list[str]:
    """By item of the scorer's probe, what the model writes greedily, up to a line break or its end token."""
    tokenizer, items = scorer.probe.processor.tokenizer, scorer.probe.items

    def write(batch: Sequence[int]) -> list[str]:
        rows = scorer.greedy([items[i] for i in batch], max_new_tokens)
        ended = [itertools.takewhile(lambda token: token != tokenizer.eos_token_id, row) for row in rows]
        return [tokenizer.decode([*row], skip_special_tokens=True).strip().split("\n")[0] for row in ended]

    alone = [replace(item, distractors=()) for item in items]  # an answer is one sequence
    return run_items(batches_of(alone, batch_size), write, scorer.in_step, scorer.device, progress)


def _by_task(items: Sequence[ChoiceItem], answers: Sequence[str]) -> dict[str, AnswerScore]:
    found = {}
    for task in dict.fromkeys(item.task for item in items):
        pairs = [(answer, item.answer) for item, answer in zip(items, answers, strict=True) if item.task == task]
        exact = sum(_words(answer) == _words(right) for answer, right in pairs)
        found[task] = AnswerScore(exact / len(pairs), sum(token_f1(*pair) for pair in pairs) / len(pairs))
    return {"": _mean(found.values()), **found}


def _by_ability(items: Sequence[ChoiceItem], by_task: Mapping[str, AnswerScore]) -> dict[str, AnswerScore]:
    tasks: dict[str, dict[str, AnswerScore]] = defaultdict(dict)
    for item in items:
        tasks[item.ability][item.task] = by_task[item.task]
    return {ability: _mean(scores.values()) for ability, scores in tasks.items()}


def _mean(scores: Collection[AnswerScore]) -> AnswerScore:
    return AnswerScore(*(sum(values) / len(scores) for values in zip(*scores, strict=True)))


def token_f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall of an answer's words; case, punctuation and articles do not count."""
    ours, theirs = Counter(_words(answer)), Counter(_words(right))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else float(ours == theirs)


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
