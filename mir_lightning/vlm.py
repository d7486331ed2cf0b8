"""Where a vision-language model keeps things: decoder layers, final norm, vision and text positions.

One rule serves all architectures; nothing here knows a model by name.
"""

import inspect
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mir_lightning.functional.checks import check_choice

TextPositions = Literal["after_vision", "all"]

POSITION_MASK = "image_embeds_position_mask"  # how kosmos-2 and kosmos-2.5 are told

_VISION_TOKEN_KEYS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
_STRUCTURAL_TOKEN_KEY = re.compile(r"(image|img|video|vision|audio|boi|eoi|boa|eoa)\w*_token_(id|index)")
_CROSS_ATTENTION_NAMES = ("cross_attn", "crossattention", "cross_attention", "encoder_attn")
_PIXEL_ARGUMENT = re.compile("pixel|image|patch|video|vision")


class Decoder(NamedTuple):
    """The text decoder of a model."""

    layers: nn.ModuleList  # its L blocks, in order
    norms: tuple[nn.Module, ...]  # beside them; the one that runs after the last block is the final norm


class TokenMasks(NamedTuple):
    """Boolean ``[B, S]`` masks over the positions of a batch; padding is in neither."""

    vision: Tensor
    text: Tensor


def find_vlm(module: nn.Module, path: str | None = None) -> PreTrainedModel:
    """The Hugging Face model inside ``module``: the module itself, or the outermost one it holds.

    Args:
        module: any module, for example a LightningModule.
        path: dotted path of the model inside ``module``; decides when there are several.

    Raises:
        ValueError: if there is none, or several and no ``path``; nothing is at ``path``; or PEFT's prompt learning
            stands before the model.
    """
    if path is not None:
        module = module_at(module, "model", path)
    outermost = list(_outermost_models(module))
    inside = {part for _, model in outermost for part in model.modules() if part is not model}
    found = {model: name for name, model in outermost if model not in inside}  # no second names of a part
    if not found:
        raise ValueError(
            f"{type(module).__name__} holds no Hugging Face model (transformers.PreTrainedModel). Of another "
            'model say where its decoder layers are, layers="path.to.the.ModuleList" and norm="path.to.the.norm", '
            "or give hidden_states."
        )
    if len(found) > 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(found)} Hugging Face models ({', '.join(found.values())}): "
            'say which one is the vision-language model with model="path.to.it".'
        )
    return next(iter(found))


def is_foreign(module: nn.Module, layers: str | None) -> bool:
    """Whether ``layers`` is the path of a decoder inside ``module`` that none of its Hugging Face models holds."""
    if layers is None:
        return False
    models = [model for _, model in _outermost_models(module)]
    found = dict(module.named_modules()).get(layers)
    inside = any(layers in dict(model.named_modules()) or found in set(model.modules()) for model in models)
    return not inside and (found is not None or not models)


def find_entrance(module: nn.Module, path: str | None = None) -> nn.Module:
    """What training calls to run :func:`find_vlm`'s model: the PEFT model around it, or itself."""
    vlm = find_vlm(module, path)
    start = module if path is None else module_at(module, "model", path)
    around = (part for part in start.modules() if _is_peft_model(part))
    return next((part for part in around if any(inner is vlm for inner in part.modules())), vlm)


def _is_peft_model(module: nn.Module) -> bool:
    """Without importing peft: whoever has such a model has imported it."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.PeftModel)


def module_at(module: nn.Module, option: str, path: str) -> nn.Module:
    """The submodule at a dotted path; a ``ValueError`` that names the option if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{option}={path!r} names no submodule of {type(module).__name__}: {error}.") from error


def _outermost_models(module: nn.Module, name: str = "") -> Iterator[tuple[str, PreTrainedModel]]:
    if isinstance(module, PreTrainedModel):
        yield name, module
        return
    adapter: Any = getattr(module, "active_peft_config", None) if _is_peft_model(module) else None
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"{adapter.peft_type.value} (PEFT's prompt learning) puts virtual tokens before those of the probe, "
            "which are neither vision nor text: not supported. Adapters such as LoRA are."
        )
    for child_name, child in module.named_children():
        yield from _outermost_models(child, f"{name}.{child_name}" if name else child_name)


def execution_device(model: nn.Module) -> torch.device:
    """Where a model computes: its first parameter's device, or where accelerate brings what it keeps off it."""
    parameter = next(model.parameters(), torch.empty(0))
    if parameter.device.type != "meta":
        return parameter.device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if (device := getattr(part, "execution_device", None)) is not None:
                return torch.device(device)
    return parameter.device


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Of the first floating-point parameter: quantised weights are integers, whose inputs are not."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def find_decoder(model: nn.Module, layers: str | None = None, norm: str | None = None) -> Decoder:
    """Decoder layers and final norm of a model.

    Of a Hugging Face model ``get_decoder()`` until it settles, then the shallowest ``ModuleList`` as long as the
    text config says.

    Args:
        model: the model; any module where ``layers`` is given.
        layers: dotted path of the ``ModuleList`` of decoder layers inside ``model``; always wins.
        norm: dotted path of the final norm; found beside the layers when None.

    Raises:
        ValueError: for an encoder-decoder, for a decoder that sees images through cross-attention (its
            vision tokens never enter the sequence), or where no such list is found.
    """
    decoder: Any = model
    if isinstance(model, PreTrainedModel):
        decoder = _innermost_decoder(model)
        reason = "is an encoder-decoder" if getattr(model.config, "is_encoder_decoder", False) else None
        if any(cross in name for name, _ in decoder.named_modules() for cross in _CROSS_ATTENTION_NAMES):
            reason = reason or "sees images through cross-attention"
        if reason is not None:
            raise ValueError(
                f"{type(model).__name__} {reason}: its vision tokens never enter the decoder's sequence, so MIR "
                "is not defined for it."
            )
    owner: nn.Module | None
    found: nn.Module | None
    if layers is not None:
        found = module_at(model, "layers", layers)
        if not isinstance(found, nn.ModuleList) or not layers or not len(found):
            raise ValueError(
                f"layers={layers!r} must name the ModuleList of decoder layers, it is {type(found).__name__}."
            )
        owner = model.get_submodule(layers.rpartition(".")[0])
    else:
        depth = getattr(decoder.config.get_text_config(decoder=True), "num_hidden_layers", None)
        owner, found = shallowest_list(decoder, depth)
        if owner is None or found is None:
            raise ValueError(
                f"no decoder layers found in {type(model).__name__}: looked for a ModuleList of {depth} "
                f"(num_hidden_layers) inside {type(decoder).__name__}. Say where they are with "
                'layers="path.to.the.ModuleList".'
            )
    beside = (child for child in owner.children() if "norm" in type(child).__name__.lower())
    return Decoder(found, tuple(beside) if norm is None else (module_at(model, "norm", norm),))


def _innermost_decoder(model: Any) -> Any:
    seen = [model]
    while hasattr(seen[-1], "get_decoder"):
        decoder = seen[-1].get_decoder()
        if decoder is None or any(decoder is module for module in seen):
            break
        seen.append(decoder)
    return seen[-1]


def shallowest_list(root: nn.Module, length: int | None) -> tuple[nn.Module | None, nn.ModuleList | None]:
    """The first ``ModuleList`` of ``length``, breadth-first, and the module that owns it."""
    queue = deque([root])
    while queue:
        for child in (module := queue.popleft()).children():
            if isinstance(child, nn.ModuleList) and len(child) == length:
                return module, child
            queue.append(child)
    return None, None


def vision_token_ids(config: PreTrainedConfig) -> set[int]:
    """Ids of image and video tokens, from the outermost config that names any; a ``ValueError`` if none does."""
    for current in _configs(config):
        ids = [getattr(current, key, None) for key in _VISION_TOKEN_KEYS]
        if found := {int(i) for i in ids if i is not None}:
            return found
    raise ValueError(
        f"no image token found: looked for {', '.join(_VISION_TOKEN_KEYS)} in {type(config).__name__} and "
        'its sub-configs. Give image_token_id, or each probe batch a "vision_mask" (bool [B, S]).'
    )


def structural_token_ids(config: PreTrainedConfig) -> set[int]:
    """Ids of placeholders and marks around images, videos and sounds: none of them is text."""
    named = (item for current in _configs(config) for item in vars(current).items())
    return {value for key, value in named if _STRUCTURAL_TOKEN_KEY.fullmatch(key) and isinstance(value, int)}


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and its sub-configs, breadth-first."""
    queue = deque([config])
    while queue:
        current = queue.popleft()
        yield current
        queue.extend(value for value in vars(current).values() if isinstance(value, PreTrainedConfig))


def check_takes_pixels(model: PreTrainedModel) -> None:
    """A ``ValueError`` for a model whose forward has no argument for images."""
    arguments = inspect.signature(type(model).forward).parameters
    if "input_ids" in arguments and not any(_PIXEL_ARGUMENT.search(name) for name in arguments):
        raise ValueError(
            f"{type(model).__name__} takes no pixels: its forward has no argument for images. MIR needs the whole "
            "vision-language model; where vision tokens are put in by other code, pass hidden_states."
        )


def token_masks(
    config: PreTrainedConfig | None,
    batch: Mapping[str, Any],
    text: TextPositions,
    image_token_id: int | None = None,
) -> TokenMasks:
    """Vision and text positions of a batch. Marks around images, and sounds, are neither.

    Args:
        config: the model's config; needed where neither the batch has a ``vision_mask`` nor ``image_token_id``
            is given.
        batch: what the model's forward takes: ``input_ids`` ``[B, S]``, perhaps ``attention_mask``; a
            ``vision_mask`` or ``text_mask`` in it wins over what would be found. Both together may be of another
            length than ``input_ids``, that of the sequence inside a model that puts vision tokens in.
        text: ``"after_vision"``: valid positions after the sample's first vision position, vision excluded
            (every valid position of a sample without an image); ``"all"``: every valid position but vision.
        image_token_id: placeholder of vision tokens, where the config does not tell it or tells another.

    Raises:
        ValueError: for an unknown ``text``, missing ``input_ids``, a mask of another shape or type, or a
            config without an image token.
    """
    check_choice("text", text, TextPositions)
    if "input_ids" not in batch:
        raise ValueError(f'a probe batch needs "input_ids" [B, S], got keys {sorted(batch)}.')
    input_ids: Tensor = batch["input_ids"]
    vision, chosen = batch.get("vision_mask"), batch.get("text_mask")
    shapes = {mask.shape for mask in (vision, chosen) if isinstance(mask, Tensor)}
    if vision is not None and chosen is not None and len(shapes) == 1 and input_ids.shape not in shapes:
        # Over positions inside the model, which no attention mask tells of.
        _check_mask("vision_mask", vision, vision)
        _check_mask("text_mask", chosen, vision)
        return TokenMasks(vision, chosen & ~vision)
    attention_mask = batch.get("attention_mask")
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask must be a tensor [B, S], got {type(attention_mask).__name__}.")
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    _check_mask("attention_mask", valid, input_ids)
    if vision is None:
        if image_token_id is not None:
            vision = vision_positions(input_ids, None, [image_token_id])
        elif POSITION_MASK in batch:
            vision = vision_positions(input_ids, batch[POSITION_MASK], ())
        elif config is not None:
            vision = vision_positions(input_ids, None, vision_token_ids(config))
        else:
            raise ValueError(
                "the model has no Hugging Face config to find vision tokens with: give each probe batch a "
                '"vision_mask" (bool [B, S]).'
            )
    _check_mask("vision_mask", vision, input_ids)
    vision = vision & valid
    if chosen is None:
        after = vision.cumsum(dim=1) > 0
        without_image = ~vision.any(dim=1, keepdim=True)
        chosen = after | without_image if text == "after_vision" else torch.ones_like(valid)
        if config is not None:
            marks = torch.tensor(
                sorted(structural_token_ids(config)), dtype=input_ids.dtype, device=input_ids.device
            )
            chosen = chosen & ~torch.isin(input_ids, marks)
    _check_mask("text_mask", chosen, input_ids)
    return TokenMasks(vision, chosen & valid & ~vision)


def vision_positions(sequence: Tensor, told: Tensor | None, token_ids: Iterable[int]) -> Tensor:
    """Where a model puts vision tokens, bool ``[B, S]``; nothing is copied to the host or from it.

    ``sequence`` is ``input_ids``, or ``[B, S, ...]`` without ``token_ids``, the placeholders of vision tokens.
    What the model is ``told`` of the positions wins.
    """
    if told is not None:
        return told == 1  # kosmos-2.5 marks the begin and end of a picture with -1
    nowhere = torch.zeros(sequence.shape[:2], dtype=torch.bool, device=sequence.device)
    return reduce(torch.logical_or, (sequence == token_id for token_id in token_ids), nowhere)


def _check_mask(name: str, mask: Any, like: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must be a boolean tensor, got {given}.")
    if mask.shape != like.shape:
        raise ValueError(f"{name} must have the shape of input_ids, {list(like.shape)}, got {list(mask.shape)}.")


PartName = Literal["projector", "vision", "llm", "lora", "moca"]

# How the names of a part's parameters begin, the first that fits, and what is missed without any.
_PARTS = {
    "lora": (r".*\.lora_", "LoRA adapters (give the lora option)"),
    "moca": (r".*\.moca\.", "MoCa modules (set moca to true)"),
    "projector": (
        r"(.*\.)?((\w*projector|connector|merger)\.|image_newline$)",
        "a module named *projector, *connector or merger",
    ),
    "vision": (
        r"(.*?\.)??(vision_tower|vision_model|visual)\.",
        "a module named vision_tower, vision_model or visual",
    ),
    "llm": ("", "the text decoder"),
}
_BEHIND_THE_FEATURES = re.compile(r"\.(post_layernorm|layernorm|head|pooler)\.")


def parameters_of(
    vlm: PreTrainedModel, part: PartName, layers: str | None = None, required: bool = True
) -> dict[str, nn.Parameter]:
    """Parameters of a part of a model by their names in it, but empty ones and those that no gradient can reach.

    Args:
        vlm: the model.
        part: projector, encoder, LLM, or the LoRA adapters or MoCa in it.
        layers: Python slice of the encoder's or the LLM's layers, ``"12:"`` from the 13th on, ``":16"`` the first
            16; None for the whole part, with embeddings, final norm and output head.
        required: whether the model has to have the part.

    Raises:
        ValueError: if the model has no such layers, or no such part and it is ``required``.
    """
    owned = {
        name: parameter
        for name, parameter in vlm.named_parameters()
        if parameter.numel()
        and part == next(owner for owner, (pattern, _) in _PARTS.items() if re.match(pattern, name))
    }
    if part == "vision" and owned:
        owned = _up_to_the_features(vlm, layers, owned)
    elif layers is not None:
        chosen = _in_layers(find_decoder(vlm).layers, layers, part)
        owned = {name: parameter for name, parameter in owned.items() if id(parameter) in chosen}
    if required and not owned:
        raise ValueError(f"{type(vlm).__name__} has no parameters of {part}: looked for {_PARTS[part][1]}.")
    return owned


def _up_to_the_features(
    vlm: PreTrainedModel, layers: str | None, owned: dict[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Of the encoder's layers up to the one whose features are used; nothing behind it ever gets a gradient."""
    tower = re.match(_PARTS["vision"][0], next(iter(owned)))[0]  # type: ignore[index]
    encoder = vlm.get_submodule(tower.removesuffix("."))
    _, blocks = shallowest_list(encoder, getattr(encoder.config, "num_hidden_layers", None))
    if blocks is None:
        if layers is not None:
            raise ValueError(
                f"layers={layers!r}: the vision encoder {type(encoder).__name__} has no list of layers."
            )
        return owned
    feature_layer = getattr(vlm.config, "vision_feature_layer", -1)
    last = max(feature_layer) if isinstance(feature_layer, (list, tuple)) else feature_layer
    used = last if last >= 0 else len(blocks) + 1 + last  # hidden_states[0] is the embedding
    kept = _in_layers(blocks, layers or ":", "vision") - {id(p) for p in blocks[used:].parameters()}
    if layers is None:  # embeddings, too, but nothing behind the layers
        before = [p for name, p in owned.items() if not _BEHIND_THE_FEATURES.search(name[len(tower) - 1 :])]
        kept |= {id(p) for p in before} - {id(p) for p in blocks.parameters()}
    return {name: p for name, p in owned.items() if id(p) in kept}


def _in_layers(blocks: nn.ModuleList, layers: str, part: PartName) -> set[int]:
    """Ids of the parameters in a slice of layers; a ``ValueError`` if that is empty or goes beyond."""
    start, _, end = layers.partition(":")
    chosen = range(int(start or 0), int(end or len(blocks)))
    if not chosen or chosen.stop > len(blocks):
        raise ValueError(f"layers={layers!r} of {part}: the model has {len(blocks)}.")
    return {id(parameter) for index in chosen for parameter in blocks[index].parameters()}
