"""``evaluate_mir``: the one engine behind every door. Runs a probe and reduces each layer on the spot."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mir_lightning.functional.checks import check_choice
from mir_lightning.functional.mir import Variant
from mir_lightning.metrics.mir import AccumulatedOutlierError, ModalityIntegrationRate
from mir_lightning.probing.isolation import leave_no_trace
from mir_lightning.probing.probe import Batch, Probe
from mir_lightning.vlm import TextPositions, TokenMasks, find_decoder, find_vlm, token_masks

_MASK_KEYS = ("vision_mask", "text_mask")


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


def evaluate_mir(
    model: nn.Module, probe: Probe, variant: Variant = "paper", text: TextPositions = "after_vision"
) -> MIRResult:
    """Modality Integration Rate of a model on a probe.

    Forward hooks on each decoder layer, and on the final norm for the last one, reduce the hidden states to
    running moments at once: no more than two layers' hidden states are alive at a time. The model is left as
    it was found (see :func:`~mir_lightning.probing.isolation.leave_no_trace`).

    Args:
        model: a Hugging Face vision-language model, or a module that holds one.
        probe: the batches to run; they are moved to the model's device.
        variant: ``"paper"``, ``"official"`` or ``"official-fast"``; see
            :func:`~mir_lightning.functional.modality_integration_rate`.
        text: which positions count as text: ``"after_vision"`` or ``"all"``; padding never does.

    Returns:
        A :class:`MIRResult`.

    Raises:
        ValueError: if the model's parts cannot be found, the probe has no vision or no text token, a mask
            does not fit, hidden states are not finite (naming the layer), or an option is unknown.
    """
    start = time.perf_counter()
    check_choice("variant", variant, Variant)
    vlm = find_vlm(model)
    masks = check_probe(vlm, probe, text)
    run = _ProbeRun(vlm, variant)
    with leave_no_trace(model):
        run.feed(probe, masks)
        try:
            mir = run.metric.compute()
        except AccumulatedOutlierError:
            run.metric.start_second_pass()
            run.feed(probe, masks)
            mir = run.metric.compute()
    layers = run.metric.compute_breakdown()
    stacked = {
        name: torch.stack([getattr(layer, name).cpu() for layer in layers])
        for name in ("mean_gap", "cov_gap", "scale", "effective_rank", "total_variance", "outliers")
    }
    loss = run.loss()
    return MIRResult(
        mir=mir.item(),
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
    )


def check_probe(vlm: PreTrainedModel, probe: Probe, text: TextPositions) -> list[TokenMasks]:
    """Vision and text positions of each batch; a ``ValueError`` if a modality has fewer than two in all."""
    masks = [token_masks(vlm.config, batch, text) for batch in probe]
    for modality, hint in (
        ("vision", "is the image token id right, and do the texts hold image placeholders?"),
        ("text", 'does text follow the image? text="all" counts what precedes it too.'),
    ):
        count = int(sum(getattr(m, modality).sum() for m in masks))
        if count < 2:
            raise ValueError(f"the probe has {count} {modality} tokens and needs at least 2: {hint}")
    return masks


class _ProbeRun:
    """One run of a probe: hooks that feed the metric, and the loss of the same forwards."""

    def __init__(self, vlm: PreTrainedModel, variant: Variant) -> None:
        self.vlm = vlm
        self.variant = variant
        self.decoder = find_decoder(vlm)
        self._metric: ModalityIntegrationRate | None = None
        self._loss_sum = 0.0
        self._loss_tokens = 0

    @property
    def metric(self) -> ModalityIntegrationRate:
        assert self._metric is not None
        return self._metric

    def loss(self) -> float | None:
        return self._loss_sum / self._loss_tokens if self._loss_tokens else None

    def feed(self, probe: Probe, masks: list[TokenMasks]) -> None:
        """Run every batch once."""
        self._loss_sum, self._loss_tokens = 0.0, 0
        parameter = next(self.vlm.parameters())
        for batch, mask in zip(probe, masks, strict=True):
            inputs = _to_model(batch, parameter.device, self.vlm.dtype)
            with self._hooks(mask, parameter.device):
                output = self.vlm(**inputs, **_lean_options(self.vlm, inputs))
            self._add_loss(output, inputs)

    def _add_loss(self, output: Any, inputs: Batch) -> None:
        if "labels" in inputs and getattr(output, "loss", None) is not None:
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
            self._loss_sum += float(output.loss) * tokens if tokens else 0.0
            self._loss_tokens += tokens

    @contextmanager
    def _hooks(self, masks: TokenMasks, device: torch.device) -> Iterator[None]:
        """While active, each decoder layer's output goes into the metric as soon as it exists."""
        positions = [mask.view(-1).nonzero()[:, 0].to(device) for mask in masks]
        last = len(self.decoder.layers) - 1
        final: list[Tensor] = []

        def after_layer(index: int, output: Any) -> None:
            hidden = _hidden_states(output, masks.vision, index)
            if index == last:
                final[:] = [hidden]
            else:
                self._reduce(hidden, positions, index)

        def after_norm(output: Any) -> None:
            if final:
                final[:] = [output]

        with ExitStack() as stack:
            for index, layer in enumerate(self.decoder.layers):
                handle = layer.register_forward_hook(lambda _m, _a, out, i=index: after_layer(i, out))
                stack.callback(handle.remove)
            for norm in self.decoder.norms:
                handle = norm.register_forward_hook(lambda _m, _a, out: after_norm(out))
                stack.callback(handle.remove)
            yield
            if not final:
                raise ValueError(
                    f"the decoder layers of {type(self.vlm).__name__} did not run in its forward pass."
                )
            self._reduce(final[0], positions, last)

    def _reduce(self, hidden: Tensor, positions: list[Tensor], layer: int) -> None:
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self._metric is None:
            self._metric = ModalityIntegrationRate(
                len(self.decoder.layers), flat.shape[1], self.variant, sync_on_compute=False
            )
        with torch.autocast(hidden.device.type, enabled=False):
            vision, text = (flat.index_select(0, where) for where in positions)
            self._metric.update(vision, text, layer=layer)


def _hidden_states(output: Any, vision_mask: Tensor, layer: int) -> Tensor:
    """The ``[B, S, H]`` hidden states in a decoder layer's output."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != vision_mask.shape:
        given = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(
            f"decoder layer {layer} gave {given} where [B, S, H] with B, S = {list(vision_mask.shape)} of "
            "input_ids was expected: the model inserts vision tokens itself or keeps parallel streams, and "
            "is not supported."
        )
    return hidden


def _to_model(batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs for the forward: on the device, floating point ones in the model's dtype, masks left out."""
    inputs = {}
    for key, value in batch.items():
        if key in _MASK_KEYS:
            continue
        if isinstance(value, Tensor):
            value = value.to(device, dtype if value.is_floating_point() else None)
        inputs[key] = value
    return inputs


def _lean_options(vlm: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """No cache, and no logits beyond the last position unless a loss needs them."""
    accepted = inspect.signature(vlm.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if "logits_to_keep" in accepted and "labels" not in inputs:
        options["logits_to_keep"] = 1
    return options
