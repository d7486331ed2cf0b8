"""MIR and image gain in a loop of one's own, on a tiny model of random weights."""

import torch
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mir_lightning import Probe, evaluate_image_gain, evaluate_mir

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
    model, probe = tiny_model(), Probe(DataLoader(samples(64, seed=1), batch_size=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = iter(DataLoader(samples(1024, seed=2), batch_size=16))
    print("step   MIR                image gain")
    for step in range(61):
        if step % 20 == 0:
            aligned = evaluate_mir(model, probe, check=step == 0, interval=True)
            looks = evaluate_image_gain(model, probe)
            print(
                f"{step:4}  {aligned.mir:.3f} ± {aligned.standard_error:.3f}"
                f"  {looks.gain:.3f} ± {looks.standard_error:.3f}"
            )
        model(**next(data)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
