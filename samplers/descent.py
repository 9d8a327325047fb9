"""Descent on many independent problems at once, one a row.

A method is asked, after every evaluation of losses and gradients at its points, where to look next. Rows never mix: every
number a method keeps is one a row. A row whose loss or gradient is not finite goes back to its last finite point and leaves
it again half as fast; a row that could not be evaluated stays where it is.

    Momentum    v ← μ·v + g;  z ← z − rate·(g + μ·v), or z − rate·v without Nesterov's look ahead
    Adam        z ← z − rate·m̂/(sqrt(v̂) + ε)
    LBFGS       z ← z − t·H·g, H the limited-memory inverse Hessian, t by a line search

Sources: Nesterov momentum as in torch.optim.SGD; Adam, 1412.6980; L-BFGS, Liu and Nocedal 1989; the line search, Lewis and
Overton 2013: bisection on an interval, doubling while it is open, which ends where the weak Wolfe conditions hold. It needs
no interpolation and one evaluation a trial, so that all rows search at once, each at its own step. (torch.optim.LBFGS
searches by cubic interpolation, for one problem at a time.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["LBFGS", "Adam", "Descent", "Momentum"]

Rows = dict[str, Tensor]  # (B, D) or (B, 1) each


class Descent(ABC):
    """A descent method on B problems; made anew for every run.

    Attributes:
        searches: whether it compares losses between evaluations, which must then be of one function.
    """

    searches = False

    @abstractmethod
    def step(self, z: Tensor, loss: Tensor, gradient: Tensor, diverged: Tensor, idle: Tensor) -> Tensor:
        """Where to look next, (B, …).

        Args:
            z: (B, …) where it was told to look.
            loss, gradient: (B,) and (B, …) there.
            diverged: (B,) where they are not finite.
            idle: (B,) where there is nothing to go by.
        """


class _FirstOrder(Descent):
    """Methods whose move depends on the gradient and a state."""

    def __init__(self, rate: float, *state: str) -> None:
        self.rate, self.names = rate, state
        self.kept: Rows = {}  # the last finite point, its gradient, and the state before it was left

    def step(self, z: Tensor, loss: Tensor, gradient: Tensor, diverged: Tensor, idle: Tensor) -> Tensor:
        here, slope = z.flatten(1), gradient.flatten(1)
        if not self.kept:
            self.state: Rows = {name: torch.zeros_like(here) for name in self.names}
            self.kept = {"z": here, "gradient": torch.zeros_like(here), **self.state}
            self.rates = torch.full_like(here[:, :1], self.rate)
        diverged, idle = diverged[:, None], idle[:, None]
        self.kept = _where(~(diverged | idle), {"z": here, "gradient": slope, **self.state}, self.kept)
        self.rates = torch.where(diverged, self.rates / 2, self.rates)
        move, state = self.move(self.kept)
        self.state = _where(~idle, state, self.state)
        return torch.where(idle, here, self.kept["z"] + self.rates * move).reshape(z.shape)

    @abstractmethod
    def move(self, at: Rows) -> tuple[Tensor, Rows]:
        """The move (B, D) at rate 1, and the state after it."""


class Momentum(_FirstOrder):
    """Gradient descent with momentum."""

    def __init__(self, rate: float, momentum: float = 0.9, nesterov: bool = False) -> None:
        super().__init__(rate, "velocity")
        self.momentum, self.nesterov = momentum, nesterov

    def move(self, at: Rows) -> tuple[Tensor, Rows]:
        velocity = self.momentum * at["velocity"] + at["gradient"]
        ahead = at["gradient"] + self.momentum * velocity if self.nesterov else velocity
        return -ahead, {"velocity": velocity}


class Adam(_FirstOrder):
    """Adam, with torch.optim's constants; without weight decay AdamW is the same."""

    betas, eps = (0.9, 0.999), 1e-8

    def __init__(self, rate: float) -> None:
        super().__init__(rate, "first", "second", "count")

    def move(self, at: Rows) -> tuple[Tensor, Rows]:
        (a, b), count = self.betas, at["count"][:, :1] + 1
        first = a * at["first"] + (1 - a) * at["gradient"]
        second = b * at["second"] + (1 - b) * at["gradient"].square()
        move = -(first / (1 - a**count)) / ((second / (1 - b**count)).sqrt() + self.eps)
        return move, {"first": first, "second": second, "count": count.expand_as(first)}


class LBFGS(Descent):
    """L-BFGS with a line search a row; every trial is one evaluation.

    Args:
        rate: the first step tried along a quasi-Newton direction.
        history: pairs of steps and changes of gradient that it remembers.
    """

    searches = True
    decrease, curvature = 1e-4, 0.9  # the Wolfe conditions' constants, as in torch.optim.LBFGS
    tries = 10  # trials along one direction, after which a row starts afresh from the farthest that was lower

    def __init__(self, rate: float = 1.0, history: int = 10) -> None:
        self.rate, self.history = rate, history
        self.at: Rows = {}  # where the line starts
        self.lower: Rows = {}  # the farthest trial known to be lower, but too near

    def step(self, z: Tensor, loss: Tensor, gradient: Tensor, diverged: Tensor, idle: Tensor) -> Tensor:
        here = {"z": z.flatten(1), "gradient": gradient.flatten(1), "value": loss[:, None].to(z)}
        if not self.at:
            self._begin(here["z"])
        diverged, idle, begun = diverged[:, None], idle[:, None], self.begun
        lower = here["value"] <= self.at["value"] + self.decrease * self.t * self.slope
        steep = _dot(here["gradient"], self.direction) < self.curvature * self.slope
        far = begun & ~idle & (diverged | ~lower)
        near = begun & ~idle & ~far & steep
        taken = ~(idle | diverged | far | near)
        self.high, self.low = torch.where(far, self.t, self.high), torch.where(near, self.t, self.low)
        self.lower = _where(near, here, self.lower)
        between = torch.where(self.high.isinf(), 2 * self.low, (self.low + self.high) / 2)
        self.t = torch.where(far | near, between, self.t)
        self.tried = torch.where(far | near, self.tried + 1, self.tried)
        lost = self.tried >= self.tries
        self._remember(taken & begun, lost, here["z"] - self.at["z"], here["gradient"] - self.at["gradient"])
        self.at = _where(lost & (self.low > 0), self.lower, _where(taken, here, self.at))
        self.begun = begun | taken
        self._turn(taken | lost)
        return torch.where(idle, here["z"], self.at["z"] + self.t * self.direction).reshape(z.shape)

    def _begin(self, z: Tensor) -> None:
        zero = torch.zeros_like(z[:, :1])
        self.at = self.lower = {"z": z, "gradient": torch.zeros_like(z), "value": zero}
        self.direction, self.slope, self.t, self.low, self.tried = torch.zeros_like(z), zero, zero, zero, zero
        self.high, self.begun = torch.full_like(zero, torch.inf), torch.zeros_like(zero, dtype=torch.bool)
        self.steps = z.new_zeros(self.history, *z.shape)
        self.changes = torch.zeros_like(self.steps)

    def _remember(self, rows: Tensor, lost: Tensor, step: Tensor, change: Tensor) -> None:
        """Takes in a pair where it says that the function is convex; a lost row forgets all."""
        rows = rows & (_dot(step, change) > 1e-10 * _dot(change, change))
        self.steps = torch.where(rows, torch.cat([self.steps[1:], step[None]]), self.steps).masked_fill(lost, 0)
        self.changes = torch.where(rows, torch.cat([self.changes[1:], change[None]]), self.changes).masked_fill(lost, 0)

    def _turn(self, rows: Tensor) -> None:
        """Gives rows a new direction, −H·g by the two loops, and a first step along it."""
        gradient = self.at["gradient"]
        direction, products, shares = -gradient, _dot(self.steps, self.changes), []
        inverse = torch.where(products > 0, 1 / products, 0.0)
        for step, change, rho in zip(*(v.flip(0) for v in (self.steps, self.changes, inverse)), strict=True):
            shares.append(rho * _dot(step, direction))
            direction = direction - shares[-1] * change
        known = products[-1] > 0
        direction = direction * torch.where(known, products[-1] / _dot(self.changes[-1], self.changes[-1]), 1.0)
        for step, change, rho, share in zip(self.steps, self.changes, inverse, shares[::-1], strict=True):
            direction = direction + (share - rho * _dot(change, direction)) * step
        first = self.rate * torch.where(known, 1.0, (1 / gradient.abs().sum(1, keepdim=True)).clamp(max=1))
        self.direction = torch.where(rows, direction, self.direction)
        self.slope = _dot(gradient, self.direction)
        self.t, self.tried = torch.where(rows, first, self.t), torch.where(rows, 0, self.tried)
        self.low = self.low.masked_fill(rows, 0)
        self.high = self.high.masked_fill(rows, torch.inf)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(…, B, 1) inner products of rows."""
    return (a * b).sum(-1, keepdim=True)


def _where(rows: Tensor, new: Rows, old: Rows) -> Rows:
    return {name: torch.where(rows, new[name], old[name]) for name in old}
