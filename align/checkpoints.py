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

import ast
import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewards.files import flush

from .results import PROBE, prepare_folder
from .world import World

__all__ = [
    "claim",
    "complete",
    "generators",
    "latest",
    "never_saved",
    "read",
    "read_config",
    "remove",
    "restore_generators",
    "write",
]

STATE, CONFIG, CHECKPOINTS = "state.pt", "config.json", "checkpoints"
PARTIAL, OLD = ".partial-", ".old"


def claim(out: str | None, resumed: bool, world: World) -> Path:
    """The folder of a run, made by the first process; a run that was cut off before it first saved is begun again.

    Args:
        out: the folder; the next free runs/NNN by default.
        resumed: it holds this run already.

    Raises:
        FileExistsError: it holds another run.
        OSError: it cannot be written.
    """
    made: Path | OSError | None = None
    if world.first:
        again = resumed or (out is not None and never_saved(Path(out).expanduser()))
        remedy = f"choose another out, or continue the run it holds: kilter train --resume {out}"
        try:
            made = prepare_folder(out, again, remedy)
            (made / CHECKPOINTS).mkdir(exist_ok=True)
        except OSError as error:
            made = error
    made = world.objects([made])[0]
    if isinstance(made, OSError):  # in all processes
        raise made
    return Path(made or "")


def write(
    folder: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Any],
    mine: Mapping[str, Any],
    extra: Callable[[Path], Sequence[Path]],
    world: World,
) -> None:
    """Writes a checkpoint; an older one of the same name is replaced only once the new one is complete.

    Args:
        state: the same in every process.
        mine: of this process.
        extra: writes further files into the folder it is given, and returns them.

    Raises:
        OSError: it could not be written in some process; nothing is left behind, and older checkpoints are untouched.
    """
    partial = folder.parent / f"{PARTIAL}{folder.name}"

    def begin() -> None:
        if world.first:
            _remove(partial)
            partial.mkdir(parents=True)

    def fill() -> None:
        files = [partial / f"rank-{world.rank:05d}.pt"]
        torch.save(dict(mine), files[0])
        if world.first:
            files += [partial / STATE, partial / CONFIG, *extra(partial)]
            torch.save(dict(state), partial / STATE)
            (partial / CONFIG).write_text(json.dumps(config, indent=1))
        for file in files:
            flush(file)

    def finish() -> None:
        if world.first:
            flush(partial)
            old = folder.with_name(f"{folder.name}{OLD}")
            if folder.exists():
                _remove(old)
                folder.rename(old)  # until the next line it is the one `complete` finds
            partial.rename(folder)
            flush(folder.parent)
            remove(old)

    for part in (begin, fill, finish):
        error: Exception | None = None
        try:
            part()
        except Exception as e:  # a full disk is a RuntimeError to torch's writer
            error = e
        if world.any(error is not None):  # all processes go on, or none
            if world.first:
                _remove(partial)
            raise OSError(f"could not write checkpoint {folder}: {error or 'another process failed'}") from error


def remove(folder: Path) -> None:
    """Removes a checkpoint; cut off in the middle, it leaves none that looks whole."""
    gone = folder.parent / f"{PARTIAL}{folder.name}"
    _remove(gone)
    with contextlib.suppress(OSError):
        folder.rename(gone)
    _remove(gone)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest first; `.stem` is the update."""
    found = [p for p in (run / CHECKPOINTS).glob("[0-9]*") if p.stem.isdigit() and (p / STATE).is_file()]
    return sorted(found, key=lambda p: (int(p.stem), p.suffix != OLD))


def never_saved(run: Path) -> bool:
    """Whether a folder holds nothing but a run that was cut off before its first checkpoint."""
    if not (run / CHECKPOINTS).is_dir():
        return run.is_dir() and {p.name for p in run.iterdir()} == {PROBE}
    return not complete(run)


def tidy(run: Path, update: int) -> None:
    """Removes what was cut off while it was written, and checkpoints after an update one goes back to."""
    for folder in (*run.glob(f"{PARTIAL}*"), *(run / CHECKPOINTS).glob(f"{PARTIAL}*")):
        _remove(folder)
    for later in complete(run):
        replaced = later.suffix == OLD and (later.with_suffix("") / STATE).is_file()
        if int(later.stem) > update or replaced:
            remove(later)


def latest(folder: Path) -> Path:
    """The newest complete checkpoint of a run, or the folder itself if it is one.

    Raises:
        FileNotFoundError: there is none.
    """
    if (folder / STATE).is_file():
        return folder
    if found := complete(folder):
        return found[-1]
    what = "was cut off before it first saved: start it again" if never_saved(folder) else "holds no run to resume"
    raise FileNotFoundError(f"{folder} {what}; expected {folder / CHECKPOINTS}/<update>/{STATE}")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """(config, shared state, one state a process) of a checkpoint.

    Raises:
        ValueError: it cannot be read.
    """
    config = read_config(folder)
    with _readable(folder):
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        ranks = [folder / f"rank-{rank:05d}.pt" for rank in range(config["processes"])]
        shards = [torch.load(path, map_location="cpu", weights_only=True) for path in ranks]
    return config, state, shards


def read_config(folder: Path) -> dict[str, Any]:
    """What a checkpoint was made with, without its weights.

    Raises:
        ValueError: it cannot be read.
    """
    with _readable(folder):
        return json.loads((folder / CONFIG).read_text())


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a torn file makes the unpickler raise almost anything
        reason = f"{type(error).__name__}: {error}".split(". ")[0].splitlines()[0]  # torch's advice is not for us
        raise ValueError(f"checkpoint {folder} cannot be read ({reason}): resume from an older one") from error


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
    torch.set_rng_state(state["torch"])
    random.setstate(ast.literal_eval(state["python"]))
    n = state["numpy"]
    np.random.set_state((n["kind"], n["keys"].numpy().astype(np.uint32), n["position"], n["has_gauss"], n["cached"]))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
