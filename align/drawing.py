"""What sources draw: the order of things, noise and levels, and which steps are trained. Every draw is a function of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from samplers import Cond, Kernel, Levels, Policy
from samplers.noise import mix

from .batches import Batch, Noised, Paths

__all__ = ["LevelLaw", "noised", "pick", "trainable_steps", "unfolded"]

LevelLaw = Literal["uniform", "logit_normal", "sampled"]


def pick(count: int, start: int, size: int, seed: int) -> list[int]:
    """`count` indices below `size` from place `start` of an endless sequence that shuffles afresh after each pass."""
    places = range(start, start + count)
    orders = {
        epoch: torch.randperm(size, generator=torch.Generator().manual_seed(mix(seed, epoch))).tolist()
        for epoch in {place // size for place in places}
    }
    return [orders[place // size][place % size] for place in places]


def noised(
    policy: Policy,
    x0: Tensor,
    cond: Cond,
    seeds: Sequence[int],
    members: int,
    draws: int,
    t: LevelLaw = "uniform",
    levels: Levels | None = None,
) -> tuple[Noised, Tensor]:
    """Draws noise and level for clean samples; the members of an item share them.

    Args:
        x0: (B, …), B a multiple of `members`.
        seeds: one an item.
        draws: independent draws an item.
        t: how levels are drawn: "uniform" in the network's time, "logit_normal" (SD3, 2403.03206), or "sampled": those at which
            a run asks the network, none of them twice in an item before all have come.
        levels: the run's table, for "sampled".

    Returns:
        The rows (B·draws), item by item and draw by draw, and which row of x0 each came from.
    """
    places, eps = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(levels.steps, generator=generator) if levels is not None and t == "sampled" else None
        for draw in range(draws):
            if order is not None:
                u = order[draw % len(order)]
            elif t == "logit_normal":
                u = torch.randn((), generator=generator, dtype=torch.float64).sigmoid()
            else:
                u = torch.rand((), generator=generator, dtype=torch.float64)
            places += [u] * members
            eps += [torch.randn(x0.shape[1:], generator=generator)] * members
    drawn = torch.stack(places)
    at = levels[drawn] if levels is not None and t == "sampled" else policy.training_levels(drawn)
    row = torch.arange(len(x0)).reshape(-1, 1, members).expand(-1, draws, -1).flatten()
    there = row.to(x0.device)
    return Noised(x0[there], torch.stack(eps).to(x0), at, cond[there]), row


def trainable_steps(kernel: Kernel, levels: Levels, skip_last: int) -> Tensor:
    """The steps that have a density, without the last few."""
    noisy = (kernel.stds(levels) > 0).nonzero().flatten()
    return noisy[noisy < levels.steps - skip_last]


def unfolded(batch: Batch, seed: int, fraction: float, skip_last: int) -> Batch:
    """Recorded trajectories as a share of their trainable steps, drawn for each item by its number; other rows as they are."""
    if not isinstance(batch.rows, Paths):
        return batch
    noisy = trainable_steps(batch.rows.kernel, batch.rows.levels, skip_last)
    count = max(1, round(fraction * len(noisy)))
    item = batch.columns["item"].reshape(-1, batch.members)[:, 0].tolist()
    order = [torch.randperm(len(noisy), generator=torch.Generator().manual_seed(mix(seed, i))) for i in item]
    return batch.steps(noisy[torch.stack(order)[:, :count].sort(1).values])
