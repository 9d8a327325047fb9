"""Components as configuration and back: a class path and the constructor's arguments."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from samplers import Policy

from . import sharding
from .loading import load_policy

__all__ = ["build", "build_policy", "describe", "describe_policy", "differences"]


def describe(component: Any) -> Any:
    """A component as configuration: its class and the constructor arguments it was made with, or keeps as attributes."""
    if component is None or isinstance(component, (bool, int, float, str)):
        return component
    if isinstance(component, torch.Tensor):
        return component.tolist()
    if isinstance(component, Mapping):
        return {str(k): describe(v) for k, v in component.items()}
    if isinstance(component, Sequence):
        return [describe(v) for v in component]
    if isinstance(component, (Path, torch.dtype, torch.device)):
        return str(component).replace("torch.", "")
    if inspect.isroutine(component):
        return f"{component.__module__}.{component.__qualname__}"  # what rewards of functions take in their place
    kind = type(component)
    path = f"{kind.__module__}.{kind.__qualname__}"
    if dataclasses.is_dataclass(component):
        made_with = {f.name: getattr(component, f.name) for f in dataclasses.fields(component)}
    elif (made_with := getattr(component, "arguments", None)) is None:
        names = [n for n in inspect.signature(kind.__init__).parameters if n != "self"]
        made_with = {n: getattr(component, n) for n in names if hasattr(component, n)}
    return {"class_path": path, "init_args": describe(made_with)}


def build(description: Any) -> Any:
    """The component that `describe` described.

    Raises:
        ValueError: a class that cannot be imported or made.
    """
    if isinstance(description, list):
        return [build(v) for v in description]
    if not isinstance(description, Mapping):
        return description
    if set(description) != {"class_path", "init_args"}:
        return {k: build(v) for k, v in description.items()}
    module, _, name = description["class_path"].rpartition(".")
    try:
        return getattr(import_module(module), name)(**build(description["init_args"]))
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"cannot make {description['class_path']} again from its recorded arguments ({error}): pass the object itself"
        ) from error


def differences(recorded: Any, asked: Any, at: str = "") -> list[str]:
    """Where two descriptions differ, as "field: recorded → asked"."""
    if isinstance(recorded, Mapping) and isinstance(asked, Mapping):
        keys = dict.fromkeys([*recorded, *asked])
        return [d for k in keys for d in differences(recorded.get(k), asked.get(k), f"{at}.{k}".lstrip("."))]
    return [] if recorded == asked else [f"{at.replace('.init_args', '')}: {recorded!r} → {asked!r}"]


def describe_policy(policy: Policy) -> dict[str, Any]:
    """How to make the policy again: from where it was loaded, or by its constructor."""
    if policy.source:
        dtype = str(policy.dtype).replace("torch.", "")
        made = {"model": policy.source, "adapter": policy.adapter or None, "dtype": dtype, "device": policy.device.type}
        more = {"student": policy.student, "controlnet": policy.control, **policy.loaded_with}
        return made | {name: value for name, value in more.items() if value}
    return describe(policy)


def build_policy(description: Mapping[str, Any]) -> Policy:
    """The policy that `describe_policy` described, on this process's own device of the same kind."""
    if "model" not in description:
        return build(description)
    device = None if description["device"] == "cuda" else description["device"]
    how = {"dtype": description["dtype"], "device": device, "waiting": sharding.asked()}
    known = ("model", "adapter", "dtype", "device")
    how |= {name: value for name, value in description.items() if name not in known}
    return load_policy(description["model"], lora=description["adapter"], **how)
