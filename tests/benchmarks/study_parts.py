"""What the study starts from: the packaged parts as folders, and projectors for its ``start`` factor.

    python -m tests.benchmarks.study_parts runs/study_parts

writes the folders ``llm`` and ``vision``, ``zero.safetensors`` (a projector whose last layer is zeros),
``small.safetensors`` (PyTorch's default, the last layer a hundredth of it) and
``matched.safetensors``: the last layer in closed form, so that mean and covariance of what it gives for 256
training pictures are those of their captions' token embeddings, principal direction by direction, in order.
"""

import argparse
from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import save_file
from torch import nn

from mir_lightning.llava.demo.emoji import EmojiScenes
from mir_lightning.llava.demo.weights import build_packaged_llava, build_packaged_processor
from mir_lightning.llava.model.connector import output_layer
from mir_lightning.vlm import parameters_of

STUDY = Path(__file__).parents[2] / "recipes" / "configs" / "study" / "pretrain.yaml"


def spectrum(matrix):
    """Eigenvalues and eigenvectors, the largest first."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def matched(model, processor, last, things, pictures=256):
    """Set the last layer."""
    samples = EmojiScenes(things=things).split(1, pictures, 0)[0]
    images, captions = [], []
    for index in range(pictures):
        images.append(samples[index].images[0])
        captions.append(samples[index].turns[1])
    ids = processor.tokenizer("\n".join(captions))["input_ids"]
    words = model.get_input_embeddings().weight[ids].double()
    seen = []
    hook = last.register_forward_hook(lambda _, given, __: seen.append(given[0].flatten(0, -2).double()))
    with torch.no_grad():
        for start in range(0, pictures, 16):
            made = processor.image_processor(images[start : start + 16], return_tensors="pt")
            model.model.get_image_features(made["pixel_values"])
        hook.remove()
        features = torch.cat(seen)
        (spread, directions), (wanted, to) = (spectrum(torch.cov(part.T)) for part in (features, words))
        kept = int((spread[: len(wanted)] > 1e-9 * spread[0]).sum())
        scale = (wanted[:kept] / spread[:kept]).sqrt()
        weight = (to[:, :kept] * scale) @ directions[:, :kept].T
        last.weight.copy_(weight)
        last.bias.copy_(words.mean(0) - weight @ features.mean(0))
        given = last(features.float()).double()
    mean = (given.mean(0) - words.mean(0)).norm() / words.norm(dim=1).mean()
    apart = (torch.cov(given.T) - torch.cov(words.T)).norm() / torch.cov(words.T).norm()
    print(f"matched: mean off by {mean:.1e} of a token's norm, covariance by {apart:.1e}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    options = parser.parse_args()
    options.root.mkdir(parents=True, exist_ok=True)
    study = yaml.safe_load(STUDY.read_text())
    made = {key: study["model"][key] for key in ("connector", "visual_tokens", "image_size")}
    model, processor = build_packaged_llava(**made), build_packaged_processor(**made)
    llm = transformers.LlamaForCausalLM(model.config.text_config)
    llm.model.load_state_dict(model.model.language_model.state_dict())
    for name, parts in (
        ("llm", (llm, processor.tokenizer)),
        ("vision", (model.model.vision_tower, processor.image_processor)),
    ):
        for part in parts:
            part.save_pretrained(options.root / name)
    last = output_layer(model)

    def save(name):
        tensors = {key: p.detach().contiguous() for key, p in parameters_of(model, "projector").items()}
        save_file(tensors, options.root / f"{name}.safetensors")

    save("zero")
    torch.manual_seed(0)
    for layer in model.model.multi_modal_projector.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    for parameter in last.parameters():
        parameter.data /= 100
    save("small")
    matched(model, processor, last, study["data"]["source"]["init_args"]["things"])
    save("matched")


if __name__ == "__main__":
    main()
