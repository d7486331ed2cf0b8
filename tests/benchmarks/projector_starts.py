"""Projectors to start from, by the way they are drawn, for the study's ``start`` factor.

    python -m tests.benchmarks.projector_starts runs/study_starts

writes ``random.safetensors`` (PyTorch's default), ``small.safetensors`` (its last layer a hundredth of that) and
``matched.safetensors``: the last layer in closed form, so that mean and covariance of what it gives for 64
training pictures are those of the caption tokens' embeddings. Of such maps it is the one of optimal transport.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mir_lightning.llava.demo.emoji import EmojiScenes
from mir_lightning.llava.demo.weights import build_packaged_llava, build_packaged_processor
from mir_lightning.vlm import parameters_of


def root(matrix, power=0.5, floor=1e-6):
    """Of a symmetric matrix; directions without spread stay without."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > floor * values[-1]
    return (vectors[:, kept] * values[kept] ** power) @ vectors[:, kept].T


def transport(of, to):
    """Symmetric matrix that turns covariance ``of`` into ``to``."""
    half, back = root(of), root(of, -0.5)
    return back @ root(half @ to @ half) @ back


def matched(model, processor, image_size, pictures=64):
    """Set the last layer."""
    samples = EmojiScenes().split(1, pictures, 0)[0]
    images = [samples[index].images[0] for index in range(pictures)]
    texts = processor.tokenizer(["\n".join(samples[index].turns[1] for index in range(pictures))])["input_ids"][0]
    words = model.get_input_embeddings().weight[texts].double()
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        seen = model.model.vision_tower(pixels).last_hidden_state.flatten(0, 1)
        hidden = projector.act(projector.linear_1(seen)).double()
        weight = transport(torch.cov(hidden.T), torch.cov(words.T))
        projector.linear_2.weight.copy_(weight)
        projector.linear_2.bias.copy_(words.mean(0) - weight @ hidden.mean(0))
        given = projector(seen).double()
    mean = (given.mean(0) - words.mean(0)).norm() / words.norm(dim=1).mean()
    spread = (torch.cov(given.T) - torch.cov(words.T)).norm() / torch.cov(words.T).norm()
    print(f"matched: mean off by {mean:.1e} of a token's norm, covariance by {spread:.1e}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--image_size", type=int, default=160)
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    model = build_packaged_llava(image_size=options.image_size)
    processor = build_packaged_processor(image_size=options.image_size)
    last = model.model.multi_modal_projector.linear_2

    def save(name):
        tensors = {key: p.detach().contiguous() for key, p in parameters_of(model, "projector").items()}
        save_file(tensors, options.root / f"{name}.safetensors")

    torch.manual_seed(0)
    for layer in model.model.multi_modal_projector.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    save("random")
    for parameter in last.parameters():
        parameter.data /= 100
    save("small")
    matched(model, processor, options.image_size)
    save("matched")


if __name__ == "__main__":
    main()
