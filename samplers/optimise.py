"""Noise optimisation: gradient ascent on the reward of what given noise becomes.

A sample is a function of the noises that drive its rollout, x = G(z), so that a reward can be climbed in z:

    minimise over z    − r(G(z)) + weight·R(z)

with R from `samplers.whiteness`. The methods differ in which noises move, how they descend, and what bounds a step:

    ReNO     the first noise of a one- or few-step model     Nesterov momentum, rate 5, gradient clipped at 0.1
    DNO      all noises of a stochastic run                  Adam, rate 0.01, gradient clipped at 1
    DFlow    the first noise of a many-step run              L-BFGS with a line search
    DOODL    the first noise of a many-step run              momentum, elements clipped at 0.001, norm restored, jitter

Noises that do not move stay what they were (common random numbers), so that r(G(z)) is a function. Clipping, momentum, line
search and the best sample belong to a row alone: a batch of B is B separate runs. An iterate is one evaluation of every row,
the first at the noise of its seed. A step to where loss or gradient is not finite is undone and taken again half as far; a
row whose sample could not be judged stays where it is. Memory does not grow with the steps while the policy checkpoints
them.

Sources: ReNO, 2406.04312; DNO, 2405.18881; D-Flow, 2402.14017; DOODL, 2303.13703. Deviations: rewards are NaN-safe and never
averaged over a batch; DNO's weight decay is 0, as meant (a misspelt key left AdamW's 0.01 in force, which shrinks all noise);
DOODL's coupled pair of latents, which made its sampler invertible, is one latent under checkpointing: the same gradient
without drift; D-Flow's start near the inversion of a measurement has no counterpart for rewards.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from typing import Literal, NamedTuple, Optional

import torch
from torch import Tensor

from rewards.base import Reward

from .descent import LBFGS, Adam, Descent, Momentum
from .levels import at_least_float32
from .noise import side_generator, side_noise
from .outer import Found, Outer, Problem, where_rows
from .rollout import GradWindow, Trajectory
from .steering import Context, gradients
from .whiteness import DIMENSION, Regulariser, penalise

__all__ = ["DNO", "DOODL", "DFlow", "NoiseOptimisation", "ReNO"]


class Evaluation(NamedTuple):
    """Of every row: its reward, clean sample and media, and the gradient (B, V, …) of the loss at its noises."""

    rewards: Tensor
    x0: Tensor
    media: Tensor
    gradient: Tensor


class NoiseOptimisation(Outer):
    """What all methods share; a subclass says which noises move and how.

    Besides rewards the history holds "penalty", R; "scale", the root mean square of the noises, 1 when fresh; and "undone",
    1 where loss or gradient was not finite.
    """

    alternatives = "search (RandomSearch, ZeroOrder), BestOfN or FeynmanKac"

    def __init__(
        self, reward: Reward | None, rounds: int, rate: float, regulariser: Regulariser, weight: float
    ) -> None:
        if rounds < 1:
            raise ValueError(f"rounds must be ≥ 1 (1 is the plain sample); got {rounds}")
        if not rate > 0:
            raise ValueError(f"rate must be > 0; got {rate}")
        if not weight >= 0:
            raise ValueError(f"weight must be ≥ 0; got {weight}")
        self.reward, self.rounds, self.rate, self.weight = reward, rounds, rate, weight
        self.regulariser: Regulariser = regulariser

    @abstractmethod
    def descent(self) -> Descent:
        """A fresh descent method."""

    def moving(self, ctx: Context | Problem) -> list[int]:
        """Which noises move, by their index in the run: the first alone."""
        return [0]

    def bounded(self, gradient: Tensor) -> Tensor:
        """The gradient (B, V, …) that the descent may see."""
        return gradient

    def settled(self, problem: Problem, z: Tensor, start: Tensor, index: int) -> Tensor:
        """The noises (B, V, …) after a step, given those of the seeds."""
        return z

    def check(self, ctx: Context) -> None:
        reward, name = self._need_reward(), type(self).__name__
        if not reward.differentiable and not self._estimates():
            offer = "DNO with gradient='hybrid' (which estimates it), " + self.alternatives
            raise ValueError(f"{name} climbs the gradient of its reward, and {reward.name} has none: use {offer}")
        if ctx.policy.prediction == "logits":
            raise ValueError(
                f"{name} differentiates with respect to noise, which tokens are drawn by: use {self.alternatives}"
            )
        if self.regulariser == "whiteness" and ctx.noise(0).ndim < 4:
            raise ValueError(
                f"whiteness is measured along rows and columns; noise of shape {tuple(ctx.noise(0).shape[1:])} has none: "
                "use regulariser 'norm' or 'concentration'"
            )
        size = len(self.moving(ctx)) * ctx.noise(0)[0].numel()
        if self.regulariser == "concentration" and self.weight > 0 and size < DIMENSION:
            raise ValueError(
                f"concentration is measured on vectors of {DIMENSION} numbers, and this noise has fewer: use regulariser 'norm'"
            )

    def iterations(self, problem: Problem, found: Found) -> Generator[float | None]:
        bank, moving, descent = problem.bank(), self.moving(problem), self.descent()
        start = z = torch.stack([at_least_float32(bank[i]) for i in moving], 1)
        for index in range(self.rounds):
            for j, i in enumerate(moving):
                bank[i] = z[:, j]
            now = self._evaluate(problem, bank, moving, index)
            penalty, slope = self._penalty(problem, z, 0 if descent.searches else index)
            loss, gradient = self.weight * penalty - now.rewards, now.gradient + self.weight * slope
            whole = _finite(now.x0) & _finite(now.media)
            unjudged = now.rewards.isnan() & whole
            diverged = ~(unjudged | (whole & loss.isfinite() & _finite(gradient)))
            found.offer(now.rewards.where(now.rewards < torch.inf, torch.nan), now.x0, now.media, bank)
            found.note(penalty=penalty, scale=z.flatten(1).square().mean(1).sqrt(), undone=diverged)
            yield
            if index + 1 < self.rounds:
                stepped = descent.step(z, loss, self.bounded(gradient), diverged, unjudged)
                z = where_rows(unjudged, z, self.settled(problem, stepped, start, index))

    def _estimates(self) -> bool:
        """Whether it does without the reward's own gradient."""
        return False

    def _evaluate(self, problem: Problem, bank: list[Tensor], moving: list[int], index: int) -> Evaluation:
        """Every row at the noises of the bank; the last iterate has no use for a gradient."""
        parts = [self._part(problem, bank, moving, rows, index) for rows in problem.parts()]
        return Evaluation(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _part(self, problem: Problem, bank: list[Tensor], moving: list[int], rows: Tensor, index: int) -> Evaluation:
        """Some rows, in one batch."""
        differentiate = index + 1 < self.rounds
        leaf = torch.stack([bank[i][rows] for i in moving], 1).detach().requires_grad_(differentiate)
        noise = [n[rows] for n in bank]
        for j, i in enumerate(moving):
            noise[i] = leaf[:, j]
        if not differentiate:
            with torch.no_grad():
                made = problem.sample(noise, rows)
                rewards, media = problem.judge(made.x0, self._need_reward(), rows)
                return Evaluation(rewards, made.x0, media, torch.zeros_like(leaf))
        with torch.enable_grad():
            made = problem.sample(noise, rows, grad=_from(moving[0]))
            target, rewards, media = self._target(problem, made, noise, rows, index)
            with problem.ledger.spend("gradient", 0, leaf.device):  # `sample` has counted them
                (gradient,) = gradients(-target, [leaf], problem.policy.dtype)
        return Evaluation(rewards.detach(), made.x0.detach(), media.detach(), gradient)

    def _target(
        self, problem: Problem, made: Trajectory, noise: list[Tensor], rows: Tensor, index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What some rows climb (R,), with its graph; their rewards and media."""
        rewards, media = problem.judge(made.x0, self._need_reward(), rows)
        return rewards, rewards, media

    def _penalty(self, problem: Problem, z: Tensor, key: int) -> tuple[Tensor, Tensor]:
        if self.weight == 0:
            return z.new_zeros(len(z)), torch.zeros_like(z)
        return penalise(self.regulariser, z, [side_generator(problem.noise, row, key, 0) for row in range(len(z))])


class ReNO(NoiseOptimisation):
    """Reward-based noise optimisation: climbs the reward in the first noise of a one- or few-step model.

    Args:
        reward: a differentiable reward; None takes the run's.
        rounds: samples made of each chain, the plain one included.
        rate: of the descent; 10 is published for Hyper-SD.
        momentum: Nesterov's.
        clip: bound of the gradient's norm, regulariser included; with `rate` it bounds how far a step goes.
        regulariser: see `samplers.whiteness`.
        weight: of the regulariser.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        rounds: int = 50,
        rate: float = 5.0,
        momentum: float = 0.9,
        clip: float = 0.1,
        regulariser: Regulariser = "norm",
        weight: float = 0.01,
    ) -> None:
        super().__init__(reward, rounds, rate, regulariser, weight)
        self.momentum, self.clip = momentum, clip

    def descent(self) -> Descent:
        return Momentum(self.rate, self.momentum, nesterov=True)

    def bounded(self, gradient: Tensor) -> Tensor:
        return _clipped(gradient, self.clip)

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if not ctx.policy.few_step:
            raise ValueError(
                f"ReNO is for models that sample in one or a few steps; this {type(ctx.policy).__name__} is a many-step model "
                f"(here {ctx.levels.steps} steps): use DNO, DFlow or DOODL, or a distilled model"
            )


class DNO(NoiseOptimisation):
    """Direct noise optimisation: climbs the reward in all noises of a stochastic run; with an ODE, in the first alone.

    Without a gradient of the reward, "hybrid" estimates it in the space of media and takes the sampler's exactly: of images
    xᵢ made from noises perturbed by `radius`, ĝ ∝ mean (r(xᵢ) − r(x))·(xᵢ − x), normalised; the noises climb ⟨ĝ, x(z)⟩.

    Args:
        reward: what to climb; None takes the run's.
        rounds: samples made of each chain, the plain one included.
        rate: of Adam; 0.001 is suggested where images break.
        clip: bound of the gradient's norm, regulariser included.
        last: how many of the run's last noises move; None moves all.
        regulariser: see `samplers.whiteness`.
        weight: of the regulariser; 0 as published, 1 suggested against reward hacking.
        gradient: of the reward: "exact", or "hybrid" for rewards without one.
        perturbations: samples that a gradient is estimated from, for "hybrid".
        radius: the perturbation's standard deviation.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        rounds: int = 100,
        rate: float = 0.01,
        clip: float = 1.0,
        last: Optional[int] = None,
        regulariser: Regulariser = "concentration",
        weight: float = 0.0,
        gradient: Literal["exact", "hybrid"] = "exact",
        perturbations: int = 4,
        radius: float = 0.01,
    ) -> None:
        super().__init__(reward, rounds, rate, regulariser, weight)
        if last is not None and last < 1:
            raise ValueError(f"last must be ≥ 1, or None for all noises; got {last}")
        if perturbations < 1 or not radius > 0:
            raise ValueError(f"perturbations must be ≥ 1 and radius > 0; got {perturbations} and {radius}")
        self.clip, self.last = clip, last
        self.gradient, self.perturbations, self.radius = gradient, perturbations, radius

    def descent(self) -> Descent:
        return Adam(self.rate)

    def moving(self, ctx: Context | Problem) -> list[int]:
        stochastic = (ctx.kernel.stds(ctx.levels) > 0).nonzero().flatten() + 1
        used = [0, *stochastic.tolist()]
        return used if self.last is None else used[-self.last :]

    def bounded(self, gradient: Tensor) -> Tensor:
        return _clipped(gradient, self.clip)

    def _estimates(self) -> bool:
        return self.gradient == "hybrid"

    def _target(
        self, problem: Problem, made: Trajectory, noise: list[Tensor], rows: Tensor, index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.gradient == "exact":
            return super()._target(problem, made, noise, rows, index)
        media = problem.decode(made.x0)
        with torch.no_grad():
            rewards = problem.score(media.detach(), self._need_reward(), rows)
            slope = self._estimate(problem, media, rewards, noise, rows, index)
        return (slope * media).flatten(1).sum(1), rewards, media

    def _estimate(
        self, problem: Problem, media: Tensor, rewards: Tensor, noise: list[Tensor], rows: Tensor, index: int
    ) -> Tensor:
        """(R, …) the direction in which the reward of media rises, of unit length; perturbations fill up the batch."""
        total, columns = torch.zeros_like(media), (-1, *[1] * (media.ndim - 1))
        for draws in torch.arange(self.perturbations).split(max(1, problem.batch // len(rows))):
            moved = [self._perturbed(problem, noise, rows, index, j) for j in draws.tolist()]
            owners = rows.repeat(len(draws))
            noises = [torch.cat(column) for column in zip(*moved, strict=True)]
            scores, _, images = problem.rate(noises, self._need_reward(), owners)
            for image, score in zip(images.split(len(rows)), scores.split(len(rows)), strict=True):
                total = total + (score - rewards).nan_to_num(0.0, 0.0, 0.0).reshape(columns) * (image - media)
        return total / (self.perturbations * 1e-3 + total.flatten(1).norm(dim=1).reshape(columns))

    def _perturbed(self, problem: Problem, noise: list[Tensor], rows: Tensor, index: int, draw: int) -> list[Tensor]:
        """The rows' noises, those that move perturbed."""
        generators = [side_generator(problem.noise, row, index, 1 + draw) for row in rows.tolist()]
        moved = list(noise)
        for i in self.moving(problem):
            fresh = torch.stack([torch.randn(noise[i].shape[1:], generator=g) for g in generators])
            moved[i] = noise[i] + self.radius * fresh.to(noise[i])
        return moved


class DFlow(NoiseOptimisation):
    """D-Flow: climbs the reward in the first noise of a many-step run by L-BFGS with a line search.

    Meant for deterministic kernels; of a stochastic one the other noises stay as they are.

    Args:
        reward: a differentiable reward; None takes the run's.
        rounds: samples made of each chain, the plain one included; every trial of a line search is one.
        rate: the first step tried along a quasi-Newton direction.
        history: steps that L-BFGS remembers.
        regulariser: see `samplers.whiteness`.
        weight: of the regulariser.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        rounds: int = 20,
        rate: float = 1.0,
        history: int = 10,
        regulariser: Regulariser = "norm",
        weight: float = 0.01,
    ) -> None:
        super().__init__(reward, rounds, rate, regulariser, weight)
        if history < 1:
            raise ValueError(f"history must be ≥ 1; got {history}")
        self.history = history

    def descent(self) -> Descent:
        return LBFGS(self.rate, self.history)


class DOODL(NoiseOptimisation):
    """DOODL: climbs the reward in the first noise of a many-step run, on the sphere of that noise.

    Args:
        reward: a differentiable reward; None takes the run's.
        rounds: samples made of each chain, the plain one included.
        rate: of the descent.
        momentum: of the descent.
        clip: bound of every element of the gradient.
        jitter: standard deviation of the noise added to every step.
        regulariser: see `samplers.whiteness`; the norm is kept by itself.
        weight: of the regulariser.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        rounds: int = 50,
        rate: float = 1.0,
        momentum: float = 0.9,
        clip: float = 1e-3,
        jitter: float = 1e-4,
        regulariser: Regulariser = "none",
        weight: float = 0.0,
    ) -> None:
        super().__init__(reward, rounds, rate, regulariser, weight)
        self.momentum, self.clip, self.jitter = momentum, clip, jitter

    def descent(self) -> Descent:
        return Momentum(self.rate, self.momentum)

    def bounded(self, gradient: Tensor) -> Tensor:
        return gradient.clamp(-self.clip, self.clip)

    def settled(self, problem: Problem, z: Tensor, start: Tensor, index: int) -> Tensor:
        z = z + self.jitter * side_noise(problem.noise, range(len(z)), z.shape[1:], index, 1).to(z)
        norms = [v.flatten(1).norm(dim=1) for v in (start, z)]
        return z * (norms[0] / norms[1]).reshape(-1, *[1] * (z.ndim - 1))


def _clipped(gradient: Tensor, bound: float) -> Tensor:
    """Gradients (B, …) of norm at most `bound`, each by itself; torch's clip_grad_norm_ a row."""
    norm = gradient.flatten(1).norm(dim=1).reshape(-1, *[1] * (gradient.ndim - 1))
    return gradient * (bound / (norm + 1e-6)).clamp(max=1)


def _finite(rows: Tensor) -> Tensor:
    """(B,) which rows are finite throughout."""
    return rows.flatten(1).isfinite().all(1)


def _from(noise: int) -> GradWindow:
    """A graph from the step that a noise enters; `noise` 0 enters before them all."""
    return lambda i, steps: i >= noise - 1
