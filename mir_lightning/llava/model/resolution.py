"""Pictures of another size than an encoder was trained on."""

import copy
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel


def check_multiple(image_size: int, patch: int) -> None:
    """A ``ValueError`` that names the nearest multiples of the patch size if ``image_size`` is none."""
    if image_size < patch or image_size % patch:
        below = image_size // patch * patch
        near = f"{below} or {below + patch}" if below else f"{patch}"
        raise ValueError(
            f"model.image_size must be a multiple of the encoder's patch of {patch} pixels, got {image_size}: "
            f"{near} would do."
        )


def made_size(images: Any) -> int:
    """Height and width in pixels of what an image processor makes; a ``ValueError`` if they differ."""
    pixels = images(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    height, width = pixels.shape[-2:]
    if height != width:
        raise ValueError(
            f"the image processor makes pictures of {height} x {width} pixels: they have to be square."
        )
    return int(height)


def resize_pictures(images: Any, image_size: int) -> None:
    """Let an image processor make pictures of so many pixels a side; the share that it crops away stays."""
    factor = image_size / made_size(images)
    given = images.to_dict()
    for name in {"size", "crop_size"} & given.keys():
        sides = {side: round(pixels * factor) for side, pixels in (given[name] or {}).items() if pixels}
        setattr(images, name, sides or None)


def resize_encoder(vision: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The encoder for pictures of so many pixels a side, its position embedding interpolated by its own method.

    It is a plain model of that size, which gives what the given one does with ``interpolate_pos_encoding``.

    Raises:
        ValueError: if it has no such method.
    """
    if image_size == vision.config.image_size:
        return vision
    config = copy.deepcopy(vision.config)
    config.image_size = image_size
    resized = type(vision)(config)
    state, shapes = vision.state_dict(), resized.state_dict()
    for name in [name for name, tensor in state.items() if tensor.shape != shapes[name].shape]:
        embeddings: Any = vision.get_submodule(name.partition(".position_embedding")[0])
        if not hasattr(embeddings, "interpolate_pos_encoding"):
            raise ValueError(
                f"model.image_size: {type(vision).__name__} cannot interpolate {name}; its pictures have "
                f"{vision.config.image_size} pixels a side, got {image_size}."
            )
        other = torch.empty(1, 0, config.hidden_size)  # of another number of patches, whatever that is
        with torch.no_grad():
            state[name] = embeddings.interpolate_pos_encoding(other, image_size, image_size).view_as(shapes[name])
    resized.load_state_dict(state)
    return resized.eval()
