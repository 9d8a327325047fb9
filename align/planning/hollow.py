"""Pipelines without weights: every network made from its config on the meta device, where tensors have shapes and no data.

Only the small files of a folder or hub id are read: configs, tokenizers, schedulers. Networks keep the parts in float32 that
`from_pretrained` keeps there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["hollow_pipeline"]

HALF = (torch.float16, torch.bfloat16)


def hollow_pipeline(model: str | Path, index: Mapping[str, Any], dtype: torch.dtype, given: Mapping[str, Any]) -> Any:
    """The pipeline that a `model_index.json` describes.

    Args:
        index: what that file holds.
        given: parts to take instead of its own, such as None for a safety checker.
    """
    import diffusers

    pipeline = getattr(diffusers, index["_class_name"])
    takes = inspect.signature(pipeline.__init__).parameters
    parts = dict(given)
    for name, entry in index.items():
        if name.startswith("_") or name in parts or name not in takes:
            continue
        parts[name] = entry
        if isinstance(entry, (list, tuple)):
            parts[name] = _part(model, name, *entry, dtype=dtype)
    made = pipeline(**parts)
    made.register_to_config(_name_or_path=str(model))
    return made


def _part(model: str | Path, name: str, library: str | None, kind: str | None, *, dtype: torch.dtype) -> Any:
    """A network without weights, or a tokenizer or scheduler as it is; None where the pipeline has none."""
    if library is None or kind is None:
        return None
    cls: Any = getattr(import_module(library), kind)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(model), "subfolder": name}
    if nn.Module not in cls.__mro__:
        return cls.from_pretrained(**where)
    if library == "diffusers":
        config = cls.load_config(**where)
        with torch.device("meta"):
            return _typed(cls.from_config(config), dtype, HALF)
    config = cls.config_class.from_pretrained(**where)
    with torch.device("meta"):
        return _typed(cls._from_config(config), dtype, (torch.float16,))


def _typed(network: nn.Module, dtype: torch.dtype, lossy: tuple[torch.dtype, ...]) -> nn.Module:
    """The network in a type, but for what its class keeps in float32 under the types that lose too much."""
    network.to(dtype)
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    for name, parameter in network.named_parameters():
        if dtype in lossy and set(name.split(".")) & set(kept):
            parameter.data = parameter.data.float()
    return network
