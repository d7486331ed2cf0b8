"""The recipe's data: batches that resume anywhere, and samples held out of them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from mir_lightning.files import read_text
from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.llava.data.batches import ConversationCollator, EpochBatches
from mir_lightning.llava.data.documents import Documents
from mir_lightning.llava.data.mixture import Mixed, Mixture
from mir_lightning.llava.data.prompts import ChatPrompt, PlainPrompt, missing_start
from mir_lightning.llava.data.records import Records
from mir_lightning.llava.data.shards import Shards
from mir_lightning.llava.data.source import Source
from mir_lightning.llava.data.table import Table
from mir_lightning.llava.demo.emoji import EmojiScenes
from mir_lightning.llava.demo.shapes import Shapes
from mir_lightning.probing.choices.styles import StyleName
from mir_lightning.probing.images import UnreadableImageError

__all__ = [
    "Documents",
    "EmojiScenes",
    "Mixture",
    "PretrainingData",
    "Records",
    "Shapes",
    "Shards",
    "Table",
]  # a source's name is enough in a config


@dataclass(eq=False, repr=False)
class PretrainingData(pl.LightningDataModule):
    """Training batches, and the samples that probes are made of.

    Args:
        source: of the samples: Records, Table, Documents, Shards, Shapes (drawn ones, by default),
            EmojiScenes, or a Mixture.
        held_out: where held-out samples come from, if not from ``source``.
        data_scale: number of training samples, drawn at random with ``seed``; all when None. Of drawn shapes, the
            samples of an epoch.
        batch_size: samples a batch, on each device.
        global_batch_size: samples an optimizer step over all devices; gradients are accumulated to it.
        prompt: ``"plain"`` (LLaVA's pre-training: picture, caption, line break) or ``"chat"`` (the tokenizer's
            template).
        system: system text of ``"chat"``.
        chat_template: file with a Jinja template for ``"chat"``, instead of the model's own; it is saved with the
            model.
        max_length: tokens of a sample.
        pack: put the samples of a batch into rows of ``max_length`` tokens, as many as go into each.
        max_unreadable: share of the samples that may be left out, for pictures that cannot be read or texts that
            nothing can be learned of; beyond it the run stops.
        group_by_length: put samples of like length into a batch, for less padding.
        probe_size: samples held out of the training data, for the probe.
        gain_samples: how many of those the image gain is measured on; 0 for none.
        caption_pictures: held-out pictures to write captions of at every evaluation; 0 for none.
        choice_items: ``.jsonl`` file of multiple-choice items, or an M3-Bench folder, for the Soft Discrimination
            Score.
        answers: questions of each task to be answered in writing and scored by exact match, of that file or on the
            drawn pictures; 0 for none.
        choice_style: ask them as RADAR's released script for ``"llava"``, ``"qwen"`` or ``"internvl"`` models,
            instead of as the model is trained.
        shapes_choices: items of each built-in task on drawn pictures instead; 0 for none.
        shapes_few_shot: captions and short answers on drawn pictures, of each task, for the few-shot baseline; 0
            for none.
        seed: of every draw.
        num_workers: processes that read and draw; 0 does it in the training process.
    """

    source: Source | None = None
    held_out: Source | None = None
    data_scale: int | None = None
    batch_size: int = 16
    global_batch_size: int | None = None
    prompt: Literal["plain", "chat"] = "plain"
    system: str | None = None
    chat_template: Path | None = None
    max_length: int = 2048
    pack: bool = False
    max_unreadable: float = 0.01
    group_by_length: bool = True
    probe_size: int = 64
    gain_samples: int = 32
    caption_pictures: int = 4
    choice_items: Path | None = None
    choice_style: StyleName | None = None
    shapes_choices: int = 0
    shapes_few_shot: int = 0
    answers: int = 0
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        sizes = {"batch_size": self.batch_size, "probe_size": self.probe_size, "max_length": self.max_length}
        check_at_least_one(**sizes, data_scale=1 if self.data_scale is None else self.data_scale)
        if self.chat_template is not None and (self.prompt != "chat" or not self.chat_template.is_file()):
            raise ValueError(f'chat_template: a file that goes with prompt="chat", got {self.chat_template}.')
        if not 0 <= self.max_unreadable < 1:
            raise ValueError(f"max_unreadable must lie in [0, 1), got {self.max_unreadable}.")
        self._source = Shapes() if self.source is None else self.source
        self.unreadable: list[str] = []
        self.source_names: list[str] = self._source.names if isinstance(self._source, Mixture) else []
        self.drawn = dict.fromkeys(self.source_names, 0)  # samples that this rank has trained on, of each source
        self._epoch = self._done = 0
        self._batches_an_epoch = 1
        self._stream: Any = None
        self._stream_state: dict[str, Any] | None = None

    @cached_property
    def samples(self) -> tuple[Any, Any]:
        """Training and held-out samples, drawn once."""
        training, held_out = self._source.split(self.probe_size, self.data_scale, self.seed)
        if self.held_out is not None:
            held_out = self.held_out.split(self.probe_size, None, self.seed)[1]
        return training, held_out

    def setup(self, stage: str) -> None:
        """Give the model's processor its template."""
        if self.chat_template is not None:
            module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
            module.processor.chat_template = read_text(self.chat_template)

    @property
    def collate(self) -> ConversationCollator:
        """What makes batches of samples, with the processor of the model in training."""
        if self.trainer is None:
            raise RuntimeError("PretrainingData takes its processor from the module: attach it to a Trainer.")
        processor: Any = self.trainer.lightning_module.processor
        tokenizer, prompt = processor.tokenizer, PlainPrompt(missing_start(processor.tokenizer))
        if self.prompt == "chat":
            prompt = ChatPrompt(tokenizer, self.system, getattr(processor, "chat_template", None))
        return ConversationCollator(processor, prompt, self.max_length, self.pack)

    def accumulate(self, trainer: pl.Trainer) -> None:
        """Set gradient accumulation by ``global_batch_size``; a ``ValueError`` if the devices cannot share it."""
        wanted, size, devices = self.global_batch_size, self.batch_size, trainer.world_size
        if wanted is None:
            return
        trainer.accumulate_grad_batches, rest = divmod(wanted, size * devices)
        if rest:
            fitting = size * devices * (trainer.accumulate_grad_batches + 1)
            remedy = f"set data.global_batch_size to a multiple of the devices, such as {fitting}"
            a_device, unequal = divmod(wanted, devices)
            if not unequal:
                fits = next(n for n in range(min(size, a_device), 0, -1) if a_device % n == 0)
                remedy = f"set data.batch_size={fits}, or data.global_batch_size={fitting}"
            taken = f"batch_size={size} times {devices} devices"
            raise ValueError(f"global_batch_size={wanted} is no multiple of {taken}: {remedy}.")

    def train_dataloader(self) -> Any:
        """Batches of the training samples, from where an interrupted epoch stopped."""
        training, collate, trainer = self.samples[0], self.collate, self.trainer
        size, workers = self.batch_size, self.num_workers
        collate.check()
        self._stream = self._source.stream(training, collate, batch_size=size, num_workers=workers)
        if self._stream is not None:
            self._resume_stream()
            return self._stream
        lengths = self._source.lengths() if self.group_by_length and not self.pack else None
        sizes = len(training) if lengths is None else [lengths[index] for index in training.indices]
        ranks = (trainer.global_rank, trainer.world_size)  # type: ignore[union-attr]
        order = training.order if isinstance(training, Mixed) else None
        batches = EpochBatches(sizes, size, self.seed, self._position, *ranks, order=order)
        self._batches_an_epoch = len(batches)
        generator = torch.Generator().manual_seed(self.seed)  # leaves the global random state alone
        return DataLoader(
            training, batch_sampler=batches, collate_fn=collate, num_workers=workers, generator=generator
        )

    def _position(self) -> tuple[int, int]:
        """Epoch, and its batches that are done; where all are, the next epoch.

        Counted here, because the Trainer's own count is not restored yet when workers ask for their first batches.
        """
        if self._done >= self._batches_an_epoch:
            self._epoch, self._done = self._epoch + 1, 0
        return self._epoch, self._done

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the batches, sources, and pictures that were left out; stop the run beyond ``max_unreadable``."""
        self._done += 1
        for name in self.source_names:
            self.drawn[name] += batch["source"].count(name)
        for line in batch.pop("unreadable", ()):
            self.unreadable.append(line)
            rank_zero_warn(f"left out: {line}")
        if len(self.unreadable) > self.max_unreadable * len(self.samples[0]):
            raise UnreadableImageError(
                f"{len(self.unreadable)} samples cannot be used: more than max_unreadable={self.max_unreadable:g}"
                f" of them; the last: {'; '.join(self.unreadable[-5:])}"
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is, and what was left out so far."""
        stream = None if self._stream is None else self._stream.state_dict()
        place = {"epoch": self._epoch, "done": self._done, "drawn": self._drawn_by_all()}
        return {**place, "unreadable": self.unreadable, "stream": stream}

    def _drawn_by_all(self) -> dict[str, int]:
        """Samples that all ranks have trained on, of each source; every rank has to ask."""
        if self.trainer is None or not self.drawn:
            return dict(self.drawn)
        strategy = self.trainer.strategy
        counts = torch.tensor(list(self.drawn.values()), device=strategy.root_device)
        whole = strategy.reduce(counts, reduce_op="sum").tolist()
        return dict(zip(self.drawn, whole, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._epoch, self._done = state_dict["epoch"], state_dict["done"]
        self.unreadable = list(state_dict["unreadable"])
        first = self.trainer is None or self.trainer.is_global_zero  # the counts are those of all ranks
        self.drawn = {name: state_dict["drawn"].get(name, 0) * first for name in self.source_names}
        self._stream_state = state_dict["stream"]
        self._resume_stream()

    def _resume_stream(self) -> None:
        """A Trainer would do it, but not where it has made the loader before, to count the steps of the run."""
        if self._stream is not None and self._stream_state is not None:
            self._stream.load_state_dict(self._stream_state)
            self._stream_state = None
