"""What a model folder holds, looked at before anything large is read: its parts, its family, its scheduler, its weights.

A folder is in the layout that diffusers' pipelines save and hubs keep: `model_index.json` names the class of every part, each
part has a folder of its own. Parts that are null, or that the family can do without (`spares`) and that have no folder, stay
None: so Stable Diffusion 3 loads without T5.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from samplers.families import FAMILIES

__all__ = [
    "absent_parts",
    "check_scheduler",
    "check_weights",
    "family_of",
    "generation_config",
    "pipeline_config",
    "read_index",
    "shapes",
    "variant_of",
]

logger = logging.getLogger("kilter")
ASSETS = Path(__file__).resolve().parent.parent / "assets"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = (".safetensors", ".bin", ".msgpack")
VOCABULARY = {"vocab.json", "tokenizer.json", "spiece.model", "tokenizer.model", "vocab.txt"}
NEVER_USED = ("safety_checker", "feature_extractor", "image_encoder")
NETWORKS = ("unet", "transformer")


def pipeline_config(model: str | Path) -> Mapping[str, Any]:
    """`model_index.json` of a complete folder or a hub id.

    Raises:
        FileNotFoundError: no such model, or parts of it are missing.
    """
    folder = Path(model)
    if folder.parent == ASSETS and not folder.is_dir():
        raise FileNotFoundError(
            f"no {folder}: the embedded model comes with a clone of the repository; pass another model"
        )
    if folder.is_dir():
        config = read_index(folder)
        absent = absent_parts(folder, config)
        if missing := _missing_parts(folder, {k: v for k, v in config.items() if k not in absent}):
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


def read_index(folder: Path) -> Mapping[str, Any]:
    """What a folder's `model_index.json` says.

    Raises:
        FileNotFoundError: there is none that names the parts of a pipeline.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json: expected a folder saved by a diffusers pipeline")
    try:
        config = json.loads(index.read_text())
    except json.JSONDecodeError as error:
        raise FileNotFoundError(f"{index} is not JSON ({error}): the download may be incomplete") from error
    if not isinstance(config, dict):
        raise FileNotFoundError(f"{index} must name the parts of a pipeline; got {type(config).__name__}")
    return config


def absent_parts(model: str | Path, config: Mapping[str, Any]) -> dict[str, None]:
    """The parts to load as None: those never used here, those that are null, and those that the family can do without and that
    have no folder."""
    unused = [name for name in NEVER_USED if name in config]
    unused += [name for name, entry in config.items() if entry == [None, None]]
    spares = getattr(family_of(config, model), "spares", ()) if Path(model).is_dir() else ()
    for name in spares:
        words = name.replace("text_encoder", "tokenizer")
        if name not in unused and name in config and not (Path(model) / name).is_dir():
            logger.warning("%s has no %s/: going on without", model, name)
            unused += [name, words]
    return dict.fromkeys(unused)


def _missing_parts(folder: Path, config: Mapping[str, Any]) -> list[str]:
    missing = []
    for name, entry in config.items():
        if not isinstance(entry, list) or not entry[0]:
            continue
        part = folder / name
        files = {f.name for f in part.iterdir()} if part.is_dir() else set()
        modelled = not any(word in entry[1] for word in ("Tokenizer", "Scheduler", "Processor"))
        if not files:
            missing.append(f"{name}/")
        elif "Tokenizer" in entry[1] and not VOCABULARY & files:
            missing.append(f"{name}/ vocabulary ({' or '.join(sorted(VOCABULARY))})")
        elif modelled and not any(f.endswith(WEIGHTS) for f in files):
            missing.append(f"{name}/ weights ({' or '.join(WEIGHTS)})")
        elif modelled and "config.json" not in files:
            missing.append(f"{name}/config.json")
        else:
            missing += [f"{name}/{file}" for file in sorted(_shards(part) - files)]
    return missing


def _shards(part: Path) -> set[str]:
    """The files among which the weights of a part are divided, by its safetensors index; of one variant at least."""
    found = []
    for index in part.glob("*.safetensors.index*.json"):
        named = set(json.loads(index.read_text())["weight_map"].values())
        found.append(named - {f.name for f in part.iterdir()})
    return min(found, key=len, default=set())


def family_of(config: Mapping[str, Any], model: str | Path) -> Any:
    """The adapter of a pipeline's family.

    Raises:
        ValueError: a family kilter does not know.
    """
    pipeline = config.get("_class_name")
    if pipeline not in FAMILIES:
        raise ValueError(
            f"{model} is a {pipeline}, which kilter cannot drive yet; supported: {', '.join(FAMILIES)}. "
            "How to add a family: samplers/families/README.md"
        )
    module, name = FAMILIES[pipeline].split(":")
    return getattr(importlib.import_module(module), name)


def check_scheduler(family: Any, config: Mapping[str, Any], model: str | Path, student: str | None) -> None:
    """Raises if the scheduler that a folder names, or that a student needs, is of another kind of model than the family.

    Raises:
        ValueError: it is.
    """
    known = getattr(family, "schedulers", None)
    named = (config.get("scheduler") or [None, None])[1]
    if known is None or named is None:
        return
    if named not in known:
        raise ValueError(
            f"{model} is a {config['_class_name']} with a {named}; such models walk the levels of {', '.join(known)}: "
            "put the scheduler/ folder and the line of model_index.json back that the model was published with"
        )
    wanted = {"lcm": "LCMScheduler", "trailing": "EulerDiscreteScheduler"}.get(student or "")
    if wanted and wanted not in known:
        raise ValueError(
            f"student={student!r} is a schedule of diffusion models; {model} is a {config['_class_name']}, whose students come "
            "with the schedule they need: leave student out"
        )


def variant_of(model: str | Path, asked: str | None = None) -> str | None:
    """The variant of a folder's networks: the one asked for, else "fp16" or "bf16" where there is no other.

    Raises:
        FileNotFoundError: the folder has no such variant.
    """
    files = [file.name for part in NETWORKS for file in Path(model).glob(f"{part}/*")]
    weights = [name for name in files if name.endswith(WEIGHTS)]
    if asked and weights and not any(f".{asked}." in name for name in weights):
        raise FileNotFoundError(f"{model} has no variant {asked!r}; its networks are in {', '.join(sorted(weights))}")
    return asked or next((v for v in ("fp16", "bf16") if weights and all(f".{v}." in name for name in weights)), None)


def check_weights(model: str | Path, pipe: Any, variant: str | None) -> None:
    """Raises if files lack weights, which stay empty, or are drawn at random in text encoders.

    Names of weights change between versions, so for these shapes are counted: every tensor must have one in the files.

    Raises:
        FileNotFoundError: weights are missing.
    """
    for name, part in ((n, p) for n, p in pipe.components.items() if isinstance(p, nn.Module)):
        if empty := [n for n, p in part.named_parameters() if p.is_meta]:
            raise FileNotFoundError(
                f"{model} is incomplete: {name}/ lacks {len(empty)} weights, such as {empty[0]}. Download it again"
            )
        if not name.startswith("text_encoder") or getattr(part, "is_quantized", False):
            continue  # the shapes of quantised weights are others
        files = [f for f in (Path(model) / name).glob("*.safetensors") if (f".{variant}." in f.name) == bool(variant)]
        found = shapes(files)
        own = {n: tuple(p.shape) for n, p in part.named_parameters()}
        lacking = Counter(own.values()) - Counter(found.values())
        if found and lacking:
            shape = next(iter(lacking))
            ends = {".".join(key.split(".")[-3:]) for key in found}
            like = [n for n, s in own.items() if s == shape and ".".join(n.split(".")[-3:]) not in ends]
            raise FileNotFoundError(
                f"{model} is incomplete: {name}/ lacks {sum(lacking.values())} weights, such as a {shape} "
                f"{like[0] if like else ''}. Download it again"
            )


def shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in safetensors files, by name, from their headers."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, "pt") as weights:
            found |= {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    return found


def generation_config(model: str | Path) -> dict[str, Any]:
    """`generation_config.json` of a folder, or nothing."""
    path = Path(model) / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise FileNotFoundError(f"{path} is not a JSON object ({error})") from error
