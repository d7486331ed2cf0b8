"""What training costs: speed, the share of time spent waiting for data, floating-point operations, and memory."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from transformers import PreTrainedModel

from mir_lightning.callbacks.schedule import tokens_of
from mir_lightning.llava.data.packing import samples_of
from mir_lightning.llava.model.experts import expert_matrices
from mir_lightning.llava.model.stages import Stage, optimizer_groups
from mir_lightning.llava.trainer import between_steps, probing_callbacks
from mir_lightning.vlm import PartName, parameters_of

_WAITING = "[_TrainingEpochLoop].train_dataloader_next"  # Lightning's name of it


class StepTimer(SimpleProfiler):
    """What Lightning did since the last optimizer step, and how long each action took; it reports nothing."""

    def describe(self) -> None:
        """Nothing."""


class Throughput(ThroughputMonitor):
    """Lightning's throughput, without the time of probes, and the share of time that was spent waiting for data.

    Logged with the training rows: ``train/device/samples_per_sec`` and ``train/device/items_per_sec`` (tokens), of
    all devices together without ``device/`` where there are several, ``train/device/mfu`` where Lightning knows
    the hardware's peak, and ``train/data_wait``, the share of the step on rank 0 (unless a profiler is chosen).

    Args:
        window_size: batches that rates are averaged over; there are none before so many.
    """

    def __init__(self, window_size: int = 20) -> None:
        super().__init__(samples_of, tokens_of, window_size=window_size)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Time what the Trainer does, in the place of the profiler that profiles nothing."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.profiler) is PassThroughProfiler:
            trainer.profiler = StepTimer()

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Begin to count."""
        super().on_train_start(trainer, *args)
        self._probed = sum(callback.budget.evaluating for callback in probing_callbacks(trainer))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take a batch into account, and log with the step that ends an accumulation."""
        before, self._probed = self._probed, sum(c.budget.evaluating for c in probing_callbacks(trainer))
        if RunningStage.TRAINING in self._t0s:  # on rank 0
            self._t0s[RunningStage.TRAINING] += self._probed - before
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if isinstance(trainer.profiler, StepTimer) and between_steps(trainer, batch_idx):
            durations = trainer.profiler.recorded_durations
            waited, worked = (sum(durations[action]) for action in (_WAITING, "run_training_batch"))
            pl_module.log("train/data_wait", waited / (waited + worked), rank_zero_only=True)
            durations.clear()


def training_flops(vlm: PreTrainedModel) -> Callable[[Mapping[str, Tensor], Tensor], float]:
    """Floating-point operations by batch (its padding left out) and boolean mask of its vision positions.

    Forward and backward, without recomputation, of a model with a transformer encoder, as far as it learns.
    A matrix of P weights takes 2P a token in the forward pass, 2P where a gradient passes through it, 2P where it
    learns; attention 4 times the width a layer, token and position, twice again for its gradient (PaLM, arXiv
    2204.02311, appendix B). Gradients are taken to pass through the whole LLM, and an encoder that learns. The
    encoder's matrices are counted once a patch, the connector's once a vision token; of experts those that a token
    goes through.
    """
    parts: tuple[PartName, ...] = ("vision", "projector")
    owners = {id(p): part for part in parts for p in parameters_of(vlm, part, required=False).values()}
    encoder_learns = any(p.requires_grad for p in vlm.parameters() if owners.get(id(p)) == "vision")
    head = vlm.get_output_embeddings().weight
    embeddings = {id(module.weight) for module in vlm.modules() if isinstance(module, nn.Embedding)} - {id(head)}
    config = vlm.config.get_text_config(decoder=True)
    experts = expert_matrices(vlm)
    cost: dict[str, float] = defaultdict(float)
    for parameter in vlm.parameters():
        part = "head" if parameter is head else owners.get(id(parameter), "llm")
        if parameter is head or (parameter.ndim > 1 and id(parameter) not in embeddings):
            passed = encoder_learns or part != "vision"
            active = config.num_experts_per_tok / len(parameter) if id(parameter) in experts else 1
            cost[part] += active * parameter.numel() * (2 + 2 * passed + 2 * parameter.requires_grad)
    tokens_per_image = getattr(vlm.config, "image_seq_length", 1)
    patches = getattr(vlm.config, "features_per_image", tokens_per_image) / tokens_per_image  # behind each token
    a_vision_token = cost["projector"] + cost["vision"] * patches
    attention = 3 * 4 * config.num_hidden_layers * config.hidden_size

    def of_batch(batch: Mapping[str, Tensor], vision_mask: Tensor) -> float:
        valid = batch["attention_mask"].bool()
        positions = batch.get("position_ids", valid.cumsum(dim=1) - 1)
        squares = (2 * positions + 1)[valid].sum().double()  # of the samples' lengths
        predictions = (batch["labels"][:, 1:] != -100).sum()
        whole = cost["llm"] * valid.sum() + cost["head"] * predictions + a_vision_token * vision_mask.sum()
        return float(whole + attention * squares)

    return of_batch


class TrainingMemory(NamedTuple):
    """Bytes a device of float32 weights, gradients, and AdamW's two moments; activations come on top."""

    weights: int
    gradients: int
    optimizer: int

    def __str__(self) -> str:
        weights, gradients, optimizer = (size / 1e9 for size in self)
        return (
            f"{sum(self) / 1e9:.1f} GB a device: weights {weights:.1f}, gradients {gradients:.1f}, AdamW "
            f"{optimizer:.1f}; activations come on top"
        )


def training_memory(vlm: PreTrainedModel, stages: Sequence[Stage], shards: int = 1) -> TrainingMemory:
    """Of a model (on the meta device will do) through all stages; ``shards`` devices share it all (FSDP2).

    The weights are float32: mixed precision keeps them, too.
    """
    weights = sum(parameter.numel() for parameter in vlm.parameters())
    learning = sum(p.numel() for group in optimizer_groups(vlm, stages) for p in group.parameters.values())
    return TrainingMemory(*(4 * count // shards for count in (weights, learning, 2 * learning)))
