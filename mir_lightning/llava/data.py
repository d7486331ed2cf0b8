"""The recipe's data: training batches that resume anywhere, and the held-out probe."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, Subset

from mir_lightning.functional.checks import check_at_least_one
from mir_lightning.llava.collate import ConversationCollator
from mir_lightning.llava.datasets import (
    RecordsDataset,
    Replacing,
    Sample,
    ShapesDataset,
    TableDataset,
)
from mir_lightning.llava.prompts import IMAGE, ChatPrompt, PlainPrompt
from mir_lightning.llava.questions import shapes_choices, shapes_few_shot
from mir_lightning.llava.sampling import EpochBatches
from mir_lightning.llava.throughput import TimedLoader
from mir_lightning.probing.choices.few_shot import FewShotProbe
from mir_lightning.probing.choices.items import ChoiceItem, load_choice_items
from mir_lightning.probing.choices.m3_bench import load_m3_bench
from mir_lightning.probing.choices.probe import ChoiceProbe
from mir_lightning.probing.images import UnreadableImageError
from mir_lightning.probing.pairs import PairProbe, read_pairs
from mir_lightning.probing.probe import Probe


def _remedy(wanted: int, batch_size: int, devices: int) -> str:
    """What would make a global batch divide."""
    fitting = batch_size * devices * -(-wanted // (batch_size * devices))
    if wanted % devices:
        return f"set data.global_batch_size to a multiple of the devices, such as {fitting}"
    a_device = wanted // devices
    size = next(size for size in range(min(batch_size, a_device), 0, -1) if a_device % size == 0)
    return f"set data.batch_size={size}, or data.global_batch_size={fitting}"


class PretrainingData(pl.LightningDataModule):
    """Training batches and the held-out probe, of files, a dataset, shards or drawn shapes.

    Args:
        files: LLaVA-format ``.json`` or ``.jsonl`` files, several at once.
        image_folder: folder that the paths in ``files`` start from.
        dataset: folder of a Hugging Face dataset (``save_to_disk``) or of parquet files, pictures with captions.
        image_column: of ``dataset``.
        caption_column: of ``dataset``.
        shards: folder or object store (``s3://...``) of LitData shards, LLaVA-format records with pictures.
        data_scale: number of training samples, drawn at random with ``seed``; all when None. Of drawn shapes, the
            samples of an epoch.
        batch_size: samples a batch, on each device.
        global_batch_size: samples an optimizer step over all devices; gradients are accumulated to it.
        prompt: ``"plain"`` (LLaVA's pre-training: picture, caption, line break) or ``"chat"`` (the tokenizer's
            template).
        system: system text of ``"chat"``.
        max_length: tokens of a sample.
        max_unreadable: share of the samples that may have pictures that cannot be read; beyond it the run stops.
        group_by_length: put samples of like length into a batch, for less padding.
        probe_size: samples held out of the training data, for the probe.
        caption_pictures: held-out pictures to write captions of at every evaluation; 0 for none.
        choice_items: ``.jsonl`` file of multiple-choice items, or an M3-Bench folder, for the Soft Discrimination
            Score.
        shapes_choices: items of each built-in task on drawn shapes instead; 0 for none.
        shapes_few_shot: captions and short answers on drawn shapes, of each task, for the few-shot baseline; 0 for
            none.
        seed: of every draw.
        num_workers: processes that read and draw; 0 does it in the training process.
    """

    def __init__(
        self,
        files: Sequence[Path] = (),
        image_folder: Path | None = None,
        dataset: Path | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        shards: str | None = None,
        data_scale: int | None = None,
        batch_size: int = 16,
        global_batch_size: int | None = None,
        prompt: Literal["plain", "chat"] = "plain",
        system: str | None = None,
        max_length: int = 2048,
        max_unreadable: float = 0.01,
        group_by_length: bool = True,
        probe_size: int = 64,
        caption_pictures: int = 4,
        choice_items: Path | None = None,
        shapes_choices: int = 0,
        shapes_few_shot: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_at_least_one(batch_size=batch_size, probe_size=probe_size, max_length=max_length)
        if data_scale is not None:
            check_at_least_one(data_scale=data_scale)
        if sum((bool(files), dataset is not None, shards is not None)) > 1:
            raise ValueError("data: give one of files, dataset and shards.")
        if files and image_folder is None:
            raise ValueError("data: files need an image_folder.")
        if not 0 <= max_unreadable < 1:
            raise ValueError(f"max_unreadable must lie in [0, 1), got {max_unreadable}.")
        self.files = files
        self.image_folder = image_folder
        self.dataset = dataset
        self.columns = (image_column, caption_column)
        self.shards = shards
        self.data_scale = data_scale
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.prompt = prompt
        self.system = system
        self.max_length = max_length
        self.max_unreadable = max_unreadable
        self.group_by_length = group_by_length
        self.probe_size = probe_size
        self.caption_pictures = caption_pictures
        self.choice_items = choice_items
        self.shapes_choices = shapes_choices
        self.shapes_few_shot = shapes_few_shot
        self.seed = seed
        self.num_workers = num_workers
        self.unreadable: list[str] = []
        self._split: tuple[Any, Any] | None = None
        self._epoch = self._done = 0
        self._batches_an_epoch = 1
        self._stream: Any = None
        self._stream_state: dict[str, Any] | None = None

    def split(self) -> tuple[Any, Any]:
        """Training and held-out samples, drawn once."""
        if self._split is None:
            if self.shards is not None:
                from mir_lightning.llava.shards import open_shards

                self._split = open_shards(self.shards, self.probe_size, self.data_scale, self.seed)
            else:
                everything = self._all()
                self._split = self._shapes() if everything is None else self._drawn(everything)
        return self._split

    def _shapes(self) -> tuple[Dataset, Dataset]:
        return (
            ShapesDataset("train", self.data_scale or 960, self.seed),
            ShapesDataset("held_out", self.probe_size, self.seed),
        )

    def _all(self) -> Dataset | None:
        if self.dataset is not None:
            return TableDataset(self.dataset, *self.columns)
        if self.files and self.image_folder is not None:
            return RecordsDataset(self.files, self.image_folder)
        return None

    def _drawn(self, everything: Any) -> tuple[Dataset, Dataset]:
        """A seeded draw: the probe first, so that it is the same at every ``data_scale``."""
        order = list(range(len(everything)))
        random.Random(self.seed).shuffle(order)
        held_out = self.probe_size
        wanted = self.data_scale or len(order) - held_out
        if wanted < 1 or held_out + wanted > len(order):
            raise ValueError(
                f"data_scale={self.data_scale} and a probe of {held_out} need more than the {len(order)} samples "
                "given."
            )
        chosen = order[held_out : held_out + wanted]
        return Subset(Replacing(everything), chosen), Subset(Replacing(everything), order[:held_out])

    def train_dataloader(self) -> DataLoader:
        """Batches of the training samples, from where an interrupted epoch stopped."""
        if self.shards is not None:
            from mir_lightning.llava.shards import ShardsLoader

            self._stream = ShardsLoader(self.split()[0], self.batch_size, self._collator(), self.num_workers)
            self._resume_stream()
            return self._stream
        trainer = self._trainer()
        dataset = self.split()[0]
        batches = EpochBatches(
            self._lengths(dataset),
            self.batch_size,
            self.seed,
            self._position,
            trainer.global_rank,
            trainer.world_size,
        )
        self._batches_an_epoch = len(batches)
        return TimedLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self._collator(),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),  # leaves the global random state alone
        )

    def accumulate(self, trainer: pl.Trainer) -> None:
        """Set the Trainer's gradient accumulation from ``global_batch_size``.

        Raises:
            ValueError: if ``global_batch_size`` is no multiple of what the devices take at once.
        """
        if self.global_batch_size is None:
            return
        at_once = self.batch_size * trainer.world_size
        if self.global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is no multiple of batch_size={self.batch_size} times "
                f"{trainer.world_size} devices: "
                f"{_remedy(self.global_batch_size, self.batch_size, trainer.world_size)}."
            )
        trainer.accumulate_grad_batches = self.global_batch_size // at_once

    def _position(self) -> tuple[int, int]:
        """Epoch, and its batches that are done; where all are, the next epoch.

        Counted here, because the Trainer's own count is not restored yet when workers ask for their first batches.
        """
        if self._done >= self._batches_an_epoch:
            self._epoch, self._done = self._epoch + 1, 0
        return self._epoch, self._done

    def _lengths(self, dataset: Any) -> list[int] | int:
        """Of the records that were drawn; of other data, only their number is known beforehand."""
        if self.group_by_length and self.files:
            lengths = dataset.dataset.dataset.lengths()
            return [lengths[i] for i in dataset.indices]
        return len(dataset)

    def probe(self, images: Path | None = None, texts: Path | None = None) -> Probe:
        """The probe for :class:`~mir_lightning.MIRCallback`: held-out samples with their labels, or other files.

        Args:
            images: folder of pictures, with ``texts`` in the manner of the MIR paper.
            texts: folder of texts.

        Raises:
            ValueError: for one folder without the other, or one that holds fewer than ``probe_size``.
        """
        module: Any = self._trainer().lightning_module
        if (images is None) != (texts is None):
            raise ValueError("probe: images and texts go together.")
        if images is not None and texts is not None:
            pairs = read_pairs(images, texts, self.probe_size)
            return PairProbe(module.processor, module.vlm.config, pairs, self.batch_size)
        collate = self._collator()
        held_out: Any = self.split()[1]
        starts = range(0, len(held_out), self.batch_size)
        chunks = [[held_out[i] for i in range(s, min(s + self.batch_size, len(held_out)))] for s in starts]
        batches = [collate(chunk) for chunk in chunks]
        for line in (line for batch in batches for line in batch.pop("unreadable")):
            rank_zero_warn(f"replaced in the probe: {line}")
        return Probe(batches)

    def choices(self) -> ChoiceProbe:
        """Multiple-choice items for :class:`~mir_lightning.SDSCallback`, asked as the model is trained to answer.

        Raises:
            ValueError: if there are none.
        """
        processor: Any = self._trainer().lightning_module.processor
        if self.choice_items is not None:
            load = load_m3_bench if self.choice_items.is_dir() else load_choice_items
            items = load(self.choice_items)
        else:
            items = shapes_choices(self.shapes_choices, self.seed)
        return ChoiceProbe(items, processor, self._template(processor))

    def captions(self) -> FewShotProbe:
        """The first pictures of the held-out samples, asked for their captions as in training.

        Raises:
            ValueError: if no held-out sample is one picture with an answer.
        """
        processor: Any = self._trainer().lightning_module.processor
        items = list(islice(self._held_out_items(), self.caption_pictures))
        if not items:
            raise ValueError("caption_pictures: no held-out sample is one picture with an answer; set it to 0.")
        return FewShotProbe(items, (), processor, shots=(0,), template=self._template(processor))

    def _held_out_items(self) -> Iterator[ChoiceItem]:
        held_out: Any = self.split()[1]
        for index in range(len(held_out)):
            sample: Sample = held_out[index]
            if len(sample.images) == 1 and len(sample.turns) > 1:
                asked = sample.turns[0] if self.prompt == "chat" else ""
                prompt = asked if IMAGE in asked else f"{IMAGE}\n{asked}" if asked else IMAGE
                yield ChoiceItem(
                    f"held out {index}", prompt, sample.turns[1], (), "caption", "caption", sample.images
                )

    def _template(self, processor: Any) -> str:
        """How a question is put to the model, as it is trained to answer."""
        if self.prompt == "plain":
            return "{prompt}"
        return ChatPrompt(processor.tokenizer, self.system).question("{prompt}")

    def few_shot(self) -> FewShotProbe:
        """Built-in captions and short answers after 0, 4 and 8 examples, with MM1's prompts."""
        processor: Any = self._trainer().lightning_module.processor
        items, examples = shapes_few_shot(self.shapes_few_shot, self.seed)
        return FewShotProbe(items, examples, processor)

    def _collator(self) -> ConversationCollator:
        processor: Any = self._trainer().lightning_module.processor
        prompt = ChatPrompt(processor.tokenizer, self.system) if self.prompt == "chat" else PlainPrompt()
        return ConversationCollator(processor, prompt, self.max_length)

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("PretrainingData takes its processor from the module: attach it to a Trainer.")
        return self.trainer

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the batches, and the pictures that were left out; stop the run beyond ``max_unreadable``."""
        self._done += 1
        for line in batch.pop("unreadable", ()):
            self.unreadable.append(line)
            rank_zero_warn(f"left out: {line}")
        allowed = self.max_unreadable * len(self.split()[0])
        if len(self.unreadable) > allowed:
            raise UnreadableImageError(
                f"{len(self.unreadable)} pictures cannot be read: more than max_unreadable={self.max_unreadable:g}"
                f" of the samples; the last: {'; '.join(self.unreadable[-5:])}"
            )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is, and what was left out so far."""
        stream = None if self._stream is None else self._stream.state_dict()
        return {"epoch": self._epoch, "done": self._done, "unreadable": self.unreadable, "stream": stream}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._epoch, self._done = state_dict["epoch"], state_dict["done"]
        self.unreadable = list(state_dict["unreadable"])
        self._stream_state = state_dict["stream"]
        self._resume_stream()

    def _resume_stream(self) -> None:
        """A Trainer would do it, but not where it has made the loader before, to count the steps of the run."""
        if self._stream is not None and self._stream_state is not None:
            self._stream.load_state_dict(self._stream_state)
            self._stream_state = None
