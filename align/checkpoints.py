"""Checkpoints: written whole or not at all.

A checkpoint is a folder made beside its final name, flushed to disk, and renamed: whoever looks sees the old state or the new
one. It holds

    config.json            how to make policy, objective, source and trainer again
    state.pt               what all processes share: weights, voices, optimiser, counters, histories
    rank-00000.pt …        what each process holds: its share of the collection in use, its generators
    the adapter            in the diffusers format, usable as it is

Tensors, numbers and strings only, so loading runs no code.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .world import World

__all__ = ["generators", "latest", "read", "restore_generators", "write"]

STATE, CONFIG = "state.pt", "config.json"
PARTIAL = ".partial-"


def write(
    folder: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    mine: Mapping[str, Any],
    extra: Callable[[Path], object],
    world: World,
) -> None:
    """Writes a checkpoint; an older one of the same name is replaced only once the new one is complete.

    Args:
        state: the same in every process.
        mine: of this process.
        extra: writes further files into the folder it is given.

    Raises:
        OSError: it could not be written in some process; nothing is left behind, and older checkpoints are untouched.
    """
    partial = folder.parent / f"{PARTIAL}{folder.name}"
    error: Exception | None = None
    try:
        if world.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    except OSError as e:
        error = e
    world.wait()
    try:
        if error is None:
            torch.save(dict(mine), partial / f"rank-{world.rank:05d}.pt")
            if world.first:
                torch.save(dict(state), partial / STATE)
                extra(partial)
                (partial / CONFIG).write_text(json.dumps(config, indent=1))
            for file in partial.iterdir():
                flush(file)
    except (OSError, RuntimeError) as e:  # torch's zip writer reports a full disk as RuntimeError
        error = e
    if world.any(error is not None):
        if world.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"could not write checkpoint {folder}: {error or 'another process failed'}") from error
    if world.first:
        flush(partial)
        old = folder.parent / f"{PARTIAL}old-{folder.name}"
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    world.wait()


def flush(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest(folder: Path) -> Path:
    """The newest complete checkpoint of a run, or the folder itself if it is one.

    Raises:
        FileNotFoundError: there is none.
    """
    if (folder / STATE).is_file():
        return folder
    found = sorted(p for p in (folder / "checkpoints").glob("[0-9]*") if (p / STATE).is_file())
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint to resume from: expected {folder}/checkpoints/<update>/{STATE}"
        )
    return found[-1]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """(config, shared state, one state a process) of a checkpoint.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        shards = [torch.load(p, map_location="cpu", weights_only=True) for p in sorted(folder.glob("rank-*.pt"))]
    except (OSError, RuntimeError, json.JSONDecodeError, EOFError) as error:
        raise ValueError(f"checkpoint {folder} cannot be read ({error}): resume from an older one") from error
    return config, state, shards


def generators() -> dict[str, Any]:
    """The state of every global generator of this process; kilter draws from none, but a reward of yours may."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": repr(random.getstate()),
        "numpy": {
            "kind": kind, "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)), "position": int(position),
            "has_gauss": int(has_gauss), "cached": float(cached),
        },
    }  # fmt: skip
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_generators(state: Mapping[str, Any]) -> None:
    """Puts `generators()` back."""
    import ast

    torch.set_rng_state(state["torch"])
    random.setstate(ast.literal_eval(state["python"]))
    n = state["numpy"]
    np.random.set_state((n["kind"], n["keys"].numpy().astype(np.uint32), n["position"], n["has_gauss"], n["cached"]))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
