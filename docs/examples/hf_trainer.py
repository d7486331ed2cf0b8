"""MIR and image gain beside the loss of a Hugging Face Trainer, on a tiny model of random weights."""

import torch
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from mir_lightning import ImageGainCallback, Probe
from mir_lightning.callbacks.hf import MIRTrainerCallback, ProbingTrainerCallback

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


if __name__ == "__main__":
    torch.manual_seed(0)
    probe = Probe(DataLoader(samples(64, seed=1), batch_size=16))
    arguments = TrainingArguments(
        "runs/hf_trainer",
        max_steps=60,
        learning_rate=3e-3,
        per_device_train_batch_size=16,
        logging_steps=20,
        report_to=[],  # "wandb", "tensorboard", ...: each gets the numbers
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    mir = MIRTrainerCallback(probe, every_n_steps=20)
    gain = ProbingTrainerCallback(ImageGainCallback(probe, every_n_steps=20))
    trainer = Trainer(tiny_model(), arguments, train_dataset=samples(512, seed=2), callbacks=[mir, gain])
    trainer.train()
    print("step   MIR    image gain")
    for row, gained in zip(mir.probing.history, gain.probing.history, strict=True):
        worth = f"{gained['image_gain']:.3f} ± {gained['image_gain_se']:.3f}"
        print(f"{row['step']:4}  {row['mir']:.3f}  {worth}")
