"""``evaluate_choices``: Soft Discrimination Score and accuracy of a model on multiple-choice items."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from mir_lightning.functional.checks import check_at_least_one, check_choice
from mir_lightning.metrics.sds import Discrimination, SoftDiscriminationScore
from mir_lightning.probing.choices.items import ChoiceItem
from mir_lightning.probing.choices.probe import ChoiceProbe
from mir_lightning.probing.choices.scores import CandidateScorer, Forward, Score
from mir_lightning.probing.isolation import leave_no_trace
from mir_lightning.probing.ranks import fit_into_memory, run_items, sum_over_ranks
from mir_lightning.vlm import find_entrance, find_vlm


@dataclass(frozen=True)
class ChoiceResult:
    """How well a model tells right answers from distractors.

    Attributes:
        sds: Soft Discrimination Score: mean over all items of the probability of the right answer.
        accuracy: share of items whose right answer scores best.
        chance: what both are for a model that cannot tell the candidates apart.
        breakdown: the same for all items (key ``""``), each ability, and each task (``"ability/task"``).
        scores: by item, in the order of the probe, the candidates' scores, float64 ``[candidates]``, the right
            answer first.
        shared_prefix: whether candidates continued from their prompt's cache; False where the model's cache
            cannot be shared and each ran with its prompt before it.
        score: as given.
        fingerprint: of the items.
        seconds: wall-clock time of the evaluation.
    """

    sds: float
    accuracy: float
    chance: float
    breakdown: dict[str, Discrimination]
    scores: list[Tensor]
    shared_prefix: bool
    score: Score
    fingerprint: str
    seconds: float


def evaluate_choices(
    model: nn.Module,
    items: ChoiceProbe,
    score: Score = "logit",
    batch_size: int = 32,
    *,
    forward: Forward | None = None,
    distributed: bool = False,
    progress: str | None = None,
) -> ChoiceResult:
    """Soft Discrimination Score (RADAR, arXiv 2602.12892) of a model on multiple-choice items.

    A candidate's score is the mean over its tokens of what the model gave them after the prompt; the softmax of
    an item's scores is compared with the right answer. Images and question run once an item and all candidates
    continue from their KV cache. Whether a model's cache can be shared is measured at the start, on two items
    against whole forwards; where it cannot, every candidate runs with its prompt before it: slower, the same
    scores. The model is left as it was found. Where a batch does not fit into the device's memory, all are run
    again in halves.

    Args:
        model: a Hugging Face vision-language model, or a module that holds one.
        items: what to ask.
        score: what a token counts: its raw ``"logit"``, as RADAR's released code has it, or its ``"logprob"``.
        batch_size: candidates in a forward; the candidates of one item stay together.
        forward: as :func:`~mir_lightning.probing.evaluate_mir` takes it.
        distributed: likewise.
        progress: likewise.

    Returns:
        A :class:`ChoiceResult`.

    Raises:
        TypeError: for items that are not a :class:`~mir_lightning.probing.ChoiceProbe`.
        ValueError: for an unknown score, a batch size below 1, an encoder-decoder, a candidate without tokens, or
            scores that are not finite (naming the item).
        torch.OutOfMemoryError: if the candidates of single items do not fit.
    """
    start = time.perf_counter()
    check_choice("score", score, Score)
    check_at_least_one(batch_size=batch_size)
    if not isinstance(items, ChoiceProbe):
        raise TypeError(f"items must be a ChoiceProbe, got {type(items).__name__}.")
    vlm = find_vlm(model)
    if getattr(vlm.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(vlm).__name__} is an encoder-decoder: its answers do not follow its prompts.")
    with leave_no_trace(model):
        scorer = CandidateScorer(vlm, items, score, forward or find_entrance(model), distributed)
        scores, shared_prefix = fit_into_memory(
            lambda size: _scores(scorer, size, progress), batch_size, lambda size: size // 2 or None
        )
    metric = SoftDiscriminationScore(items.tasks, sync_on_compute=False)
    for item, of_item in zip(items.items, scores, strict=True):
        if not of_item.isfinite().all():
            raise ValueError(f"scores of item {item.id} hold NaN or inf: the model has diverged or overflowed.")
        metric.update([of_item], item.task)
    breakdown = metric.compute_breakdown()
    return ChoiceResult(
        *breakdown[""][:3],
        breakdown=breakdown,
        scores=scores,
        shared_prefix=shared_prefix,
        score=score,
        fingerprint=items.fingerprint,
        seconds=time.perf_counter() - start,
    )


def _scores(scorer: CandidateScorer, batch_size: int, progress: str | None) -> tuple[list[Tensor], bool]:
    """Scores by item, and whether candidates continued from their prompt's cache."""
    items = scorer.probe.items
    shares = scorer.can_share(_check_items(items))
    if scorer.in_step:
        shares = not sum_over_ranks([not shares], scorer.device)[0]
    score = scorer.shared if shares else scorer.whole
    batches = batches_of(items, batch_size)
    return run_items(
        batches, lambda batch: score([items[i] for i in batch]), scorer.in_step, scorer.device, progress
    ), shares


def _check_items(items: Sequence[ChoiceItem]) -> list[ChoiceItem]:
    """The longest candidate of all, and one with the shortest prompt beside it, so that padding is seen too."""
    longest = max(items, key=lambda item: max(map(len, item.candidates)))
    like = [item for item in items if len(item.images) == len(longest.images) and item is not longest]
    chosen = [longest, *sorted(like, key=lambda item: len(item.prompt))[:1]]
    return [replace(item, answer=max(item.candidates, key=len), distractors=()) for item in chosen]


def batches_of(items: Sequence[ChoiceItem], batch_size: int) -> list[list[int]]:
    """Indices of items of like length and as many images, up to ``batch_size`` candidates together."""
    order = sorted(range(len(items)), key=lambda i: (len(items[i].images), len(items[i].prompt)))
    batches: list[list[int]] = []
    room, images = 0, -1
    for index in order:
        item = items[index]
        if len(item.candidates) > room or len(item.images) != images:
            batches.append([])
            room, images = batch_size, len(item.images)
        batches[-1].append(index)
        room -= len(item.candidates)
    return batches
