"""From a folder or hub id to a `Policy`."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from samplers.families import FAMILIES
from samplers.policy import Policy

from .adapters import WEIGHTS as ALL_WEIGHTS
from .adapters import load_lora
from .planning.hollow import hollow_pipeline

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["EMBEDDED", "Student", "best_device", "load_policy", "usable"]

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny-sd"
Student = Literal["lcm", "trailing"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = (".safetensors", ".bin", ".msgpack")


def load_policy(
    model: str | Path = EMBEDDED,
    *,
    lora: str | Path | None = None,
    student: Student | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    preview_vae: str | Path | None = None,
    waiting: bool = False,
) -> Policy:
    """Loads a diffusers pipeline as a policy.

    Args:
        model: a folder in the diffusers layout, or a hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5". The
            default is the embedded model, "tiny-sd"; "tiny-turbo" is its few-step student, "tiny-flow" a rectified flow. A
            `generation_config.json` in the folder sets the defaults of `steps` ("num_inference_steps") and `guidance`
            ("guidance_scale"), the length of texts ("max_sequence_length"), and may name the "world" whose detector is gold.
        lora: LoRA weights in the diffusers format: a folder, a file or a hub id; or the folder of a run that trained all weights.
        student: for few-step students that come as LoRA or as a network alone, over a many-step checkpoint's schedule: "lcm" for
            latent consistency (LCM-LoRA), "trailing" for turbo, Hyper-SD and DMD students. Whole checkpoints of LCM and
            SD-Turbo are recognised by their schedulers.
        device: where to run; a GPU (CUDA, then Apple's) if there is one. On "meta" no weights are read: see `align.planning`.
        dtype: of the networks, as a torch dtype or its name; float32 on the CPU, float16 elsewhere.
        preview_vae: an `AutoencoderTiny` (folder or hub id) that decodes intermediate estimates.
        waiting: leave the denoising network on the CPU, from where training shards it over devices.

    Raises:
        FileNotFoundError: no such folder, or parts of it are missing.
        ValueError: a pipeline of a family kilter does not know, or a device that is not here.
    """
    model = _embedded(model)
    model, lora, preview_vae = _expanded(model), lora and _expanded(lora), preview_vae and _expanded(preview_vae)
    config = _pipeline_config(model)
    if lora is not None and not Path(lora).exists() and not HUB_ID.fullmatch(str(lora)):
        raise FileNotFoundError(f"no LoRA {lora}: expected a folder or file here, or a hub id such as owner/name")
    if student not in (None, "lcm", "trailing"):
        raise ValueError(f"student must be lcm or trailing; got {student!r}")
    family = _family(config, model)
    device = usable(device or best_device())
    dtype = _dtype(dtype) or (torch.float32 if device.type == "cpu" else torch.float16)

    import diffusers

    unused = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in config}
    unused |= {name: None for name, entry in config.items() if entry == [None, None]}
    networks = (file for part in ("unet", "transformer") for file in Path(model).glob(f"{part}/*"))
    weights = [file.name for file in networks if file.name.endswith(WEIGHTS)]
    variant = "fp16" if weights and all(".fp16." in name for name in weights) else None
    with _quiet(diffusers), _named(model):
        if device.type == "meta":
            pipe = hollow_pipeline(model, config, dtype, unused)
        else:
            pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=dtype, variant=variant, **unused)
        whole = None if lora is None else Path(lora) / ALL_WEIGHTS
        if lora is not None and not (whole and whole.is_file()):
            load_lora(pipe, lora)
        if student is not None:
            kind = diffusers.LCMScheduler if student == "lcm" else diffusers.EulerDiscreteScheduler
            known = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
            pipe.scheduler = kind.from_config(
                known | ({"timestep_spacing": "trailing"} if student == "trailing" else {})
            )
        tiny = None
        if preview_vae is not None:
            tiny = diffusers.AutoencoderTiny.from_pretrained(preview_vae, dtype=dtype)
    policy = family(pipe if waiting else pipe.to(device), preview_vae=tiny)
    for part in policy.children() if waiting else (policy,):
        if part is not policy.network:
            part.to(device)
    if whole is not None and whole.is_file():
        _replace_weights(policy.network, whole)
    defaults = _generation_config(model)
    policy.steps = int(defaults.get("num_inference_steps", policy.steps))
    policy.guidance = float(defaults.get("guidance_scale", policy.guidance))
    if policy.max_sequence_length is not None:
        policy.max_sequence_length = int(defaults.get("max_sequence_length", policy.max_sequence_length))
    policy.source, policy.world = str(model), str(defaults.get("world", ""))
    policy.adapter, policy.student = "" if lora is None else str(lora), student or ""
    return policy


def usable(device: str | torch.device) -> torch.device:
    """The device.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch has one of each
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {str(device)!r} cannot be used here, expected cpu, cuda, cuda:1, mps …: {reason}"
        ) from error


def _replace_weights(network: torch.nn.Module, file: Path) -> None:
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


def _pipeline_config(model: str | Path) -> Mapping[str, Any]:
    """`model_index.json` of a complete folder or a hub id."""
    folder = Path(model)
    if folder.parent == EMBEDDED.parent and not folder.is_dir():
        raise FileNotFoundError(
            f"no {folder}: the embedded model comes with a clone of the repository; pass another model"
        )
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
        words = {"vocab.json", "tokenizer.json", "spiece.model", "vocab.txt"}
        if not files:
            missing.append(f"{name}/")
        elif "Tokenizer" in entry[1] and not words & set(files):
            missing.append(f"{name}/ vocabulary ({' or '.join(sorted(words))})")
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
    path = Path(model) / "generation_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}; got {dtype!r}")
    return known[dtype]


def _embedded(model: str | Path) -> str | Path:
    """The folder of an embedded model's name, unless a folder here has that name."""
    named = EMBEDDED.parent / str(model)
    return named if str(model) in ("tiny-sd", "tiny-turbo", "tiny-flow") and not Path(model).exists() else model


def _expanded(path: str | Path) -> str | Path:
    return Path(path).expanduser() if str(path).startswith("~") else path


def best_device() -> str:
    """A GPU if there is one: CUDA, of this process, then Apple's."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # one a process under `accelerate launch`
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def _named(model: str | Path) -> Iterator[None]:
    """What the libraries raise over a broken file, as one error that says which model it was."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{model} could not be loaded, its files may be incomplete: {reason}") from error


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
