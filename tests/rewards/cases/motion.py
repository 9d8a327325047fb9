"""Rewards for motion, on videos that drift at different speeds."""

from __future__ import annotations

import torch

import rewards
from tests.rewards import tiny
from tests.rewards.cases import Case


def drifting() -> torch.Tensor:
    """Four scenes of five frames that drift to the left by 1 to 4 pixels a frame: (4, 5, 3, 80, 96)."""
    wide = 0.1 + 0.8 * tiny.natural(4, 80, 128, slope=1.5)
    return torch.stack(
        [torch.stack([w[..., v * f : v * f + 96] for f in range(5)]) for v, w in enumerate(wide, start=1)]
    )


CASES: dict[str, Case] = {
    "DynamicDegree": Case(lambda _: rewards.DynamicDegree(), media=drifting),
    "FrameDifference": Case(lambda _: rewards.FrameDifference(), media=drifting),
    "TemporalFlickering": Case(lambda _: rewards.TemporalFlickering(), media=drifting),
}
