"""MIR and image gain beside the loss of a Lightning run, on a tiny model of random weights."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mir_lightning import ImageGainCallback, MIRCallback, Probe

IMAGE = 3  # the token whose places in input_ids the vision tokens take


def tiny_model():
    """A LLaVA of two layers that makes 9 vision tokens of a picture of 12 x 12 pixels."""
    both = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = CLIPVisionConfig(hidden_size=16, image_size=12, patch_size=4, **both)
    text = LlamaConfig(hidden_size=32, vocab_size=32, pad_token_id=0, **both)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )


def samples(count, seed):
    """Noisy pictures of one of eight colours; the text behind each names its colour four times."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(8, (count,), generator=generator)
    channels = torch.stack([colours & 1, colours >> 1 & 1, colours >> 2], dim=1) * 2.0 - 1
    pixels = channels[:, :, None, None] + 0.3 * torch.randn(count, 3, 12, 12, generator=generator)
    text = torch.stack([10 + colours, 20 + colours], dim=1).repeat(1, 4)
    ids = torch.cat([torch.full((count, 1), 1), torch.full((count, 9), IMAGE), text], dim=1)
    labels = torch.where(torch.arange(ids.shape[1]) < 10, -100, ids)
    keys = ("input_ids", "attention_mask", "pixel_values", "labels")
    return [
        dict(zip(keys, row, strict=True)) for row in zip(ids, torch.ones_like(ids), pixels, labels, strict=True)
    ]


class Training(pl.LightningModule):
    """Any module that holds a Hugging Face model; nothing in it knows of MIR."""

    def __init__(self):
        super().__init__()
        self.vlm = tiny_model()

    def training_step(self, batch, batch_idx):
        return self.vlm(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    pl.seed_everything(0)
    probe = Probe(DataLoader(samples(64, seed=1), batch_size=16))
    mir, gain = MIRCallback(probe, every_n_steps=20), ImageGainCallback(probe, every_n_steps=20)
    trainer = pl.Trainer(
        max_steps=60,
        callbacks=[mir, gain],
        logger=False,  # any of Lightning's: numbers go to all, pictures to W&B, TensorBoard and beside the CSV log
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(Training(), DataLoader(samples(512, seed=2), batch_size=16, shuffle=True))
    print("step   MIR    image gain")
    for row, gained in zip(mir.history, gain.history, strict=True):
        worth = f"{gained['image_gain']:.3f} ± {gained['image_gain_se']:.3f}"
        print(f"{row['step']:4}  {row['mir']:.3f}  {worth}")
