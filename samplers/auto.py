"""One budget, many methods: a race in which the best-placed method gets the next share.

The first half of a prompt's budget goes to independent draws, as in best of N. The other half is spent in races of equal price.
Every rival that can do something with a race's share runs once; from then on each prompt gives its race to whichever promises the
greatest rise of its best sample so far:

    draws          E[(max of n − best)₊], n what the share pays for, under a normal law fitted to the draws so far
    a population   the same of its winners, whose law has the mean of the winners so far and the spread of draws
    a chain        half of what it gained when it last ran; it begins at the noise of the best sample that has one

What is left in the end goes to draws. All samples count, whoever made them, so the result is at worst that of a best of N with half
the budget, and in a race that draws win it is best of N. Prompts decide for themselves: nothing depends on what else is in the
batch. In evaluations or reward calls the race is a function of the seed; in seconds it depends on the clock.

The j-th draw of a prompt has the seed of the prompt's first row plus j, as `align.steer` numbers particles: draws are those of best
of N, one by one.

No published method is followed; the closest are Thompson-like allocation by expected improvement (Jones et al., 1998) and
successive races (Hoeffding races, Maron and Moore, 1994).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from rewards.base import Reward

from .budget import Budget
from .guidance import Guided
from .noise import SeededNoise, mix
from .optimise import ReNO
from .outer import Found, Outer, Problem
from .price import Price, price
from .rollout import rollout
from .search import ZeroOrder
from .smc import FeynmanKac
from .steering import FREE, Compose, Context, Steering

__all__ = ["Auto", "expected_rise"]

CROWD = 4  # particles of a population, at least: fewer have nothing to resample
KEEP = 0.5  # of a chain's last gain is expected of its next race
RACE, START = 0xA0, 0xA1  # streams of seeds


def expected_rise(mean: float, std: float, best: float, draws: int = 1) -> float:
    """E[(max of so many normal draws − best)₊]."""
    if std <= 0:
        return max(0.0, mean - best)
    low = max(best, mean - 8 * std)
    x = torch.linspace(low, max(low, mean + 8 * std), 513, dtype=torch.float64)
    beyond = 1 - torch.special.ndtr((x - mean) / std) ** draws
    return float(torch.trapezoid(beyond, x)) + max(0.0, low - best)


class Auto(Outer):
    """Spends a budget on best of N, and on whichever rival raises the best sample most for its price.

    Args:
        reward: what to steer by; None takes the run's.
        rivals: steerings that race the draws, in the order of their trials. None takes what model, kernel and reward allow:
            `FeynmanKac`, then on a few-step model `ReNO`, or `ZeroOrder` without a gradient; on another `FeynmanKac` with `Guided`
            proposals, and `ZeroOrder`.
        races: into how many parts the budget is divided.
        share: of the budget that goes to draws before any rival is tried.
        beta: temperature of the rivals that are chosen, in units of the reward.
        samples: what a prompt may spend without a budget, in plain samples.
    """

    spends = True

    def __init__(
        self,
        reward: Reward | None = None,
        rivals: Optional[list[Steering]] = None,
        races: int = 10,
        share: float = 0.5,
        beta: float = 0.1,
        samples: int = 32,
    ) -> None:
        if races < 1 or samples < 1:
            raise ValueError(f"races and samples must be ≥ 1; got {races} and {samples}")
        if not 0 <= share <= 1:
            raise ValueError(f"share is a part of the budget in [0, 1]; got {share}")
        if any(isinstance(rival, Auto) for rival in rivals or ()):
            raise ValueError("an Auto cannot race in an Auto")
        self.reward, self.rivals, self.races, self.share = reward, rivals, races, share
        self.beta, self.samples = beta, samples
        self.begins = all(rival.begins for rival in rivals or ())
        self.rounds = races + 2  # the plain samples, the races, what is left

    def bind(self, reward: Reward | None) -> Steering:
        bound = super().bind(reward)
        assert isinstance(bound, Auto)
        bound.rivals = None if self.rivals is None else [rival.bind(bound.reward) for rival in self.rivals]
        return bound

    def rewards(self) -> list[Reward]:
        of_rivals = (reward for rival in self.rivals or () for reward in rival.rewards())
        return list({id(reward): reward for reward in (*super().rewards(), *of_rivals)}.values())

    def check(self, ctx: Context) -> None:
        self._need_reward()
        for rival in self.rivals or ():
            rival.check(ctx)

    def field(self, ctx: Context) -> Sequence[Steering]:
        """The rivals in this run: those given, or those that can work."""
        reward = self._need_reward()
        if self.rivals is not None:
            return self.rivals
        stochastic = ctx.kernel.diversifies(ctx.levels)
        fk = [FeynmanKac(reward, self.beta, potential="max", every=4, start=0.2, stop=0.8)] * stochastic
        if ctx.policy.few_step:
            return [*fk, ReNO(reward) if reward.differentiable else ZeroOrder(reward)]
        guided = Guided(reward, 1 / self.beta, tempering="linear")
        twisted = [Compose(guided, FeynmanKac(reward, self.beta, tempering="linear"))]
        return [*fk, *twisted * (stochastic and reward.differentiable), ZeroOrder(reward)]

    def iterations(self, problem: Problem, found: Found) -> Generator[float | None]:
        race = _Race(self, problem)
        found.offer(*race.begin())
        found.note(arm=torch.zeros(problem.rows))
        for i in range(self.races + 1):
            yield 0.0  # it keeps to the budget by itself
            picks = race.picks(i)
            found.offer(*race.run(picks))
            arms = torch.tensor([picks[p].arm if p in picks else -1 for p in range(race.groups)])
            found.note(arm=arms.repeat_interleave(problem.particles))


class _Pick(NamedTuple):
    """What a prompt does in a race: an arm, and what it may spend on it."""

    arm: int
    amount: float


@dataclass
class _Entry:
    """What is known of a prompt.

    Attributes:
        seed: of its first row.
        drawn: samples drawn by their seeds.
        values: of the draws that were judged.
        best: of all samples.
        spent: in the budget's unit.
        start: the best sample whose noise is known, and how to get that noise.
        results: of every rival's races: the winner of a population, the gain of a chain.
    """

    seed: int
    drawn: int = 0
    values: list[float] = field(default_factory=list)
    best: float = -math.inf
    spent: float = 0.0
    start: tuple[float, Callable[[], list[Tensor]] | None] = (-math.inf, None)
    results: dict[int, list[float]] = field(default_factory=dict)


class _Given(SeededNoise):
    """Noise that is given, with the seeds of side decisions."""

    def __init__(self, tensors: Sequence[Tensor], seeds: Sequence[int]) -> None:
        super().__init__(seeds, tensors[0].shape[1:], device=tensors[0].device, dtype=tensors[0].dtype)
        self.tensors = tensors

    def __call__(self, i: int) -> Tensor:
        return self.tensors[i] if i < len(self.tensors) else torch.zeros_like(self.tensors[0])


class _Race:
    """The state of a run: arm 0 draws, the others are rivals."""

    def __init__(self, auto: Auto, problem: Problem) -> None:
        self.auto, self.problem, self.reward = auto, problem, auto._need_reward()
        self.groups, self.chains = problem.rows // problem.particles, problem.particles
        self.bank = problem.bank()
        noise = problem.noise
        self.seeds = noise.seeds if isinstance(noise, SeededNoise) else [row << 16 for row in range(problem.rows)]
        self.like = noise.dtype if isinstance(noise, SeededNoise) else torch.float32
        self.entries = [_Entry(self.seeds[p * self.chains]) for p in range(self.groups)]
        one, steps = problem, problem.levels.steps
        self.draw = steps * (1 + one.cond.guided)  # network evaluations
        self.budget = one.budget or Budget(auto.samples * self.draw * self.groups, "nfe")
        self.each = self.budget.amount / self.groups
        self.arms: list[Steering] = [FREE, *auto.field(auto._context(one))]
        shape = tuple(self.bank[0].shape[1:])
        how = (one.policy, one.kernel, one.levels, one.cond[[0]])
        prices = [price(arm, *how, arm.least, shape) for arm in self.arms[1:]]
        counts = {"network": float(self.draw), "decode": 1.0, "reward": 1.0, "gradient": 0.0}
        self.prices = [Price(1, counts, dict.fromkeys(counts, 0.0)), *prices]
        self.shown: tuple[Tensor, Tensor]
        self.made: dict[tuple[int, int], tuple[float, Tensor, Tensor]] = {}
        self.count = [0] * self.groups
        self.pace = 0.0  # seconds of a network evaluation, all included

    def begin(self) -> tuple[Tensor, Tensor, Tensor]:
        """The plain samples."""
        one = self.problem
        scores, x0, media = one.rate(self.bank, self.reward)
        values = scores.detach().double().cpu()
        for p, entry in enumerate(self.entries):
            rows = range(p * self.chains, (p + 1) * self.chains)
            for row in rows:
                self._learn(entry, float(values[row]), lambda row=row: [n[[row]] for n in self.bank])
            entry.drawn, entry.spent = self.chains, self.chains * self._cost(0)
        self.shown = x0, media
        self._tick()
        return values, x0, media

    def picks(self, i: int) -> dict[int, _Pick]:
        """Which prompts do what in race i; after the last race, what is left goes to draws."""
        chosen, done = {}, min(1.0, (i + 1) / self.auto.races)
        for p, entry in enumerate(self.entries):
            begun = self.chains * self._cost(0)
            due = begun + done * (self.each - begun) - entry.spent
            pick = _Pick(0, due) if i == self.auto.races else self._pick(entry, i, due * (1 + 1e-9))
            if self._count(pick) > 0:
                chosen[p] = pick
        return chosen

    def _pick(self, entry: _Entry, i: int, amount: float) -> _Pick:
        """The arm that promises most for an amount; untried rivals first, once draws have had their share."""
        part = (self.each - self.chains * self._cost(0)) / self.auto.races * (1 + 1e-9)  # without what was left over
        able = [a for a in range(len(self.arms)) if a == 0 or self._able(a, min(amount, part), entry)]
        untried = [a for a in able if a and a not in entry.results]
        if i < math.ceil(self.auto.share * self.auto.races) or len(entry.values) < 2 or len(able) == 1:
            return _Pick(0, amount)
        if untried:
            return _Pick(untried[0], amount)
        return max((_Pick(a, amount) for a in able), key=lambda pick: self._promise(entry, pick))

    def _able(self, arm: int, amount: float, entry: _Entry) -> bool:
        """Whether an arm can do something with an amount."""
        if isinstance(self.arms[arm], Outer):
            return entry.start[1] is not None and self._cost(arm, 2) <= amount
        return self._count(_Pick(arm, amount)) >= CROWD

    def _promise(self, entry: _Entry, pick: _Pick) -> float:
        """How much the best sample is expected to rise."""
        values = torch.tensor(entry.values, dtype=torch.float64)
        mean, std = float(values.mean()), float(values.std())
        if pick.arm == 0:
            return expected_rise(mean, std, entry.best, self._count(pick))
        results = entry.results[pick.arm]
        if isinstance(self.arms[pick.arm], Outer):
            return KEEP * results[-1]
        return expected_rise(sum(results) / len(results), std, entry.best)

    def _cost(self, arm: int, rounds: int = 1) -> float:
        """What a particle or chain of an arm costs."""
        counts = self.prices[arm].of(1, rounds)
        evaluations = counts["network"] + 2 * counts["gradient"]
        if self.budget.unit == "s":
            return evaluations * self.pace
        return counts["reward"] if self.budget.unit == "rewards" else evaluations

    def _count(self, pick: _Pick) -> int:
        """How many particles an amount pays for."""
        each, least = self._cost(pick.arm), self.arms[pick.arm].least
        return 1 if isinstance(self.arms[pick.arm], Outer) else int(pick.amount * (1 + 1e-9) / each) // least * least

    def run(self, picks: dict[int, _Pick]) -> tuple[Tensor, Tensor, Tensor]:
        """One race: prompts of the same mind run together. Returns the best new sample of every chain."""
        self.made, self.count = {}, [0] * self.groups
        minds: dict[_Pick, list[int]] = {}
        for p, pick in picks.items():
            minds.setdefault(pick, []).append(p)
        for pick, groups in minds.items():
            if pick.arm == 0:
                self._draw(groups, self._count(pick))
            elif isinstance(self.arms[pick.arm], Outer):
                self._climb(groups, pick)
            else:
                self._crowd(groups, pick.arm, self._count(pick))
        self._tick()
        x0, media = (part.clone() for part in self.shown)
        values = torch.full((self.problem.rows,), torch.nan, dtype=torch.float64)
        for (p, chain), (value, its_x0, its_media) in self.made.items():
            row = p * self.chains + chain
            values[row], x0[row], media[row] = value, its_x0, its_media
        self.shown = x0, media
        return values, x0, media

    def _draw(self, groups: list[int], many: int) -> None:
        """Fresh samples of every prompt, by their seeds."""
        asked = [(p, self.entries[p].seed + self.entries[p].drawn + j) for p in groups for j in range(many)]
        for first in range(0, len(asked), self.problem.batch):
            part = asked[first : first + self.problem.batch]
            noise = self._noise([seed for _, seed in part])
            rows = torch.tensor([p * self.chains for p, _ in part])
            self._judge(part, self.problem.sample(noise, rows).x0, rows)
        for p in groups:
            entry = self.entries[p]
            entry.drawn, entry.spent = entry.drawn + many, entry.spent + many * self._cost(0)

    def _judge(self, part: Sequence[tuple[int, int]], x0: Tensor, rows: Tensor) -> None:
        scores, media = self.problem.judge(x0, self.reward, rows)
        for j, ((p, seed), value) in enumerate(zip(part, scores.double().tolist(), strict=True)):
            self._learn(self.entries[p], value, lambda seed=seed: self._noises(seed))
            self._make(p, value, x0[j], media[j])

    def _crowd(self, groups: list[int], arm: int, many: int) -> None:
        """A population of every prompt."""
        one, steering = self.problem, self.arms[arm]
        per_call = max(1, one.batch // many)
        for part in (groups[i : i + per_call] for i in range(0, len(groups), per_call)):
            entries = [self.entries[p] for p in part]
            runs = [len(entry.results.get(arm, ())) for entry in entries]
            seeds = [mix(e.seed, RACE, arm, n, j) for e, n in zip(entries, runs, strict=True) for j in range(many)]
            rows = torch.tensor([p * self.chains for p in part]).repeat_interleave(many)
            prompts = [one.prompts[row] for row in rows.tolist()] if one.prompts else []
            how = {"particles": many, "prompts": prompts, "steering": steering, "watch": one.watch}
            done = rollout(one.policy, one.kernel, one.cond[rows], one.levels, self._noise(seeds), **how)
            one.ledger.add(done.ledger)
            for name, failed in done.failures.items():
                one.failures[name] = one.failures.get(name, 0) + failed
            if done.rewards is None or done.media is None or steering.rewards() != [self.reward]:
                scores, media = one.judge(done.x0, self.reward, rows)
            else:
                scores, media = done.rewards.flatten(), done.media
            values = scores.detach().double().cpu().reshape(len(part), many)
            for g, (p, entry) in enumerate(zip(part, entries, strict=True)):
                entry.results.setdefault(arm, []).append(float(values[g].nan_to_num(-math.inf).max()))
                entry.spent += many * self._cost(arm)
                for j in range(many):
                    self._make(p, float(values[g, j]), done.x0[g * many + j], media[g * many + j])

    def _climb(self, groups: list[int], pick: _Pick) -> None:
        """A method around the loop, from the noises of the best samples."""
        one, entries = self.problem, [self.entries[p] for p in groups]
        starts = [begin() for _, begin in (entry.start for entry in entries) if begin is not None]
        seeds = [mix(e.seed, START, pick.arm, len(e.results.get(pick.arm, ()))) for e in entries]
        noise = _Given([torch.cat(parts) for parts in zip(*starts, strict=True)], seeds)
        rows = torch.tensor([p * self.chains for p in groups])
        prompts = [one.prompts[row] for row in rows.tolist()] if one.prompts else []
        how = {"prompts": prompts, "batch": one.batch, "watch": one.watch, "failures": one.failures}
        inner = Problem(one.policy, one.kernel, one.cond[rows], one.levels, noise, **how)
        found, spent, began = Found(), 0.0, time.perf_counter()
        steering = self.arms[pick.arm]
        assert isinstance(steering, Outer)
        work = steering.iterations(inner, found)
        for growth in work:
            before, spent = spent, self.budget.spent(inner.ledger, time.perf_counter() - began) / len(groups)
            if spent + (spent - before) * (1.0 if growth is None else growth) > pick.amount:
                break
        work.close()
        one.ledger.add(inner.ledger)
        assert found.reward is not None
        for g, (p, entry) in enumerate(zip(groups, entries, strict=True)):
            value = float(found.reward[g])
            entry.results.setdefault(pick.arm, []).append(max(0.0, value - entry.best))
            entry.spent += spent
            if found.noise and value > entry.start[0]:
                entry.start = value, lambda g=g, noise=found.noise: [n[[g]] for n in noise]
            self._make(p, value, found.x0[g], found.media[g])

    def _learn(self, entry: _Entry, value: float, noises: Callable[[], list[Tensor]]) -> None:
        """Takes note of a draw."""
        if math.isfinite(value):
            entry.values.append(value)
            entry.best = max(entry.best, value)
            entry.start = max(entry.start, (value, noises), key=lambda start: start[0])

    def _make(self, p: int, value: float, x0: Tensor, media: Tensor) -> None:
        """Deals a sample to one of its prompt's chains."""
        at = p, self.count[p] % self.chains
        self.count[p] += 1
        if at not in self.made or value > self.made[at][0] or math.isnan(self.made[at][0]):
            self.made[at] = value, x0, media
        if value > self.entries[p].best:
            self.entries[p].best = value

    def _tick(self) -> None:
        """Where seconds are spent, they are spent by all prompts alike."""
        clock = time.perf_counter() - self.problem.started
        self.pace = clock / max(1, self.problem.ledger.evaluations)
        if self.budget.unit == "s":
            for entry in self.entries:
                entry.spent = clock / self.groups

    def _noise(self, seeds: Sequence[int]) -> SeededNoise:
        return SeededNoise(seeds, self.bank[0].shape[1:], device=self.problem.policy.device, dtype=self.like)

    def _noises(self, seed: int) -> list[Tensor]:
        return [self._noise([seed])(i) for i in range(len(self.bank))]
