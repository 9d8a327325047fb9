"""How a run samples: kernel, levels, guidance and size, the same for training, evaluation and replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rewards import Prompt
from samplers import Cond, Context, Kernel, Levels, Policy, SeededNoise, Size, Trajectory, rollout
from samplers.hypernoise import shifted_noise
from samplers.noise import mix
from samplers.rollout import GradWindow, Record, never

from .controls import shown

__all__ = ["Sampling", "SharedStart"]


class SharedStart(SeededNoise):
    """Noise whose initial latent comes from other seeds: samples that share x_T and differ in their steps.

    Args:
        starts: seeds of noise(0), one a row.
    """

    def __init__(self, seeds: Sequence[int], starts: Sequence[int], shape: Sequence[int] | None = None, **how) -> None:
        super().__init__(seeds, shape, **how)
        self.starts = SeededNoise(starts, shape, **how)

    def __call__(self, i: int) -> torch.Tensor:
        return self.starts(0) if i == 0 else super().__call__(i)


@dataclass(frozen=True)
class Sampling:
    """What rollouts of a run have in common.

    Attributes:
        kernel, levels, shape, guidance, size: how the policy samples.
        rows: sampled at a time.
        shifted: whether the weights that speak move the initial noise of the reference, instead of being what samples.
    """

    kernel: Kernel
    levels: Levels
    shape: tuple[int, ...]
    guidance: float
    size: Size
    rows: int = 64
    shifted: bool = False

    @classmethod
    def of(
        cls,
        policy: Policy,
        kernel: Kernel | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        size: Size | None = None,
        rows: int = 64,
    ) -> Sampling:
        """The policy's own settings where none are given."""
        size = tuple(size or policy.size)
        levels = policy.levels(policy.steps if steps is None else steps, size)
        kernel = kernel or policy.kernel
        kernel.stds(levels)  # raises if the kernel does not fit the table
        return cls(kernel, levels, policy.shape(size), policy.guidance if guidance is None else guidance, size, rows)

    def cond(self, policy: Policy, prompts: Sequence[Prompt]) -> Cond:
        """One row a prompt, at the run's guidance."""
        return policy.encode(shown(policy, prompts, self.size)).with_guidance(self.guidance)

    def noise(self, policy: Policy, seeds: Sequence[int], starts: Sequence[int] | None = None) -> SeededNoise:
        """A stream a row; with `starts`, rows of the same start share their initial latent."""
        how = {"device": policy.device, "dtype": torch.float64 if policy.dtype == torch.float64 else torch.float32}
        if starts is None:
            return SeededNoise(seeds, self.shape, **how)
        return SharedStart(seeds, starts, self.shape, **how)

    def roll(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        grad: GradWindow = never,
        record: Record = "final",
        watch: Callable[[Context], None] | None = None,
    ) -> Trajectory:
        """One trajectory a prompt and seed."""
        cond, noise = self.cond(policy, prompts), self.noise(policy, seeds, starts)
        if self.shifted:
            noise = shifted_noise(policy, noise, self.levels, cond)
        how = {"prompts": prompts, "grad": grad, "record": record, "watch": watch}
        with policy.acting_as("reference" if self.shifted else "policy"):
            return rollout(policy, self.kernel, cond, self.levels, noise, **how)


def seed_of(seed: int, *keys: int) -> int:
    """A seed for one purpose of a run: a function of the run's seed and counters, so there is no state to save."""
    return mix(seed, *keys)
