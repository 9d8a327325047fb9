"""From a folder or hub id to a `Policy`."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from samplers.families import FAMILIES
from samplers.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["EMBEDDED", "load_policy"]

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny-sd"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = (".safetensors", ".bin", ".msgpack")


def load_policy(
    model: str | Path = EMBEDDED,
    *,
    lora: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    preview_vae: str | Path | None = None,
) -> Policy:
    """Loads a diffusers pipeline as a policy.

    Args:
        model: a folder in the diffusers layout, or a hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5". The
            default is the embedded model. A `generation_config.json` in the folder sets the defaults of `steps`
            ("num_inference_steps") and `guidance` ("guidance_scale").
        lora: LoRA weights in the diffusers format: a folder, a file or a hub id.
        device: where to run; a GPU if there is one.
        dtype: of the networks, as a torch dtype or its name; float32 on the CPU, float16 elsewhere.
        preview_vae: an `AutoencoderTiny` (folder or hub id) that decodes intermediate estimates.

    Raises:
        FileNotFoundError: no such folder, or parts of it are missing.
        ValueError: a pipeline of a family kilter does not know.
    """
    config = _pipeline_config(model)
    family = _family(config, model)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = _dtype(dtype) or (torch.float32 if device.type == "cpu" else torch.float16)

    import diffusers

    unused = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in config}
    with _quiet(diffusers):
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=dtype, **unused)
        if lora is not None:
            pipe.load_lora_weights(lora)
        tiny = None
        if preview_vae is not None:
            tiny = diffusers.AutoencoderTiny.from_pretrained(preview_vae, dtype=dtype)
    policy = family(pipe.to(device), preview_vae=tiny).to(device)
    defaults = _generation_config(model)
    policy.steps = int(defaults.get("num_inference_steps", policy.steps))
    policy.guidance = float(defaults.get("guidance_scale", policy.guidance))
    policy.source = str(model)
    return policy


def _pipeline_config(model: str | Path) -> Mapping[str, Any]:
    """`model_index.json` of a complete folder or a hub id."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"{folder} holds no model_index.json: expected a folder saved by a diffusers pipeline"
            )
        try:
            config = json.loads(index.read_text())
        except json.JSONDecodeError as error:
            raise FileNotFoundError(f"{index} is not JSON ({error}): the download may be incomplete") from error
        if missing := _missing_parts(folder, config):
            raise FileNotFoundError(f"{folder} is incomplete; missing: {', '.join(missing)}. Download it again")
        return config
    if not HUB_ID.fullmatch(str(model)):
        raise FileNotFoundError(f"no folder {model}; a hub id looks like owner/name")
    from diffusers import DiffusionPipeline

    try:
        config = DiffusionPipeline.load_config(str(model))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{model} is neither a folder here nor a model that the hub could give: {reason}"
        ) from error
    assert isinstance(config, dict)
    return config


def _missing_parts(folder: Path, config: Mapping[str, Any]) -> list[str]:
    missing = []
    for name, entry in config.items():
        if (
            name in ("safety_checker", "feature_extractor", "image_encoder")
            or not isinstance(entry, list)
            or not entry[0]
        ):
            continue
        part = folder / name
        files = [f.name for f in part.iterdir()] if part.is_dir() else []
        modelled = not any(word in entry[1] for word in ("Tokenizer", "Scheduler", "Processor"))
        if not files:
            missing.append(f"{name}/")
        elif modelled and not any(f.endswith(WEIGHTS) for f in files):
            missing.append(f"{name}/ weights ({' or '.join(WEIGHTS)})")
        elif modelled and "config.json" not in files:
            missing.append(f"{name}/config.json")
    return missing


def _family(config: Mapping[str, Any], model: str | Path):
    pipeline = config.get("_class_name")
    if pipeline not in FAMILIES:
        raise ValueError(f"{model} is a {pipeline}, which kilter cannot drive yet; supported: {', '.join(FAMILIES)}")
    module, name = FAMILIES[pipeline].split(":")
    return getattr(importlib.import_module(module), name)


def _generation_config(model: str | Path) -> dict[str, Any]:
    path = Path(model).expanduser() / "generation_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}; got {dtype!r}")
    return known[dtype]


class _quiet:
    """Silences progress bars and the remarks of from_pretrained while a model loads."""

    def __init__(self, diffusers) -> None:
        from transformers.utils import logging as transformers_logging

        self.logs = (diffusers.utils.logging, transformers_logging)

    def __enter__(self) -> None:
        self.before = [log.get_verbosity() for log in self.logs]
        for log in self.logs:
            log.set_verbosity_error()
            log.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        for log, level in zip(self.logs, self.before, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()
