"""Weights from folders, files and the hub: nothing executable is read, every key is accounted for.

Files are safetensors where there is a choice, else pickles read with `weights_only=True`. Code of a checkpoint's author runs only
where a class takes `trust_remote_code` and the user said so.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "expand",
    "fill",
    "find",
    "folder",
    "hollow",
    "imported",
    "loading",
    "precision",
    "pretrained",
    "pretrained_tokenizer",
    "read_model",
    "read_weights",
    "unfilled",
    "warn_if_cut",
]

HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/(.+)")  # owner/name/file
LISTED = 8  # keys an error names
_HOLLOW: ContextVar[bool] = ContextVar("hollow", default=False)


def expand(name: str) -> str:
    """Resolves a leading ~; hub ids pass."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def precision(dtype: str, allowed: Sequence[str] = ("float32", "bfloat16", "float16")) -> Any:
    """The torch.dtype that a network is to run in; asked for first, as loading takes long.

    Raises:
        ValueError: it is not among those allowed.
    """
    if dtype not in allowed:
        raise ValueError(f"dtype must be one of {', '.join(allowed)}; got {dtype!r}")
    return getattr(torch, dtype)


@contextmanager
def loading(name: str, needed: str) -> Iterator[None]:
    """Turns whatever a loader raises into one error that says what was asked, what is there and what to do."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # json, safetensors, torch and the hub each raise their own
        path = Path(expand(name.removeprefix("local-dir:")))
        remedy = "If a download was interrupted, delete what is there and repeat it."
        if path.is_dir():
            found = f"the folder holds {', '.join(sorted(p.name for p in path.iterdir())) or 'nothing'}"
        elif path.exists():
            found = f"a file of {path.stat().st_size} bytes"
        elif path.is_absolute():
            found, remedy = "nothing, there is no such folder or file", "Correct the path."
        else:
            found = "nothing of that name on disk, so it was looked up on the hub"
        raise OSError(
            f"cannot load {name!r}: {type(error).__name__}: {error}\nNeeded: {needed}. Found: {found}. {remedy}"
        ) from error


def find(name: str) -> Path:
    """A file on disk, or owner/name/file on the hub, which is downloaded.

    Raises:
        FileNotFoundError: it is neither.
    """
    path, on_hub = Path(expand(name)), HUB_FILE.fullmatch(name)
    if path.is_file():
        return path
    if not on_hub or path.is_absolute():
        raise FileNotFoundError(f"no file {name}, and it does not read owner/name/file as a file on the hub does")
    if _HOLLOW.get():
        return path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(*on_hub.groups()))


def folder(name: str, *patterns: str) -> Path:
    """A folder on disk, or the files of a hub repository that fit the patterns, which are downloaded."""
    path = Path(expand(name))
    if path.is_dir() or path.is_absolute():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(patterns)))


def read_model(name: str) -> dict[str, Tensor]:
    """All tensors of a folder or hub repository that holds model.safetensors, or else pytorch_model.bin, whole or in shards.

    Raises:
        OSError: files are missing, incomplete or unreadable.
    """
    with loading(
        name, "model.safetensors, or model.safetensors.index.json and its shards; or pytorch_model.bin likewise"
    ):
        path, main = folder(name, "model*.safetensors", "model.safetensors.index.json"), "model.safetensors"
        if not any(path.glob("model*.safetensors")):
            path, main = folder(name, "pytorch_model*.bin", "pytorch_model.bin.index.json"), "pytorch_model.bin"
        index, files = path / f"{main}.index.json", {main}
        if index.is_file():
            files = set(json.loads(index.read_text())["weight_map"].values())
        return {key: weight for file in sorted(files) for key, weight in read_weights(path / file).items()}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch file, there also under `state_dict` or `model`.

    Raises:
        ValueError: the file holds something else.
    """
    if _HOLLOW.get() and not Path(path).is_file():
        return {}
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(name), Mapping):
            weights = weights[name]
    if not isinstance(weights, Mapping) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} holds no state dict, but {type(weights).__name__}")
    return dict(weights)


def fill(module: nn.Module, weights: Mapping[str, Tensor], name: str, ignore: Sequence[str] = ()) -> None:
    """Loads weights into a module; every key must fit.

    Args:
        module: takes the weights in its own types, or as they are if it is on the meta device.
        weights: by the module's names.
        name: of the checkpoint, for the error.
        ignore: patterns of keys that may be left over, matched in full.

    Raises:
        ValueError: keys are missing or left over, or shapes differ; the error lists them.
    """
    if _HOLLOW.get():
        return
    own = module.state_dict()
    extra = [k for k in weights if k not in own and not any(re.fullmatch(p, k) for p in ignore)]
    missing = [k for k in own if k not in weights]
    differ = [
        f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    found = {"lacks": missing, "has unknown": extra, "differs in shape at": differ}
    if any(found.values()):
        told = "; ".join(f"{what} {_some(keys)}" for what, keys in found.items() if keys)
        raise ValueError(f"{name} does not hold the weights of {type(module).__name__}: it {told}")
    bare = any(p.is_meta for p in module.parameters())
    module.load_state_dict({k: weights[k] for k in own}, assign=bare)


def pretrained(cls: Any, name: str, *, unread: Sequence[str] = (), **options: Any) -> Any:
    """`cls.from_pretrained`, refusing weights that do not fill the network and warning of those that it does not read.

    Args:
        cls: a class of transformers.
        name: folder or hub id.
        unread: patterns of weights that may be missing, matched in full: those that the network has and does not use.
        options: for `from_pretrained`.

    Raises:
        OSError: files are missing, incomplete or unreadable.
    """
    if _HOLLOW.get():
        return _outline(cls, name, options)
    with loading(name, "config.json and the weights (model.safetensors)"):
        # without trust_remote_code, transformers asks at the terminal
        options = {"dtype": "auto", "trust_remote_code": False, **options}
        network, report = cls.from_pretrained(expand(name), output_loading_info=True, **options)
        if lacking := sorted(k for k in report["missing_keys"] if not any(re.fullmatch(p, k) for p in unread)):
            raise OSError(f"the weights lack {_some(lacking)}")
    if extra := sorted(k for k in report["unexpected_keys"] if not k.endswith("position_ids")):
        warnings.warn(f"{name} holds weights that {cls.__name__} does not read: {_some(extra)}", stacklevel=3)
    return network


def _outline(cls: Any, name: str, options: Mapping[str, Any]) -> Any:
    """The network that `pretrained` would load, on the meta device."""
    from transformers import AutoConfig

    with loading(name, "config.json"):
        config = AutoConfig.from_pretrained(expand(name), trust_remote_code=False)
        dtype = options.get("dtype", "auto")
        dtype = getattr(config, "dtype", None) if dtype == "auto" else dtype
        more = {key: value for key, value in options.items() if key not in ("dtype", "trust_remote_code")}
        with torch.device("meta"):
            network = getattr(cls, "from_config", None) or cls._from_config
            return network(config, **more).to(dtype or torch.float32)


def pretrained_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub id, refusing the empty one that transformers 5 makes up for want of its files: it reads
    every prompt alike.

    Raises:
        OSError: files are missing, or the vocabulary holds special tokens only.
    """
    from transformers import AutoTokenizer

    with loading(name, "the tokenizer (tokenizer.json)"):
        tokenizer = AutoTokenizer.from_pretrained(expand(name), trust_remote_code=False)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise OSError("the tokenizer's files are missing: it knows no words")
    return tokenizer


def imported(path: str) -> Any:
    """What a dotted path names, such as a function of the user's; modules in the working directory are found too.

    Raises:
        ValueError: there is none.
    """
    module, _, name = path.rpartition(".")
    sys.path.append(str(Path.cwd()))
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {path!r}: {error}; give it as package.module.name") from error
    finally:
        sys.path.pop()


@contextmanager
def hollow() -> Iterator[None]:
    """Within, networks have their shapes and no weights of their own: of the hub only configs and tokenizers are read."""
    token = _HOLLOW.set(True)
    try:
        yield
    finally:
        _HOLLOW.reset(token)


@contextmanager
def unfilled() -> Iterator[None]:
    """Within, networks of transformers draw no weights, which would take seconds, as `fill` gives them theirs."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


def warn_if_cut(reader: str, text: str, count: int, limit: int, unit: str = "tokens") -> None:
    """Warns that the end of a prompt is not read."""
    if count > limit:
        warnings.warn(
            f"{reader} reads {limit} {unit}: the last {count - limit} of {count} are cut in {text[:60]!r}...",
            stacklevel=2,
        )


def _some(keys: Sequence[str]) -> str:
    more = len(keys) - LISTED
    return ", ".join(keys[:LISTED]) + (f" and {more} more" if more > 0 else "")
