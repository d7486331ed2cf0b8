"""A world that a tiny model learns in seconds, and faults planted in its training."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from mir_lightning import ImageGainCallback, MIRCallback
from tests.models import IMAGE_TOKEN, tiny_llava
from tests.training import fit

_CLASSES = 8
_PATTERNS = torch.randn(_CLASSES, 3, 12, 12, generator=torch.Generator().manual_seed(7))


def batches(count, seed, fault=None, size=16):
    """A word, a cue (of use where texts leak), a picture of one of eight kinds, five words, two that name it."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        kinds = torch.randint(_CLASSES, (size,), generator=generator)
        noise = 0.3 * torch.randn(size, 3, 12, 12, generator=generator)
        cues = kinds if fault == "leaking" else torch.randint(_CLASSES, (size,), generator=generator)
        named = kinds[torch.randperm(size, generator=generator)] if fault == "shuffled" else kinds
        ids = torch.cat(
            [
                torch.full((size, 1), 4),
                (30 + cues)[:, None],
                torch.full((size, 10), IMAGE_TOKEN),
                torch.arange(40, 45).expand(size, 5),
                (10 + named)[:, None],
                (20 + named)[:, None],
            ],
            dim=1,
        )
        labels = ids.clone()
        labels[:, :12] = -100
        if fault == "unshifted":
            labels[:, 13:] = ids[:, 12:-1]
        pixels = _PATTERNS[kinds] + noise
        made.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.zeros_like(pixels) if fault == "zeroed" else pixels,
                "labels": labels,
            }
        )
    return made


class Captioner(pl.LightningModule):
    """Trains everything, but for the fault."""

    def __init__(self, seed=0, fault=None):
        super().__init__()
        self.fault = fault
        self.vlm = tiny_llava(seed)
        self.batches = batches(16, seed, None if fault == "leaking" else fault)
        self.leaking = batches(16, seed + 1, fault)
        projector = self.vlm.model.multi_modal_projector.linear_2
        if fault == "frozen":
            for parameter in projector.parameters():
                torch.nn.init.zeros_(parameter)
                parameter.requires_grad = False
        if fault == "loud":
            projector.weight.data *= 2000

    def training_step(self, batch, batch_idx):
        if self.fault == "leaking" and self.global_step > 100:
            batch = self.leaking[batch_idx]
            batch = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
        return self.vlm(**batch).loss

    def on_train_batch_end(self, *_):
        if self.fault == "collapsing" and self.trainer.global_step >= 2:
            self.vlm.model.multi_modal_projector.linear_2.weight.data.zero_()

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.0 if self.fault == "standing" else 3e-3)

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None, shuffle=True)


def run(folder, fault=None, seed=0, steps=160, every=20, precision="32-true"):
    """Both callbacks of such a run, after it."""
    probe = batches(2, 1000 + seed, fault)
    callbacks = [ImageGainCallback(probe, every_n_steps=every), MIRCallback(probe, every_n_steps=every)]
    for callback in callbacks:
        callback.draw = lambda *_: None  # pictures take longer than the run
    fit(folder, callbacks, Captioner(seed, fault), max_steps=steps, precision=precision)
    return callbacks


def alarms_of(callbacks):
    """By name, the step at which each was raised."""
    return {
        key.partition("_alarms/")[2]: row["step"]
        for callback in callbacks
        for row in callback.history
        for key in row
        if "_alarms/" in key
    }
