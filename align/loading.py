"""From a folder or hub id to a `Policy`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from samplers.families import FAMILIES
from samplers.policy import Policy

from .folders import (
    ASSETS,
    HUB_ID,
    absent_parts,
    check_scheduler,
    check_weights,
    family_of,
    generation_config,
    pipeline_config,
    variant_of,
)
from .loras import all_weights, load_fitting_lora, replace_weights
from .places import Offload, Placement, Quantize
from .planning.hollow import hollow_pipeline
from .single import is_single_file, single_config, single_pipeline

__all__ = ["EMBEDDED", "Student", "best_device", "load_policy", "usable"]

EMBEDDED = ASSETS / "tiny-sd"
Student = Literal["lcm", "trailing"]


def load_policy(
    model: str | Path = EMBEDDED,
    *,
    lora: str | Path | None = None,
    student: Student | None = None,
    controlnet: str | Path | None = None,
    like: str | Path | None = None,
    variant: str | None = None,
    quantize: Quantize | None = None,
    quantize_text: bool = False,
    device_map: str | None = None,
    offload: Offload | None = None,
    compile: bool | Literal["regional"] = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    preview_vae: str | Path | None = None,
    waiting: bool = False,
) -> Policy:
    """Loads a diffusers pipeline as a policy.

    Args:
        model: a folder in the diffusers layout, a hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5", or one
            .safetensors file that holds a whole checkpoint. The default is the embedded model, "tiny-sd"; "tiny-turbo" is its
            few-step student, "tiny-flow" a rectified flow. A `generation_config.json` in the folder sets the defaults of
            `steps` ("num_inference_steps") and `guidance` ("guidance_scale"), the length of texts ("max_sequence_length"),
            and may name the "world" whose detector is gold.
        lora: LoRA weights in the diffusers format: a folder, a file or a hub id; or the folder of a run that trained all weights.
        student: for few-step students that come as LoRA or as a network alone, over a many-step checkpoint's schedule: "lcm" for
            latent consistency (LCM-LoRA), "trailing" for turbo, Hyper-SD and DMD students. Whole checkpoints of LCM and
            SD-Turbo are recognised by their schedulers.
        controlnet: a ControlNet (folder or hub id) beside a Stable Diffusion model; every prompt then needs a picture, its
            `meta["control"]`. Whole pipelines with a ControlNet need nothing said.
        like: the folder or hub id whose configuration a checkpoint in one file takes; recognised by its tensors if not said.
        variant: of the files of weights, such as "fp16"; guessed where a folder's network has no other.
        quantize: bits of the network's frozen linear layers, under a LoRA of float32: "int8", "fp8" (torchao) or "nf4"
            (bitsandbytes, on a GPU). Needs the extra `quant`.
        quantize_text: the same for the text encoders.
        device_map: "balanced" spreads the networks over the GPUs.
        offload: weights wait on the CPU: "group" brings a layer at a time, "model" a network, "sequential" a layer, slower.
            No gradient passes through "group"; training works with "sequential" alone. See `align.places`.
        compile: compiles the network with `torch.compile`, in place; "regional" its repeated block, once.
        device: where to run; a GPU (CUDA, then Apple's) if there is one. On "meta" no weights are read: see `align.planning`.
        dtype: of the networks, as a torch dtype or its name; float32 on the CPU, elsewhere float16, or bfloat16 for flows and if
            quantised.
        preview_vae: an `AutoencoderTiny` (folder or hub id) that decodes intermediate estimates.
        waiting: leave the denoising network on the CPU, from where training shards it over devices.

    Raises:
        FileNotFoundError: no such folder, or parts of it are missing.
        ValueError: a pipeline of a family kilter does not know, a scheduler or LoRA of another family, a device or package that
            is not here, or options that exclude each other.
    """
    places = Placement(quantize, quantize_text, device_map, offload, compile)
    model, lora = _expanded(_embedded(model)), lora and _expanded(lora)
    like = like and _expanded(_embedded(like))
    config, like = _described(model, like, places)
    if controlnet is not None and "ControlNet" not in (name := str(config.get("_class_name"))):
        config = {**config, "_class_name": name.replace("Pipeline", "ControlNetPipeline")}
        if config["_class_name"] not in FAMILIES:
            raise ValueError(f"a ControlNet goes beside Stable Diffusion or Stable Diffusion XL; {model} is a {name}")
    if lora is not None and not Path(lora).exists() and not HUB_ID.fullmatch(str(lora)):
        raise FileNotFoundError(f"no LoRA {lora}: expected a folder or file here, or a hub id such as owner/name")
    if student not in (None, "lcm", "trailing"):
        raise ValueError(f"student must be lcm or trailing; got {student!r}")
    family = family_of(config, model)
    check_scheduler(family, config, model, student)
    device = usable(device or best_device())
    places.check(device, waiting)
    dtype = _dtype(dtype) or _best_dtype(device, quantize, family)
    given = {"variant": variant_of(model, variant), "dtype": dtype}
    pipe = _pipeline(model, config, like, device, controlnet, places, **given)
    whole = all_weights(lora)
    with _quiet():
        if lora is not None and whole is None:
            load_fitting_lora(pipe, lora)
        if student is not None:
            _reschedule(pipe, student)
        tiny = _preview(preview_vae, dtype)
    policy = _placed(family, pipe, tiny, places, device, waiting)
    if whole is not None:
        replace_weights(policy.network, whole)
    if device.type != "meta":
        places.settle(policy, device)
    _set_defaults(policy, generation_config(model))
    policy.source, policy.adapter, policy.student = str(model), "" if lora is None else str(lora), student or ""
    policy.control = "" if controlnet is None else str(controlnet)
    told = {"like": like and str(like), "variant": variant}
    policy.loaded_with = {**places.as_dict(), **{name: value for name, value in told.items() if value}}
    return policy


def _described(model: str | Path, like: str | Path | None, places: Placement) -> tuple[Mapping[str, Any], Any]:
    """What a model is made of, and whose configuration it takes if it is one file."""
    if not is_single_file(model):
        if like is None:
            return pipeline_config(model), None
        raise ValueError(f"like names the configuration of a checkpoint in one file; {model} has its own: leave it out")
    if places.quantize or places.device_map:
        raise ValueError(f"{model} is one file, which is read whole: quantize and device_map need a folder or hub id")
    return single_config(model, like)


def _pipeline(
    model: str | Path,
    config: Mapping[str, Any],
    like: str | Path | None,
    device: torch.device,
    controlnet: str | Path | None,
    places: Placement,
    *,
    variant: str | None,
    dtype: torch.dtype,
) -> Any:
    """The pipeline, its weights where `from_pretrained` puts them; without any on the meta device."""
    import diffusers

    given: dict[str, Any] = dict(absent_parts(model, config))
    kind = diffusers.DiffusionPipeline
    if controlnet is not None:
        given["controlnet"] = _controlnet(_expanded(controlnet), dtype, device.type == "meta")
        kind = getattr(diffusers, config["_class_name"])
    with _quiet(), _named(model):
        if device.type == "meta":
            return hollow_pipeline(like or model, config, dtype, given)
        if like is not None:
            pipe = single_pipeline(model, str(like), config, dtype, given)
        else:
            how = places.reading(config, dtype)
            pipe = kind.from_pretrained(model, dtype=dtype, variant=variant, **given, **how)
    check_weights(model, pipe, variant)
    return pipe


def _controlnet(where: str | Path, dtype: torch.dtype, hollow: bool) -> Any:
    """A ControlNet by itself, or its shape alone."""
    import diffusers

    kind = diffusers.ControlNetModel
    with _quiet(), _named(where):
        config: Any = kind.load_config(where)
    if (name := config.get("_class_name")) != kind.__name__:
        raise ValueError(f"{where} holds a {name}: expected a {kind.__name__}")
    with _quiet(), _named(where):
        if not hollow:
            return kind.from_pretrained(where, dtype=dtype)
        with torch.device("meta"):
            made: Any = kind.from_config(config)
        return made.to(dtype)


def _placed(family: Any, pipe: Any, tiny: Any, places: Placement, device: torch.device, waiting: bool) -> Policy:
    """The policy, on its devices unless something else will bring it there."""
    if places.offload or places.device_map:
        return family(pipe, preview_vae=tiny)
    policy = family(pipe if waiting else pipe.to(device), preview_vae=tiny)
    for part in policy.children() if waiting else (policy,):
        if part is not policy.network:
            part.to(device)
    return policy


def _reschedule(pipe: Any, student: Student) -> None:
    """Gives the pipeline the schedule of a few-step student."""
    import diffusers

    kind = diffusers.LCMScheduler if student == "lcm" else diffusers.EulerDiscreteScheduler
    known = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    pipe.scheduler = kind.from_config(known | ({"timestep_spacing": "trailing"} if student == "trailing" else {}))


def _preview(vae: str | Path | None, dtype: torch.dtype) -> Any:
    import diffusers

    if vae is None:
        return None
    with _named(vae):
        return diffusers.AutoencoderTiny.from_pretrained(_expanded(vae), dtype=dtype)


def _set_defaults(policy: Policy, known: Mapping[str, Any]) -> None:
    """What the folder's `generation_config.json` says of a run."""
    policy.steps = int(known.get("num_inference_steps", policy.steps))
    policy.guidance = float(known.get("guidance_scale", policy.guidance))
    policy.world = str(known.get("world", ""))
    if (most := getattr(policy, "max_sequence_length", None)) is not None:
        policy.max_sequence_length = int(known.get("max_sequence_length", most))  # pyright: ignore


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


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}; got {dtype!r}")
    return known[dtype]


def _best_dtype(device: torch.device, quantize: str | None, family: Any) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if quantize else getattr(family, "half", torch.float16)


def _embedded(model: str | Path) -> str | Path:
    """The folder of an embedded model's name, unless a folder here has that name."""
    named = ASSETS / str(model)
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

    def __init__(self) -> None:
        import diffusers
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
