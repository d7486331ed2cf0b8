"""A model as a probe calls it: the way in, what it is given, and its hidden states layer by layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from mir_lightning.probing.probe import Batch, Probe
from mir_lightning.vlm import (
    TextPositions,
    TokenMasks,
    check_takes_pixels,
    compute_dtype,
    execution_device,
    find_decoder,
    find_entrance,
    find_vlm,
    is_foreign,
    token_masks,
)

Forward = Callable[..., Any]
HiddenStates = Callable[[nn.Module, dict[str, Any]], Iterable[Tensor]]
Reduce = Callable[[Tensor, int, int], None]  # hidden states [B, S, H], their layer from 0, number of layers
TakeTokens = Callable[
    [Tensor, Tensor, int, int], None
]  # vision [n, H], text [m, H], their layer, number of layers

_NOT_INPUTS = ("vision_mask", "text_mask", "source")
_NOT_PIXELS = ("mask", "embeds")


class ProbeWarning(UserWarning):
    """What is measured on a probe says less than it seems to."""


class Network:
    """A model to look into.

    Args:
        model: a Hugging Face vision-language model, or a module that holds one; any module with ``layers`` or
            ``hidden_states``.
        forward: called with a batch's inputs instead of the model, which it has to reach.
        layers: dotted path of the ``ModuleList`` of decoder layers inside the model.
        norm: dotted path of the final norm inside the model.
        image_token_id: placeholder of vision tokens in ``input_ids``.
        hidden_states: gives the hidden states of a batch, see :func:`~mir_lightning.evaluate_mir`.

    Raises:
        ValueError: if the model's parts cannot be found, or it is of a kind that MIR is not defined for.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None = None,
        layers: str | None = None,
        norm: str | None = None,
        image_token_id: int | None = None,
        hidden_states: HiddenStates | None = None,
    ) -> None:
        foreign = hidden_states is not None or is_foreign(model, layers)
        self.vlm = None if foreign else find_vlm(model)
        self.model = model if foreign else find_entrance(model)
        self.forward = forward or self.model
        self.decoder = None if hidden_states is not None else find_decoder(self.vlm or model, layers, norm)
        self.image_token_id = image_token_id
        self.hidden_states = hidden_states
        self.device = execution_device(self.model)
        self.dtype = compute_dtype(self.model)
        self._norm = norm
        self._chosen = "" if layers is None else f"layers={layers!r}: "
        accepted = inspect.signature(type(self.vlm or self.model).forward).parameters
        passes_on = self.vlm is not None and any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        self._no_cache = {"use_cache": False} if "use_cache" in accepted or passes_on else {}
        self._keeps_logits = "logits_to_keep" in accepted

    def check_layer(self, option: str, layer: int | None) -> None:
        """Raise a ``ValueError`` that names the option unless the model has the layer, counted from 1."""
        total = None if self.decoder is None else len(self.decoder.layers)
        if layer is not None and (layer < 1 or (total is not None and layer > total)):
            raise ValueError(f"{option} must lie in 1 .. {total or 'the number of layers'}, got {layer}.")

    def masks(self, probe: Probe, text: TextPositions) -> list[TokenMasks]:
        """Vision and text positions of each batch, and all that can be known without running the model.

        Raises:
            ValueError: if the model takes no pixels, a mask does not fit, or a modality has fewer than two tokens
                in all.
        """
        if self.vlm is not None and "vision_mask" not in probe[0]:
            check_takes_pixels(self.vlm)
        config = None if self.vlm is None else self.vlm.config
        masks, sink = [], False
        for batch in probe:
            masks.append(token_masks(config, batch, text, self.image_token_id))
            sink |= _begins_with_vision(batch, masks[-1])
        if sink:
            _warn_of_sink(probe.fingerprint)
        for modality, hint in (
            ("vision", "is the image token id right, and do the texts hold image placeholders?"),
            ("text", 'does text follow the image? text="all" counts what precedes it too.'),
        ):
            count = int(sum(getattr(m, modality).sum() for m in masks))
            if count < 2:
                raise ValueError(f"the probe has {count} {modality} tokens and needs at least 2: {hint}")
            if self.width is not None and count < self.width:
                rank_zero_warn(
                    f"the probe has {count} {modality} tokens and the model is {self.width} wide: a covariance "
                    f"of them is singular, and MIR depends on their number. {self.width - count} more would do.",
                    category=ProbeWarning,
                )
        return masks

    @property
    def width(self) -> int | None:
        """Of the hidden states, where the model's config tells."""
        return None if self.vlm is None else self.vlm.config.get_text_config(decoder=True).hidden_size

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Of a forward: on the device, floating point ones in the model's dtype, masks and sources left out."""

        def move(tensor: Tensor) -> Tensor:
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.to(self.device, dtype, non_blocking=True, copy=True)  # some forwards write into it

        inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
        return apply_to_collection(inputs, Tensor, move)

    def run(self, inputs: dict[str, Any], logits: int = 1) -> Any:
        """A lean forward: no cache, and logits of the last positions only, unless a loss is wanted as well."""
        lean = {"logits_to_keep": logits} if self._keeps_logits and "labels" not in inputs else {}
        return self.forward(**inputs, **self._no_cache, **lean)

    def run_layers(self, inputs: dict[str, Any], masks: TokenMasks, reduce: Reduce) -> Any:
        """Run the inputs; ``reduce`` gets each decoder layer's output, the last one's after the final norm.

        Returns:
            What the forward gives; ``None`` of a model with ``hidden_states``.
        """
        if self.hidden_states is not None:
            states = list(self.hidden_states(self.model, inputs))
            if not states:
                raise ValueError("hidden_states gave no layer.")
            for layer, hidden in enumerate(states):
                reduce(self._sequence_states(hidden, masks.vision, layer), layer, len(states))
            return None
        assert self.decoder is not None
        total = len(self.decoder.layers)
        final: list[Tensor] = []
        normed = False
        places: dict[nn.Module, list[int]] = {}  # several of a module that stands in the list several times
        for index, block in enumerate(self.decoder.layers):
            places.setdefault(block, []).append(index)

        def after_layer(block: nn.Module, output: Any) -> None:
            if not places[block]:
                raise ValueError(
                    f"{self._chosen}a decoder layer ({type(block).__name__}) ran more often than it is in "
                    "the list."
                )
            layer = places[block].pop(0)
            hidden = self._sequence_states(output, masks.vision, layer)
            if layer + 1 == total:
                final[:] = [hidden]
            else:
                reduce(hidden, layer, total)

        def after_norm(output: Any) -> None:
            nonlocal normed
            if final:
                final[:], normed = [output], True

        with ExitStack() as hooks:
            for block in tuple(places):
                hooks.enter_context(block.register_forward_hook(lambda m, _a, out: after_layer(m, out)))
            for norm in self.decoder.norms:
                hooks.enter_context(norm.register_forward_hook(lambda _m, _a, out: after_norm(out)))
            output = self.run(inputs)
        if not final:
            raise ValueError(f"{self._chosen}the decoder's last layer did not run in the model's forward pass.")
        if self._norm is not None and not normed:
            raise ValueError(f"norm={self._norm!r} did not run after the decoder's last layer.")
        reduce(final[0], total - 1, total)
        return output

    def run_tokens(
        self, batch: Batch, masks: TokenMasks, counts: bool, take: TakeTokens
    ) -> tuple[dict[str, Any], Any]:
        """Run a batch; ``take`` gets each layer's vision and text tokens, none where the batch does not count.

        An error in ``take`` waits until the forward is through: other ranks may be computing in step.

        Returns:
            The inputs, and what the forward gives.
        """
        inputs, errors = self.inputs(batch), list[Exception]()
        positions = [mask.view(-1).nonzero()[:, 0].to(self.device) for mask in masks]
        if not counts:
            positions = [where[:0] for where in positions]

        def reduce(hidden: Tensor, layer: int, layers: int) -> None:
            if not errors:
                flat = hidden.reshape(-1, hidden.shape[-1])
                try:
                    vision, text = (flat.index_select(0, where.to(flat.device)) for where in positions)
                    take(vision, text, layer, layers)
                except Exception as error:
                    errors.append(error)

        output = self.run_layers(inputs, masks, reduce)
        if errors:
            raise errors[0]
        return inputs, output

    def check_vision_mask(self, batch: Batch, masks: TokenMasks) -> bool:
        """Run a batch twice, with other pixels the second time, and see what moves at the first decoder layer.

        Every floating-point tensor but masks and embeddings is taken for pixels.

        Returns:
            Whether some position moved; none does while a projector is silent (its output layer all zeros), or
            where the batch holds no pixels.

        Raises:
            ValueError: if a position outside the vision mask moved.
        """
        inputs = self.inputs(batch)
        changed, pixels = _with_other_pixels(inputs)
        if not pixels:
            return False
        before, after = (self._first_layer_input(given) for given in (inputs, changed))
        if before.shape[:2] != masks.vision.shape:
            return True  # the layers say with a better message that the sequence has another length
        moved = (before != after).any(dim=-1).cpu()
        outside = moved & ~masks.vision
        if outside.any():
            sample, position = outside.nonzero()[0].tolist()
            raise ValueError(
                f"the vision mask is wrong: {int(outside.sum())} positions outside it carry pixels (sample "
                f"{sample}, position {position}, token {int(inputs['input_ids'][sample, position])}). Give "
                'image_token_id, or each probe batch a "vision_mask".'
            )
        return bool(moved.any())

    def _first_layer_input(self, inputs: dict[str, Any]) -> Tensor:
        assert self.decoder is not None
        layer, seen = self.decoder.layers[0], []
        name = next(iter(inspect.signature(layer.forward).parameters))
        with layer.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append((args[0] if args else kwargs[name]).detach()), with_kwargs=True
        ):
            self.run(inputs)
        if not seen:
            raise ValueError(f"{self._chosen}the decoder's first layer did not run in the model's forward pass.")
        return seen[0]

    def _sequence_states(self, output: Any, vision_mask: Tensor, layer: int) -> Tensor:
        """The ``[B, S, H]`` hidden states in a decoder layer's output."""
        hidden = output[0] if isinstance(output, tuple) else output
        expected = list(vision_mask.shape)
        if isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == vision_mask.shape:
            return hidden
        given = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        inserts = (
            "inserts vision tokens inside the model, and their positions are not known outside: give "
            "hidden_states, and a vision_mask over those positions"
        )
        why = "the model is not supported"
        if self._chosen:
            why = f"these are not the layers of the text decoder, which would do, or the model {inserts}"
        elif isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[0] == expected[0]:
            why = f"the model {inserts}"
        elif isinstance(hidden, Tensor) and hidden.ndim == 4:
            why = "the model keeps parallel residual streams apart, and is not supported: none is the whole"
        raise ValueError(
            f"{self._chosen}decoder layer {layer} gave {given} where [B, S, H] with B, S = {expected} of "
            f"input_ids was expected: {why}."
        )


def _begins_with_vision(batch: Batch, masks: TokenMasks) -> bool:
    """Whether the first position of some sample is a vision token."""
    valid = batch.get("attention_mask")
    if not isinstance(valid, Tensor) or valid.shape != masks.vision.shape:
        valid = torch.ones_like(masks.vision)
    first = valid.int().argmax(dim=1, keepdim=True)
    return bool(masks.vision.gather(1, first).any())


@cache
def _warn_of_sink(fingerprint: str) -> None:
    """Once for a probe, however often it is run."""
    rank_zero_warn(
        "the probe has samples whose first token is a vision token. Language models make their first token an "
        "attention sink, of an extreme norm, so MIR counts a token that is no picture's. Put text or a "
        "begin-of-text token before the picture, as a chat template or a prompt such as "
        f"'USER: {{image}} ...' does (probe {fingerprint[:8]}).",
        category=ProbeWarning,
    )


def map_pixels(inputs: Mapping[str, Any], change: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Inputs with their pixels changed: every floating-point or uint8 tensor but masks and embeddings."""

    def change_pixels(value: Tensor) -> Any:
        return change(value) if value.is_floating_point() or value.dtype == torch.uint8 else value

    return {
        key: value
        if any(part in key for part in _NOT_PIXELS)
        else apply_to_collection(value, Tensor, change_pixels)
        for key, value in inputs.items()
    }


def _with_other_pixels(inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Noise added to the pixels, and in how many tensors; zeros stay: whole images of them are padding to some."""
    generator, found = torch.Generator().manual_seed(0), []

    def change(value: Tensor) -> Tensor:
        if value.is_floating_point():
            other = value + torch.randn(value.shape, generator=generator).to(value)
        else:
            other = torch.randint(1, 256, value.shape, generator=generator, dtype=torch.uint8).to(value.device)
        found.append(value)
        return torch.where(value == 0, value, other)

    return map_pixels(inputs, change), len(found)
