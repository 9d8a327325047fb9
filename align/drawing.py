"""What sources draw: the order of things, noise and levels, and which steps are trained. Every draw is a function of a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samplers import Cond, Kernel, Levels, Policy
from samplers.noise import mix

from .batches import Batch, Noised, Paths

__all__ = ["noised", "pick", "trainable_steps", "unfolded"]


def pick(count: int, start: int, size: int, seed: int) -> list[int]:
    """`count` indices below `size` from place `start` of an endless sequence that shuffles afresh after each pass."""
    places = range(start, start + count)
    orders = {
        epoch: torch.randperm(size, generator=torch.Generator().manual_seed(mix(seed, epoch))).tolist()
        for epoch in {place // size for place in places}
    }
    return [orders[place // size][place % size] for place in places]


def noised(
    policy: Policy, x0: Tensor, cond: Cond, seeds: Sequence[int], members: int, draws: int, t: str = "uniform"
) -> tuple[Noised, Tensor]:
    """Draws noise and level for clean samples; the members of an item share them.

    Args:
        x0: (B, …), B a multiple of `members`.
        seeds: one an item.
        draws: independent draws an item.
        t: how levels are drawn: "uniform" in the network's time, or "logit_normal" (SD3, 2403.03206).

    Returns:
        The rows (B·draws), item by item and draw by draw, and which row of x0 each came from.
    """
    levels, eps = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(draws):
            u = torch.rand((), generator=generator, dtype=torch.float64)
            if t == "logit_normal":
                u = torch.randn((), generator=generator, dtype=torch.float64).sigmoid()
            levels += [u] * members
            eps += [torch.randn(x0.shape[1:], generator=generator)] * members
    row = torch.arange(len(x0)).reshape(-1, 1, members).expand(-1, draws, -1).flatten()
    there = row.to(x0.device)
    return Noised(x0[there], torch.stack(eps).to(x0), policy.training_levels(torch.stack(levels)), cond[there]), row


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
