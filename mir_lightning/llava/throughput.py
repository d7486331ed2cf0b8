"""How fast a run trains, what share of the hardware's peak that is, and how long it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from mir_lightning.callbacks.base import ProbingCallback
from mir_lightning.llava.restart import between_steps
from mir_lightning.llava.schedule import Part, parameters_of


class TimedLoader(DataLoader):
    """A DataLoader that counts the seconds in which batches were waited for.

    Attributes:
        waited: so far.
    """

    waited: float = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch


class Throughput(ThroughputMonitor):
    """Lightning's throughput, without the time of probes, and the share of time that was spent waiting for data.

    Logged with the training rows: ``train/device/samples_per_sec`` and ``train/device/items_per_sec`` (tokens), of
    all devices together without ``device/`` where there are several, ``train/device/mfu`` where Lightning knows
    the hardware's peak, and ``train/data_wait``, the share of the step on rank 0.

    Args:
        window_size: batches that rates are averaged over; there are none before so many.
    """

    def __init__(self, window_size: int = 20) -> None:
        super().__init__(batch_size_fn=_samples, length_fn=_tokens, window_size=window_size)
        self._probed = self._waited = self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Begin to count."""
        super().on_train_start(trainer, *args)
        self._probed = _probing_seconds(trainer)
        self._waited, self._since = _waited(trainer), time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a batch into account, and log with the step that ends an accumulation."""
        probed = _probing_seconds(trainer)
        spent, self._probed = probed - self._probed, probed
        self._since += spent
        if RunningStage.TRAINING in self._t0s:  # on rank 0
            self._t0s[RunningStage.TRAINING] += spent
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if between_steps(trainer, batch_idx):
            waited, now = _waited(trainer), time.perf_counter()
            share = (waited - self._waited) / max(now - self._since, 1e-9)
            pl_module.log("train/data_wait", min(share, 1.0), rank_zero_only=True)
            self._waited, self._since = waited, now


def _samples(batch: Mapping[str, Tensor]) -> int:
    return len(batch["input_ids"])


def _tokens(batch: Mapping[str, Tensor]) -> int:
    return int(batch["attention_mask"].sum())


def _probing_seconds(trainer: pl.Trainer) -> float:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(callback.budget.evaluating for callback in callbacks if isinstance(callback, ProbingCallback))


def _waited(trainer: pl.Trainer) -> float:
    return getattr(trainer.train_dataloader, "waited", 0.0)


class TrainingFlops(NamedTuple):
    """Floating-point operations of training, forward and backward, without recomputation.

    Attributes:
        token: of each token in the LLM and projector.
        prediction: of each position with logits.
        patch: of each vision token in the encoder.
        attention: of each token, times the length of its sequence.
    """

    token: float
    prediction: float
    patch: float
    attention: float

    def of_batch(self, batch: Mapping[str, Tensor], vision: Tensor) -> float:
        """Of a batch whose vision positions are the boolean ``vision``; its padding left out."""
        tokens = batch["attention_mask"].sum(dim=1).double()
        predictions = (batch["labels"] != -100).sum()
        attention = self.attention * tokens.square().sum()
        return float(
            self.token * tokens.sum() + self.prediction * predictions + self.patch * vision.sum() + attention
        )


def training_flops(vlm: PreTrainedModel) -> TrainingFlops:
    """What a dense model with a transformer encoder costs, as far frozen as it is.

    A matrix of P weights takes 2P a token in the forward pass, 2P where a gradient passes through it, 2P where it
    learns; attention 4 times the width a layer, token and position, twice again for its gradient (PaLM, arXiv
    2204.02311, appendix B). Gradients are taken to pass through the whole LLM, and through the encoder where it
    learns.
    """
    vision = {id(p) for p in parameters_of(vlm, Part("vision", 1.0)).values()}
    encoder_learns = any(p.requires_grad for p in vlm.parameters() if id(p) in vision)
    head = vlm.get_output_embeddings().weight
    embeddings = {id(module.weight) for module in vlm.modules() if isinstance(module, nn.Embedding)}
    token = prediction = patch = 0.0
    for parameter in vlm.parameters():
        if parameter.ndim < 2 or (id(parameter) in embeddings and parameter is not head):
            continue
        of_encoder = id(parameter) in vision
        cost = parameter.numel() * (2 + 2 * (encoder_learns or not of_encoder) + 2 * parameter.requires_grad)
        if parameter is head:
            prediction += cost
        elif of_encoder:
            patch += cost
        else:
            token += cost
    config = vlm.config.get_text_config(decoder=True)
    return TrainingFlops(token, prediction, patch, 3 * 4 * config.num_hidden_layers * config.hidden_size)
