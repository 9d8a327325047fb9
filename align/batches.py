"""Batches: rows of evidence, and what is known about each.

A `Batch` holds rows of one of four kinds and named per-row columns. Rows come in items of `members` consecutive rows: one for
most losses, a winner and a loser for a pair, K for a ranked list. Indexing keeps rows, columns and prompts together.

    Starts   seeds and conditions of rollouts still to be made, with gradient       (backpropagation)
    Paths    whole recorded trajectories; `Batch.steps` unfolds them into `Steps`    (what a rollout source collects, REBEL)
    Steps    single transitions x_t → x_s                                            (policy gradients, D3PO)
    Noised   clean samples with their own noise draw (x0, eps, level)                (denoising losses, Diffusion-DPO)

Columns by name: `reward` (B,); `advantage` (B,); `quality` (B,) higher is preferred within an item, equal is a tie; `label` (B,)
1 desirable, 0 not; `weight` (B,) ≥ 0, by which the loss of an item is multiplied (`Batch.mean`); `old` (B,) log-density of a
step, or evidence of a noised row, when it was collected, and (B, T) on `Paths`; `group` (B,) the prompt a row belongs to; `keep`
(B,) bool, false where a row must not be trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rewards import Prompt
from samplers import Cond, Kernel, Levels, diffuse

__all__ = ["Batch", "Noised", "Paths", "Rows", "Starts", "Steps", "concat"]


@dataclass(frozen=True)
class Starts:
    """Rollouts to make.

    Attributes:
        seeds: (B,) int64, one a row.
        cond: B rows.
        kernel, levels, shape: how to sample.
        draw: a number for random decisions that a whole update shares, such as where to truncate.
    """

    seeds: Tensor
    cond: Cond
    kernel: Kernel
    levels: Levels
    shape: tuple[int, ...]
    draw: int = 0

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: Tensor) -> Starts:
        return replace(self, seeds=self.seeds[rows], cond=self.cond[rows.to(_device(self.cond))])


@dataclass(frozen=True)
class Paths:
    """Recorded trajectories: latents (B, T+1, …)."""

    latents: Tensor
    cond: Cond
    kernel: Kernel
    levels: Levels

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: Tensor) -> Paths:
        rows = rows.to(self.latents.device)
        return replace(self, latents=self.latents[rows], cond=self.cond[rows])


@dataclass(frozen=True)
class Steps:
    """Transitions from x at level `step` to `following` at the next; step (B,) int64 on the CPU."""

    x: Tensor
    following: Tensor
    step: Tensor
    cond: Cond
    kernel: Kernel
    levels: Levels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor) -> Steps:
        there = rows.to(self.x.device)
        parts = {"x": self.x[there], "following": self.following[there], "step": self.step[rows.cpu()]}
        return replace(self, cond=self.cond[there], **parts)


@dataclass(frozen=True)
class Noised:
    """Clean samples x0 (B, …), their noise eps (B, …) and their level (t, alpha, sigma: (B,)), drawn once and kept."""

    x0: Tensor
    eps: Tensor
    at: Levels
    cond: Cond

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, rows: Tensor) -> Noised:
        there = rows.to(self.x0.device)
        return Noised(self.x0[there], self.eps[there], self.at[rows.cpu()], self.cond[there])

    @property
    def x(self) -> Tensor:
        """(B, …) the noisy states."""
        return diffuse(self.x0, self.eps, self.at)


Rows = Starts | Paths | Steps | Noised


@dataclass(frozen=True)
class Batch:
    """Rows, their columns and prompts; see the module docstring.

    Attributes:
        rows: B rows.
        columns: named tensors (B, …) on the CPU or the rows' device.
        prompts: B prompts, or none where no loss asks for them.
        members: rows an item.
        shared: statistics of the whole update that every micro-batch needs.
    """

    rows: Rows
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: tuple[Prompt, ...] = ()
    members: int = 1
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {name: len(column) for name, column in self.columns.items()} | {"rows": len(self.rows)}
        if self.prompts:
            sizes["prompts"] = len(self.prompts)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"a batch needs one entry a row everywhere; got {sizes}")
        if len(self.rows) % self.members:
            raise ValueError(f"{len(self.rows)} rows do not make whole items of {self.members}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def items(self) -> int:
        """How many items the rows make."""
        return len(self.rows) // self.members

    def __getitem__(self, rows: Tensor | Sequence[int]) -> Batch:
        rows = torch.as_tensor(rows, dtype=torch.long).cpu()
        columns = {name: column[rows.to(column.device)] for name, column in self.columns.items()}
        prompts = tuple(self.prompts[i] for i in rows.tolist()) if self.prompts else ()
        return replace(self, rows=self.rows[rows], columns=columns, prompts=prompts)

    def take(self, items: Tensor | Sequence[int]) -> Batch:
        """Whole items, by their index."""
        items = torch.as_tensor(items, dtype=torch.long)
        return self[(items[:, None] * self.members + torch.arange(self.members)).flatten()]

    def column(self, name: str) -> Tensor:
        """A column, on the device of the rows; float64 becomes float32 where the device has none (Apple GPUs).

        Raises:
            ValueError: the source did not make it.
        """
        if name not in self.columns:
            raise ValueError(
                f"this loss needs the column {name!r}; the source made {sorted(self.columns)}: choose another source or option"
            )
        column, device = self.columns[name], _device(self.rows.cond)
        return (column.float() if column.is_floating_point() and device.type == "mps" else column).to(device)

    def mean(self, losses: Tensor) -> Tensor:
        """The mean of losses, one an item or one a row, each multiplied by its column `weight` if there is one."""
        if "weight" not in self.columns:
            return losses.mean()
        weight = self.column("weight").to(losses)
        return (losses * (weight if len(losses) == len(self) else weight[:: self.members])).mean()

    def having(self, **columns: Tensor) -> Batch:
        """With further columns."""
        return replace(self, columns={**self.columns, **columns})

    def kept(self) -> Batch:
        """The items whose rows may all be trained on."""
        if "keep" not in self.columns:
            return self
        return self.take(self.columns["keep"].reshape(-1, self.members).all(1).nonzero().flatten().cpu())

    def steps(self, chosen: Tensor) -> Batch:
        """Unfolds `Paths` into `Steps`: for every item its chosen steps, each with all its members.

        Args:
            chosen: (items, S) int64, the steps of each item.
        """
        paths = self.rows
        assert isinstance(paths, Paths)
        count = chosen.shape[1]
        row = torch.arange(len(self)).reshape(-1, 1, self.members).expand(-1, count, -1).flatten()
        step = chosen.cpu()[:, :, None].expand(-1, -1, self.members).flatten()  # (items, S) -> (items*S*members,)
        there = row.to(paths.latents.device)
        x, following = paths.latents[there, step.to(there.device)], paths.latents[there, step.to(there.device) + 1]
        rows = Steps(x, following, step, paths.cond[there], paths.kernel, paths.levels)
        columns = {}
        for name, column in self.columns.items():
            index = row.to(column.device)
            columns[name] = column[index, step.to(column.device)] if column.ndim > 1 else column[index]
        prompts = tuple(self.prompts[i] for i in row.tolist()) if self.prompts else ()
        return Batch(rows, columns, prompts, self.members, self.shared)

    def state(self) -> dict[str, Any]:
        """Tensors, strings and numbers from which `restored` makes the batch again."""
        rows = self.rows
        keep = {n: v for n, v in vars(rows).items() if n not in ("kernel", "levels", "cond", "shape")}
        if "at" in keep:
            keep["at"] = vars(keep["at"])
        cond = {"positive": dict(rows.cond.positive), "negative": rows.cond.negative and dict(rows.cond.negative)}
        prompts = [(p.text, p.negative, dict(p.meta)) for p in self.prompts]
        return {
            "kind": type(rows).__name__,
            "rows": keep,
            "cond": {**cond, "guidance": rows.cond.guidance},
            "columns": dict(self.columns),
            "prompts": prompts,
            "members": self.members,
        }

    @classmethod
    def restored(
        cls,
        state: Mapping[str, Any],
        kernel: Kernel,
        levels: Levels,
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
    ) -> Batch:
        """The batch of `state()`, sampled as the run samples; latents and conditions on `device`, all else stays."""
        kinds = {"Starts": Starts, "Paths": Paths, "Steps": Steps, "Noised": Noised}
        positive, negative, guidance = (state["cond"][name] for name in ("positive", "negative", "guidance"))
        cond = Cond(_moved(positive, device), negative and _moved(negative, device), guidance)
        latents = {n: v for n, v in state["rows"].items() if n in ("latents", "x", "following", "x0", "eps")}
        fields = {**state["rows"], **_moved(latents, device), "cond": cond}
        if "at" in fields:
            fields["at"] = Levels(**fields["at"])
        else:
            fields |= {"kernel": kernel, "levels": levels}
        if state["kind"] == "Starts":
            fields["shape"] = shape
        prompts = tuple(Prompt(text, negative, meta) for text, negative, meta in state["prompts"])
        return cls(kinds[state["kind"]](**fields), state["columns"], prompts, state["members"])


def concat(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several of the same kind, in order."""
    first = batches[0]
    rows = [vars(b.rows) for b in batches]
    fields = {}
    for name, value in rows[0].items():
        if isinstance(value, Tensor):
            fields[name] = torch.cat([r[name] for r in rows])
        elif isinstance(value, Cond):
            fields[name] = Cond.joined([r[name] for r in rows])
        elif name == "at":
            fields[name] = Levels(
                *(torch.cat([getattr(r[name], part) for r in rows]) for part in ("t", "alpha", "sigma"))
            )
        else:
            fields[name] = value
    columns = {name: torch.cat([b.columns[name] for b in batches]) for name in first.columns}
    prompts = tuple(p for b in batches for p in b.prompts)
    return Batch(type(first.rows)(**fields), columns, prompts, first.members, first.shared)


def _moved(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}


def _device(cond: Cond) -> torch.device:
    return next(iter(cond.positive.values())).device
