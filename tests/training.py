"""A tiny pre-training run with Lightning."""

import csv
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from tests.items import picture
from tests.models import tiny_batch, tiny_llava
from tests.processors import build

STEPS = 6


class Pretraining(pl.LightningModule):
    """Knows nothing of MIR; draws random numbers in training, so that a disturbed RNG would show."""

    def __init__(self, **kwargs):
        super().__init__()
        self.vlm = tiny_llava(dropout=0.1, **kwargs)
        self.vlm.train()
        self.vlm.model.vision_tower.eval()

    def training_step(self, batch, batch_idx):
        loss = self.vlm(**batch).loss * (1 + 0.01 * torch.rand(()))
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader([tiny_batch(seed=s) for s in range(8)], batch_size=None, shuffle=True)


def fit(folder, callbacks=(), module=None, ckpt_path=None, data=None, **options):
    pl.seed_everything(0, verbose=False)
    module = module or Pretraining()
    options = {"logger": CSVLogger(folder), "max_steps": STEPS, "enable_checkpointing": False, **options}
    options.setdefault("enable_progress_bar", False)
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


class Manual(Pretraining):
    """Two optimizers: every batch is two optimizer steps to Lightning."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.AdamW(part.parameters(), lr=1e-3)
            for part in (self.vlm.model.language_model, self.vlm.model.multi_modal_projector)
        ]


class Captioning(Pretraining):
    """Tiny LLaVA with a real processor; draws random numbers in training."""

    def __init__(self):
        pl.LightningModule.__init__(self)
        self.vlm, self.processor = build("llava", attention_dropout=0.1)
        self.vlm.train()
        self.vlm.model.vision_tower.eval()

    def train_dataloader(self):
        return DataLoader(caption_batches(self.processor), batch_size=None, shuffle=True)


def caption_batches(processor):
    captions = ("a red star", "a green cross", "two circles")
    made = []
    for seed in range(8):
        inputs = processor(
            images=[[picture(10 * seed + i)] for i in range(3)],
            text=[f"<image>A photo of {caption}" for caption in captions],
            padding=True,
            return_tensors="pt",
        )
        hidden = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == processor.image_token_id)
        made.append({**inputs, "labels": inputs["input_ids"].masked_fill(hidden, -100)})
    return made


def logged_rows(trainer):
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_run(a, b):
    (trainer, module), (other_trainer, other) = a, b
    for (name, x), y in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert [m.training for m in module.modules()] == [m.training for m in other.modules()]
    losses = [
        [(r["step"], r["train/loss"]) for r in logged_rows(t) if r["train/loss"]] for t in (trainer, other_trainer)
    ]
    assert losses[0] == losses[1]


class Environment(LightningEnvironment):
    """Processes that the test has started."""

    def __init__(self, rank, world, port):
        super().__init__()
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
        self._rank, self._world = rank, world

    creates_processes_externally = True

    def world_size(self):
        return self._world

    def global_rank(self):
        return self._rank

    def set_world_size(self, size):
        pass

    def set_global_rank(self, rank):
        pass


def strategy_of(kind, world):
    if kind == "ddp":
        return DDPStrategy(find_unused_parameters=True)
    return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)


def trainer_of(rank, world, strategy, callback, folder, **options):
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        plugins=[Environment(rank, world, 0)],
        callbacks=[callback],
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **options,
    )
