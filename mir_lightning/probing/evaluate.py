"""``evaluate_mir``: the one engine behind every door."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from mir_lightning.functional.checks import check_choice
from mir_lightning.functional.frechet import RankOrder
from mir_lightning.functional.influence import standard_error
from mir_lightning.functional.mir import LayerDistance, Rule, Variant
from mir_lightning.hardware import float64_is_slow
from mir_lightning.metrics.mir import AccumulatedOutlierError, ModalityIntegrationRate
from mir_lightning.probing.batches import MaskedBatches
from mir_lightning.probing.isolation import leave_no_trace
from mir_lightning.probing.network import Forward, HiddenStates, Network
from mir_lightning.probing.probe import Batch, Probe, ProbeLike
from mir_lightning.probing.ranks import fit_into_memory, run_together, sum_over_ranks
from mir_lightning.vlm import TextPositions, TokenMasks

Products = Literal["auto", "float64", "float32"]

_SAMPLE_SIZE = 400


class UncheckedMaskWarning(UserWarning):
    """The self-check of the vision mask could not tell whether it is right."""


_NOTHING_MOVED = (
    "the vision mask could not be checked: no input of the first decoder layer moves with the pixels. Either the "
    "projector is silent (its output layer still zeros), or the model does not see the images, or the batches "
    "hold no pixels. check=False goes without."
)


class SourceMIR(NamedTuple):
    """What the batches of one source found."""

    mir: float
    loss: float | None  # mean cross-entropy over their labels, in nats


@dataclass(frozen=True)
class MIRResult:
    """What a probe found. Tensors are float64, on the CPU; L is the number of decoder layers.

    Attributes:
        mir: Modality Integration Rate, log10 of the sum of ``layers``; lower is better aligned.
        layers: Fréchet distance by layer, ``[L]``.
        mean_gap: squared distance of the means by layer, ``[L]``.
        cov_gap: ``layers - mean_gap``, ``[L]``.
        scale: text-centric scale alpha by layer, ``[L]``.
        norm_ratio: mean norm of the vision tokens over that of the text tokens by layer, ``[L]``.
        mir_equal_norm: MIR of clouds that are each scaled to mean norm 1: the gap without its loudness.
        effective_rank: of vision and text tokens, ``[L, 2]``: how many directions they fill; see ``rank_order``.
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
        rank_order: as given.
        products: ``"float64"`` or ``"float32"``: the dtype of the products that covariances are sums of.
        influence: what each sample of the probe adds to ``mir``, ``[N]``; ``None`` without ``interval``. See
            :func:`~mir_lightning.functional.mir_influence`.
        standard_error: of ``mir`` over redrawn samples, from the influences.
        sources: MIR and loss by source, where each batch of the probe names one (those with vision tokens).
    """

    mir: float
    layers: Tensor
    mean_gap: Tensor
    cov_gap: Tensor
    scale: Tensor
    norm_ratio: Tensor
    mir_equal_norm: float
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
    rank_order: RankOrder
    products: str
    influence: Tensor | None
    standard_error: float | None
    sources: dict[str, SourceMIR]


def evaluate_mir(
    model: nn.Module,
    probe: ProbeLike,
    variant: Variant = "paper",
    text: TextPositions = "after_vision",
    *,
    forward: Forward | None = None,
    hidden_states: HiddenStates | None = None,
    sample_layer: int | None = None,
    distributed: bool = False,
    layers: str | None = None,
    norm: str | None = None,
    image_token_id: int | None = None,
    check: bool = False,
    progress: str | None = None,
    interval: bool = False,
    rank_order: RankOrder = 2,
    products: Products = "auto",
) -> MIRResult:
    """Modality Integration Rate of a model on a probe.

    Forward hooks on each decoder layer, and on the final norm for the last one, reduce the hidden states to
    running moments at once: no more than two layers' hidden states are alive at a time. The model is left as
    it was found (see :func:`~mir_lightning.probing.isolation.leave_no_trace`). Where a batch does not fit into
    the device's memory, the whole probe is run again in halves of its batches, as often as it takes; the number
    is the same.

    Args:
        model: a Hugging Face vision-language model, or a module that holds one; any module with ``layers`` or
            ``hidden_states``.
        probe: the batches to run; they are moved to the model's device. Where each names one ``source`` and there
            are several, those of each source run once more, for its own MIR.
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
        layers: dotted path of the ``ModuleList`` of decoder layers inside the Hugging Face model, or inside any
            other module (the probe's batches then need a ``vision_mask``, or ``image_token_id``); found by a rule
            that serves most Hugging Face models when None.
        norm: dotted path of the final norm; found beside the layers when None.
        image_token_id: placeholder of vision tokens in ``input_ids``; that of the model's config when None.
        check: first run one batch twice, with other pixels the second time, and see that what moves at the
            decoder's first layer lies inside the vision mask. Warns where nothing moves.
        progress: title of a bar of the batches; none without.
        interval: also give what each sample adds to MIR, and the standard error: one more pass over the probe, and
            memory for two float64 matrices ``[d, d]`` a layer. For ``"paper"`` and ``"robust"``.
        rank_order: of the effective ranks: 2, the participation ratio, which is free, or 1, the entropy of the
            eigenvalues, which takes a decomposition for each layer and modality.
        products: of tokens, that covariances are sums of: ``"float64"``, ``"float32"`` (see
            :class:`~mir_lightning.ModalityIntegrationRate`), or ``"auto"``: float32 on GPUs whose float64 is slow.
            The official variants' are float64.

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
    check_choice("rank_order", rank_order, RankOrder)
    check_choice("products", products, Products)
    if interval and variant not in get_args(Rule):
        raise ValueError(f'interval needs variant "paper" or "robust", got {variant!r}, which replaces tokens.')
    if check and hidden_states is not None:
        raise ValueError("check works with Hugging Face models only: pass check=False along with hidden_states.")
    network, probe = Network(model, forward, layers, norm, image_token_id, hidden_states), Probe.of(probe)
    network.check_layer("sample_layer", sample_layer)
    if products == "auto":
        products = "float32" if float64_is_slow(network.device) else "float64"
    fingerprint, masks = probe.fingerprint, network.masks(probe, text)
    whole = MaskedBatches(probe, masks)
    sources: dict[str, SourceMIR] = {}

    options = {"rank_order": rank_order, "products": getattr(torch, products)}
    fit = partial(fit_into_memory, smaller=MaskedBatches.halved)

    def read(part: MaskedBatches, title: str | None) -> _Reading:
        return fit(
            lambda part: _Reading(network, variant, options, sample_layer, distributed, title).of(part), part
        )

    with leave_no_trace(network.model):
        checked = check and fit(lambda part: _mask_is_right(network, part, distributed), whole)
        reading = read(whole, progress)
        breakdown, loss = reading.metric.compute_breakdown(), reading.loss()
        influence = None
        if interval:
            influence = fit(lambda part: _influence(network, reading.metric, part, distributed, progress), whole)
        for name, batches in probe.by_source().items():
            if any(masks[index].vision.any() for index in batches):
                part = MaskedBatches(probe.part(batches), [masks[index] for index in batches])
                of_source = read(part, progress and f"{progress}, {name}")
                sources[name] = SourceMIR(of_source.metric.compute().item(), of_source.loss())
    if check and not checked:
        warnings.warn(UncheckedMaskWarning(_NOTHING_MOVED), stacklevel=2)
    by_layer = {name: torch.stack([getattr(d, name).cpu() for d in breakdown]) for name in LayerDistance._fields}
    robust_layers, _ = by_layer.pop("robust"), by_layer.pop("tokens")
    return MIRResult(
        mir=reading.metric.compute().item(),
        layers=by_layer["mean_gap"] + by_layer["cov_gap"],
        mir_equal_norm=by_layer.pop("equal_norm").sum().log10().item(),
        **by_layer,
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
        sample=reading.sample(),
        sample_layer=reading.sample_layer,
        checked=checked,
        rank_order=rank_order,
        products=products,
        influence=influence,
        standard_error=None if influence is None else standard_error(influence).item(),
        sources=sources,
    )


def _mask_is_right(network: Network, batches: MaskedBatches, distributed: bool) -> bool:
    """Self-check of each rank's first batch; whether some position moved on any rank."""
    moved = [False]

    def check(index: int, counts: bool) -> None:
        moved.append(network.check_vision_mask(*batches[index]))

    ranks = torch.distributed.get_world_size() if distributed else 1
    run_together(min(ranks, len(batches)), check, distributed, network.device)
    return sum_over_ranks([any(moved)], network.device)[0] > 0 if distributed else any(moved)


def _influence(
    network: Network,
    metric: ModalityIntegrationRate,
    batches: MaskedBatches,
    distributed: bool,
    progress: str | None,
) -> Tensor:
    """What each sample adds to the MIR that the metric found on the same batches, ``[N]`` on the CPU."""
    influences = metric.compute_influences()
    added = torch.zeros(batches.samples, dtype=torch.float64, device=metric.device)

    def add(index: int, counts: bool) -> None:
        batch, masks = batches[index]
        samples = [mask.nonzero()[:, 0].to(added.device) + batches.first_sample(index) for mask in masks]

        def take(vision: Tensor, text: Tensor, layer: int, layers: int) -> None:
            for side, (tokens, of_samples) in enumerate(zip((vision, text), samples, strict=True)):
                of_tokens = influences[layer].by_token(side, tokens.to(added.device))
                added.index_add_(0, of_samples[: len(tokens)], of_tokens)

        network.run_tokens(batch, masks, counts, take)

    run_together(len(batches), add, distributed, network.device, progress and f"{progress}, interval")
    total = torch.stack([layer.distance for layer in influences]).sum()
    given = sum_over_ranks(added.tolist(), network.device) if distributed else added.tolist()
    return torch.tensor(given, dtype=torch.float64) / (total.item() * math.log(10))


class _Reading:
    """Hidden states of a probe's batches go into the metric as soon as they exist; loss and a sample beside it."""

    def __init__(
        self,
        network: Network,
        variant: Variant,
        options: dict[str, Any],
        sample_layer: int | None,
        distributed: bool,
        progress: str | None,
    ) -> None:
        self.network = network
        self.variant = variant
        self.options = options
        self.distributed = distributed
        self.progress = progress
        self._sample_layer = sample_layer
        self._metric: ModalityIntegrationRate | None = None

    @property
    def metric(self) -> ModalityIntegrationRate:
        assert self._metric is not None
        return self._metric

    @property
    def sample_layer(self) -> int:
        """Counted from 1."""
        return self._sample_layer or (self.metric.num_layers + 1) // 2

    def of(self, batches: MaskedBatches) -> _Reading:
        """Run the batches, twice where the order of the tokens asks for it."""
        self._run(batches)
        try:
            self.metric.compute()
        except AccumulatedOutlierError:
            self.metric.start_second_pass()
            self._run(batches)
            self.metric.compute()
        return self

    def _run(self, batches: MaskedBatches) -> None:
        self._loss_sum, self._loss_tokens = 0.0, 0
        self._samples: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._sample_share = -(-_SAMPLE_SIZE // len(batches))
        run_together(
            len(batches),
            lambda index, counts: self._add(*batches[index], counts),
            self.distributed,
            self.network.device,
            self.progress,
        )

    def _add(self, batch: Batch, masks: TokenMasks, counts: bool) -> None:
        inputs, output = self.network.run_tokens(batch, masks, counts, self._reduce)
        if counts and "labels" in inputs and getattr(output, "loss", None) is not None:
            self._add_loss(output.loss, inputs)

    def _add_loss(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        labels = inputs["labels"]
        is_text = isinstance(labels, Tensor) and labels.shape == inputs["input_ids"].shape
        count = int((labels[:, 1:] != -100).sum()) if is_text else len(inputs["input_ids"])
        self._loss_sum += float(loss.float().mean()) * count if count else 0.0
        self._loss_tokens += count

    def _reduce(self, vision: Tensor, text: Tensor, layer: int, layers: int) -> None:
        if self._metric is None:
            self._metric = ModalityIntegrationRate(
                layers, vision.shape[1], self.variant, sync_on_compute=self.distributed, **self.options
            ).to(vision.device)
        # The layers of a model spread over devices do not all lie where the metric does.
        vision, text = (tokens.to(self.metric.device) for tokens in (vision, text))
        self.metric.update(vision, text, layer=layer)
        if layer + 1 == self.sample_layer:
            for parts, tokens in zip(self._samples, (vision, text), strict=True):
                parts.append(tokens[:: max(1, len(tokens) // self._sample_share)].float())

    def loss(self) -> float | None:
        """Mean cross-entropy over all labelled tokens; ``None`` without any."""
        total, tokens = self._loss_sum, float(self._loss_tokens)
        if self.distributed:
            total, tokens = sum_over_ranks([total, tokens], self.network.device)
        return total / tokens if tokens else None

    def sample(self) -> tuple[Tensor, Tensor]:
        """Some vision and text tokens of one layer, ``[n, d]`` float32, spread over this rank's batches."""
        empty = torch.zeros(0, self.metric.hidden_size)
        vision, text = (torch.cat(parts)[:_SAMPLE_SIZE].cpu() if parts else empty for parts in self._samples)
        return vision, text
