# %% [markdown]
# # Whose clouds lie closer, who looks more, and is the difference real?
#
# Two checkpoints of one model, one probe, and three questions: which has the lower MIR, is that more than the
# noise of the probe, and which one looks at its pictures? Everything is made here, in well under a
# minute on a CPU core: a LLaVA of random weights, pictures of one of eight colours, and texts that name them.
#
# This page is a script that was run when the site was built: [which_is_better.py](which_is_better.py), and as a
# [notebook](which_is_better.ipynb) with its outputs.

# %%
import torch
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging

from mir_lightning import Probe, evaluate_image_gain, evaluate_mir
from mir_lightning.functional import standard_error

logging.disable_progress_bar()
IMAGE = 3  # the token whose places in input_ids the vision tokens take


def tiny_model():
    torch.manual_seed(0)
    both = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = CLIPVisionConfig(hidden_size=16, image_size=12, patch_size=4, **both)
    text = LlamaConfig(hidden_size=32, vocab_size=32, pad_token_id=0, **both)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )


def samples(count, seed):
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


# %% [markdown]
# ## Two checkpoints
#
# The same model after 10 and after 80 steps, saved as any Hugging Face model is (and one in between, for later).

# %%
model, folders = tiny_model(), {step: f"runs/notebook/step_{step}" for step in (10, 78, 80)}
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step, batch in enumerate(DataLoader(samples(80 * 16, seed=2), batch_size=16), start=1):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in folders:
        model.save_pretrained(folders[step])

# %% [markdown]
# ## Each by itself
#
# `interval=True` gives, for one more pass, what each sample of the probe adds to MIR, and from that the
# standard error over redrawn samples.

# %%
probe = Probe(DataLoader(samples(64, seed=1), batch_size=16))
early, late = (LlavaForConditionalGeneration.from_pretrained(folders[step]) for step in (10, 80))
results = {
    step: evaluate_mir(each, probe, interval=True) for step, each in zip((10, 80), (early, late), strict=True)
}
for step, result in results.items():
    print(f"after {step:2} steps: MIR {result.mir:.3f} ± {1.96 * result.standard_error:.3f} (95 %)")

# %% [markdown]
# ## The difference
#
# Both models saw the same samples. A sample that is hard for one is mostly hard for the other, so the
# difference is surer than either number: its standard error comes from the differences of the influences,
# sample by sample.

# %%
a, b = results.values()
difference = b.mir - a.mir
error = 1.96 * standard_error(b.influence - a.influence).item()
alone = 1.96 * (a.standard_error**2 + b.standard_error**2) ** 0.5
print(f"paired:             {difference:+.3f} ± {error:.3f} (95 %)")
print(f"as if unrelated:    {difference:+.3f} ± {alone:.3f}")
closer = "neither: the difference is smaller than its noise"
if abs(difference) > error:
    closer = f"the model after {80 if difference < 0 else 10} steps"
print(f"closer clouds:      {closer}")

# %% [markdown]
# A difference that is *not* real: the same two steps before the end. Its MIR is another number in the fourth
# digit, and the interval of the difference holds 0.

# %%
model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(folders[78]).state_dict())
near = evaluate_mir(model, probe, interval=True)
error = 1.96 * standard_error(b.influence - near.influence).item()
print(f"paired:             {b.mir - near.mir:+.4f} ± {error:.4f} (95 %)")
print("real" if abs(b.mir - near.mir) > error else "smaller than its noise")

# %% [markdown]
# The command line says the same of saved models and results: `mir-lightning compare a.json b.json --interval`.
#
# ## Where the difference lies
#
# Each layer's distance is a gap of the means and a gap of the spreads; `norm_ratio` says how much louder the
# vision tokens are.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
for place, (step, result) in enumerate(results.items()):
    rows = torch.arange(len(result.layers)) + 0.35 * place
    axes.barh(rows, result.mean_gap, height=0.3, color=("#9ab8d3", "#1a6fa8")[place], label=f"means, step {step}")
    axes.barh(
        rows,
        result.cov_gap,
        left=result.mean_gap,
        height=0.3,
        color=("#e6b89c", "#c2571a")[place],
        label=f"spreads, step {step}",
    )
axes.set_yticks(torch.arange(len(a.layers)) + 0.175, [f"layer {k + 1}" for k in range(len(a.layers))])
axes.set_xlabel("Fréchet distance")
axes.invert_yaxis()
axes.legend(fontsize=8)
for step, result in results.items():
    print(
        f"after {step:2} steps: norm of vision over text {result.norm_ratio.mean():.2f}, "
        f"MIR at equal norms {result.mir_equal_norm:.3f}"
    )

# %% [markdown]
# ## Which one looks?
#
# MIR is about the shape of two clouds. Whether a model uses its pictures is another question, and the image
# gain answers it: the loss with another sample's picture minus the loss with the right one.

# %%
for step, each in zip((10, 80), (early, late), strict=True):
    gain = evaluate_image_gain(each, probe)
    print(f"after {step:2} steps: {gain.gain:+.3f} ± {1.96 * gain.standard_error:.3f} nats a token (95 %)")

# %% [markdown]
# The image gain says which one to keep: of two runs the one with the higher gain scored better in 85 % of the
# pairs of [72 small runs](../evidence.md), the one with the lower MIR in 39 %. A difference of MIR says how the
# clouds moved. One run with one seed shows how to ask, not what is true of a method: for that take three seeds
# or more.
