"""Modality Integration Rate as a streaming torchmetrics Metric, merged exactly across ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from mir_lightning.functional.checks import check_at_least_one, check_choice
from mir_lightning.functional.frechet import Gaussian
from mir_lightning.functional.mir import (
    LayerDistance,
    Variant,
    check_count,
    check_tokens,
    inlier_bounds,
    is_inlier,
    layer_distance,
    norms_of,
    text_scale,
    token_layer_distance,
    token_norms,
)
from mir_lightning.metrics.moments import (
    all_reduce_moments,
    mean_and_covariance,
    merge_moments,
    moments_of,
    packed_size,
    update_moments,
)

Modality = Literal["vision", "text"]
_MODALITIES: tuple[Modality, Modality] = ("vision", "text")
_STATES = ("norms", "dropped", "rows", "moments")
_LEAST_ROOM = 2**20  # bytes of raw tokens kept before judging any: enough for steady statistics


class AccumulatedOutlierError(ValueError):
    """Tokens that the final 3-sigma rule excludes were accumulated earlier in the stream, or the reverse."""


class ModalityIntegrationRate(Metric):
    r"""Modality Integration Rate over a stream of tokens; lower is better aligned.

    .. math:: \mathrm{MIR} = \log_{10} \sum_{k=1}^{L} \mathrm{FD}(\omega(\alpha_k V_k), \omega(\alpha_k T_k))

    Source: MIR paper (arXiv 2410.07167), section 3. Any split of the tokens into updates, and of the updates
    over ranks, gives what :func:`~mir_lightning.functional.modality_integration_rate` gives for all of them.

    With ``variant="paper"`` one pass suffices. Per layer and modality the metric holds

    - one float64 a token: its norm, which decides the scale and the outliers at the end, exactly;
    - raw tokens while they take less room than a covariance; after that, only those whose norm is unusual
      so far, which the outlier rule may yet exclude;
    - a float64 mean and (half of a symmetric) covariance of the others: ``4 d²`` bytes.

    A token that was accumulated as usual and turns out to be an outlier (or the reverse) is noticed:
    :meth:`compute` raises, and :meth:`start_second_pass` followed by the same updates gives the exact answer.

    The official variants need the coordinate-wise median of all tokens, so they keep every token.

    Args:
        num_layers: number of decoder layers, L.
        hidden_size: width d of the tokens.
        variant: ``"paper"``, ``"official"`` or ``"official-fast"``; see the functional.
        kwargs: as every torchmetrics Metric takes them.

    Raises:
        ValueError: if ``num_layers`` or ``hidden_size`` is below 1, or the variant is unknown.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> metric = ModalityIntegrationRate(num_layers=2, hidden_size=8)
        >>> for _ in range(4):
        ...     for layer in range(2):
        ...         vision = torch.randn(64, 8, generator=generator) + 1
        ...         text = torch.randn(48, 8, generator=generator)
        ...         metric.update(vision, text, layer=layer)
        >>> round(metric.compute().item(), 3)
        0.367
        >>> metric.compute_layers().shape
        torch.Size([2])
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, num_layers: int, hidden_size: int, variant: Variant = "paper", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_at_least_one(num_layers=num_layers, hidden_size=hidden_size)
        check_choice("variant", variant, Variant)
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.variant = variant
        self._distances: list[LayerDistance] | None = None
        self._fixed_bounds: dict[str, tuple[Tensor, Tensor]] | None = None
        for group in self._groups():
            for state in _STATES:
                self.add_state(f"{group}_{state}", default=[], dist_reduce_fx=None)

    def _groups(self) -> list[str]:
        return [f"{modality}_{layer}" for layer in range(self.num_layers) for modality in _MODALITIES]

    def _state(self, group: str, state: str) -> list[Tensor]:
        return getattr(self, f"{group}_{state}")

    def update(
        self, vision: Tensor | Sequence[Tensor], text: Tensor | Sequence[Tensor], layer: int | None = None
    ) -> None:
        """Add tokens of one layer, or of all layers at once.

        Args:
            vision: vision tokens ``[n_v, d]`` of the layer; n_v may be 0. Without ``layer``, a sequence of L.
            text: text tokens ``[n_t, d]``, or a sequence of L.
            layer: 0-based index of the layer; ``None`` when sequences over all layers are given.

        Raises:
            TypeError: for tokens that are not floating point tensors.
            ValueError: for a layer out of range, another width than ``hidden_size``, or non-finite tokens.
        """
        if layer is None:
            if len(vision) != self.num_layers or len(text) != self.num_layers:
                raise ValueError(
                    f"without layer, vision and text must be sequences of {self.num_layers} tensors "
                    f"[n, d], got {len(vision)} and {len(text)}."
                )
            for index, (v, t) in enumerate(zip(vision, text, strict=True)):
                self._update_layer(v, t, index)
        else:
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"layer must lie in 0 .. {self.num_layers - 1}, got {layer}.")
            self._update_layer(vision, text, layer)

    def _update_layer(self, vision: Any, text: Any, layer: int) -> None:
        for modality, tokens in zip(_MODALITIES, (vision, text), strict=True):
            check_tokens(modality, tokens, layer)
            if tokens.shape[1] != self.hidden_size:
                raise ValueError(
                    f"{modality} tokens of layer {layer} must have width hidden_size={self.hidden_size}, "
                    f"got {tokens.shape[1]}."
                )
        norms = [token_norms(m, t, layer) for m, t in zip(_MODALITIES, (vision, text), strict=True)]
        for modality, tokens, token_norm in zip(_MODALITIES, (vision, text), norms, strict=True):
            if len(tokens):
                self._add(f"{modality}_{layer}", tokens.detach(), token_norm.detach())

    def _add(self, group: str, tokens: Tensor, norms: Tensor) -> None:
        if self._fixed_bounds is not None:
            self._accumulate(group, tokens[is_inlier(norms, self._fixed_bounds[group])])
            return
        held, moments = self._state(group, "rows"), self._state(group, "moments")
        held_bytes = sum(rows.nbytes for rows in held) + tokens.nbytes
        room = max(8 * packed_size(self.hidden_size), _LEAST_ROOM)
        if self.variant != "paper" or (not moments and held_bytes <= room):
            held.append(tokens.clone())
            return
        self._accumulate_usual(group, tokens, room // 2)

    def _accumulate_usual(self, group: str, tokens: Tensor, room: int) -> None:
        """Accumulate the tokens with usual norms; hold the others back for the final outlier rule.

        Held tokens beyond ``room`` bytes are released, the most usual first, but never one that is an
        outlier among all seen so far.
        """
        tokens = torch.cat([*self._state(group, "rows"), tokens])
        norms = norms_of(tokens)
        seen = torch.cat([*self._state(group, "norms"), norms])
        median, outlier_margin = inlier_bounds(seen)
        offset = (norms - median).abs()
        usual = offset <= _usual_margin(seen, median, outlier_margin)
        if int((~usual).sum()) * tokens[:1].nbytes > room:
            open_inliers = offset[~usual & (offset <= outlier_margin)]
            if len(open_inliers):
                usual |= offset <= open_inliers.median()
        self._accumulate(group, tokens[usual])
        self._state(group, "norms").append(norms[usual])
        setattr(self, f"{group}_rows", [tokens[~usual]])

    def _accumulate(self, group: str, tokens: Tensor) -> None:
        moments = self._state(group, "moments")
        if moments and len(tokens):
            update_moments(moments[0], tokens)
        elif len(tokens):
            moments.append(moments_of(tokens))

    def compute(self) -> Tensor:
        """MIR of everything seen, a float64 scalar.

        Raises:
            ValueError: with fewer than two tokens of a modality in a layer.
            AccumulatedOutlierError: see :meth:`start_second_pass`.
        """
        self._distances = [self._layer_distance(layer) for layer in range(self.num_layers)]
        return torch.stack([d.distance.cpu() for d in self._distances]).sum().log10()

    def compute_layers(self) -> Tensor:
        """Fréchet distances by layer, ``[L]``, float64."""
        return torch.stack([d.distance.cpu() for d in self.compute_breakdown()])

    def compute_breakdown(self) -> list[LayerDistance]:
        """Everything known about each layer: gaps, scale, effective ranks, variances, outliers."""
        self.compute()
        assert self._distances is not None
        return self._distances

    def _layer_distance(self, layer: int) -> LayerDistance:
        if self.variant != "paper":
            vision, text = (self._all_rows(f"{modality}_{layer}") for modality in _MODALITIES)
            return token_layer_distance(vision, text, self.variant, layer)
        gaussians, counts, outliers, scale = [], [], [], torch.zeros(())
        for modality in _MODALITIES:
            group = f"{modality}_{layer}"
            rows = self._all_rows(group)
            row_norms = norms_of(rows)
            known, dropped = (self._all_norms(group, state) for state in ("norms", "dropped"))
            norms = torch.cat([known, dropped, row_norms])
            check_count(modality, len(norms), layer)
            bounds = inlier_bounds(norms)
            wrong = int((~is_inlier(known, bounds)).sum() + is_inlier(dropped, bounds).sum())
            if wrong:
                raise AccumulatedOutlierError(
                    f"{wrong} {modality} tokens of layer {layer} looked usual when they were accumulated "
                    "and are outliers among all tokens seen: call start_second_pass() and repeat the same "
                    "updates, or shuffle the stream."
                )
            inlier = is_inlier(row_norms, bounds)
            counts.append(len(norms))
            outliers.append(len(dropped) + int((~inlier).sum()))
            check_count(modality, counts[-1] - outliers[-1], layer)
            gaussians.append(self._gaussian(group, rows[inlier]))
            if modality == "text":
                scale = text_scale(norms, layer)
        return layer_distance(gaussians[0], gaussians[1], scale, counts, outliers)

    def _gaussian(self, group: str, rows: Tensor) -> Gaussian:
        moments = self._state(group, "moments")
        if not moments:
            return Gaussian.from_tokens(rows)
        packed = moments[0]
        if len(rows):
            packed = merge_moments(packed, moments_of(rows), self.hidden_size)
        return Gaussian.from_moments(*mean_and_covariance(packed, self.hidden_size))

    def _all_rows(self, group: str) -> Tensor:
        rows = self._state(group, "rows")
        return torch.cat(rows) if rows else torch.zeros(0, self.hidden_size, device=self._device_of(group))

    def _all_norms(self, group: str, state: str) -> Tensor:
        return torch.cat(
            [torch.zeros(0, dtype=torch.float64, device=self._device_of(group)), *self._state(group, state)]
        )

    def _device_of(self, group: str) -> torch.device:
        for state in _STATES:
            for tensor in self._state(group, state):
                return tensor.device
        return self.device

    def start_second_pass(self) -> None:
        """Keep the norms, forget the tokens, and expect the same updates again (on every rank).

        The norms of a whole first pass decide which tokens are outliers, so the second pass is exact whatever
        the order of the stream. Needed only after an :class:`AccumulatedOutlierError`.
        """
        if self._is_synced:
            self.unsync()
        local = {group: self._seen_norms(group) for group in self._groups()}
        with self.sync_context(should_sync=self._to_sync):
            bounds = {group: inlier_bounds(self._seen_norms(group)) for group in self._groups()}
        for group, norms in local.items():
            inlier = is_inlier(norms, bounds[group])
            setattr(self, f"{group}_norms", [norms[inlier]])
            setattr(self, f"{group}_dropped", [norms[~inlier]])
            setattr(self, f"{group}_rows", [])
            setattr(self, f"{group}_moments", [])
        self._fixed_bounds = bounds
        self._computed = None

    def _seen_norms(self, group: str) -> Tensor:
        rows = norms_of(self._all_rows(group))
        return torch.cat([self._all_norms(group, "norms"), self._all_norms(group, "dropped"), rows])

    def reset(self) -> None:
        """Forget everything seen."""
        super().reset()
        self._distances = None
        self._fixed_bounds = None

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge another stream's states into this one (used by ``forward`` and ``merge_state``)."""
        for name in self._defaults:
            merged = incoming_state[name] + getattr(self, name)
            if name.endswith("_moments") and len(merged) == 2:
                merged = [merge_moments(merged[0], merged[1], self.hidden_size)]
            setattr(self, name, merged)
        self._computed = None

    def _sync_dist(
        self, dist_sync_fn: Callable[..., list[Tensor]] | None = None, process_group: Any | None = None
    ) -> None:
        """Merge across ranks: norms are gathered, moments summed; raw tokens travel only for official variants."""
        assert dist_sync_fn is not None
        pg = process_group or self.process_group
        for group in self._groups():
            if self.variant == "paper":
                self._sync_moments(group, dist_sync_fn, pg)
            else:
                gathered = dist_sync_fn(self._all_rows(group).double(), group=pg)
                setattr(self, f"{group}_rows", [rows for rows in gathered if len(rows)])

    def _sync_moments(self, group: str, dist_sync_fn: Callable[..., list[Tensor]], pg: Any) -> None:
        """The norms of all ranks decide which held tokens are inliers, so each rank adds its own."""
        rows = self._all_rows(group)
        row_norms = norms_of(rows)
        known = torch.cat(dist_sync_fn(self._all_norms(group, "norms"), group=pg))
        open_norms = torch.cat(dist_sync_fn(row_norms, group=pg))
        dropped = torch.cat(dist_sync_fn(self._all_norms(group, "dropped"), group=pg))
        seen = torch.cat([known, open_norms, dropped])
        if len(seen) < 2:
            setattr(self, f"{group}_norms", [seen])
            setattr(self, f"{group}_rows", [])
            return
        bounds = inlier_bounds(seen)
        moments = self._state(group, "moments")
        packed = moments[0] if moments else known.new_zeros(packed_size(self.hidden_size))
        inliers = rows[is_inlier(row_norms, bounds)]
        if len(inliers):
            local = moments_of(inliers)
            packed = merge_moments(packed, local, self.hidden_size) if moments else local
        open_inlier = is_inlier(open_norms, bounds)
        setattr(self, f"{group}_norms", [torch.cat([known, open_norms[open_inlier]])])
        setattr(self, f"{group}_dropped", [torch.cat([dropped, open_norms[~open_inlier]])])
        setattr(self, f"{group}_rows", [])
        setattr(self, f"{group}_moments", [all_reduce_moments(packed, self.hidden_size, pg)])


def _usual_margin(norms: Tensor, median: Tensor, outlier_margin: Tensor) -> Tensor:
    """How far from the median a norm is surely no outlier later on: tighter than 3 sigma, and robust.

    Massive activations inflate sigma, so the median absolute deviation bounds it too (4.5 of them are
    3 sigma of a normal distribution).
    """
    deviation = (norms - median).abs().median()
    tight = outlier_margin * (2.5 / 3)
    return torch.where(deviation > 0, torch.minimum(tight, 4.5 * deviation), tight)
