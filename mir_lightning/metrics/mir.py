"""Modality Integration Rate as a streaming torchmetrics Metric, merged exactly across ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from mir_lightning.functional.checks import check_at_least_one, check_choice
from mir_lightning.functional.frechet import Gaussian
from mir_lightning.functional.mir import (
    BOTH,
    NEITHER,
    PAPER_ONLY,
    ROBUST_ONLY,
    LayerDistance,
    OutlierRules,
    Rule,
    Variant,
    check_count,
    check_tokens,
    layer_distance,
    norms_of,
    official_layer_distance,
    outlier_rules,
    rule_of,
    text_scale,
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
_STATES = ("rows", "norms", "classes", "moments")
_PARTS = (BOTH, PAPER_ONLY, ROBUST_ONLY)  # classes whose tokens are accumulated, each apart
_KEPT: dict[Rule, tuple[int, int]] = {"paper": (BOTH, PAPER_ONLY), "robust": (BOTH, ROBUST_ONLY)}
_SURE = 2.5 / 3  # of a margin: tokens within it so far are hardly outliers in the end
_USUAL = 1.5 / 3  # of a margin: what is accumulated while there is room to hold the others and learn more
_LEAST_ROOM = 2**20  # bytes of raw tokens kept before judging any: enough for steady statistics


class AccumulatedOutlierError(ValueError):
    """Tokens that a final outlier rule excludes were accumulated earlier in the stream, or the reverse."""


class _Part(NamedTuple):
    """One modality of a layer, its outliers known.

    Attributes:
        norms: of all its tokens.
        classes: of those tokens.
        rows: tokens held back, with the class of each.
        row_classes: of ``rows``.
    """

    norms: Tensor
    classes: Tensor
    rows: Tensor
    row_classes: Tensor

    def excluded(self, rule: Rule) -> int:
        """Number of tokens that a rule does not keep."""
        return sum(int((self.classes == c).sum()) for c in range(NEITHER + 1) if c not in _KEPT[rule])


class ModalityIntegrationRate(PreciseMetric):
    r"""Modality Integration Rate over a stream of tokens; lower is better aligned.

    .. math:: \mathrm{MIR} = \log_{10} \sum_{k=1}^{L} \mathrm{FD}(\omega(\alpha_k V_k), \omega(\alpha_k T_k))

    Source: MIR paper (arXiv 2410.07167), section 3. Any split of the tokens into updates, and of the updates
    over ranks, gives what :func:`~mir_lightning.functional.modality_integration_rate` gives for all of them.

    With ``variant="paper"`` or ``"robust"`` one pass suffices, and gives both numbers. Per layer and modality the
    metric holds

    - one float64 a token: its norm, which decides the scale and the outliers at the end, exactly;
    - raw tokens while they take less room than a covariance; after that, only those whose norm is unusual
      so far, which an outlier rule may yet exclude;
    - the mean and (half of the symmetric) covariance of the others: about ``4 d²`` bytes in float64; and another
      for tokens that one of the two rules keeps, where they are too many to hold.

    A token that was accumulated and turns out to be of another class is noticed: :meth:`compute` raises, and
    :meth:`start_second_pass` followed by the same updates gives the exact answer.

    The official variants need the coordinate-wise median of all tokens, so they keep every token.

    States live on the device of the tokens, each layer on its own; with ``compute_on_cpu=True`` all on the CPU.
    They keep their precision whatever ``.to`` or a Trainer's precision plugin casts around them.

    Args:
        num_layers: number of decoder layers, L.
        hidden_size: width d of the tokens.
        variant: ``"paper"``, ``"robust"``, ``"official"`` or ``"official-fast"``; see the functional.
        accumulator: dtype that covariances are stored in: ``torch.float64``, or ``torch.float32`` for half the
            memory. Products are float64 all the same; the rounding in between changes MIR by less than 1e-6
            (1e-5 where covariances are singular).
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
        self._fixed_rules: dict[str, OutlierRules] | None = None
        for group in self._groups():
            # Fewer where tokens are kept: a MetricCollection lets metrics of the same states share them.
            for state in _STATES[:1] if self._keeps_tokens else _STATES:
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
        with torch.inference_mode(False), torch.no_grad():  # else later updates could not go on with these states
            self._update(vision, text, layer)

    def _update(self, vision: Any, text: Any, layer: int | None) -> None:
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
        if self._fixed_rules is not None:
            self._accumulate(group, tokens, self._fixed_rules[group].classes(norms))
            return
        held = self._state(group, "rows")
        room = max(packed_size(self.hidden_size) * self.accumulator.itemsize, _LEAST_ROOM)
        first = not self._keeps_tokens and not self._state(group, "moments")
        if self._keeps_tokens or (first and _bytes_of(held) + tokens.nbytes <= room):
            held.append(tokens.clone())
            return
        if first:
            tokens, norms = torch.cat([*held, tokens]), torch.cat([*map(norms_of, held), norms])
            held.clear()
        self._sort(group, tokens, norms, room // 2)

    def _sort(self, group: str, tokens: Tensor, norms: Tensor, room: int) -> None:
        """Accumulate the tokens with usual norms; hold the others back for the final outlier rules.

        Where more than ``room`` bytes are held, the sure inliers among them are released, and the surely massive,
        far outside the robust rule and well inside the paper's; where that is not enough, also that half of the
        others that is further from any margin. Never a token that neither rule keeps among all seen so far.
        """
        held = self._state(group, "rows")
        rules = outlier_rules(torch.cat([*self._state(group, "norms"), *map(norms_of, held), norms]))
        margin = torch.minimum(rules.paper, rules.robust)
        self._release(group, tokens, norms, torch.where(rules.offsets(norms) <= _USUAL * margin, BOTH, NEITHER))
        for pressed in (False, True):
            if _bytes_of(held) <= room:
                return
            rows = torch.cat(held)
            held.clear()
            norms = norms_of(rows)
            offsets, classes = rules.offsets(norms), rules.classes(norms)
            sure = (offsets <= _SURE * margin) | ((offsets > 2 * rules.robust) & (offsets <= _SURE * rules.paper))
            if pressed and (kept := classes != NEITHER).any():
                leeway = torch.minimum((offsets / rules.robust - 1).abs(), (offsets / rules.paper - 1).abs())
                sure |= kept & (leeway >= leeway[kept].median())
            for part, moments in enumerate(self._moments(group)):
                if moments is None and rows[sure & (classes == part)].nbytes < room:
                    sure &= classes != part  # holding them takes less than moments of their own
            self._release(group, rows, norms, torch.where(sure, classes, NEITHER))

    def _release(self, group: str, tokens: Tensor, norms: Tensor, classes: Tensor) -> None:
        """Accumulate tokens by class; hold back those of class ``NEITHER``."""
        open_ = classes == NEITHER
        if open_.any():
            self._state(group, "rows").append(tokens[open_])
            tokens, norms, classes = tokens[~open_], norms[~open_], classes[~open_]
        self._accumulate(group, tokens, classes)
        self._state(group, "norms").append(norms)
        self._state(group, "classes").append(classes.byte())

    def _accumulate(self, group: str, tokens: Tensor, classes: Tensor) -> None:
        """Add tokens to the moments of their classes; those of class ``NEITHER`` to none."""
        for part in _PARTS:
            of_part = classes == part
            chosen = tokens if of_part.all() else tokens[of_part]
            if not len(chosen):
                continue
            moments = self._moments(group)
            if (known := moments[part]) is not None:
                update_moments(known, chosen)
            else:
                moments[part] = moments_of(chosen, self.accumulator)
                setattr(self, f"{group}_moments", _packed(moments))

    def _moments(self, group: str) -> list[Moments | None]:
        """Of each part; ``None`` for one without tokens."""
        return _unpacked(self._state(group, "moments"))

    def compute(self) -> Tensor:
        """MIR of everything seen, a float64 scalar.

        Raises:
            ValueError: with fewer than two tokens of a modality in a layer.
            AccumulatedOutlierError: see :meth:`start_second_pass`.
        """
        self._distances = [self._layer_distance(layer) for layer in range(self.num_layers)]
        return torch.stack([d.distance.cpu() for d in self._distances]).sum().log10()

    def compute_robust(self) -> Tensor:
        """MIR by the robust outlier rule, whatever the variant, a float64 scalar."""
        return torch.stack([d.robust.cpu() for d in self.compute_breakdown()]).sum().log10()

    def compute_layers(self) -> Tensor:
        """Fréchet distances by layer, ``[L]``, float64."""
        return torch.stack([d.distance.cpu() for d in self.compute_breakdown()])

    def compute_breakdown(self) -> list[LayerDistance]:
        """Everything known about each layer: gaps, scale, effective ranks, variances, outliers."""
        self.compute()
        assert self._distances is not None
        return self._distances

    @property
    def _keeps_tokens(self) -> bool:
        return self.variant.startswith("official")

    def _layer_distance(self, layer: int) -> LayerDistance:
        groups = [f"{modality}_{layer}" for modality in _MODALITIES]
        if self._keeps_tokens:
            vision, text = map(self._all_rows, groups)
            return official_layer_distance(vision, text, self.variant, layer)
        parts = [self._judged(group, modality, layer) for group, modality in zip(groups, _MODALITIES, strict=True)]
        own: Rule = rule_of(self.variant)
        excluded: dict[Rule, list[int]] = {rule: [part.excluded(rule) for part in parts] for rule in _KEPT}
        for modality, part, outliers in zip(_MODALITIES, parts, excluded[own], strict=True):
            check_count(modality, len(part.norms) - outliers, layer)
        gaussians = self._gaussians(groups, parts, own)
        alike = not any(((part.classes == PAPER_ONLY) | (part.classes == ROBUST_ONLY)).any() for part in parts)
        robust = gaussians if alike or own == "robust" else self._gaussians(groups, parts, "robust")
        counts = [len(part.norms) for part in parts]
        scale = text_scale(parts[1].norms, layer)
        return layer_distance(gaussians, robust, scale, counts, excluded[own], excluded["robust"])

    def _judged(self, group: str, modality: Modality, layer: int) -> _Part:
        """The tokens of a group with their final classes; what was accumulated has to be of the class it was."""
        rows = self._all_rows(group)
        row_norms = norms_of(rows)
        known, filed = self._all(group, "norms", torch.float64), self._all(group, "classes", torch.uint8)
        norms = torch.cat([known, row_norms])
        check_count(modality, len(norms), layer)
        rules = outlier_rules(norms)
        wrong = int((rules.classes(known) != filed).sum())
        if wrong:
            raise AccumulatedOutlierError(
                f"{wrong} {modality} tokens of layer {layer} looked usual (or massive) when they were accumulated "
                "and do not among all tokens seen: call start_second_pass() and repeat the same updates, or "
                "shuffle the stream."
            )
        row_classes = rules.classes(row_norms)
        return _Part(norms, torch.cat([filed, row_classes]), rows, row_classes)

    def _gaussians(self, groups: Sequence[str], parts: Sequence[_Part], rule: Rule) -> tuple[Gaussian, Gaussian]:
        vision, text = (self._gaussian(group, part, rule) for group, part in zip(groups, parts, strict=True))
        return vision, text

    def _gaussian(self, group: str, part: _Part, rule: Rule) -> Gaussian:
        """Of the tokens that a rule keeps."""
        both, only = _KEPT[rule]
        rows = part.rows[(part.row_classes == both) | (part.row_classes == only)]
        moments = reduce(_union, [self._moments(group)[c] for c in _KEPT[rule]])
        if moments is None:
            return Gaussian.from_tokens(rows)
        moments = self._with(moments, rows)
        assert moments is not None
        return Gaussian(*mean_and_covariance(moments), eps=torch.finfo(self.accumulator).eps)

    def _all_rows(self, group: str) -> Tensor:
        rows = self._state(group, "rows")
        return torch.cat(rows) if rows else torch.zeros(0, self.hidden_size, device=self._device_of(group))

    def _all(self, group: str, state: str, dtype: torch.dtype) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=dtype, device=self._device_of(group)), *self._state(group, state)])

    def _device_of(self, group: str, default: torch.device | None = None) -> torch.device:
        for state in _STATES:
            for tensor in getattr(self, f"{group}_{state}", ()):
                return tensor.device
        return default or self.device

    def start_second_pass(self) -> None:
        """Keep the norms, forget the tokens, and expect the same updates again (on every rank).

        The norms of a whole first pass decide which tokens are outliers, so the second pass is exact whatever
        the order of the stream. Needed only after an :class:`AccumulatedOutlierError`.
        """
        if self._is_synced:
            self.unsync()
        if self._keeps_tokens:
            self.reset()
            return
        local = {group: self._seen_norms(group) for group in self._groups()}
        with self.sync_context(should_sync=self._to_sync):
            rules = {group: outlier_rules(self._seen_norms(group)) for group in self._groups()}
        for group, norms in local.items():
            setattr(self, f"{group}_norms", [norms])
            setattr(self, f"{group}_classes", [rules[group].classes(norms)])
            setattr(self, f"{group}_rows", [])
            setattr(self, f"{group}_moments", [])
        self._fixed_rules = rules
        self._computed = None

    def _seen_norms(self, group: str) -> Tensor:
        return torch.cat([self._all(group, "norms", torch.float64), norms_of(self._all_rows(group))])

    def reset(self) -> None:
        """Forget everything seen."""
        for name in self._defaults:  # torchmetrics empties lists in place, which others may hold (Running)
            setattr(self, name, [])
        super().reset()
        self._distances = None
        self._fixed_rules = None

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge another stream's states into this one (used by ``forward`` and ``merge_state``)."""
        for name in self._defaults:
            own, incoming = getattr(self, name), incoming_state[name]
            if not name.endswith("_moments"):
                setattr(self, name, incoming + own)
            else:
                both = zip(_unpacked(incoming), _unpacked(own), strict=True)
                merged = _packed([_union(*pair) for pair in both])
                setattr(self, name, [tensor.clone() for tensor in merged])
        self._computed = None

    def _sync_dist(
        self, dist_sync_fn: Callable[..., list[Tensor]] | None = None, process_group: Any | None = None
    ) -> None:
        """Merge across ranks: norms are gathered, moments summed; raw tokens travel only for official variants."""
        assert dist_sync_fn is not None
        pg = process_group or self.process_group
        for group in self._groups():
            if not self._keeps_tokens:
                self._sync_moments(group, dist_sync_fn, pg)
            else:
                gathered = dist_sync_fn(self._all_rows(group).double(), group=pg)
                setattr(self, f"{group}_rows", [rows for rows in gathered if len(rows)])

    def _sync_moments(self, group: str, dist_sync_fn: Callable[..., list[Tensor]], pg: Any) -> None:
        """The norms of all ranks decide the classes of the held tokens, so each rank adds its own."""
        rows = self._all_rows(group)
        row_norms = norms_of(rows)
        known, filed, open_norms = (
            torch.cat(dist_sync_fn(tensor, group=pg))
            for tensor in (
                self._all(group, "norms", torch.float64),
                self._all(group, "classes", torch.uint8),
                row_norms,
            )
        )
        seen = torch.cat([known, open_norms])
        classes = filed.new_zeros(len(seen))
        moments = self._moments(group)
        if len(seen) >= 2:
            rules = outlier_rules(seen)
            classes = torch.cat([filed, rules.classes(open_norms)])
            row_classes = rules.classes(row_norms)
            moments = [
                self._all_reduced(self._with(moments[c], rows[row_classes == c]), (classes == c).any(), pg)
                for c in _PARTS
            ]
        setattr(self, f"{group}_norms", [seen])
        setattr(self, f"{group}_classes", [classes])
        setattr(self, f"{group}_rows", [])
        setattr(self, f"{group}_moments", _packed(moments))

    def _with(self, moments: Moments | None, rows: Tensor) -> Moments | None:
        """Moments with the held rows of their class; the argument does not change."""
        return _union(moments, moments_of(rows, self.accumulator)) if len(rows) else moments

    def _all_reduced(self, moments: Moments | None, anywhere: Tensor, pg: Any) -> Moments | None:
        """Moments of a part over all ranks; ``None`` where none has a token of it."""
        if not anywhere:
            return None
        none = no_moments(self.hidden_size, self.accumulator, anywhere.device)
        return all_reduce_moments(moments or none, pg)

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


def _packed(parts: Sequence[Moments | None]) -> list[Tensor]:
    """Moments of the parts as a state: two tensors each, empty ones for a part without tokens."""
    device = next((part.head.device for part in parts if part is not None), None)
    nothing = (torch.zeros(0, device=device), torch.zeros(0, device=device))
    return [tensor for part in parts for tensor in part or nothing] if any(parts) else []


def _unpacked(state: Sequence[Tensor]) -> list[Moments | None]:
    pairs = zip(state[::2], state[1::2], strict=True)
    return [Moments(*pair) if len(pair[0]) else None for pair in pairs] or [None] * len(_PARTS)


def _union(first: Moments | None, second: Moments | None) -> Moments | None:
    """Moments of two sets of tokens together."""
    return merge_moments(first, second) if first is not None and second is not None else first or second
