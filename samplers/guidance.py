"""Gradient guidance.

`Guided` is the proposal of twisted diffusion samplers (TDS, 2306.17775; DAS, 2501.05803): the law of the next state is tilted
by ∇_x r(decode(x0(x))), taken through the network. Alone it is a heuristic; composed with `FeynmanKac` it is exact, because
the loop then hands over log p/q.
"""

from __future__ import annotations

from typing import Literal

from rewards.base import Reward

from .steering import Context, Steering
from .transitions import Transition

__all__ = ["Guided"]


class Guided(Steering):
    """Gradient guidance: tilts each step's law by the gradient of the reward at decode(x0), through the network.

    The mean moves by scale·std²·∇_x r (TDS, 2306.17775; DAS, 2501.05803). Alone this is a heuristic. In
    `Compose(Guided(r, 1/beta), FeynmanKac(r, beta))` it is the near-optimal proposal of an exact sampler.

    Args:
        reward: a differentiable reward; None takes the run's.
        scale: strength, in units of 1/beta; the default matches FeynmanKac's.
        start, stop: the fraction of the run's steps, in [0, 1], within which to guide.
        tempering: "constant", or "linear": the scale grows with the steps, as estimates become worth following.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        scale: float = 10.0,
        start: float = 0.0,
        stop: float = 1.0,
        tempering: Literal["constant", "linear"] = "constant",
    ) -> None:
        if not 0 <= start < stop <= 1:
            raise ValueError(f"start and stop are fractions of the run, 0 <= start < stop <= 1; got {start}, {stop}")
        self.reward, self.scale, self.start, self.stop, self.tempering = reward, scale, start, stop, tempering

    def tilting(self, progress: float) -> list[Reward]:
        return [self._need_reward()] if self.start <= progress < self.stop else []

    def check(self, ctx: Context) -> None:
        reward = self._need_reward()
        if not reward.differentiable:
            raise ValueError(
                f"Guided needs the gradient of its reward, and {reward.name} has none: "
                "use FeynmanKac, SVDD or BestOfN, or a differentiable reward"
            )
        if not ctx.kernel.diversifies(ctx.levels):
            raise ValueError(
                "Guided tilts stochastic steps, and this kernel has none: use DDIM(eta=1), CPS or an SDE kernel"
            )

    def propose(self, ctx: Context, base: Transition) -> Transition:
        if not base.stochastic or not self.tilting(ctx.step / ctx.levels.steps):
            return base
        gamma = (ctx.step + 1) / ctx.levels.steps if self.tempering == "linear" else 1.0
        return base.shift(ctx.gradient(self._need_reward()), self.scale * gamma)
