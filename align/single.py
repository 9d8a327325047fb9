"""A checkpoint in one file, as model sharing sites keep it: recognised by its tensors, read by diffusers.

The file holds weights and no configuration. That comes from the folder of the model the file is a kind of: diffusers tells which
by the names and shapes of the tensors, and `like` says so where it cannot be had from the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .folders import read_index, shapes

UNKNOWN = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # what diffusers says of a file it does not know

__all__ = ["is_single_file", "single_config", "single_pipeline"]


def is_single_file(model: str | Path) -> bool:
    """Whether a model is one file of weights."""
    return str(model).endswith((".safetensors", ".ckpt", ".gguf")) or Path(model).is_file()


def single_config(file: str | Path, like: str | Path | None) -> tuple[Mapping[str, Any], str]:
    """What the file's pipeline is made of, and the folder or hub id whose configuration it takes.

    Raises:
        FileNotFoundError: no such file, or its configuration cannot be had.
        ValueError: no safetensors file, or one that diffusers does not recognise.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}")
    if not str(file).endswith(".safetensors"):
        raise ValueError(f"{file} must be a .safetensors file, or a folder in the diffusers layout")
    like = str(like or _recognised(Path(file)))
    if Path(like).is_dir():
        return read_index(Path(like)), like
    from diffusers import DiffusionPipeline

    try:
        config: Any = DiffusionPipeline.load_config(like)
    except OSError as error:
        raise FileNotFoundError(
            f"{file} takes the configuration of {like}, which is no folder here and which the hub could not give: pass "
            "like= a folder with that model's model_index.json, configs, tokenizers, and the weights of parts the file lacks"
        ) from error
    return config, like


def _recognised(file: Path) -> str:
    """The hub id of the model whose layout the tensors have."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes([file]).items()}
    try:
        found = fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
    except (KeyError, IndexError):  # tensors of other shapes than it knows
        found = UNKNOWN
    whole = any(name.startswith("model.diffusion_model.") for name in tensors)
    if found == UNKNOWN and not whole:
        raise ValueError(
            f"{file} is not recognised as a checkpoint: its tensors are named such as {next(iter(tensors), 'nothing')!r}. A LoRA "
            "goes to lora=, a model in the diffusers layout is a folder; else say whose layout it has with like="
        )
    return found


def single_pipeline(
    file: str | Path, like: str, config: Mapping[str, Any], dtype: torch.dtype, given: Mapping[str, Any]
) -> Any:
    """The pipeline of a file, with the configuration of `like` and the parts in `given` instead of its own."""
    import diffusers

    kind = getattr(diffusers, str(config["_class_name"]))
    return kind.from_single_file(str(file), config=like, torch_dtype=dtype, **given)
