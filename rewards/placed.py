"""A reward on a device of its own: a judge beside the GPU that samples, or on the CPU to spare its memory.

Rewards follow their input from device to device; this one takes its input to where it stays, and brings scores and gradients back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Prompt, Reward, Scores
from .composite import Wrapper

__all__ = ["Placed"]


class Placed(Wrapper):
    """A reward that stays on one device, wherever the media are.

    Range: as its part
    Size: as its part
    Gradient: as its part

    Args:
        reward: what to keep there.
        device: such as "cuda:1" or "cpu".

    Raises:
        ValueError: there is no such device.
    """

    stays = True

    def __init__(self, reward: Reward, device: str) -> None:
        super().__init__(reward)
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"Placed cannot use the device {device!r}: {error}") from error
        reward.to(self.device)

    @property
    def name(self) -> str:
        return self.reward.name

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        scores = self.reward.score(media.to(self.device), prompts)
        return Scores(scores.total.to(media.device), {k: v.to(media.device) for k, v in scores.parts.items()})

    def _apply(self, fn: Any, recurse: bool = True) -> Placed:
        return self  # stays where it is
