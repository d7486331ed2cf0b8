"""``evaluate_mir``: the one engine behind every door."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mir_lightning.functional.checks import check_choice
from mir_lightning.functional.mir import Variant
from mir_lightning.probing.batches import MaskedBatches, check_probe
from mir_lightning.probing.isolation import leave_no_trace
from mir_lightning.probing.probe import Probe
from mir_lightning.probing.run import Forward, HiddenStates, ProbeRun
from mir_lightning.vlm import TextPositions, find_vlm


class UncheckedMaskWarning(UserWarning):
    """The self-check of the vision mask could not tell whether it is right."""


_NOTHING_MOVED = (
    "the vision mask could not be checked: no input of the first decoder layer moves with the pixels. Either the "
    "projector is silent (its output layer still zeros), or the model does not see the images."
)


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
        outliers: vision and text tokens outside the outlier rule of the variant, ``[L, 2]``.
        mir_robust: MIR by the robust outlier rule, which many massive tokens cannot mask, whatever the variant.
        robust_layers: its Fréchet distances by layer, ``[L]``.
        massive: vision and text tokens outside the robust rule, ``[L, 2]``.
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
        checked: whether the vision mask was found right by the self-check.
    """

    mir: float
    layers: Tensor
    mean_gap: Tensor
    cov_gap: Tensor
    scale: Tensor
    effective_rank: Tensor
    total_variance: Tensor
    outliers: Tensor
    mir_robust: float
    robust_layers: Tensor
    massive: Tensor
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
    checked: bool


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
    layers: str | None = None,
    image_token_id: int | None = None,
    check: bool = False,
    progress: str | None = None,
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
        variant: ``"paper"``, ``"robust"``, ``"official"`` or ``"official-fast"``; see
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
        layers: dotted path of the ``ModuleList`` of decoder layers inside the Hugging Face model; found by a rule
            that serves most models when None.
        image_token_id: placeholder of vision tokens in ``input_ids``; that of the model's config when None.
        check: first run one batch twice, with other pixels the second time, and see that what moves at the
            decoder's first layer lies inside the vision mask. Warns where nothing moves.
        progress: title of a bar of the batches; none without.

    Returns:
        A :class:`MIRResult`.

    Raises:
        ValueError: if the model's parts cannot be found, the probe has no vision or no text token, a mask
            does not fit or fails the check, hidden states are not finite (naming the layer), or an option is
            unknown.
        torch.OutOfMemoryError: if single samples do not fit, or batches cannot be split.
    """
    start = time.perf_counter()
    check_choice("variant", variant, Variant)
    if hidden_states is None:
        model = find_vlm(model)
    elif check:
        raise ValueError("check works with Hugging Face models only: pass check=False along with hidden_states.")

    def new_run() -> ProbeRun:
        return ProbeRun(model, variant, forward, hidden_states, sample_layer, distributed, layers, progress)

    fingerprint = probe.fingerprint
    vlm = model if isinstance(model, PreTrainedModel) and hidden_states is None else None
    masks = check_probe(vlm, probe, text, layers, image_token_id)
    batches = MaskedBatches(probe, masks)
    with leave_no_trace(model):
        checked = check and new_run().check_masks(batches)
        run, mir = _run_in_memory(batches, new_run)
        breakdown, loss = run.metric.compute_breakdown(), run.loss()
    if check and not checked:
        warnings.warn(UncheckedMaskWarning(_NOTHING_MOVED), stacklevel=2)
    stacked = {
        name: torch.stack([getattr(layer, name).cpu() for layer in breakdown])
        for name in ("mean_gap", "cov_gap", "scale", "effective_rank", "total_variance", "outliers", "massive")
    }
    robust_layers = torch.stack([layer.robust.cpu() for layer in breakdown])
    return MIRResult(
        mir=mir,
        layers=stacked["mean_gap"] + stacked["cov_gap"],
        **stacked,
        mir_robust=robust_layers.sum().log10().item(),
        robust_layers=robust_layers,
        vision_tokens=int(sum(m.vision.sum() for m in masks)),
        text_tokens=int(sum(m.text.sum() for m in masks)),
        loss=loss,
        perplexity=None if loss is None else math.exp(min(loss, 700.0)),
        seconds=time.perf_counter() - start,
        variant=variant,
        text=text,
        fingerprint=fingerprint,
        sample=run.sample,
        sample_layer=run.sample_layer,
        checked=checked,
    )


def _run_in_memory(batches: MaskedBatches, new_run: Callable[[], ProbeRun]) -> tuple[ProbeRun, float]:
    """Run the probe, with its batches halved until they fit."""
    while True:
        run = new_run()
        try:
            return run, run.mir(batches)
        except torch.OutOfMemoryError as error:
            halved = batches.halved()
            if halved is None:
                raise
            batches = halved
            error.__traceback__ = None  # it holds the tensors that did not fit
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
