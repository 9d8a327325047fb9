"""Windows: the few steps of a rollout that are stochastic, and so trained; the others are steps of the ODE.

The window is the same for all samples of a collection and moves between collections. Fewer steps are trained, and the samples
of a group differ, in a single short stretch of the way, so that what a reward says of them is said of that stretch.

    progressive    from noise towards data: `stride` steps on after every so many collections, until it is at the end
    random         anywhere, drawn anew as often

Sources: MixGRPO, 2507.21802 (width 4, every 25, stride 1, the window that is constant and moves on being their best); the
windows of Flow-GRPO's code called Fast (width 2 or 3, drawn from the first half of the way).

Deviations: MixGRPO's code goes back to the noise once it is at the end, its paper stays there, as here; neither happens in its
300 collections. Flow-GRPO's code draws a window for each process, here all share one. The faster solvers of MixGRPO-Flash are
left out: a multistep solver is no Markov chain.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Optional

import torch

from samplers import Kernel, Levels
from samplers.noise import mix

__all__ = ["Window"]


@dataclass(frozen=True)
class Window:
    """Which steps are stochastic.

    Attributes:
        width: how many.
        every: collections from one place to the next.
        stride: steps from one place to the next, for "progressive".
        order: how it moves.
        first, last: the steps among which it moves, counted from 0; all of them by default.
    """

    width: int = 4
    every: int = 25
    stride: int = 1
    order: Literal["progressive", "random"] = "progressive"
    first: int = 0
    last: Optional[int] = None

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("every", 1), ("stride", 1), ("first", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be ≥ {least}; got {getattr(self, name)}")
        if self.order not in ("progressive", "random"):
            raise ValueError(f"order must be progressive or random; got {self.order!r}")
        if self.last is not None and self._highest(self.last + 1) < self.first:
            raise ValueError(f"a window of {self.width} does not fit between steps {self.first} and {self.last}")

    def on(self, kernel: Kernel, levels: Levels, iteration: int, seed: int) -> Kernel:
        """The kernel of an iteration: without noise outside the window."""
        return self._placed(kernel, levels, self._begins(levels.steps, iteration // self.every, seed))

    def kernels(self, kernel: Kernel, levels: Levels) -> Iterator[Kernel]:
        """The kernels of all places where the window may be.

        Raises:
            ValueError: it does not fit into so few steps.
        """
        highest = self._highest(levels.steps)
        if highest < self.first or (self.last is not None and self.last >= levels.steps):
            raise ValueError(f"{self} does not fit into {levels.steps} steps")
        return (self._placed(kernel, levels, begin) for begin in range(self.first, highest + 1))

    def _highest(self, steps: int) -> int:
        """The last step at which it may begin."""
        return (steps if self.last is None else self.last + 1) - self.width

    def _begins(self, steps: int, place: int, seed: int) -> int:
        highest = self._highest(steps)
        if self.order == "progressive":
            return min(self.first + place * self.stride, highest)
        generator = torch.Generator().manual_seed(mix(seed, place))
        return int(torch.randint(self.first, highest + 1, (), generator=generator))

    def _placed(self, kernel: Kernel, levels: Levels, begin: int) -> Kernel:
        noisy = kernel.noisy_steps or (True,) * levels.steps
        placed = copy.copy(kernel)
        placed.noisy_steps = tuple(n and begin <= i < begin + self.width for i, n in enumerate(noisy))
        return placed
