"""Rewards under constraints: raise one, keep others at what they need to be, with multipliers that follow the training run.

The problem is max E[r_0] subject to E[r_i] >= theta_i. With l_i the state and m_i the multiplier of constraint i of N:

| squash    | m_i                     | score                                               |                                   |
|-----------|-------------------------|-----------------------------------------------------|-----------------------------------|
| `none`    | l_i, clipped to 0 … most| r_0 + sum_i m_i (r_i - theta_i)                     | the Lagrangian; dual ascent       |
| `sigmoid` | sigmoid(l_i)            | (N - sum_i m_i) r_0 + sum_i m_i (r_i - theta_i)     | reach the threshold (mu-PPO)      |
| `tanh`    | tanh(l_i)               | the same                                            | stay at it: m_i < 0 pushes back   |
|           |                         |                                                     | when it is overshot (xi-PPO)      |

After each collection of a training run, with J_i the mean of r_i over all samples of all processes,

    v_i <- momentum v_i + (theta_i - J_i) dm_i/dl_i        l_i <- l_i + rate v_i

so a multiplier rises while its constraint is violated. At a fixed point of `none` and `sigmoid` with 0 < m_i the constraint is met
exactly and the policy is stationary in the Lagrangian: the conditions of Karush, Kuhn and Tucker.

Source: Moskovitz et al., "Confronting Reward Model Overoptimization with Constrained RLHF", 2023, arXiv 2310.04373: rate 0.01,
momentum 0.1; thresholds are the values of the rewards where a gold measure of an unconstrained run is highest. Deviations: any
reward may be the objective, not only the divergence from the reference; rewards are mixed before advantages are taken, not after,
so rewards of different scales belong into `Standardised`, with thresholds in its unit; states begin at `initial` rather than at
small random numbers, and their gradient is not clipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Prompt, Reward, Scores
from .composite import Adaptive, Composite, Rewards, named, numbers

__all__ = ["Constrained"]


class Constrained(Composite, Adaptive):
    """One reward to raise, and others that must reach a threshold.

    Outside a training run the multipliers stay as they are. `parts` holds the rewards as they are.

    Range: of the mixture
    Size: as its parts
    Gradient: as its parts

    Args:
        objective: what to raise.
        constraints: rewards that must reach their threshold on average; a dict gives the parts names.
        thresholds: one a constraint, in the same form, in its unit.
        squash: how a state becomes a multiplier; see the module docstring.
        rate: step size of the states.
        momentum: of the steps, 0 to below 1.
        initial: the states at first.
        most: the greatest multiplier of squash "none".

    Raises:
        ValueError: no constraints, modalities that differ, thresholds that do not match, or a number out of its range.
    """

    def __init__(
        self,
        objective: Reward,
        constraints: Rewards,
        thresholds: list[float] | dict[str, float],
        *,
        squash: Literal["none", "sigmoid", "tanh"] = "none",
        rate: float = 0.01,
        momentum: float = 0.1,
        initial: float = 0.0,
        most: float = 100.0,
    ) -> None:
        if not constraints:
            raise ValueError("Constrained needs at least one constraint; got none")
        needed = named(constraints)
        if "objective" in needed:
            raise ValueError('a constraint cannot be called "objective": choose another key')
        super().__init__({"objective": objective, **needed})
        self.thresholds = numbers("thresholds", thresholds, list(needed))
        if squash not in ("none", "sigmoid", "tanh"):
            raise ValueError(f"squash must be none, sigmoid or tanh; got {squash!r}")
        if not (rate >= 0 and 0 <= momentum < 1 and most > 0 and math.isfinite(initial)):
            raise ValueError(
                "rate must be 0 or more, momentum 0 to below 1, most above 0 and initial finite; "
                f"got {rate}, {momentum}, {most} and {initial}"
            )
        if squash == "none" and not 0 <= initial <= most:
            raise ValueError(f"initial must be 0 to most = {most}; got {initial}")
        self.squash, self.rate, self.momentum, self.most = squash, rate, momentum, most
        self.states, self.speeds = [float(initial)] * len(self.thresholds), [0.0] * len(self.thresholds)

    @property
    def multipliers(self) -> list[float]:
        """The present multipliers, in the order of the constraints."""
        rules = {"none": float, "sigmoid": lambda x: 1 / (1 + math.exp(-x)), "tanh": math.tanh}
        return [rules[self.squash](state) for state in self.states]

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        parts = self.totals(media, prompts)
        objective, *constraints = parts.values()
        self.watch(torch.stack(constraints, dim=1))
        multipliers = self.multipliers
        total = objective if self.squash == "none" else (len(multipliers) - sum(multipliers)) * objective
        for multiplier, reward, threshold in zip(multipliers, constraints, self.thresholds, strict=True):
            total = total + multiplier * (reward - threshold)
        return Scores(total, parts)

    def learn(self, values: Tensor) -> None:
        slopes = {"none": lambda m: 1.0, "sigmoid": lambda m: m * (1 - m), "tanh": lambda m: 1 - m * m}
        for i, (mean, m) in enumerate(zip(values.nanmean(dim=0).tolist(), self.multipliers, strict=True)):
            if mean != mean:  # nothing was judged
                continue
            self.speeds[i] = self.momentum * self.speeds[i] + (self.thresholds[i] - mean) * slopes[self.squash](m)
            self.states[i] += self.rate * self.speeds[i]
            if self.squash == "none":
                self.states[i] = min(max(self.states[i], 0.0), self.most)

    def state(self) -> dict[str, Any]:
        return {"states": list(self.states), "speeds": list(self.speeds)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.states, self.speeds = list(state["states"]), list(state["speeds"])

    def worth_watching(self) -> dict[str, float]:
        return {f"multiplier_{label}": m for label, m in zip(self.labels[1:], self.multipliers, strict=True)}
