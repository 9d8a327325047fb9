"""Adapters that others trained: read, compared with the network they are to go on, and refused by name where they do not fit.

diffusers loads what fits of a LoRA and says so in a warning, or loads nothing. Here every layer of the file must have its layer
in the network, of the same width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapters import WEIGHTS as ALL_WEIGHTS
from .adapters import load_lora

__all__ = ["all_weights", "load_fitting_lora", "replace_weights"]

# what names of layers tell of a family, the more telling first
MARKS = {
    "FLUX.2": ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", "double_stream_modulation"),
    "FLUX.1": ("single_transformer_blocks", "single_blocks", "double_blocks"),
    "Qwen-Image": ("img_mlp", "txt_mlp"),
    "Stable Diffusion 3": ("add_q_proj", "joint_blocks"),
    "Z-Image or Lumina2": ("noise_refiner", "context_refiner", "layers.0.attention"),
    "PixArt or Sana": ("transformer_blocks.0.attn1",),
    "a video model": ("blocks.0.cross_attn", "blocks.0.attn1"),
}
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}


def all_weights(lora: str | Path | None) -> Path | None:
    """The file of a run that trained the network itself, where `lora` is the folder of one."""
    file = None if lora is None else Path(lora) / ALL_WEIGHTS
    return file if file is not None and file.is_file() else None


def load_fitting_lora(pipe: Any, lora: str | Path) -> None:
    """Puts LoRA weights (a folder, a file or a hub id) on a pipeline's network.

    Raises:
        ValueError: they are of another family; the message says how many layers fit, and which family they look like.
        FileNotFoundError: they cannot be read.
    """
    part = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    network = getattr(pipe, part)
    before = set(dict(network.named_parameters()))
    weights = _read(pipe, lora, part)
    if weights:
        _check(weights, network, lora, type(pipe).__name__, part)
    try:
        load_lora(pipe, lora)
    except (RuntimeError, ValueError, LookupError, TypeError, OSError) as error:
        raise ValueError(f"LoRA {lora} could not be put on {type(network).__name__}: {_first(error)}") from error
    if not weights and before == set(dict(network.named_parameters())):
        raise ValueError(f"LoRA {lora} changes no layer of {type(network).__name__}")


def _read(pipe: Any, lora: str | Path, part: str) -> dict[str, Tensor]:
    """The tensors of the file in peft's names, those of `part` first stripped of it; nothing where a pipeline reads none."""
    if not hasattr(pipe, "lora_state_dict"):
        return {}
    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        found = pipe.lora_state_dict(str(lora), unet_config=getattr(getattr(pipe, "unet", None), "config", None))
    except (ValueError, LookupError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            raise FileNotFoundError(f"LoRA {lora} could not be read: {_first(error)}") from error
        raise ValueError(f"LoRA {lora} is in no format that {type(pipe).__name__} reads: {_first(error)}") from error
    weights: Mapping[str, Tensor] = found[0] if isinstance(found, tuple) else found
    if weights and not any("lora_A" in name for name in weights):
        weights = convert_unet_state_dict_to_peft(weights)
    return dict(weights)


def _check(weights: Mapping[str, Tensor], network: nn.Module, lora: str | Path, pipeline: str, part: str) -> None:
    """Raises unless every layer that the file adapts is one of the network's, as wide."""
    if not any("lora" in name or "lokr" in name for name in weights):
        raise ValueError(f"{lora} holds no LoRA: its tensors are named such as {next(iter(weights))!r}")
    modules = dict(network.named_modules())
    layers = {name.split(".lora_A")[0]: w for name, w in weights.items() if ".lora_A" in name}
    own = {n: w for n, w in layers.items() if not n.startswith(("text_encoder", "text_model"))}
    fit = [n for n, w in own.items() if _width(modules.get(n.removeprefix(f"{part}."))) == w.shape[1]]
    if own and len(fit) < len(own):
        odd = next(n for n in own if n not in fit)
        looks = _family(own)
        raise ValueError(
            f"LoRA {lora} fits {len(fit)} of its {len(own)} layers to the {type(network).__name__} of this {pipeline}: "
            f"{odd!r} has no layer of width {own[odd].shape[1]} there. "
            + (
                f"It looks like one of {looks}: load it over such a model"
                if looks
                else "Load it over its own base model"
            )
        )


def _width(module: nn.Module | None) -> int | None:
    """Features or channels that a layer takes."""
    return getattr(module, "in_features", None) or getattr(module, "in_channels", None)


def _family(layers: Mapping[str, Tensor]) -> str:
    """The family that names and widths of layers look like, or ""."""
    if any("down_blocks" in n or "up_blocks" in n or "mid_block" in n for n in layers):  # a UNet, as wide as its text
        return next((WIDTHS.get(w.shape[1], "") for n, w in layers.items() if "attn2.to_k" in n), "")
    return next((family for family, marks in MARKS.items() if any(m in n for n in layers for m in marks)), "")


def replace_weights(network: nn.Module, file: Path) -> None:
    """Puts the weights of a run that trained the network itself in the place of the network's own."""
    from safetensors.torch import load_file

    weights, own = load_file(file), network.state_dict()
    strange = [name for name, w in weights.items() if name not in own or own[name].shape != w.shape]
    if strange:
        raise ValueError(
            f"{file} has a {tuple(weights[strange[0]].shape)} {strange[0]!r}, which {type(network).__name__} has not: "
            "load it over the model it was trained from"
        )
    network.load_state_dict(weights, strict=False)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2]) if lines else type(error).__name__
