"""One pass of a probe through a model: hidden states go into the metric as soon as they exist."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mir_lightning.functional.mir import Variant
from mir_lightning.metrics.mir import AccumulatedOutlierError, ModalityIntegrationRate
from mir_lightning.probing.batches import MaskedBatch
from mir_lightning.probing.probe import Batch
from mir_lightning.probing.ranks import progress_bar, raise_together, rounds_of, share_of_rank, sum_over_ranks
from mir_lightning.probing.selfcheck import check_vision_mask
from mir_lightning.vlm import Decoder, TokenMasks, execution_device, find_decoder

Forward = Callable[..., Any]
HiddenStates = Callable[[nn.Module, dict[str, Any]], Iterable[Tensor]]

_SAMPLE_SIZE = 400
_MASK_KEYS = ("vision_mask", "text_mask")


class ProbeRun:
    """The metric and the loss of a probe, on this rank's share of it or on all of it.

    Args:
        model: the model to look into; a Hugging Face model unless ``hidden_states`` is given.
        variant: of the metric.
        forward: runs the inputs of a batch through the model; the model itself when None.
        hidden_states: gives the hidden states of a batch instead of hooks.
        sample_layer: layer, counted from 1, to keep a sample of the tokens of; the middle one when None.
        distributed: whether each rank takes its share of the batches.
        layers: dotted path of the decoder layers; found by rule when None.
        progress: title of a bar of the batches; none without.
    """

    def __init__(
        self,
        model: nn.Module,
        variant: Variant,
        forward: Forward | None,
        hidden_states: HiddenStates | None,
        sample_layer: int | None,
        distributed: bool,
        layers: str | None = None,
        progress: str | None = None,
    ) -> None:
        self.model = model
        self.variant = variant
        self.forward = forward or model
        self.hidden_states = hidden_states
        self.distributed = distributed
        self.progress = progress
        self._decoder = find_decoder(model, layers) if isinstance(model, PreTrainedModel) else None
        self.device = execution_device(model)
        self.dtype = next(model.parameters()).dtype
        self._sample_layer = sample_layer
        self._samples: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._metric: ModalityIntegrationRate | None = None
        self._loss_sum = 0.0
        self._loss_tokens = 0
        self._error: Exception | None = None
        self._sample_share = 0

    @property
    def metric(self) -> ModalityIntegrationRate:
        """What the hidden states went into."""
        assert self._metric is not None
        return self._metric

    @property
    def sample_layer(self) -> int:
        """Layer of :attr:`sample`, counted from 1."""
        return self._sample_layer or (self.metric.num_layers + 1) // 2

    @property
    def sample(self) -> tuple[Tensor, Tensor]:
        """Some vision and text tokens of one layer, ``[n, d]`` float32, spread over this rank's batches."""
        empty = torch.zeros(0, self.metric.hidden_size)
        vision, text = (torch.cat([empty, *parts])[:_SAMPLE_SIZE] for parts in self._samples)
        return vision, text

    def mir(self, batches: Sequence[MaskedBatch]) -> float:
        """Run the batches, twice where the order of the tokens asks for it, and compute MIR."""
        self._feed(batches)
        try:
            return self.metric.compute().item()
        except AccumulatedOutlierError:
            self.metric.start_second_pass()
            self._feed(batches)
            return self.metric.compute().item()

    def loss(self) -> float | None:
        """Mean cross-entropy over all labelled tokens; ``None`` without any."""
        total, tokens = self._loss_sum, float(self._loss_tokens)
        if self.distributed:
            total, tokens = sum_over_ranks([total, tokens], self.device)
        return total / tokens if tokens else None

    def _feed(self, batches: Sequence[MaskedBatch]) -> None:
        """Run every batch once. Errors surface when all ranks have done theirs, on all of them."""
        self._loss_sum, self._loss_tokens, self._error = 0.0, 0, None
        self._samples = ([], [])
        self._sample_share = -(-_SAMPLE_SIZE // len(batches))
        share = share_of_rank(batches) if self.distributed else ((batch, True) for batch in batches)
        total = rounds_of(batches) if self.distributed else len(batches)
        for (batch, masks), counts in progress_bar(share, total, self.progress):
            try:
                self._run(batch, masks, counts)
            except Exception as error:
                self._error = self._error or error
            if self._error is not None and not self.distributed:
                raise self._error
        if self.distributed:
            raise_together(self._error, self.device)

    def check_masks(self, batches: Sequence[MaskedBatch]) -> bool:
        """Self-check of this rank's first batch; whether some position moved on any rank."""
        assert self._decoder is not None
        moved, error = False, None
        batch, masks = next(share_of_rank(batches))[0] if self.distributed else batches[0]
        inputs = _to_model(batch, self.device, self.dtype)
        try:
            moved = check_vision_mask(self._decoder.layers[0], self._forward_lean, inputs, masks)
        except Exception as caught:
            error = caught
        if self.distributed:
            raise_together(error, self.device)
            return sum_over_ranks([moved], self.device)[0] > 0
        if error is not None:
            raise error
        return moved

    def _forward_lean(self, inputs: dict[str, Any]) -> Any:
        """No cache, and no logits beyond the last position unless a loss needs them."""
        accepted = inspect.signature(type(self.model).forward).parameters
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        if "logits_to_keep" in accepted and "labels" not in inputs:
            options["logits_to_keep"] = 1
        return self.forward(**inputs, **options)

    def _run(self, batch: Batch, masks: TokenMasks, counts: bool) -> None:
        inputs = _to_model(batch, self.device, self.dtype)
        positions = [mask.view(-1).nonzero()[:, 0].to(self.device) for mask in masks]

        def reduce(hidden: Tensor, layer: int, layers: int) -> None:
            """An error waits until the forward is through: other ranks may be computing in step."""
            if self._error is None:
                try:
                    self._reduce(hidden, positions if counts else [p[:0] for p in positions], layer, layers)
                except Exception as error:
                    self._error = error

        if self.hidden_states is not None:
            states = list(self.hidden_states(self.model, inputs))
            for layer, hidden in enumerate(states):
                reduce(_sequence_states(hidden, masks.vision, layer), layer, len(states))
            return
        assert self._decoder is not None
        with _layer_hooks(self._decoder, masks.vision, reduce):
            output = self._forward_lean(inputs)
        if counts:
            self._add_loss(output, inputs)

    def _add_loss(self, output: Any, inputs: Batch) -> None:
        if "labels" in inputs and getattr(output, "loss", None) is not None:
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
            self._loss_sum += float(output.loss) * tokens if tokens else 0.0
            self._loss_tokens += tokens

    def _reduce(self, hidden: Tensor, positions: list[Tensor], layer: int, layers: int) -> None:
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self._metric is None:
            self._metric = ModalityIntegrationRate(
                layers, flat.shape[1], self.variant, sync_on_compute=self.distributed
            ).to(hidden.device)
        # The layers of a model spread over devices do not all lie where the metric does.
        vision, text = (flat.index_select(0, where.to(flat.device)).to(self._metric.device) for where in positions)
        self._metric.update(vision, text, layer=layer)
        if layer + 1 == self.sample_layer:
            for parts, tokens in zip(self._samples, (vision, text), strict=True):
                parts.append(tokens[:: max(1, len(tokens) // self._sample_share)].float().cpu())


@contextmanager
def _layer_hooks(
    decoder: Decoder, vision_mask: Tensor, reduce: Callable[[Tensor, int, int], None]
) -> Iterator[None]:
    """Meanwhile ``reduce(hidden, layer, layers)`` gets each decoder layer's output, the last one's normed."""
    last = len(decoder.layers) - 1
    final: list[Tensor] = []

    def after_layer(index: int, output: Any) -> None:
        hidden = _sequence_states(output, vision_mask, index)
        if index == last:
            final[:] = [hidden]
        else:
            reduce(hidden, index, last + 1)

    def after_norm(output: Any) -> None:
        if final:
            final[:] = [output]

    with ExitStack() as stack:
        for index, layer in enumerate(decoder.layers):
            handle = layer.register_forward_hook(lambda _m, _a, out, i=index: after_layer(i, out))
            stack.callback(handle.remove)
        for norm in decoder.norms:
            handle = norm.register_forward_hook(lambda _m, _a, out: after_norm(out))
            stack.callback(handle.remove)
        yield
        if not final:
            raise ValueError("the decoder's last layer did not run in the model's forward pass.")
        reduce(final[0], last, last + 1)


def _sequence_states(output: Any, vision_mask: Tensor, layer: int) -> Tensor:
    """The ``[B, S, H]`` hidden states in a decoder layer's output."""
    hidden = output[0] if isinstance(output, tuple) else output
    expected = list(vision_mask.shape)
    if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == vision_mask.shape:
        return hidden
    given = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
    why = "is not supported"
    if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[0] == expected[0]:
        why = "inserts vision tokens inside the model, and is not supported: their positions are not known outside"
    elif isinstance(hidden, Tensor) and hidden.ndim == 4:
        why = "keeps parallel residual streams apart, and is not supported: none of them alone is the hidden state"
    raise ValueError(
        f"decoder layer {layer} gave {given} where [B, S, H] with B, S = {expected} of input_ids was expected: "
        f"the model {why}."
    )


def _to_model(batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs for the forward: on the device, floating point ones in the model's dtype, masks left out."""
    inputs = {}
    for key, value in batch.items():
        if key in _MASK_KEYS:
            continue
        if isinstance(value, Tensor):
            value = value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
        inputs[key] = value
    return inputs
