"""``evaluate_mir``: the one engine behind every door."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mir_lightning.functional.checks import check_choice
from mir_lightning.functional.mir import Variant
from mir_lightning.probing.isolation import leave_no_trace
from mir_lightning.probing.probe import Probe
from mir_lightning.probing.run import Forward, HiddenStates, MaskedBatch, ProbeRun
from mir_lightning.vlm import TextPositions, TokenMasks, find_vlm, token_masks


@dataclass(frozen=True)
class MIRResult:
    """What a probe found. Tensors are float64, on the CPU; L is the number of decoder layers.

    Attributes:
        mir: Modality Integration Rate, log10 of the sum of ``layers``; lower is better aligned.
        layers: Fréchet distance by layer, ``[L]``.
        mean_gap: squared distance of the means by layer, ``[L]``.
        cov_gap: ``layers - mean_gap``, ``[L]``.
        scale: text-centric scale alpha by layer, ``[L]``.
        effective_rank: of vision and text tokens, ``[L, 2]``. A low MIR with a low vision rank is collapse.
        total_variance: of the normalised vision and text tokens, ``[L, 2]``.
        outliers: vision and text tokens outside the 3-sigma rule, ``[L, 2]``.
        vision_tokens: number of vision tokens of the probe.
        text_tokens: number of text tokens of the probe.
        loss: mean cross-entropy over the probe's labels, in nats; ``None`` without labels.
        perplexity: ``exp(loss)``.
        seconds: wall-clock time of the evaluation.
        variant: as given.
        text: as given.
        fingerprint: of the probe.
        sample: some hundred vision and text tokens of one layer, float32 ``[n, d]`` each, to look at.
        sample_layer: that layer, counted from 1.
    """

    mir: float
    layers: Tensor
    mean_gap: Tensor
    cov_gap: Tensor
    scale: Tensor
    effective_rank: Tensor
    total_variance: Tensor
    outliers: Tensor
    vision_tokens: int
    text_tokens: int
    loss: float | None
    perplexity: float | None
    seconds: float
    variant: Variant
    text: TextPositions
    fingerprint: str
    sample: tuple[Tensor, Tensor]
    sample_layer: int


def evaluate_mir(
    model: nn.Module,
    probe: Probe,
    variant: Variant = "paper",
    text: TextPositions = "after_vision",
    *,
    forward: Forward | None = None,
    hidden_states: HiddenStates | None = None,
    sample_layer: int | None = None,
    distributed: bool = False,
) -> MIRResult:
    """Modality Integration Rate of a model on a probe.

    Forward hooks on each decoder layer, and on the final norm for the last one, reduce the hidden states to
    running moments at once: no more than two layers' hidden states are alive at a time. The model is left as
    it was found (see :func:`~mir_lightning.probing.isolation.leave_no_trace`). Where a batch does not fit into
    the device's memory, the whole probe is run again in halves of its batches, as often as it takes; the number
    is the same.

    Args:
        model: a Hugging Face vision-language model, or a module that holds one; any module with
            ``hidden_states``.
        probe: the batches to run; they are moved to the model's device.
        variant: ``"paper"``, ``"official"`` or ``"official-fast"``; see
            :func:`~mir_lightning.functional.modality_integration_rate`.
        text: which positions count as text: ``"after_vision"`` or ``"all"``; padding never does.
        forward: called with a batch's inputs instead of the Hugging Face model, which it has to reach: for
            models that must be entered through a wrapper.
        hidden_states: for models that are not Hugging Face's: called with ``model`` and a batch, gives the
            hidden states ``[B, S, H]`` after each layer, the last after the final norm. The probe's batches
            then need a ``vision_mask``.
        sample_layer: layer, counted from 1, whose tokens are sampled; the middle one when None.
        distributed: whether the ranks of the default process group each run their share of the batches. The
            result is that of all of them, on every rank, and so is an error.

    Returns:
        A :class:`MIRResult`.

    Raises:
        ValueError: if the model's parts cannot be found, the probe has no vision or no text token, a mask
            does not fit, hidden states are not finite (naming the layer), or an option is unknown.
        torch.OutOfMemoryError: if single samples do not fit, or batches cannot be split.
    """
    start = time.perf_counter()
    check_choice("variant", variant, Variant)
    config = None
    if hidden_states is None:
        model = vlm = find_vlm(model)
        config = vlm.config
    masks = check_probe(config, probe, text)
    batches: list[MaskedBatch] = list(zip(probe, masks, strict=True))
    with leave_no_trace(model):
        run, mir = _run_in_memory(
            batches, lambda: ProbeRun(model, variant, forward, hidden_states, sample_layer, distributed)
        )
        layers, loss = run.metric.compute_breakdown(), run.loss()
    stacked = {
        name: torch.stack([getattr(layer, name).cpu() for layer in layers])
        for name in ("mean_gap", "cov_gap", "scale", "effective_rank", "total_variance", "outliers")
    }
    return MIRResult(
        mir=mir,
        layers=stacked["mean_gap"] + stacked["cov_gap"],
        **stacked,
        vision_tokens=int(sum(m.vision.sum() for m in masks)),
        text_tokens=int(sum(m.text.sum() for m in masks)),
        loss=loss,
        perplexity=None if loss is None else math.exp(min(loss, 700.0)),
        seconds=time.perf_counter() - start,
        variant=variant,
        text=text,
        fingerprint=probe.fingerprint,
        sample=run.sample,
        sample_layer=run.sample_layer,
    )


def _run_in_memory(batches: list[MaskedBatch], new_run: Callable[[], ProbeRun]) -> tuple[ProbeRun, float]:
    """Run the probe, with its batches halved until they fit."""
    while True:
        run = new_run()
        try:
            return run, run.mir(batches)
        except torch.OutOfMemoryError as error:
            halves = [half for batch in batches for half in _halves(batch)]
            if len(halves) == len(batches):
                raise
            batches = halves
            error.__traceback__ = None  # it holds the tensors that did not fit
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def _halves(batch: MaskedBatch) -> list[MaskedBatch]:
    """A batch in two, where every tensor in it has one row a sample; else as it is."""
    inputs, masks = batch
    samples = len(masks.vision)
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    if samples < 2 or any(value.ndim == 0 or len(value) != samples for value in tensors.values()):
        return [batch]
    parts = (slice(0, samples // 2), slice(samples // 2, samples))
    return [
        (
            {key: value[part] if key in tensors else value for key, value in inputs.items()},
            TokenMasks(masks.vision[part], masks.text[part]),
        )
        for part in parts
    ]


def check_probe(config: PreTrainedConfig | None, probe: Probe, text: TextPositions) -> list[TokenMasks]:
    """Vision and text positions of each batch; a ``ValueError`` if a modality has fewer than two in all."""
    masks = [token_masks(config, batch, text) for batch in probe]
    for modality, hint in (
        ("vision", "is the image token id right, and do the texts hold image placeholders?"),
        ("text", 'does text follow the image? text="all" counts what precedes it too.'),
    ):
        count = int(sum(getattr(m, modality).sum() for m in masks))
        if count < 2:
            raise ValueError(f"the probe has {count} {modality} tokens and needs at least 2: {hint}")
    return masks
