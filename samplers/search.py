"""Search over noise and over paths: draw, judge, keep the best. It needs no gradient and no reward of noisy states.

With z the noises of a run, K chains a prompt, and every judged sample a finished one:

    RandomSearch   z' fresh                                             each better one is kept
    ZeroOrder      z' = |z|·(c·u + sqrt(1 − c²)·w), u = z/|z|, w ⟂ u    moves to the best neighbour if it beats the base
    PathSearch     x_i ~ N((α_i/α_j)·x_j, σ_i² − (α_i/α_j)²·σ_j²)       moves to the best way down from a renoised state

Sources: inference-time scaling beyond denoising steps, 2501.09732 (all three); the schedule of the paths is that of
the baseline in 2503.19385. Deviations: the first iterate of every method is the plain sample of the seed; every chain has a
search of its own (the paper keeps the best N of all); a base or path is never made or scored again; path search compares
finished samples, not estimates at the level where the next round begins, which costs the last steps of every way down, so
that every iterate leaves a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rewards.base import Reward

from .levels import at_least_float32, diffuse_again
from .noise import SeededNoise, side_noise
from .outer import Found, Outer, Problem, where_rows
from .steering import Context
from .transitions import widest

__all__ = ["Noises", "PathSearch", "RandomSearch", "ZeroOrder"]

Noises = Literal["all", "initial"]


class Drawn(NamedTuple):
    """Judged samples.

    Attributes:
        rewards: (R,) float64 on the CPU, NaN where there is no judgement.
        parts: (R, …) x0, media, and what made them.
    """

    rewards: Tensor
    parts: list[Tensor]

    def where(self, rows: Tensor, other: Drawn) -> Drawn:
        """These where the mask (R,) is true, else the others."""
        parts = [where_rows(rows, mine, its) for mine, its in zip(self.parts, other.parts, strict=True)]
        return Drawn(torch.where(rows, self.rewards, other.rewards), parts)

    def put(self, rows: Tensor, others: Drawn) -> Drawn:
        """These, the ones at the given indices replaced."""
        parts = [
            mine.index_copy(0, rows.to(mine.device), its) for mine, its in zip(self.parts, others.parts, strict=True)
        ]
        return Drawn(self.rewards.index_copy(0, rows, others.rewards), parts)

    def chunks(self, count: int) -> list[Drawn]:
        """So many equal parts."""
        parts = zip(*(part.chunk(count) for part in self.parts), strict=True)
        return [Drawn(rewards, list(part)) for rewards, part in zip(self.rewards.chunk(count), parts, strict=True)]

    def beats(self, other: Drawn) -> Tensor:
        """(R,) which are better; any judgement is better than none."""
        return (self.rewards > other.rewards) | (~self.rewards.isnan() & other.rewards.isnan())

    def offer(self, found: Found) -> None:
        """Shows them to the driver as an iterate, with the noises that make them."""
        found.offer(self.rewards, self.parts[0], self.parts[1], self.parts[2:])


Rate = Callable[[Sequence[Tensor], Tensor], Drawn]  # noises (R, …) and their rows (R,) → judged samples


def best_of(problem: Problem, draws: int, propose: Callable[[int], Sequence[Tensor]], rate: Rate) -> Drawn:
    """The best of some candidates of every chain, the first of equals; as many at a time as fill a batch.

    Args:
        draws: candidates a chain.
        propose: the noises (B, …) of the n-th candidates of all chains.
        rate: makes and judges them.
    """
    at_once, best = max(1, problem.batch // problem.rows), None
    for first in range(0, draws, at_once):
        offered = [propose(n) for n in range(first, min(first + at_once, draws))]
        noise = [torch.cat(parts) for parts in zip(*offered, strict=True)]
        for drawn in rate(noise, torch.arange(problem.rows).repeat(len(offered))).chunks(len(offered)):
            best = drawn if best is None else drawn.where(drawn.beats(best), best)
    assert best is not None
    return best


def gaussians(problem: Problem, like: Sequence[Tensor], *keys: int) -> list[Tensor]:
    """Standard normal tensors (B, …) of given shapes, each row from a stream of its own for these keys."""
    sizes = [noise[0].numel() for noise in like]
    flat = side_noise(problem.noise, range(problem.rows), [sum(sizes)], *keys)
    return [part.reshape(n.shape).to(n) for part, n in zip(flat.split(sizes, 1), like, strict=True)]


class NoiseSearch(Outer):
    """A method that varies noises: all that a run uses, or the initial one, the others staying as they are."""

    noises: Noises = "all"

    def check(self, ctx: Context) -> None:
        self._need_reward()
        if self.noises == "initial" and not ctx.noise(0).is_floating_point():
            raise ValueError(
                f"{type(self).__name__} cannot vary the initial state of a token model, which is all masks: "
                "set noises to all"
            )

    def varied(self, bank: Sequence[Tensor]) -> list[int]:
        """Which noises of a run are varied."""
        return [i for i, noise in enumerate(bank) if noise.is_floating_point() and (i == 0 or self.noises == "all")]

    def _rater(self, problem: Problem) -> Rate:
        reward = self._need_reward()

        def rate(noise: Sequence[Tensor], rows: Tensor) -> Drawn:
            scores, x0, media = problem.rate(noise, reward, rows)
            return Drawn(scores.detach().double().cpu(), [x0, media, *noise])

        return rate

    def _fresh(self, problem: Problem, bank: Sequence[Tensor], draw: int) -> list[Tensor]:
        """New noises: those of the seed `draw` blocks of K after each chain's own."""
        which, noise = self.varied(bank), problem.noise
        if isinstance(noise, SeededNoise):
            seeds = [seed + draw * problem.particles for seed in noise.seeds]
            later = SeededNoise(seeds, noise.shape, dtype=noise.dtype, stream=noise.stream)
        else:
            later = problem.noise_of(torch.arange(problem.rows), draw)
        return replaced(bank, which, [later(i).to(bank[i]) for i in which])


def replaced(bank: Sequence[Tensor], which: Sequence[int], new: Sequence[Tensor]) -> list[Tensor]:
    """The noises of a run, some of them new."""
    given = dict(zip(which, new, strict=True))
    return [given.get(i, noise) for i, noise in enumerate(bank)]


class RandomSearch(NoiseSearch):
    """Random search: every round draws fresh noises and keeps the best sample; best of N that can stop at any time.

    Draw n of a chain has its seed plus n·K, so that R single draws of K chains are the R·K samples of `BestOfN` from the same
    seed.

    Args:
        reward: what to search by; None takes the run's.
        rounds: iterates, ≥ 1; the first is the plain sample.
        draws: fresh noises a chain in the second iterate, ≥ 1.
        growth: how many times as many in each iterate after it, ≥ 1; draws 2 and growth 2 are the published 2, 4, 8, …
        noises: "all" that a run uses, or the "initial" one, with the others kept.
    """

    def __init__(
        self, reward: Reward | None = None, rounds: int = 16, draws: int = 1, growth: int = 1, noises: Noises = "all"
    ) -> None:
        if rounds < 1 or draws < 1 or growth < 1:
            raise ValueError(f"rounds, draws and growth must be ≥ 1; got {rounds}, {draws} and {growth}")
        self.reward, self.rounds, self.draws, self.growth = reward, rounds, draws, growth
        self.noises: Noises = noises

    def iterations(self, problem: Problem, found: Found) -> Generator[float | None]:
        rate, bank, seen = self._rater(problem), problem.bank(), 1
        rate(bank, torch.arange(problem.rows)).offer(found)
        yield self.draws
        for i in range(self.rounds - 1):
            draws = self.draws * self.growth**i
            best_of(problem, draws, lambda n, seen=seen: self._fresh(problem, bank, seen + n), rate).offer(found)
            seen += draws
            yield self.growth


class ZeroOrder(NoiseSearch):
    """Zero-order search: moves to the best of n neighbours of the noise at a fixed angle, if it beats the noise itself.

    A chain none of whose neighbours is better draws a new base, which is judged together with its own neighbours in the next
    iterate. Neighbours have the base's norm, each noise of a run on a sphere of its own. The K chains are K such searches.

    Args:
        reward: what to search by; None takes the run's.
        rounds: iterates, ≥ 1; the first is the plain sample.
        neighbours: n, a chain and iterate, ≥ 1.
        cosine: of the angle between a noise and its neighbour, in (−1, 1); 0.95 is 18 degrees.
        noises: "all" that a run uses, or the "initial" one, with the others kept.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        rounds: int = 10,
        neighbours: int = 4,
        cosine: float = 0.95,
        noises: Noises = "all",
    ) -> None:
        if rounds < 1 or neighbours < 1:
            raise ValueError(f"rounds and neighbours must be ≥ 1; got {rounds} and {neighbours}")
        if not -1 < cosine < 1:
            raise ValueError(f"cosine is that of the angle to a neighbour, in (-1, 1); got {cosine}")
        self.reward, self.rounds, self.neighbours, self.cosine = reward, rounds, neighbours, cosine
        self.noises: Noises = noises

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if ctx.noise(0)[0].numel() < 2:
            raise ValueError("ZeroOrder moves on a sphere, and one number has none around it: use RandomSearch or PCN")

    def iterations(self, problem: Problem, found: Found) -> Generator[float | None]:
        rate, rows = self._rater(problem), torch.arange(problem.rows)
        base = rate(problem.bank(), rows)
        stuck, spent = torch.zeros(problem.rows, dtype=torch.bool), problem.rows
        base.offer(found)
        for i in range(1, self.rounds):
            asked = problem.rows * self.neighbours + int(stuck.sum())
            yield asked / spent
            spent = asked
            if bool(stuck.any()):
                again = rows[stuck]
                noise = [n[again.to(n.device)] for n in self._fresh(problem, base.parts[2:], i)]
                base = base.put(again, rate(noise, again))
            best = best_of(problem, self.neighbours, lambda n, i=i, at=base: self._around(problem, at, i, n), rate)
            moved = best.beats(base)
            best.where(moved | ~stuck, base).offer(found)  # a new base may be better than all that is around it
            found.note(moved=moved)
            base, stuck = best, ~moved  # whose place a new base takes
        yield

    def _around(self, problem: Problem, base: Drawn, *keys: int) -> list[Tensor]:
        bank = base.parts[2:]
        which = self.varied(bank)
        towards = gaussians(problem, [bank[i] for i in which], *keys)
        return replaced(bank, which, [neighbour(bank[i], w, self.cosine) for i, w in zip(which, towards, strict=True)])


def neighbour(z: Tensor, direction: Tensor, cosine: float) -> Tensor:
    """The point (B, …) on the sphere through z at an angle of this cosine from it, on the way to `direction`; norms are kept."""
    at, towards = widest(z).flatten(1), widest(direction).flatten(1)
    norm = at.norm(dim=1, keepdim=True)
    at = at / norm
    towards = towards - (towards * at).sum(1, keepdim=True) * at
    towards = towards / towards.norm(dim=1, keepdim=True)
    return (norm * (cosine * at + math.sqrt(1 - cosine**2) * towards)).reshape(z.shape).to(z)


class PathSearch(Outer):
    """Search over paths: noises a nearly finished sample anew, walks several ways down again, and goes on from the best.

    A round takes a chain's state at level j back to level i by the exact forward kernel, `branches` times, walks all of them to
    the end, and moves to the best one's state at a level a little after j. With a stochastic kernel every way down has noise
    of its own. Levels are shares of the run's steps, which on the even grid of a flow are its times.

    Args:
        reward: what to search by; None takes the run's.
        branches: M, ways down a chain and round, ≥ 1.
        begin: the share of the run in (0, 1) after which the first round begins.
        back: the share of the run by which a round goes back, at most to the start.
        forth: the share by which the state it goes on from lies after that, more than `back`.
    """

    begins = False

    def __init__(
        self,
        reward: Reward | None = None,
        branches: int = 5,
        begin: float = 0.88,
        back: float = 0.78,
        forth: float = 0.81,
    ) -> None:
        if branches < 1:
            raise ValueError(f"branches must be ≥ 1; got {branches}")
        if not (0 < begin < 1 and 0 < back < forth <= 1):
            raise ValueError(
                f"shares of the run: 0 < begin < 1 and 0 < back < forth ≤ 1; got begin {begin}, back {back}, forth {forth}"
            )
        self.reward, self.branches, self.begin, self.back, self.forth = reward, branches, begin, back, forth

    @property
    def rounds(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The plain sample, and as many rounds as the net progress takes to the end."""
        return 1 + math.ceil((1 - self.begin) / (self.forth - self.back) - 1e-9)

    def levels(self, steps: int) -> list[tuple[int, int]]:
        """(i, j) of every iterate: it starts at level i, and the next one goes back from level j."""
        at, next_at = self.begin, max(1, round(self.begin * steps))
        walked = [(0, next_at)]
        for _ in range(self.rounds - 1):
            start = min(max(0, round((at - self.back) * steps)), next_at - 1)
            at = min(1.0, at - self.back + self.forth)
            next_at = max(start + 1, round(at * steps))
            walked.append((start, next_at))
        return walked

    def check(self, ctx: Context) -> None:
        self._need_reward()
        if not ctx.noise(0).is_floating_point():
            raise ValueError("PathSearch adds Gaussian noise to states, and tokens have none: use RandomSearch or PCN")

    def iterations(self, problem: Problem, found: Found) -> Generator[float | None]:
        bank, (first, *rounds) = problem.bank(), self.levels(problem.levels.steps)
        best = self._rater(problem, *first)(bank, torch.arange(problem.rows))
        Drawn(best.rewards, best.parts[:2]).offer(found)
        level, spent = first[1], problem.levels.steps
        for i, (start, end) in enumerate(rounds, 1):
            asked = (problem.levels.steps - start) * self.branches
            yield asked / spent
            spent = asked
            like = [best.parts[2], *bank[start + 1 :]]

            def ways(
                n: int, i: int = i, like: list[Tensor] = like, level: int = level, start: int = start
            ) -> list[Tensor]:
                drawn, *later = gaussians(problem, like, i, n)
                x, eps = at_least_float32(like[0]), at_least_float32(drawn)
                return [diffuse_again(x, eps, problem.levels[level], problem.levels[start]).to(drawn), *later]

            best, level = best_of(problem, self.branches, ways, self._rater(problem, start, end)), end
            Drawn(best.rewards, best.parts[:2]).offer(found)
        yield

    def _rater(self, problem: Problem, start: int, middle: int) -> Rate:
        """Walks from a level to the end; keeps the state at another level on the way."""
        reward = self._need_reward()

        def rate(noise: Sequence[Tensor], rows: Tensor) -> Drawn:
            walked = []
            for part in torch.arange(len(rows)).split(problem.batch):
                given = [n[part] for n in noise]
                state = problem.sample(given, rows[part], start=start, stop=middle).x0
                x0 = problem.sample([state, *given[1 + middle - start :]], rows[part], start=middle).x0
                scores, media = problem.judge(x0, reward, rows[part])
                walked.append((scores.detach().double().cpu(), x0, media, state))
            rewards, *parts = (torch.cat(column) for column in zip(*walked, strict=True))
            return Drawn(rewards, parts)

        return rate
