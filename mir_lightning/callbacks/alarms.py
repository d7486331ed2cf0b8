"""Alarms: readings which together say that a run is going wrong, with the step and the likely causes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Points = Sequence[Mapping[str, float]]

_SURE = 1.96  # standard errors of a 95 % interval
_NOTHING = 0.002  # nats a token: a gain that is none, however sure it is
_LOSS_FELL = 0.1  # of the first loss
_LOSS_ROSE = 0.25  # of the least loss
_POINTS = 3  # in a row that say the same: a model learns how captions go before it learns to look
_LOUD = 10.0  # mean norm of vision over text tokens
_SOME_GAIN = 0.02  # nats a token: one that can be lost
_GAIN_FELL, _RANK_FELL = 0.5, 0.25  # of the largest value so far
_SETTLED = 0.25  # of the whole fall of the loss: what the last points may still add


class Alarm(NamedTuple):
    """Something to look at."""

    name: str  # of the kind
    step: int
    message: str


def points_of(histories: Iterable[Iterable[tuple[int, Mapping[str, float]]]]) -> list[dict[str, float]]:
    """Readings by step, of several histories of (step, readings)."""
    found: dict[int, dict[str, float]] = {}
    for history in histories:
        for step, readings in history:
            found.setdefault(step, {"step": step}).update(readings)
    return [found[step] for step in sorted(found)]


def raised(points: Points) -> list[Alarm]:
    """The alarms that the last of ``points`` raise.

    A point has its ``step`` and those readings that were taken: image ``gain`` with its ``gain_error``, and
    ``loss`` on the same samples; of the probe of MIR its ``mir_loss``, the effective ``rank`` of the vision tokens
    and the ``norm_ratio`` of vision and text tokens.
    """
    alarms = []
    for rule in _RULES:
        if points and (message := rule(points)):
            step = int(points[-1]["step"])
            alarms.append(Alarm(rule.__name__.strip("_"), step, f"step {step}: {message}"))
    return alarms


def _with(points: Points, *names: str) -> Points:
    return [point for point in points if all(name in point for name in names)]


def _blind(point: Mapping[str, float]) -> bool:
    """Whether the interval of the image gain holds 0 or next to nothing, or lies below it."""
    return point["gain"] <= max(_SURE * point["gain_error"], _NOTHING)


def _gain_of(point: Mapping[str, float]) -> str:
    return f"{point['gain']:.3f} ± {_SURE * point['gain_error']:.3f} nats a token"


def _no_gain(points: Points) -> str | None:
    points = _with(points, "loss", "gain")
    if len(points) <= _POINTS or not all(map(_blind, points[-_POINTS:])):
        return None
    first, before, last = (points[place]["loss"] for place in (0, -_POINTS - 1, -1))
    if first - last < _LOSS_FELL * first or before - last > _SETTLED * (first - last):
        return None
    return (
        f"the loss on the probe fell from {first:.3f} to {last:.3f}, and the image gain is {_gain_of(points[-1])}:"
        " the model learns the texts and does not look at the pictures. Do captions belong to their pictures, do "
        "pixels arrive, does the projector train, is the loss on the right tokens?"
    )


def _gain_falls(points: Points) -> str | None:
    points = _with(points, "loss", "gain")
    if not points:
        return None
    best, last = max(points, key=lambda point: point["gain"]), points[-1]
    noise = _SURE * (best["gain_error"] ** 2 + last["gain_error"] ** 2) ** 0.5
    fell = best["gain"] - last["gain"] > noise and last["gain"] < _GAIN_FELL * best["gain"]
    if not fell or best["gain"] < _SOME_GAIN or last["loss"] >= best["loss"]:
        return None
    return (
        f"the image gain fell from {best['gain']:.3f} at step {best['step']:.0f} to {_gain_of(last)}, while the "
        f"loss went on falling from {best['loss']:.3f} to {last['loss']:.3f}: the model turns from pictures to "
        "texts. Does it learn them by heart, or is the projector's learning rate too high?"
    )


def _collapse(points: Points) -> str | None:
    ranked, gains = _with(points, "rank"), _with(points, "gain")
    if not ranked or len(gains) <= _POINTS or not all(map(_blind, gains[-_POINTS:])):
        return None
    best, last = max(ranked, key=lambda point: point["rank"]), ranked[-1]
    if last["rank"] >= _RANK_FELL * best["rank"]:
        return None
    return (
        f"the effective rank of the vision tokens fell from {best['rank']:.1f} at step {best['step']:.0f} to "
        f"{last['rank']:.1f}, and the image gain is {_gain_of(gains[-1])}: vision tokens become all alike "
        "(collapse), and a low MIR says nothing then. Is the learning rate too high, the projection too small?"
    )


def _loud(points: Points) -> str | None:
    points = _with(points, "norm_ratio")
    if not points or points[-1]["norm_ratio"] <= _LOUD:
        return None
    return (
        f"vision tokens are {points[-1]['norm_ratio']:.1f} times as long as text tokens (mean over layers): "
        "their norm, not their content, makes most of MIR. A projector without normalisation, a rate too "
        "high, features of another scale?"
    )


def _losses(points: Points) -> list[tuple[float, float]]:
    """(loss, step) of one probe: the gain's, or MIR's where there is no other."""
    name = "loss" if _with(points, "loss") else "mir_loss"
    return [(point[name], point["step"]) for point in _with(points, name)]


def _loss_stands(points: Points) -> str | None:
    losses = [loss for loss, _ in _losses(points)]
    if losses and losses[-1] == 0:
        return "the loss on the probe is exactly 0: do the labels hold what the model is given, or nothing?"
    last = losses[-_POINTS - 1 :]
    if len(last) <= _POINTS or max(last) - min(last) > 1e-6 * max(last):
        return None
    return (
        f"the loss on the probe stays at {last[-1]:.6f}: nothing that it depends on trains. Is the right part "
        "unfrozen, is the learning rate 0, does the optimizer hold its parameters?"
    )


def _loss_rises(points: Points) -> str | None:
    losses = _losses(points)
    best, at = min(losses, default=(0.0, 0.0))
    if len(losses) <= _POINTS or any(loss < (1 + _LOSS_ROSE) * best for loss, _ in losses[-_POINTS:]):
        return None
    return (
        f"the loss on the probe rose from {best:.3f} at step {at:.0f} to {losses[-1][0]:.3f}: "
        "what is trained is not what the probe asks. Labels shifted twice or not at all, another prompt, learning "
        "by heart, a rate too high?"
    )


_RULES = (_no_gain, _gain_falls, _collapse, _loud, _loss_stands, _loss_rises)


def label_fault(batches: Iterable[Mapping[str, Any]], vision: Iterable[Tensor]) -> str | None:
    """What is wrong with the labels of batches, if they have any: padding or pictures in them, or nothing.

    ``vision`` are the batches' masks of vision tokens.
    """
    labelled = total = 0
    for batch, is_vision in zip(batches, vision, strict=True):
        labels, valid = batch.get("labels"), batch.get("attention_mask")
        if not isinstance(labels, Tensor) or labels.shape != is_vision.shape:
            continue
        learned = labels != -100
        total, labelled = total + labels.numel(), labelled + int(learned.sum())
        for what, where in (("vision tokens", is_vision), ("padding", None if valid is None else valid == 0)):
            if where is not None and (found := int((learned & where).sum())):
                return f"the labels hold {found} positions of {what}, to be learned: set them to -100."
    return "the labels are all -100: nothing is learned." if total and not labelled else None
