"""Modality Integration Rate as a streaming torchmetrics Metric, merged exactly across ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

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
from mir_lightning.metrics.figures import subplots
from mir_lightning.metrics.moments import (
    Moments,
    all_reduce_moments,
    mean_and_covariance,
    merge_moments,
    moments_of,
    no_moments,
    packed_size,
    update_moments,
)
from mir_lightning.metrics.precise import PreciseMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Modality = Literal["vision", "text"]
_MODALITIES: tuple[Modality, Modality] = ("vision", "text")
_STATES = ("norms", "dropped", "rows", "moments")
_LEAST_ROOM = 2**20  # bytes of raw tokens kept before judging any: enough for steady statistics


class AccumulatedOutlierError(ValueError):
    """Tokens that the final 3-sigma rule excludes were accumulated earlier in the stream, or the reverse."""


class ModalityIntegrationRate(PreciseMetric):
    r"""Modality Integration Rate over a stream of tokens; lower is better aligned.

    .. math:: \mathrm{MIR} = \log_{10} \sum_{k=1}^{L} \mathrm{FD}(\omega(\alpha_k V_k), \omega(\alpha_k T_k))

    Source: MIR paper (arXiv 2410.07167), section 3. Any split of the tokens into updates, and of the updates
    over ranks, gives what :func:`~mir_lightning.functional.modality_integration_rate` gives for all of them.

    With ``variant="paper"`` one pass suffices. Per layer and modality the metric holds

    - one float64 a token: its norm, which decides the scale and the outliers at the end, exactly;
    - raw tokens while they take less room than a covariance; after that, only those whose norm is unusual
      so far, which the outlier rule may yet exclude;
    - the mean and (half of the symmetric) covariance of the others: about ``4 d²`` bytes in float64.

    A token that was accumulated as usual and turns out to be an outlier (or the reverse) is noticed:
    :meth:`compute` raises, and :meth:`start_second_pass` followed by the same updates gives the exact answer.

    The official variants need the coordinate-wise median of all tokens, so they keep every token.

    States live on the device of the tokens, each layer on its own; with ``compute_on_cpu=True`` all on the CPU.
    They keep their precision whatever ``.to`` or a Trainer's precision plugin casts around them.

    Args:
        num_layers: number of decoder layers, L.
        hidden_size: width d of the tokens.
        variant: ``"paper"``, ``"official"`` or ``"official-fast"``; see the functional.
        accumulator: dtype that covariances are stored in: ``torch.float64``, or ``torch.float32`` for half the
            memory. Products are float64 all the same; the rounding in between changes MIR by less than 1e-6.
        kwargs: as every torchmetrics Metric takes them.

    Raises:
        ValueError: if ``num_layers`` or ``hidden_size`` is below 1, or the variant or accumulator is unknown.

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

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        variant: Variant = "paper",
        accumulator: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least_one(num_layers=num_layers, hidden_size=hidden_size)
        check_choice("variant", variant, Variant)
        if accumulator not in (torch.float64, torch.float32):
            raise ValueError(f"accumulator must be torch.float64 or torch.float32, got {accumulator}.")
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.variant = variant
        self.accumulator = accumulator
        self._distances: list[LayerDistance] | None = None
        self._fixed_bounds: dict[str, tuple[float, float]] | None = None
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
            ValueError: for a layer out of range, another width than ``hidden_size``, a device other than
                before, or non-finite tokens. Nothing has been added then.
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
        check_tokens(vision, text, layer)
        if vision.shape[1] != self.hidden_size:
            raise ValueError(
                f"tokens of layer {layer} must have width hidden_size={self.hidden_size}, got {vision.shape[1]}."
            )
        if self.compute_on_cpu:
            vision, text = vision.cpu(), text.cpu()
        norms = [token_norms(m, t, layer) for m, t in zip(_MODALITIES, (vision, text), strict=True)]
        groups = [f"{modality}_{layer}" for modality in _MODALITIES]
        for group in groups:
            if (known := self._device_of(group, vision.device)) != vision.device:
                raise ValueError(
                    f"tokens of layer {layer} were on {known} before and are on {vision.device} now: "
                    "keep a layer on one device, or pass compute_on_cpu=True."
                )
        for group, tokens, token_norm in zip(groups, (vision, text), norms, strict=True):
            if len(tokens):
                self._add(group, tokens.detach(), token_norm)

    def _add(self, group: str, tokens: Tensor, norms: Tensor) -> None:
        if self._fixed_bounds is not None:
            self._accumulate(group, tokens[is_inlier(norms, self._fixed_bounds[group])])
            return
        held = self._state(group, "rows")
        room = max(packed_size(self.hidden_size) * self.accumulator.itemsize, _LEAST_ROOM)
        first = not self._state(group, "moments")
        if self.variant != "paper" or (first and _bytes_of(held) + tokens.nbytes <= room):
            held.append(tokens.clone())
            return
        if first:
            tokens, norms = torch.cat([*held, tokens]), torch.cat([*map(norms_of, held), norms])
            held.clear()
        self._sort(group, tokens, norms, room // 2)

    def _sort(self, group: str, tokens: Tensor, norms: Tensor, room: int) -> None:
        """Accumulate the tokens with usual norms; hold the others back for the final outlier rule.

        Where more than ``room`` bytes are held, those that have become usual are released, and the more usual
        half of the others, but never one that is an outlier among all seen so far.
        """
        held = self._state(group, "rows")
        seen = torch.cat([*self._state(group, "norms"), *map(norms_of, held), norms])
        median, outlier_margin = inlier_bounds(seen)
        margin = _usual_margin(seen, median, outlier_margin)
        self._split(group, tokens, norms, (norms - median).abs() <= margin)
        if _bytes_of(held) > room:
            rows = torch.cat(held)
            held.clear()
            norms = norms_of(rows)
            offset = (norms - median).abs()
            inliers = offset[offset <= outlier_margin]
            if len(inliers):
                margin = torch.maximum(margin, inliers.median())
            self._split(group, rows, norms, offset <= margin)

    def _split(self, group: str, tokens: Tensor, norms: Tensor, usual: Tensor) -> None:
        if usual.all():
            self._accumulate(group, tokens)
        else:
            self._accumulate(group, tokens[usual])
            self._state(group, "rows").append(tokens[~usual])
        self._state(group, "norms").append(norms[usual])

    def _accumulate(self, group: str, tokens: Tensor) -> None:
        if not len(tokens):
            return
        moments = self._moments(group)
        if moments is None:
            setattr(self, f"{group}_moments", list(moments_of(tokens, self.accumulator)))
        else:
            update_moments(moments, tokens)

    def _moments(self, group: str) -> Moments | None:
        state = self._state(group, "moments")
        return Moments(*state) if state else None

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
        moments = self._moments(group)
        if moments is None:
            return Gaussian.from_tokens(rows)
        if len(rows):
            moments = merge_moments(moments, moments_of(rows, self.accumulator))
        return Gaussian(*mean_and_covariance(moments), eps=torch.finfo(self.accumulator).eps)

    def _all_rows(self, group: str) -> Tensor:
        rows = self._state(group, "rows")
        return torch.cat(rows) if rows else torch.zeros(0, self.hidden_size, device=self._device_of(group))

    def _all_norms(self, group: str, state: str) -> Tensor:
        return torch.cat(
            [torch.zeros(0, dtype=torch.float64, device=self._device_of(group)), *self._state(group, state)]
        )

    def _device_of(self, group: str, default: torch.device | None = None) -> torch.device:
        for state in _STATES:
            for tensor in self._state(group, state):
                return tensor.device
        return default or self.device

    def start_second_pass(self) -> None:
        """Keep the norms, forget the tokens, and expect the same updates again (on every rank).

        The norms of a whole first pass decide which tokens are outliers, so the second pass is exact whatever
        the order of the stream. Needed only after an :class:`AccumulatedOutlierError`.
        """
        if self._is_synced:
            self.unsync()
        local = {group: self._seen_norms(group) for group in self._groups()}
        with self.sync_context(should_sync=self._to_sync):
            bounds = {}
            for group in self._groups():
                median, margin = inlier_bounds(self._seen_norms(group))
                bounds[group] = (median.item(), margin.item())
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
        for name in self._defaults:  # torchmetrics empties lists in place, which others may hold (Running)
            setattr(self, name, [])
        super().reset()
        self._distances = None
        self._fixed_bounds = None

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge another stream's states into this one (used by ``forward`` and ``merge_state``)."""
        for name in self._defaults:
            own, incoming = getattr(self, name), incoming_state[name]
            if not name.endswith("_moments"):
                setattr(self, name, incoming + own)
            elif own and incoming:
                setattr(self, name, list(merge_moments(Moments(*incoming), Moments(*own))))
            elif incoming:
                setattr(self, name, [part.clone() for part in incoming])
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
        moments = self._moments(group) or no_moments(self.hidden_size, self.accumulator, known.device)
        inliers = rows[is_inlier(row_norms, bounds)]
        if len(inliers):
            moments = merge_moments(moments, moments_of(inliers, self.accumulator))
        open_inlier = is_inlier(open_norms, bounds)
        setattr(self, f"{group}_norms", [torch.cat([known, open_norms[open_inlier]])])
        setattr(self, f"{group}_dropped", [torch.cat([dropped, open_norms[~open_inlier]])])
        setattr(self, f"{group}_rows", [])
        setattr(self, f"{group}_moments", list(all_reduce_moments(moments, pg)))

    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None
    ) -> tuple[Figure | None, Axes]:
        """Draw the distances by layer, or MIR over time.

        Args:
            val: a result of :meth:`compute` or ``forward``, or a sequence of them: MIR over time. ``None``
                draws the distances by layer of everything seen, split into their gaps.
            ax: axes to draw into instead of a new figure.

        Returns:
            The figure (``None`` with ``ax``) and its axes.

        Raises:
            ModuleNotFoundError: without matplotlib.
        """
        if val is not None:
            return cast("tuple[Figure, Axes]", self._plot(val, ax))
        figure: Figure | None = None
        if ax is None:
            figure, ax = subplots()
        layers = self.compute_breakdown()
        numbers = range(1, self.num_layers + 1)
        ax.plot(numbers, [layer.distance.item() for layer in layers], "o-", label="Fréchet distance")
        ax.plot(numbers, [layer.mean_gap.item() for layer in layers], "--", label="mean gap")
        ax.plot(numbers, [layer.cov_gap.item() for layer in layers], ":", label="covariance gap")
        ax.set(xlabel="decoder layer", ylabel="distance", title=f"MIR {self.compute().item():.3f}")
        ax.legend()
        return figure, ax


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _usual_margin(norms: Tensor, median: Tensor, outlier_margin: Tensor) -> Tensor:
    """How far from the median a norm is surely no outlier later on: tighter than 3 sigma, and robust.

    Massive activations inflate sigma, so the median absolute deviation bounds it too (4.5 of them are
    3 sigma of a normal distribution).
    """
    deviation = (norms - median).abs().median()
    tight = outlier_margin * (2.5 / 3)
    return torch.where(deviation > 0, torch.minimum(tight, 4.5 * deviation), tight)
