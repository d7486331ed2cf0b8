"""``evaluate_image_gain``: what its own picture is worth to each text of a probe."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mir_lightning.metrics.image_gain import ImageGain
from mir_lightning.probing.batches import MaskedBatches
from mir_lightning.probing.exchange import Exchange
from mir_lightning.probing.isolation import leave_no_trace
from mir_lightning.probing.network import Forward, Network, map_pixels
from mir_lightning.probing.probe import Probe, ProbeLike
from mir_lightning.probing.ranks import fit_into_memory, run_together, sum_over_ranks

_SPECK = 1e-6  # some models take whole pictures of zeros for padding, and drop them


class SourceGain(NamedTuple):
    """Image gain of the samples of one source, in nats a token."""

    gain: float
    standard_error: float  # NaN for one sample
    samples: int


@dataclass(frozen=True)
class ImageGainResult:
    """What the pictures of a probe are worth. Nats a token; tensors are float64, on the CPU.

    Attributes:
        gain: loss with another sample's picture minus loss with the right one; 0 means that the model does not
            look.
        gain_blank: loss with a picture of one colour minus loss with the right one.
        standard_error: of ``gain``, over samples.
        standard_error_blank: of ``gain_blank``.
        samples: gain of each sample in the order of the probe, ``[N]``; NaN for one without picture or labels, or
            that met no other picture. Those are in none of the numbers here.
        samples_blank: the same against a blank picture, ``[N]``.
        loss: mean cross-entropy with the right pictures.
        tokens: number of labelled tokens.
        sources: gain by source, where the probe's batches name any.
        seconds: wall-clock time of the evaluation.
        fingerprint: of the probe.
    """

    gain: float
    gain_blank: float
    standard_error: float
    standard_error_blank: float
    samples: Tensor
    samples_blank: Tensor
    loss: float
    tokens: int
    sources: dict[str, SourceGain]
    seconds: float
    fingerprint: str


def evaluate_image_gain(
    model: nn.Module,
    probe: ProbeLike,
    *,
    forward: Forward | None = None,
    distributed: bool = False,
    image_token_id: int | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> ImageGainResult:
    """Whether a model looks: how much likelier it finds texts with their own picture than with a wrong one.

    The probe runs three times: as it is, with its texts beside each other's pictures (see
    :class:`~mir_lightning.probing.exchange.Exchange`), and with blank pictures: pixel values all but zero, the
    mean colour after normalisation. Source: visual information gain (arXiv 2602.17186). The model is left as it
    was found. Where a batch does not fit into the device's memory, all is run again in halves of the batches.

    Args:
        model: a Hugging Face vision-language model, or a module that holds one.
        probe: batches with ``labels`` ``[B, S]``, perhaps with ``source``, a list of B names, to give the gain by.
        forward: as :func:`~mir_lightning.probing.evaluate_mir` takes it.
        distributed: likewise.
        image_token_id: likewise.
        seed: of who gets whose picture.
        progress: as ``evaluate_mir`` takes it.

    Returns:
        An :class:`ImageGainResult`.

    Raises:
        ValueError: if the model's parts cannot be found, no sample of the probe has labels, or a picture, or
            another picture to see, a mask does not fit, logits are not those of ``input_ids``, or losses are not
            finite (naming the sample).
        torch.OutOfMemoryError: if single samples do not fit, or batches cannot be split.
    """
    start = time.perf_counter()
    network, probe = Network(model, forward, image_token_id=image_token_id), Probe.of(probe)
    exchange = Exchange(network, probe, seed)
    with leave_no_trace(network.model):
        losses = fit_into_memory(
            lambda arms: _losses(network, exchange, arms, distributed, progress),
            exchange.arms,
            lambda arms: [half for arm in arms if (half := arm.halved()) is not None] or None,
        )
    paired = exchange.paired

    def metric_of(chosen: Tensor) -> ImageGain:
        metric = ImageGain(sync_on_compute=False)
        right, other, blank = losses[:, chosen]
        metric.update(right, other, blank, exchange.tokens[chosen])
        return metric

    found = metric_of(paired).compute_breakdown()
    sources = {}
    for name in sorted({name for name in exchange.sources if name is not None}):
        chosen = paired & torch.tensor([name == source for source in exchange.sources])
        if chosen.any():
            of_source = metric_of(chosen).compute_breakdown()
            sources[name] = SourceGain(of_source.gain, of_source.standard_error, int(chosen.sum()))
    nowhere = torch.full(paired.shape, math.nan, dtype=torch.float64)
    placed = {name: nowhere.masked_scatter(paired, getattr(found, name)) for name in ("samples", "samples_blank")}
    fields: Any = {**found._asdict(), **placed}
    seconds = time.perf_counter() - start
    return ImageGainResult(**fields, sources=sources, seconds=seconds, fingerprint=probe.fingerprint)


def _losses(
    network: Network, exchange: Exchange, arms: list[MaskedBatches], distributed: bool, progress: str | None
) -> Tensor:
    """Of each sample with the right, another and a blank picture, summed over its labelled tokens, ``[3, N]``."""
    own, exchanged = arms
    found = torch.zeros(3, len(exchange.paired), dtype=torch.float64)
    samples, texts = (x.split(exchange.sizes) for x in (torch.arange(found.shape[1]), exchange.text_of))

    def run(index: int, counts: bool) -> None:
        place, rows = own.parts[index]
        for arm, batches, read in ((0, own, samples), (1, exchanged, texts), (2, own, samples)):
            inputs = network.inputs(batches[index][0])
            sums = _sums(network, map_pixels(inputs, _blank) if arm == 2 else inputs)
            if not sums.isfinite().all():
                bad = int(read[place][rows][~sums.isfinite()][0])
                raise ValueError(f"the loss of sample {bad} is NaN or inf: the model has diverged or overflowed.")
            if counts:
                found[arm, read[place][rows]] = sums

    run_together(len(own), run, distributed, network.device, progress)
    if distributed:
        total = sum_over_ranks(found.flatten().tolist(), network.device)
        found = torch.tensor(total, dtype=found.dtype).view(3, -1)
    return found


def _blank(pixels: Tensor) -> Tensor:
    """Every picture of one colour; what is padding stays padding."""
    return torch.full_like(pixels, 128) if pixels.dtype == torch.uint8 else pixels.where(pixels == 0, _SPECK)


def _sums(network: Network, inputs: dict[str, Any]) -> Tensor:
    """Cross-entropy summed over each row's labelled tokens, ``[B]``; only their logits become float32."""
    labels = inputs.pop("labels")
    first = (labels[:, 1:] != -100).any(dim=0).nonzero()[:1].sum()  # before it no logits are needed
    wanted = labels.shape[1] - int(first)
    logits = getattr(network.run(inputs, logits=wanted), "logits", None)
    shape = (len(labels), wanted)
    if not isinstance(logits, Tensor) or logits.shape[:-1] not in (shape, labels.shape):
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(network.model).__name__} gave logits {given} where [B, S, V] with B, S = "
            f"{list(labels.shape)} of input_ids was expected: the image gain needs the logits of every token."
        )
    targets = labels[:, 1 - wanted :].to(logits.device)
    rows, places = (targets != -100).nonzero(as_tuple=True)
    losses = cross_entropy(logits[:, -wanted:][rows, places].float(), targets[rows, places], reduction="none")
    return torch.zeros(len(labels), dtype=torch.float64).index_add(0, rows.cpu(), losses.cpu().double())
