"""Samples for people to choose among: images, the trajectories that made them, and a file of choices still to be made.

    out/choices.jsonl          one row a prompt, without an answer: add "winner", "ranking" or "scores" to each
    out/images/00000-0.png     what to look at
    out/trajectories/00000-0.safetensors   "latents" (T+1, …), for D3PO

Every row records how it was sampled in "settings", against which a run checks that trajectories fit it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rewards import Prompt, as_prompts
from rewards.files import whole
from samplers import Kernel, Policy, Size, Trajectory

from .data import append_feedback
from .prompts import read_prompts
from .results import prepare_folder, to_pil
from .sampling import Sampling
from .steering import row_seed

__all__ = ["sample_pairs", "settings_of", "unlike"]


def sample_pairs(
    policy: Policy,
    prompts: Sequence[str | Prompt] | str | Prompt,
    out: str | Path,
    *,
    kernel: Kernel | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: Size | None = None,
    seed: int = 0,
    group: int = 2,
    trajectories: bool = True,
    shared_start: bool = True,
    batch: int = 32,
) -> Path:
    """Samples `group` images of every prompt and writes them for people to judge.

    Args:
        prompts: texts, or .txt / .jsonl files of them.
        out: a folder that is empty or does not exist yet.
        kernel, steps, guidance, size: how to sample; the policy's own by default. Training on the trajectories needs the same.
        seed: of the first sample; sample k of prompt p has `row_seed(seed, p, k)`.
        group: samples a prompt.
        trajectories: keep every state, which evidence "steps" (D3PO) needs; otherwise the clean latent, where there is no image.
        shared_start: the samples of a prompt share their initial latent and differ in the noise of their steps, as in D3PO.
        batch: samples in flight at a time.

    Returns:
        The file of choices to be made.

    Raises:
        ValueError: nothing to choose among, or the samples of a prompt would all be the same.
        FileExistsError: `out` holds something.
    """
    given = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    texts = [p for p in given if isinstance(p, str)]
    wanted = as_prompts(read_prompts(texts) if texts and len(texts) == len(given) else given)
    sampling = Sampling.of(policy, kernel, steps, guidance, size)
    if group < 2 or not wanted or batch < 1:
        raise ValueError(
            f"a choice needs prompts and a group of two or more; got {len(wanted)} prompts, group={group}, batch={batch}"
        )
    if (shared_start or trajectories) and not sampling.kernel.diversifies(sampling.levels):
        why = "samples that share their start would be the same" if shared_start else "a trajectory has no density"
        raise ValueError(f"{sampling.kernel} is deterministic, so {why}: use DDIM(eta=1), or switch both options off")
    folder = prepare_folder(out, remedy="choose another folder, it may hold choices that people have made")
    at_once = max(1, batch // group)
    for first in range(0, len(wanted), at_once):
        part = wanted[first : first + at_once]
        numbers = range(first, first + len(part))
        seeds = [row_seed(seed, p, k) for p in numbers for k in range(group)]
        starts = [row_seed(seed, p, 0) for p in numbers for _ in range(group)] if shared_start else None
        record = "path" if trajectories else "final"
        rows = [p for p in part for _ in range(group)]
        path = sampling.roll(policy, rows, seeds, starts=starts, record=record)
        with torch.no_grad():
            media = policy.decode(path.x0)
        for i, prompt in enumerate(part):
            mine = slice(i * group, (i + 1) * group)
            files = _save(folder, first + i, path, media, mine, trajectories)
            row = {"prompt": prompt.text, **({"negative": prompt.negative} if prompt.negative else {}), **files}
            row |= {"seeds": seeds[mine], "settings": settings_of(policy, sampling) | {"shared_start": shared_start}}
            append_feedback(folder / "choices.jsonl", row)
    return folder / "choices.jsonl"


def settings_of(policy: Policy, sampling: Sampling) -> dict[str, Any]:
    """What must be the same for a trajectory to belong to a run."""
    kernel, size = repr(sampling.kernel), list(sampling.size)
    how = {"kernel": kernel, "steps": sampling.levels.steps, "guidance": sampling.guidance, "size": size}
    return {"model": policy.source or type(policy).__name__, "adapter": getattr(policy, "adapter", ""), **how}


def unlike(recorded: Mapping[str, Any], run: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """What differs between the recorded settings and the run's. Models and adapters are told apart by the last part of
    their name, so that data can move to another machine."""

    def same(name: str, value: Any) -> bool:
        there = recorded[name]
        return Path(str(there)).name == Path(str(value)).name if name in ("model", "adapter") else there == value

    names = [n for n in run if n not in ignore and not (n in recorded and same(n, run[n]))]
    said = {n: f"{recorded[n]!r} was recorded" if n in recorded else "was not recorded" for n in names}
    return [f"{n}: {said[n]}, the run has {run[n]!r}" for n in names]


def _save(
    folder: Path, number: int, path: Trajectory, media: Tensor, rows: slice, trajectories: bool
) -> dict[str, list[str]]:
    """Writes the samples of one prompt, each file whole or not at all; returns the keys of its row."""
    files: dict[str, list[str]] = {}
    pictures = media.ndim == 4 and media.shape[1] == 3
    for k, i in enumerate(range(rows.start, rows.stop)):
        if pictures:
            name = f"images/{number:05d}-{k}.png"
            (folder / "images").mkdir(exist_ok=True)
            whole(folder / name, partial(to_pil(media[i]).save, format="png"), durable=False)
            files.setdefault("images", []).append(name)
        if trajectories or not pictures:
            name = f"trajectories/{number:05d}-{k}.safetensors"
            (folder / "trajectories").mkdir(exist_ok=True)
            states = {"latents": path.latents[i]} if trajectories and path.latents is not None else {"x0": path.x0[i]}
            plain = {key: value.detach().cpu().clone() for key, value in states.items()}
            whole(folder / name, partial(save_file, plain), durable=False)
            files.setdefault("latents", []).append(name)
    return files
