"""Prices: what a steering spends, found by letting it steer a stand-in.

A dry run of the method itself, over the real levels and kernel, on a policy whose network and decoder and rewards do next to
nothing: its ledger holds the exact counts of whatever is a function of the settings alone. So no method has to say what it costs,
and none can say it wrongly. Methods that react to rewards (early acceptance) are priced as they go on the stand-in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewards.base import Prompt, Reward

from .kernels import Kernel
from .ledger import Ledger
from .levels import Levels
from .noise import SeededNoise
from .outer import Found, Outer, Problem
from .policy import Cond, Policy
from .rollout import rollout
from .steering import Steering
from .values import Value

__all__ = ["Price", "price"]

FURTHER = 2  # iterates after the first that are averaged over


@dataclass(frozen=True)
class Price:
    """What one prompt costs.

    Attributes:
        particles: how many particles or chains were priced; the cost of others is in proportion.
        first: counts of the rollout, or of the first iterate of a method around the loop; by what is spent, as in `Ledger`.
        then: counts of each further iterate; none within a rollout.
        rounds: iterates, at most.
    """

    particles: int
    first: Mapping[str, float]
    then: Mapping[str, float]
    rounds: int = 1

    def of(self, particles: int, rounds: float = 1) -> dict[str, float]:
        """Counts of so many particles of a prompt, for so many iterates."""
        share, more = particles / self.particles, max(0.0, rounds - 1)
        return {on: share * (n + more * self.then[on]) for on, n in self.first.items()}


def price(
    steering: Steering, policy: Policy, kernel: Kernel, levels: Levels, cond: Cond, particles: int, shape: Sequence[int]
) -> Price:
    """What the steering costs a prompt; neither the policy nor any reward is called.

    Args:
        cond: of one prompt.
        particles: K of the dry run.
        shape: of one latent.

    Raises:
        ValueError: the model makes tokens, for which there is no stand-in; or the steering cannot run with so many particles.
    """
    stand_in, rehearsed = _Network(policy, shape), _rehearsed(steering, {})
    noise, cond = SeededNoise(range(particles), shape), cond[[0]]
    problem = Problem(stand_in, kernel, cond, levels, noise, particles=particles, prompts=[Prompt("")])
    if not isinstance(rehearsed, Outer):
        how = {"particles": particles, "prompts": [Prompt("")], "steering": rehearsed}
        run = rollout(stand_in, kernel, cond, levels, noise, **how)
        return Price(particles, dict(run.ledger.counts), dict.fromkeys(run.ledger.counts, 0.0))
    work, spent = rehearsed.iterations(problem, Found()), []
    for _ in range(1 + FURTHER):
        if next(work, StopIteration) is StopIteration:
            break
        spent.append(dict(problem.ledger.counts))
    work.close()
    first, more = (spent or [Ledger().counts])[0], max(1, len(spent) - 1)
    then = {on: ((spent or [first])[-1][on] - n) / more for on, n in first.items()}
    return Price(particles, dict(first), then, rehearsed.rounds)


class _Network(Policy):
    """Says of every state that the clean one is half of it."""

    def __init__(self, policy: Policy, shape: Sequence[int]) -> None:
        super().__init__()
        if policy.prediction == "logits":
            raise ValueError("budgets need a model of continuous states, and this one makes tokens: choose particles")
        for name in Policy.__annotations__:
            if name != "network" and hasattr(policy, name):
                setattr(self, name, getattr(policy, name))
        self.network, self.checkpointing = nn.Linear(1, 1).requires_grad_(False), "none"
        self._shape, self._kernel, self._levels = tuple(shape), policy.kernel, policy.levels

    @property
    def kernel(self) -> Kernel:
        return self._kernel

    def encode(self, prompts: Sequence[str | Prompt]) -> Cond:
        return Cond({"row": torch.zeros(len(prompts), 1)})

    def shape(self, size: Any) -> tuple[int, ...]:
        return self._shape

    def levels(self, steps: int, size: Any) -> Levels:
        return self._levels(steps, size)

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        alpha, sigma = at.like(x)
        x0 = x / 2
        eps = (x - alpha * x0) / sigma
        kinds = {"x0": lambda: x0, "v": lambda: alpha * eps - sigma * x0, "flow": lambda: eps - x0}
        return kinds.get(self.prediction, lambda: eps)()

    def decode(self, x0: Tensor, frames: slice | None = None) -> Tensor:
        return x0

    def encode_media(self, media: Tensor) -> Tensor:
        return media


class _Judge(Reward):
    """Stands in for a reward."""

    needs_prompt = False

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.modality, self.differentiable, self.compares = reward.modality, reward.differentiable, reward.compares

    def check(self, media: Tensor) -> None:
        pass

    def measure(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return media.flatten(1).mean(1)


class _Estimate(Value):
    """Stands in for a value."""

    def forward(self, x: Tensor, at: Levels, cond: Cond, prompts: Sequence[Prompt]) -> Tensor:
        return x.flatten(1).mean(1)


def _rehearsed(part: Any, known: dict[int, Any]) -> Any:
    """A copy of a steering with stand-ins for the rewards and values it holds, the same ones for the same."""
    if isinstance(part, (list, tuple)):
        return type(part)([_rehearsed(one, known) for one in part])
    if not isinstance(part, (Reward, Value, Steering)):
        return part
    if id(part) not in known:
        if isinstance(part, Steering):
            known[id(part)] = made = copy.copy(part)
            vars(made).update({name: _rehearsed(value, known) for name, value in vars(part).items()})
        else:
            known[id(part)] = _Judge(part) if isinstance(part, Reward) else _Estimate()
    return known[id(part)]
