"""Modality Integration Rate as a streaming torchmetrics Metric, merged exactly across ranks."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from mir_lightning.functional.checks import check_at_least_one, check_choice
from mir_lightning.functional.frechet import Gaussian, RankOrder
from mir_lightning.functional.influence import LayerInfluence
from mir_lightning.functional.mir import (
    LayerDistance,
    OutlierRules,
    Rule,
    Variant,
    check_count,
    check_finite,
    check_tokens,
    judge,
    layer_distance,
    mean_norms,
    norms_of,
    official_layer_distance,
    rule_of,
)
from mir_lightning.metrics.base import PreciseMetric
from mir_lightning.metrics.cloud import (
    AccumulatedOutlierError,
    Batch,
    Cloud,
    Gather,
    Judged,
    counts_of,
    gather_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AccumulatedOutlierError", "ModalityIntegrationRate"]

_MODALITIES = ("vision", "text")
_OF_BOTH = ("effective_rank", "total_variance", "tokens", "outliers", "massive")
_SIZES = [2 if name in _OF_BOTH else 1 for name in LayerDistance._fields]  # of a row that travels


class ModalityIntegrationRate(PreciseMetric):
    r"""Modality Integration Rate over a stream of tokens; lower is better aligned.

    .. math:: \mathrm{MIR} = \log_{10} \sum_{k=1}^{L} \mathrm{FD}(\omega(\alpha_k V_k), \omega(\alpha_k T_k))

    Source: MIR paper (arXiv 2410.07167), section 3. Any split of the tokens into updates, and of the updates
    over ranks, gives what :func:`~mir_lightning.functional.modality_integration_rate` gives for all of them.

    With ``variant="paper"`` or ``"robust"`` one pass suffices, and gives both numbers. A
    :class:`~mir_lightning.metrics.cloud.Cloud` per layer and modality holds one float64 a token (its norm), the
    mean and half of the symmetric covariance (about ``4 d²`` bytes in float64), and the few tokens that an outlier
    rule may yet exclude. A token that was accumulated and turns out to be an outlier is noticed: :meth:`compute`
    raises, and :meth:`start_second_pass` followed by the same updates gives the exact answer.

    The official variants need the coordinate-wise median of all tokens, so they keep every token.

    States live on the device of the tokens, each layer on its own; with ``compute_on_cpu=True`` all on the CPU.
    On several ranks each finalises its share of the layers, and the others get its numbers.
    They keep their precision whatever ``.to`` or a Trainer's precision plugin casts around them.

    Args:
        num_layers: number of decoder layers, L.
        hidden_size: width d of the tokens.
        variant: ``"paper"``, ``"robust"``, ``"official"`` or ``"official-fast"``; see the functional.
        accumulator: dtype that covariances are stored in: ``torch.float64``, or ``torch.float32`` for half the
            memory. The rounding changes MIR by less than 1e-6 (1e-5 where covariances are singular).
        rank_order: order of the effective ranks in the breakdown: 2, the participation ratio, which is free, or 1,
            the entropy of the eigenvalues, which takes a decomposition each.
        products: dtype of the products that covariances are sums of: ``torch.float64``, or ``torch.float32`` for
            devices whose float64 is slow: products of 256 centred tokens, never in TF32 or bfloat16. It changes
            MIR by less than 1e-6 (1e-5 where covariances are singular).
        kwargs: as every torchmetrics Metric takes them.

    Raises:
        ValueError: if ``num_layers`` or ``hidden_size`` is below 1, or the variant or a dtype is unknown.

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
        rank_order: RankOrder = 2,
        products: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least_one(num_layers=num_layers, hidden_size=hidden_size)
        check_choice("variant", variant, Variant)
        for name, dtype in (("accumulator", accumulator), ("products", products)):
            if dtype not in (torch.float64, torch.float32):
                raise ValueError(f"{name} must be torch.float64 or torch.float32, got {dtype}.")
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.variant = variant
        check_choice("rank_order", rank_order, RankOrder)
        self.accumulator = accumulator
        self.products = products
        self.rank_order = rank_order
        self._distances: list[LayerDistance] | None = None
        self._synced_group: Any = None  # the processes that the states are synced over
        self._layers_have_owners = True  # whether each layer's moments are summed on one of them, or on all
        self._final_rules: list[list[OutlierRules]] | None = None
        self._keeps_tokens = variant.startswith("official")
        # Fewer where tokens are kept: a MetricCollection lets metrics of the same states share them.
        states = Cloud.STATES[:1] if self._keeps_tokens else Cloud.STATES
        for layer, modality, state in product(range(num_layers), _MODALITIES, states):
            self.add_state(f"{modality}_{layer}_{state}", default=[], dist_reduce_fx=None)

    def _clouds(self, layer: int, states: Mapping[str, Any] | None = None) -> list[Cloud]:
        """Vision and text tokens of a layer: their states in this metric, or in a copy of them."""
        found = vars(self) if states is None else states
        home = torch.device("cpu") if self.compute_on_cpu else self.device
        of_both = ([found.get(f"{m}_{layer}_{s}", []) for s in Cloud.STATES] for m in _MODALITIES)
        return [Cloud(self.hidden_size, self.accumulator, self.products, home, *states) for states in of_both]

    @torch.compiler.disable
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
        if layer is None and (len(vision) != self.num_layers or len(text) != self.num_layers):
            raise ValueError(
                f"without layer, vision and text must be sequences of {self.num_layers} tensors "
                f"[n, d], got {len(vision)} and {len(text)}."
            )
        if layer is not None and not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must lie in 0 .. {self.num_layers - 1}, got {layer}.")
        given = enumerate(zip(vision, text, strict=True)) if layer is None else [(layer, (vision, text))]
        with torch.inference_mode(False), torch.no_grad():  # else later updates could not go on with these states
            found = [(index, *self._sorted(v, t, index)) for index, (v, t) in given]
            for index, batches, counts in found:
                for cloud, batch, (*of_classes, _) in zip(self._clouds(index), batches, counts, strict=True):
                    cloud.add(batch, of_classes)

    def _sorted(self, vision: Any, text: Any, layer: int) -> tuple[list[Batch], list[list[int]]]:
        """How tokens of a layer can be added, and how many of each class; nothing has been added yet.

        The counts are all that an update waits for the device for, so whether norms are finite comes with them.
        """
        given, clouds = self._checked(vision, text, layer), self._clouds(layer)
        norms = [norms_of(tokens) for tokens in given]
        final = self._final_rules[layer] if self._final_rules else (None, None)
        batches = [
            Batch.held(tokens, of_tokens) if self._keeps_tokens else cloud.sort(tokens, of_tokens, rules)
            for cloud, tokens, of_tokens, rules in zip(clouds, given, norms, final, strict=True)
        ]
        broken = torch.stack([(~of_tokens.isfinite()).any() for of_tokens in norms])
        counts = torch.cat([torch.stack([counts_of(b.classes) for b in batches]), broken[:, None]], dim=1).tolist()
        for modality, of_tokens, (*_, is_broken) in zip(_MODALITIES, norms, counts, strict=True):
            if is_broken:
                check_finite(modality, of_tokens, layer)
        return batches, counts

    def _checked(self, vision: Any, text: Any, layer: int) -> list[Tensor]:
        """Tokens of a layer, where their shapes and devices are right."""
        check_tokens(vision, text, layer)
        if vision.shape[1] != self.hidden_size:
            raise ValueError(
                f"tokens of layer {layer} must have width hidden_size={self.hidden_size}, got {vision.shape[1]}."
            )
        given = [tokens.cpu() if self.compute_on_cpu else tokens for tokens in (vision.detach(), text.detach())]
        for tokens, cloud in zip(given, self._clouds(layer), strict=True):
            if (known := cloud.device(tokens.device)) != tokens.device:
                raise ValueError(
                    f"tokens of layer {layer} were on {known} before and are on {tokens.device} now: "
                    "keep a layer on one device, or pass compute_on_cpu=True."
                )
        return given

    def compute(self) -> Tensor:
        """MIR of everything seen, a float64 scalar.

        Raises:
            ValueError: with fewer than two tokens of a modality in a layer.
            AccumulatedOutlierError: see :meth:`start_second_pass`.
        """
        if self._is_synced and dist.is_initialized():
            self._distances = self._shared_distances()
        else:
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

    def compute_influences(self) -> list[LayerInfluence]:
        """What a token adds to each layer's distance; for a second pass over the same tokens.

        Raises:
            ValueError: for the official variants, which replace tokens; otherwise as :meth:`compute`.
        """
        if self._keeps_tokens:
            raise ValueError(f'variant {self.variant!r} has no influence function: use "paper" or "robust".')
        rule, influences = rule_of(self.variant), []
        self._layers_have_owners = False
        try:
            with self.sync_context(should_sync=self._to_sync):
                for layer in range(self.num_layers):
                    clouds, judged = self._clouds(layer), self._judged(layer)
                    vision, text = (c.gaussian(tokens, rule) for c, tokens in zip(clouds, judged, strict=True))
                    norms = judged[0].norms, judged[1].norms
                    influences.append(LayerInfluence((vision, text), norms, rule, layer))
        finally:
            self._layers_have_owners = True
        return influences

    def _shared_distances(self) -> list[LayerDistance]:
        """Of synced states: layer k is finalised by rank k mod R. What one cannot finalise fails on all."""
        group, width = self._synced_group, sum(_SIZES)
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        rows = torch.zeros(self.num_layers, width + 1, dtype=torch.float64, device=self._clouds(0)[0].device())
        for layer in range(rank, self.num_layers, ranks):
            with suppress(Exception):  # seen again below
                found = self._layer_distance(layer)
                rows[layer, 1:] = torch.cat([value.double().flatten().to(rows.device) for value in found])
                rows[layer, 0] = 1
        dist.all_reduce(rows, group=group)  # zeros, but for those of one rank
        for layer in (rows[:, 0] == 0).nonzero().flatten().tolist():
            if layer % ranks == rank or self._keeps_tokens:
                self._layer_distance(layer)
            else:
                self._judged(layer)  # raises the same, for tokens that are at fault
            raise RuntimeError(f"layer {layer} could not be finalised by rank {layer % ranks}: see its error.")
        return [LayerDistance(*(value.squeeze() for value in row[1:].split(_SIZES))) for row in rows]

    def _judged(self, layer: int) -> list[Judged]:
        return [c.judged(modality, layer) for c, modality in zip(self._clouds(layer), _MODALITIES, strict=True)]

    def _layer_distance(self, layer: int) -> LayerDistance:
        clouds = self._clouds(layer)
        if self._keeps_tokens:
            vision, text = (cloud.held() for cloud in clouds)
            return official_layer_distance(vision, text, self.variant, layer, self.rank_order)
        judged = self._judged(layer)
        own = rule_of(self.variant)
        outliers, massive = ([tokens.excluded(rule) for tokens in judged] for rule in (own, "robust"))
        for modality, tokens, excluded in zip(_MODALITIES, judged, outliers, strict=True):
            check_count(modality, len(tokens.norms) - excluded, layer)

        def gaussians(rule: Rule) -> tuple[Gaussian, Gaussian]:
            vision, text = (cloud.gaussian(tokens, rule) for cloud, tokens in zip(clouds, judged, strict=True))
            return vision, text

        kept = gaussians(own)
        norms = mean_norms(judged[0].norms, judged[1].norms, layer)
        differ = own != "robust" and any(tokens.rules_differ() for tokens in judged)
        counts = [len(tokens.norms) for tokens in judged], outliers, massive
        return layer_distance(kept, gaussians("robust") if differ else kept, norms, *counts, self.rank_order)

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
        with self.sync_context(should_sync=self._to_sync):
            rules = [[judge(c.seen_norms()) for c in self._clouds(k)] for k in range(self.num_layers)]
        for layer, of_layer in enumerate(rules):
            for cloud, final in zip(self._clouds(layer), of_layer, strict=True):
                cloud.start_second_pass(final)
        self._final_rules = rules
        self._computed = None

    def reset(self) -> None:
        """Forget everything seen."""
        for name in self._defaults:  # torchmetrics empties lists in place, which others may hold (Running)
            setattr(self, name, [])
        super().reset()
        self._distances = None
        self._final_rules = None

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add another metric's tokens to this one's.

        Raises:
            ValueError: for a metric of another depth, width or dtype.
        """
        if isinstance(incoming_state, ModalityIntegrationRate):
            own, other = (
                f"{m.num_layers} layers of width {m.hidden_size}, {m.accumulator} of {m.products} products"
                f"{', all' * m._keeps_tokens}"
                for m in (self, incoming_state)
            )
            if own != other:
                raise ValueError(f"the metrics differ: {own}, and {other}.")
        super().merge_state(incoming_state)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge another stream's states into this one (used by ``forward`` and ``merge_state``)."""
        for layer in range(self.num_layers):
            for own, incoming in zip(self._clouds(layer), self._clouds(layer, incoming_state), strict=True):
                own.merge(incoming)
        self._computed = None

    def _sync_dist(self, dist_sync_fn: Gather | None = None, process_group: Any | None = None) -> None:
        """Merge across ranks: each layer on the one that finalises it; raw tokens travel for official variants."""
        assert dist_sync_fn is not None
        self._synced_group = group = process_group or self.process_group
        if self._keeps_tokens:
            gather_rows([c for k in range(self.num_layers) for c in self._clouds(k)], dist_sync_fn, group)
            return
        for layer in range(self.num_layers):
            owner = layer % dist.get_world_size(group) if self._layers_have_owners else None
            for cloud in self._clouds(layer):
                cloud.sync(dist_sync_fn, owner, group)

    def _draw(self, ax: "Axes") -> None:
        layers = self.compute_breakdown()
        numbers = range(1, self.num_layers + 1)
        ax.plot(numbers, [layer.distance.item() for layer in layers], "o-", label="Fréchet distance")
        ax.plot(numbers, [layer.mean_gap.item() for layer in layers], "--", label="mean gap")
        ax.plot(numbers, [layer.cov_gap.item() for layer in layers], ":", label="covariance gap")
        ax.set(xlabel="decoder layer", ylabel="distance", title=f"MIR {self.compute().item():.3f}")
