"""A tiny pre-training run with Lightning."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from tests.models import tiny_batch, tiny_llava

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


def fit(folder, callbacks=(), module=None, ckpt_path=None, **options):
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
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module
