"""Advantages: pure functions from rewards (N,) and groups (N,) to (N,), over the rewards of all devices.

A reward that is NaN was not judged: it takes no part in any statistic, and its own advantage is 0.

Sources: DDPO's per-prompt statistics, 2305.13301; GRPO, 2402.03300; global standard deviation, Flow-GRPO 2505.05470.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["Advantage", "PromptStatistics", "advantages", "best_and_worst", "group_mean", "normalised"]

Advantage = Literal["group", "group_global_std", "global", "centre", "rank", "running", "none"]


def advantages(kind: Advantage, rewards: Tensor, groups: Tensor, eps: float = 1e-4, clip: float = 5.0) -> Tensor:
    """(N,) float64 advantages.

    Args:
        kind: "group": (r − group mean) / (group std + eps), GRPO. "group_global_std": the std of all rewards instead, as
            Flow-GRPO does. "global": mean and std of all rewards. "centre": r − group mean (no scale, so no bias toward easy
            prompts, 2503.20783). "rank": ranks within the group spread evenly over [−1, 1], ties shared. "none": r itself.
        rewards: (N,), NaN where not judged.
        groups: (N,) int, which prompt each reward belongs to.
        eps: added to standard deviations (population ones).
        clip: advantages are clamped to ± this; "none" is not.

    Raises:
        ValueError: an unknown kind, or groups of one sample where a group is compared with itself.
    """
    r = rewards.double()
    if kind == "none":
        return r.nan_to_num(0.0)
    if kind not in get_args(Advantage) or kind == "running":
        raise ValueError(f"advantage must be one of {', '.join(get_args(Advantage))}; got {kind!r}")
    if kind == "global":
        a = (r - r.nanmean()) / (_std(r) + eps)
        return a.nan_to_num(0.0).clamp(-clip, clip)
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    if int(sizes.max()) < 2:
        raise ValueError(
            f"advantage {kind!r} compares the samples of a prompt: take at least two a prompt, got one each"
        )
    if kind == "rank":
        return _ranks(r, index, len(sizes)).clamp(-clip, clip)
    gap = r - group_mean(r, groups)
    if kind == "group":
        gap = gap / (group_mean(gap.square(), groups).sqrt() + eps)
    elif kind == "group_global_std":
        gap = gap / (_std(r) + eps)
    return gap.nan_to_num(0.0).clamp(-clip, clip)


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """(N,) the mean of each value's group, NaN left out."""
    _, index = groups.unique(return_inverse=True)
    judged = ~values.isnan()
    total = torch.zeros(int(index.max()) + 1, dtype=values.dtype).index_add_(0, index, values.nan_to_num(0.0))
    count = torch.zeros_like(total).index_add_(0, index, judged.to(values.dtype))
    return (total / count)[index]


def normalised(rewards: Tensor, groups: Tensor) -> Tensor:
    """(N,) rewards mapped to [0, 1] within each group; 0.5 where all are equal, NaN where not judged."""
    r = rewards.double()
    out = torch.empty_like(r)
    for g in groups.unique():
        mine = r[groups == g]
        judged = mine[~mine.isnan()]
        low, high = (judged.min(), judged.max()) if len(judged) else (mine.new_zeros(()), mine.new_zeros(()))
        out[groups == g] = (mine - low) / (high - low) if high > low else mine * 0 + 0.5
    return out


def best_and_worst(rewards: Tensor, members: int) -> tuple[Tensor, Tensor]:
    """Of each block of `members` rewards the indices (N,) of the highest and the lowest; equal where nothing tells them apart."""
    table = rewards.reshape(-1, members).double()
    high = table.nan_to_num(-torch.inf).argmax(1)
    low = table.nan_to_num(torch.inf).argmin(1)
    start = torch.arange(len(table)) * members
    return start + high, start + low


class PromptStatistics:
    """DDPO's running statistics: each prompt's last rewards make its mean and standard deviation.

    Args:
        buffer: how many rewards of a prompt are remembered.
        least: below this many the statistics of the current batch stand in.
    """

    def __init__(self, buffer: int = 16, least: int = 16) -> None:
        self.buffer, self.least = buffer, least
        self.seen: dict[str, deque[float]] = {}

    def __call__(self, rewards: Tensor, prompts: Sequence[str], clip: float = 5.0) -> Tensor:
        """(N,) float64 advantages; the rewards enter the memory first, as published."""
        r, judged = rewards.double(), ~rewards.isnan()
        out = torch.zeros_like(r)
        for text in dict.fromkeys(prompts):
            mine = torch.tensor([p == text for p in prompts]) & judged
            memory = self.seen.setdefault(text, deque(maxlen=self.buffer))
            memory.extend(r[mine].tolist())
            past = torch.tensor(list(memory), dtype=torch.float64)
            basis = past if len(past) >= self.least else r[judged]
            if len(basis):
                out[mine] = (r[mine] - basis.mean()) / (basis.std(correction=0) + 1e-6)
        return out.clamp(-clip, clip)

    def state(self) -> dict[str, Any]:
        return {text: list(memory) for text, memory in self.seen.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self.seen = {text: deque(memory, maxlen=self.buffer) for text, memory in state.items()}


def _std(r: Tensor) -> Tensor:
    return (r - r.nanmean()).square().nanmean().sqrt()


def _ranks(r: Tensor, index: Tensor, groups: int) -> Tensor:
    out = torch.zeros_like(r)
    for g in range(groups):
        mine = (index == g) & ~r.isnan()
        values = r[mine]
        if len(values) > 1:
            below = (values[:, None] > values).double().sum(1) - (values[:, None] < values).double().sum(1)
            out[mine] = below / (len(values) - 1)
    return out
