"""Rollover budget forcing: candidates for every step, one after the other, until one is better than all before.

A chain is a state x_t on its way to data. A candidate is a draw from the kernel's law of its next state, judged by the reward
of its clean estimate, which costs one network evaluation. A chain

    begins   at the best of so many initial noises;
    moves    to the first candidate that beats the best reward of its path, and the rest of this step's quota is added to the
             next one's; or, when the quota is used up, to the best candidate of the step;
    stays    at the last step whose candidates still need the network, and spends there all that is left.

Candidates are judged `speculative` at a time and considered in order; those behind the one that is accepted are thrown away.
So neither the law nor the result depends on how many there are; the ledger has what they cost, and no quota is charged.

Source: Rollover Budget Forcing, 2503.19385. Deviations:

* The published code returns the best estimate of the last step, which may be worse than earlier ones. Here the best estimate
  of all steps is kept, together with the plain sample of the seed and the finished sample of the chain.
* Quotas are shared among the steps that draw candidates, not among all steps, and each particle is a chain with its own.
* The published flow models are made stochastic along a variance preserving interpolant. No conversion is needed: the law of
  `DDIM` depends on the levels' ratios alpha/sigma alone, up to the scale of the state, so on a flow it is that ancestral
  sampler already.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from rewards.base import Reward

from .kernels import Kernel
from .levels import Clean, Levels
from .noise import onward
from .outer import Found, Outer, Problem
from .steering import Context

__all__ = ["RolloverBudget"]

PUBLISHED = 250  # evaluations a chain: 500 for two


class Candidate(NamedTuple):
    """A state with its clean estimate, and the reward and media of that."""

    x: Tensor
    clean: Clean
    reward: float
    media: Tensor

    @property
    def rank(self) -> float:
        """The reward; below all others where there is no judgement."""
        return -math.inf if math.isnan(self.reward) else self.reward


@dataclass
class Chain:
    """Where a chain is, and what it may still spend.

    Attributes:
        total, quota: candidates of the whole chain, and of a step.
        last: the step at which it stays.
        left: candidates of this step.
        step: whose candidates are drawn; −1 for initial noises.
        tried, used: candidates considered, of this step and in all.
        bar: the best reward of the path.
        at: the candidate last moved to.
        best: of this step.
    """

    total: int
    quota: int
    last: int
    left: int
    step: int = -1
    tried: int = 0
    used: int = 0
    bar: float = -math.inf
    at: Candidate | None = None
    best: Candidate | None = None

    def consider(self, candidate: Candidate) -> bool:
        """Takes one candidate of this step; returns whether the chain has moved, so that the others come too late."""
        self.tried, self.used, self.left = self.tried + 1, self.used + 1, self.left - 1
        if self.best is None or candidate.rank > self.best.rank:
            self.best = candidate
        accepted = self.step >= 0 and candidate.rank > self.bar
        if self.step == self.last or not (accepted or self.left == 0):
            return False
        self.at, self.bar = self.best, max(self.bar, self.best.rank)
        self.step, self.tried, self.best = self.step + 1, 0, None
        self.left = max(1, self.total - self.used) if self.step == self.last else self.quota + self.left
        return True


class RolloverBudget(Outer):
    """Rollover budget forcing: unused candidates of a step roll over to the next, and a chain spends its whole quota.

    Args:
        reward: what to choose by; None takes the run's.
        candidates: of a chain in all, each one network evaluation and one reward call; None takes what the run's budget
            allows, or the paper's 250 without one.
        initial: noises to choose the beginning from, the paper's 25.
        speculative: candidates of a chain judged at a time; more fill the batch better and waste what comes too late.
    """

    begins = False

    def __init__(
        self,
        reward: Reward | None = None,
        candidates: Optional[int] = None,
        initial: int = 25,
        speculative: int = 1,
    ) -> None:
        if initial < 1 or speculative < 1:
            raise ValueError(f"initial and speculative must be ≥ 1; got {initial} and {speculative}")
        if candidates is not None and candidates <= initial:
            raise ValueError(
                f"candidates are for all steps, of which initial come first; got {candidates} and {initial}"
            )
        self.reward, self.candidates, self.initial, self.speculative = reward, candidates, initial, speculative

    @property
    def rounds(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The plain sample, candidates one at a time, and the finished sample; speculation needs fewer."""
        return (self.candidates or PUBLISHED) + 2

    def check(self, ctx: Context) -> None:
        self._need_reward()
        if not ctx.noise(0).is_floating_point():
            raise ValueError(
                "RolloverBudget judges clean estimates, and tokens have none: use RandomSearch or TreeSampling"
            )
        drawn = _drawn(ctx.kernel, ctx.levels)
        if drawn != list(range(len(drawn))):
            raise ValueError(
                f"RolloverBudget draws candidates from the first step on without a gap, but {ctx.kernel} draws noise at steps "
                f"{drawn} alone: leave out noisy_steps"
            )
        if self.candidates is not None and self.candidates < self.initial + len(drawn):
            raise ValueError(
                f"{self.candidates} candidates are too few for {self.initial} initial noises and {len(drawn)} steps"
            )

    def iterations(self, problem: Problem, found: Found) -> Generator[float | None]:
        self._finish(problem, found, [problem.noise_of(part) for part in problem.parts()], 0)
        judged_alone = problem.budget is not None and problem.budget.unit == "rewards"
        yield self.speculative / (1 if judged_alone else problem.levels.steps)
        steps = len(_drawn(problem.kernel, problem.levels))
        total = self._allowed(problem)
        initial = total if not steps else max(1, min(self.initial, total - steps))
        chains = [
            Chain(total, max(1, (total - initial) // max(steps, 1)), steps - 1, initial) for _ in range(problem.rows)
        ]
        while any(chain.left > 0 for chain in chains):
            self._offer(problem, found, self._advance(problem, chains))
            yield
        if not _is_estimate(problem.kernel, problem.levels, steps):
            x = torch.stack([chain.best.x for chain in chains if chain.best is not None])
            noises = [onward(x[part.to(x.device)], problem.noise_of(part), steps) for part in problem.parts()]
            self._finish(problem, found, noises, steps)
            yield

    def _allowed(self, problem: Problem) -> int:
        """Candidates a chain, at least one: what is asked for, or what the rest of the budget pays for."""
        if problem.budget is None:
            return self.candidates or PUBLISHED
        network, counts = 1 + problem.cond.guided, problem.ledger.counts
        price = {"nfe": float(network), "rewards": 1.0}.get(problem.budget.unit)
        if price is None:
            seconds = {on: spent / max(counts[on], 1) for on, spent in problem.ledger.seconds.items()}
            price = network * seconds["network"] + seconds["decode"] + seconds["reward"]
        paid = int((problem.budget.amount - problem.spent) / (problem.rows * price))
        return max(1, paid if self.candidates is None else min(self.candidates, paid))

    def _finish(self, problem: Problem, found: Found, noises: Sequence, start: int) -> None:
        """Walks every chain to data and offers it."""
        parts, reward = problem.parts(), self._need_reward()
        ended = [problem.sample(noise, part, start=start).x0 for noise, part in zip(noises, parts, strict=True)]
        judged = [problem.judge(x0, reward, part) for x0, part in zip(ended, parts, strict=True)]
        rewards, media = (torch.cat(column) for column in zip(*judged, strict=True))
        found.offer(rewards, torch.cat(ended), media)

    def _advance(self, problem: Problem, chains: Sequence[Chain]) -> list[Candidate | None]:
        """Judges the next candidates of every chain that has any left; returns the best of those considered."""
        asked = [
            (row, stream)
            for row, chain in enumerate(chains)
            for stream in range(chain.tried, chain.tried + min(self.speculative, chain.left))
        ]
        made = []
        for i in range(0, len(asked), problem.batch):
            made += self._judged(problem, chains, asked[i : i + problem.batch])
        best: list[Candidate | None] = [None] * len(chains)
        late = set()
        for (row, _), candidate in zip(asked, made, strict=True):
            if row in late:
                continue
            if chains[row].consider(candidate):
                late.add(row)
            other = best[row]
            best[row] = candidate if other is None or candidate.rank > other.rank else other
        return best

    def _judged(self, problem: Problem, chains: Sequence[Chain], asked: Sequence[tuple[int, int]]) -> list[Candidate]:
        """Candidates, each of a row and by a stream of its noise, from one network call."""
        policy, rows = problem.policy, torch.tensor([row for row, _ in asked])
        to = torch.tensor([chains[row].step + 1 for row, _ in asked])  # the levels of the candidates
        drawn = [problem.noise_of(rows[[j]], stream)(int(to[j])) for j, (_, stream) in enumerate(asked)]
        x, origins = torch.cat(drawn).to(policy.device), [chains[row].at for row, _ in asked]
        if all(origin is not None for origin in origins):
            now = [origin for origin in origins if origin is not None]
            clean = Clean(*(torch.stack(part) for part in zip(*(origin.clean for origin in now), strict=True)))  # pyright: ignore
            x = problem.kernel(clean, torch.stack([origin.x for origin in now]), problem.levels, to - 1).sample(x)
        x, cond = x.to(policy.dtype), problem.cond[rows]
        with torch.no_grad(), problem.ledger.spend("network", len(x) * (1 + cond.guided), x.device):
            clean = policy.denoise(x, problem.levels[to], cond)
        rewards, media = problem.judge(clean.x0, self._need_reward(), rows)
        parts = zip(x, clean.x0, clean.eps, rewards.tolist(), media, strict=True)  # pyright: ignore
        return [Candidate(state, Clean(x0, eps), reward, made) for state, x0, eps, reward, made in parts]

    @staticmethod
    def _offer(problem: Problem, found: Found, made: Sequence[Candidate | None]) -> None:
        """Offers estimates as samples; chains that have nothing new keep what they have."""
        rewards = torch.tensor([math.nan if c is None else c.reward for c in made], dtype=torch.float64)
        x0 = [found.x0[row] if c is None else c.clean.x0.to(found.x0) for row, c in enumerate(made)]
        media = [found.media[row] if c is None else c.media for row, c in enumerate(made)]
        found.offer(rewards, torch.stack(x0), torch.stack(media))


def _drawn(kernel: Kernel, levels: Levels) -> list[int]:
    """The steps that draw noise, but for the last one: from its candidates nothing is left to estimate."""
    return [i for i in range(levels.steps - 1) if kernel.window(i, i + 1).diversifies(levels[i : i + 2])]


def _is_estimate(kernel: Kernel, levels: Levels, start: int) -> bool:
    """Whether all that is left from a level on is one step to the clean estimate itself."""
    return start == levels.steps - 1 and float(levels.sigma[-1]) == 0 and not kernel.diversifies(levels, start)
