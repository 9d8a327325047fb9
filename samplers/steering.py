"""The `Steering` noun: what inference-time control does to the loop.

A steering may do two things at a step: `select` (which rows go on: resampling) and `propose` (tilt the law of the next
state). It holds only its configuration; all that changes during a run lives in the `Context`, whose per-row quantities
follow their rows through every selection.
"""

from __future__ import annotations

import copy
from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from rewards.base import Prompt, Reward

from .kernels import DDIM, Kernel
from .ledger import Ledger
from .levels import Clean, Levels
from .noise import Noise, side_generator
from .transitions import Categorical, Transition
from .values import Value

if TYPE_CHECKING:
    from .policy import Cond, Policy

__all__ = ["FREE", "Compose", "Context", "RewardFailed", "Steering"]


class RewardFailed(RuntimeError):
    """A reward could judge no sample of some prompt, so steering cannot go on."""


class Context:
    """The population at one step: P prompts × K particles, flattened to B rows, one block a prompt.

    Attributes:
        step: 0 … T; at T the run is over and `x` is the final state.
        x: (B, …) the state.
        clean: the clean estimate; at step T, x itself.
        log_w: (P, K) float64 log weights since the start of the run; never reset, so log mean exp is the log evidence.
        log_z: (P,) float64 log evidence, NaN until a sampler that estimates it has finished.
        log_ratio: (B,) float64 log p/q of guided proposals not yet accounted for in log_w.
        rows: per-particle quantities (P, K) that a steering keeps between steps, on the CPU.
        media: the decoded final samples, once a reward has asked for them.
        ess, ancestors: one entry an event: (P,) and (step, (P, K)).
        failures: samples each reward could not judge, by name.
    """

    def __init__(
        self,
        policy: Policy,
        kernel: Kernel,
        cond: Cond,
        levels: Levels,
        noise: Noise,
        particles: int,
        prompts: Sequence[Prompt],
        steering: Steering,
    ) -> None:
        self.policy, self.kernel, self.cond, self.levels, self.noise = policy, kernel, cond, levels, noise
        self.particles, self.prompts = particles, list(prompts)
        self.groups = len(cond) // particles
        self.step = 0
        self.log_w = torch.zeros(self.groups, particles, dtype=torch.float64)
        self.log_z = torch.full((self.groups,), torch.nan, dtype=torch.float64)
        self.rows: dict[str, Tensor] = {}
        self.ess: list[Tensor] = []
        self.ancestors: list[tuple[int, Tensor]] = []
        self.failures: dict[str, int] = {}
        self.ledger = Ledger()
        self.steering = steering
        self.x: Tensor
        self.clean: Clean
        self.media: Tensor | None = None
        self.log_ratio: Tensor | None = None
        self._graph: tuple[Tensor, Tensor] | None = None
        self._taken: Tensor | None = None

    @property
    def final(self) -> bool:
        """Whether the run is over and only the last weighting is left."""
        return self.step == self.levels.steps

    def enter(self, step: int, x: Tensor, clean: Clean) -> None:
        """Moves to a step; what was computed for the last one is dropped."""
        self.step, self._scores, self._gradients, self._taken = step, {}, {}, None
        self._graph = (x, clean.x0) if x.is_leaf and x.requires_grad else None
        self.x, self.clean = x, clean

    def take(self, ancestors: Tensor) -> None:
        """Lets the rows `ancestors` (P, K), indices within a group, go on: every per-row quantity is reindexed."""
        self.ancestors.append((self.step, ancestors))
        self.rows = {name: value.gather(1, ancestors) for name, value in self.rows.items()}
        rows = (ancestors + torch.arange(self.groups)[:, None] * self.particles).flatten().to(self.x.device)
        self.x = self.x[rows]
        self.clean = Clean(*(None if part is None else part[rows] for part in self.clean))  # pyright: ignore
        self.cond = self.cond[rows]
        self._scores = {name: value[rows] for name, value in self._scores.items()}
        self._gradients = {name: value[rows] for name, value in self._gradients.items()}
        self._taken = rows if self._taken is None else self._taken[rows]
        if self.log_ratio is not None:
            self.log_ratio = self.log_ratio[rows]

    def score(self, judge: Reward | Value) -> Tensor:
        """(B,) the reward of the clean estimate at this step, computed once; of the full decode at the final step.

        Of a value, its estimate at the state itself. Where a steering tilts by the judge, its gradient with respect to x is
        computed in the same pass.
        """
        if id(judge) not in self._scores:
            tilts = any(judge is j for j in self.tilting)
            if isinstance(judge, Value):
                self._estimate(judge, tilts)
            elif self._graph is not None and tilts:
                self._score_and_gradient(judge)
            else:
                self._scores[id(judge)] = self.score_of(self.clean.x0, judge)
        return self._scores[id(judge)]

    def gradient(self, judge: Reward | Value) -> Tensor:
        """(B, …) gradient with respect to x: of the reward of the clean estimate, through decoder and network; of a value."""
        self.score(judge)
        return self._gradients[id(judge)]

    def score_of(self, x0: Tensor, reward: Reward) -> Tensor:
        """(B,) the reward of given clean samples."""
        decode = self.policy.decode if self.final else self.policy.preview
        with torch.set_grad_enabled(torch.is_grad_enabled() and x0.requires_grad):
            with self.ledger.spend("decode", len(x0), x0.device):
                media = decode(x0)
            if self.final:
                self.media = media
            with self.ledger.spend("reward", len(x0), x0.device):
                return reward(media, self.prompts)

    @property
    def tilting(self) -> list[Reward | Value]:
        """Rewards and values whose gradients the steering asks for at this step."""
        return [] if self.final else self.steering.tilting(self.step / self.levels.steps)

    def differentiates(self, step: int) -> bool:
        """Whether the steering will differentiate a reward through the network call of this step."""
        return any(isinstance(judge, Reward) for judge in self.steering.tilting(step / self.levels.steps))

    def _score_and_gradient(self, reward: Reward) -> None:
        """Both from one pass over the step's graph, whose rows are in the order before this step's selection."""
        assert self._graph is not None
        x, x0 = self._graph
        with torch.enable_grad():
            scores = self.score_of(x0, reward)
            with self.ledger.spend("gradient", len(x), x.device):
                rewards = [judge for judge in self.tilting if isinstance(judge, Reward)]
                more = sum(id(judge) in self._gradients for judge in rewards) + 1 < len(rewards)
                (gradient,) = torch.autograd.grad(scores.nansum(), x, retain_graph=more)
        scores = scores.detach()
        if self._taken is not None:
            scores, gradient = scores[self._taken], gradient[self._taken]
        self._scores[id(reward)], self._gradients[id(reward)] = scores, gradient

    def _estimate(self, value: Value, tilts: bool) -> None:
        """A value at the state, and its gradient if that will be asked for: there is no graph but its own."""
        x = self.x.detach().requires_grad_(tilts)
        with torch.set_grad_enabled(tilts), self.ledger.spend("reward", len(x), x.device):
            scores = value(x, self.levels[self.step], self.cond, self.prompts)
            if tilts:
                (self._gradients[id(value)],) = torch.autograd.grad(scores.nansum(), x)
        self._scores[id(value)] = scores.detach()

    def release(self) -> None:
        """Lets go of the step's graph once its rewards have been differentiated."""
        if self._graph is not None:
            self._graph = None
            self.x = self.x.detach()
            self.clean = Clean(*(None if part is None else part.detach() for part in self.clean))  # pyright: ignore

    def posterior_draw(self, draw: int) -> Tensor:
        """(B, …) an approximate draw from p(x0 | x_t): half of the remaining way stochastically, then one clean estimate.

        Tokens are drawn independently from their clean marginals, masked positions only.
        """
        noise = self._side_noise(draw)
        if self.clean.eps is None:
            guess = Categorical(self.clean.x0).sample(noise)
            return torch.where(self.x == self.clean.x0.shape[-1], guess, self.x)
        middle = (self.step + self.levels.steps + 1) // 2
        if middle >= self.levels.steps:
            return self.clean.x0
        now, to = self.levels[self.step], self.levels[middle]
        ancestral = DDIM(1.0)
        x = ancestral.law(self.clean, self.x, now, to, ancestral.std(now, to)).sample(noise).to(self.x.dtype)
        with self.ledger.spend("network", len(x) * (1 + self.cond.guided), x.device):
            return self.policy.denoise(x, to, self.cond).x0

    def _side_noise(self, draw: int) -> Tensor:
        shape, device = self.clean.x0.shape[1:], self.x.device
        generators = (side_generator(self.noise, row, self.step, 1 + draw) for row in range(len(self.x)))
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    def generators(self) -> list[torch.Generator]:
        """One generator a group for this step's resampling, tied to the seed of the group's first row."""
        return [side_generator(self.noise, group * self.particles, self.step, 0) for group in range(self.groups)]


class Steering(ABC):
    """Inference-time control. The base class steers nothing."""

    reward: Reward | None = None
    outside: bool = False  # whether it makes rollouts of its own, see `samplers.outer`

    def select(self, ctx: Context) -> Tensor | None:
        """Ancestors (P, K), indices within each group, or None to keep the population. Called at every step and once at T."""
        return None

    def propose(self, ctx: Context, base: Transition) -> Transition:
        """The law to sample the next state from, given the kernel's own."""
        return base

    def check(self, ctx: Context) -> None:
        """Raises before any network runs if this steering cannot work in this run."""

    def tilting(self, progress: float) -> list[Reward | Value]:
        """Rewards and values whose gradients `propose` will ask for when this share of the steps, in [0, 1), is done."""
        return []

    def rewards(self) -> list[Reward]:
        """Every reward this steering uses."""
        return [] if self.reward is None else [self.reward]

    def bind(self, reward: Reward | None) -> Steering:
        """A copy that uses `reward` wherever no reward was given."""
        bound = copy.copy(self)
        bound.reward = self.reward or reward
        return bound

    def _need_reward(self) -> Reward:
        if self.reward is None:
            raise ValueError(f"{type(self).__name__} needs a reward: pass reward=…")
        return self.reward

    def __repr__(self) -> str:
        fields = {k: v.name if isinstance(v, (Reward, Value)) else v for k, v in vars(self).items()}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in fields.items())})"


class Free(Steering):
    """No steering: plain sampling."""


FREE = Free()


class Compose(Steering):
    """Several steerings at once: proposals are chained; at most one may select.

    `Compose(Guided(reward, 1 / beta), FeynmanKac(reward, beta))` is twisted sequential Monte Carlo.

    Args:
        a, b: the steerings, in the order in which their proposals are applied; either may be a `Compose`.
    """

    def __init__(self, a: Steering, b: Steering) -> None:
        self.a, self.b = a, b
        if a.outside or b.outside:
            raise ValueError(
                f"Compose joins steerings within a rollout; {a if a.outside else b} makes rollouts of its own"
            )

    def select(self, ctx: Context) -> Tensor | None:
        first, second = self.a.select(ctx), self.b.select(ctx)
        if first is not None and second is not None:
            raise ValueError("both steerings of a Compose select rows: keep one of them")
        return second if first is None else first

    def propose(self, ctx: Context, base: Transition) -> Transition:
        return self.b.propose(ctx, self.a.propose(ctx, base))

    def check(self, ctx: Context) -> None:
        self.a.check(ctx)
        self.b.check(ctx)

    def tilting(self, progress: float) -> list[Reward | Value]:
        return _distinct(self.a.tilting(progress) + self.b.tilting(progress))

    def rewards(self) -> list[Reward]:
        return _distinct(self.a.rewards() + self.b.rewards())

    def bind(self, reward: Reward | None) -> Steering:
        return Compose(self.a.bind(reward), self.b.bind(reward))


Judge = TypeVar("Judge")


def _distinct(judges: list[Judge]) -> list[Judge]:
    return list({id(judge): judge for judge in judges}.values())
