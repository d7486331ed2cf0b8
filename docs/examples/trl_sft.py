"""MIR and image gain beside the loss of TRL's SFTTrainer, on a tiny model of random weights.

Needs trl, datasets and pillow: pip install 'mir-lightning[data,recipes]' trl
"""

import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from mir_lightning import ImageGainCallback, Probe
from mir_lightning.callbacks.hf import MIRTrainerCallback, ProbingTrainerCallback

COLOURS = ["black", "red", "green", "yellow", "blue", "magenta", "cyan", "white"]
WORDS = ["<pad>", "</s>", "<image>", "<unk>", "See", "It", "is", "all", "of", "it", ".", *COLOURS]


def tiny_processor():
    """A word a token; pictures of 12 x 12 pixels, 9 patches."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    pixels = CLIPImageProcessorPil(size={"height": 12, "width": 12}, do_center_crop=False)
    return LlavaProcessor(
        pixels, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def tiny_model():
    """A LLaVA of two layers that makes 9 vision tokens of a picture of 12 x 12 pixels."""
    both = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = CLIPVisionConfig(hidden_size=16, image_size=12, patch_size=4, **both)
    text = LlamaConfig(hidden_size=32, vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **both)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=WORDS.index("<image>"))
    )


def rows(count, seed):
    """Noisy pictures of one of eight colours, and texts that name it."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for colour in torch.randint(8, (count,), generator=generator).tolist():
        channels = torch.tensor([colour & 1, colour >> 1 & 1, colour >> 2]) * 255.0
        pixels = channels + 40 * torch.randn(12, 12, 3, generator=generator)
        picture = Image.fromarray(pixels.clamp(0, 255).byte().numpy())
        says = f" It is {COLOURS[colour]} . All of it is {COLOURS[colour]} ."
        made.append({"images": [picture], "prompt": "See <image>", "completion": says})
    return made


if __name__ == "__main__":
    torch.manual_seed(0)
    arguments = SFTConfig(
        "runs/trl_sft",
        max_steps=60,
        learning_rate=3e-3,
        per_device_train_batch_size=16,
        logging_steps=20,
        report_to=[],  # "wandb", "tensorboard", ...: each gets the numbers
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    data = Dataset.from_list(rows(512, seed=2))
    trainer = SFTTrainer(tiny_model(), arguments, train_dataset=data, processing_class=tiny_processor())
    held_out = rows(64, seed=1)
    probe = Probe([trainer.data_collator(held_out[i : i + 16]) for i in range(0, 64, 16)])
    mir = MIRTrainerCallback(trainer, probe, every_n_steps=20)
    gain = ProbingTrainerCallback(ImageGainCallback(probe, every_n_steps=20), trainer)
    trainer.add_callback(mir)
    trainer.add_callback(gain)
    trainer.train()
    print("step   MIR    image gain")
    for row, gained in zip(mir.probing.history, gain.probing.history, strict=True):
        worth = f"{gained['image_gain']:.3f} ± {gained['image_gain_se']:.3f}"
        print(f"{row['step']:4}  {row['mir']:.3f}  {worth}")
