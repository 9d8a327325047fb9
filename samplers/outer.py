"""Methods that call the denoising loop from outside: noise optimisation, sampling in noise space, search.

An `Outer` is a steering that does not act within a rollout but makes many: it proposes noise (or states), rolls them out,
looks at the rewards, and goes on. Its K particles are K chains a prompt, and every row of the result is its chain's best sample
so far (or its last, for methods that are samplers), so that the result is usable after every iteration: anytime. The first
iterate of a chain is the plain sample of its seed, so that the result is never worse than no steering.

A method is one generator, `iterations(problem, found)`: it offers what it finds and yields once an iterate. Budget, callbacks,
Ctrl-C and bookkeeping are the driver's, `Outer.run`.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rewards.base import Prompt, Reward

from .budget import Budget
from .kernels import Kernel
from .ledger import Ledger
from .levels import Levels
from .noise import Noise, SeededNoise, side_noise
from .policy import Cond, Policy
from .rollout import GradWindow, Interrupted, Record, Trajectory, check, never, rollout, row_by_row, shaped
from .steering import FREE, Context, RewardFailed, Steering

__all__ = ["Found", "Iterate", "Outer", "Problem", "run"]


@dataclass(frozen=True)
class Iterate:
    """What a callback sees after every iterate of an outer method.

    Attributes:
        index: how many came before.
        total: how many there will be at most.
        rewards: (P, K) of this iterate's samples, NaN where there is no judgement.
        best: (P, K) the best so far of every chain.
        found: everything found so far.
        ledger: what was spent so far.
    """

    index: int
    total: int
    rewards: Tensor
    best: Tensor
    found: Found
    ledger: Ledger


@dataclass
class Problem:
    """What is to be sampled: P prompts × K chains, flattened to B rows, one block a prompt.

    Attributes:
        cond: B rows.
        noise: noise(0) … noise(T), each (B, …): the starting point.
        prompts: B prompts.
        budget: what may be spent, or None; a started iterate is finished.
        batch: rows in flight at a time; the result does not depend on it.
        watch: called at every step of every rollout.
        seen: called after every iterate.
        ledger: what was spent so far.
        failures: samples a reward could not judge, by its name.
    """

    policy: Policy
    kernel: Kernel
    cond: Cond
    levels: Levels
    noise: Noise
    particles: int = 1
    prompts: Sequence[str | Prompt] = ()
    budget: Budget | None = None
    batch: int = 32
    watch: Callable[[Context], None] | None = None
    seen: Callable[[Iterate], None] | None = None
    ledger: Ledger = field(default_factory=Ledger)
    failures: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.noise = shaped(self.noise, self.policy)
        self.cond, self.prompts = row_by_row(self.cond, self.prompts, len(self.noise(0)), self.particles)
        self.started = time.perf_counter()

    @property
    def rows(self) -> int:
        """B, the number of chains."""
        return len(self.cond)

    @property
    def spent(self) -> float:
        """How much of the budget is gone, in its unit; 0 without one."""
        if self.budget is None:
            return 0.0
        return self.budget.spent(self.ledger, time.perf_counter() - self.started)

    def bank(self) -> list[Tensor]:
        """The starting noises (B, …) on the policy's device: all T + 1, or the initial one alone if no step uses noise."""
        last = self.levels.steps if self.kernel.diversifies(self.levels) else 0
        return [self.noise(i).to(self.policy.device) for i in range(last + 1)]

    def noise_of(self, rows: Tensor, stream: int = 0) -> Noise:
        """The noise of some rows: their own (stream 0), or more like it, independent of it and of all other streams."""
        noise = self.noise
        if isinstance(noise, SeededNoise):
            seeds = [noise.seeds[row] for row in rows.tolist()]
            how = {"device": noise.device, "dtype": noise.dtype, "stream": noise.stream + stream}
            return SeededNoise(seeds, noise.shape, **how)

        def draw(i: int) -> Tensor:
            own = noise(i)[rows]
            if stream == 0 or not own.is_floating_point():  # tokens start fully masked, always
                return own
            return side_noise(noise, rows.tolist(), own.shape[1:], stream, i).to(own)

        return draw

    def parts(self, rows: Tensor | None = None) -> list[Tensor]:
        """Row indices, at most `batch` at a time."""
        return list((torch.arange(self.rows) if rows is None else rows).split(self.batch))

    def sample(
        self,
        noise: Noise | Sequence[Tensor],
        rows: Tensor | None = None,
        *,
        grad: GradWindow = never,
        start: int = 0,
        stop: int | None = None,
        kernel: Kernel | None = None,
        record: Record = "final",
        watch: Callable[[Context], None] | None = None,
    ) -> Trajectory:
        """Rolls noise out in one batch, on the ledger.

        Args:
            noise: of the given rows; a sequence may leave out the noises of deterministic last steps.
            rows: (R,) the row each sample belongs to; all of them in order by default.
            grad: which steps build a graph.
            start, stop: the steps to walk; noise(0) is then the state at level `start`.
            kernel: instead of the problem's.
            record: "path" keeps every state.
        """
        rows = torch.arange(self.rows) if rows is None else rows
        cond = replace(self.cond[rows], begin=None) if start else self.cond[rows]
        levels = self.levels[slice(start, None if stop is None else stop + 1)]
        kernel = (kernel or self.kernel).window(start, start + levels.steps)
        given = noise if callable(noise) else _padded(noise, kernel, levels)
        prompts = [self.prompts[i] for i in rows.tolist()] if self.prompts else []
        how = {"prompts": prompts, "grad": grad, "record": record, "watch": watch or self.watch}
        trajectory = rollout(self.policy, kernel, cond, levels, given, **how)
        self.ledger.add(trajectory.ledger)
        graded = sum(grad(i, levels.steps) for i in range(levels.steps)) if grad is not never else 0
        self.ledger.counts["gradient"] += graded * len(rows) * (1 + self.cond.guided)
        return trajectory

    def judge(self, x0: Tensor, reward: Reward, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """((R,) rewards of clean samples, (R, …) their media), with a graph if x0 has one. NaN is counted."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and x0.requires_grad):
            media = self.decode(x0)
            return self.score(media, reward, rows), media.detach()

    def decode(self, x0: Tensor) -> Tensor:
        """The media of clean samples, on the ledger."""
        with self.ledger.spend("decode", len(x0), x0.device):
            return self.policy.decode(x0)

    def score(self, media: Tensor, reward: Reward, rows: Tensor | None = None) -> Tensor:
        """(R,) rewards of media, on the ledger. NaN is counted."""
        rows = torch.arange(self.rows) if rows is None else rows
        prompts = [self.prompts[i] for i in rows.tolist()] if self.prompts else []
        with self.ledger.spend("reward", len(media), media.device):
            scores = reward(media, prompts)
        failed = int(scores.isnan().sum())
        if failed:
            self.failures[reward.name] = self.failures.get(reward.name, 0) + failed
        return scores

    def rate(
        self, noise: Sequence[Tensor], reward: Reward, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Samples and judges noises (R, …) of the given rows, `batch` at a time: (R,) rewards, (R, …) x0 and media; no graph."""
        rows = torch.arange(self.rows) if rows is None else rows
        rated = []
        for part in torch.arange(len(rows)).split(self.batch):
            x0 = self.sample([n[part] for n in noise], rows[part]).x0
            rated.append((*self.judge(x0, reward, rows[part]), x0))
        scores, media, x0 = (torch.cat(parts) for parts in zip(*rated, strict=True))
        return scores, x0, media


class Found:
    """What every chain has found: its best sample so far, and its latest.

    Attributes:
        reward, x0, media: (B,), (B, …), (B, …) of the best samples; reward is float64 on the CPU, −∞ where nothing was judged.
        noise, last_noise: the noises (B, …) that make the best and the latest samples, where the method offers them.
        last: (rewards, x0, media) of the latest samples; media None where they are not at hand.
        log_z: (P,) log evidence, where the method estimates it.
        history: what happened, one entry an iterate: "reward" and "best", (B,) each, and what a method adds.
    """

    def __init__(self) -> None:
        self.reward: Tensor | None = None
        self.x0: Tensor
        self.media: Tensor
        self.noise: list[Tensor] = []
        self.last_noise: list[Tensor] = []
        self.last: tuple[Tensor, Tensor, Tensor | None]
        self.log_z: Tensor | None = None
        self.history: dict[str, list[Tensor]] = {}

    def offer(self, rewards: Tensor, x0: Tensor, media: Tensor, noise: Sequence[Tensor] = ()) -> Tensor:
        """Takes the samples (B, …) of an iterate, one a chain; returns (B,) which are their chains' best so far.

        A sample that was not judged is kept only where the chain has nothing else.
        """
        value = rewards.detach().double().cpu()
        x0, noise = x0.detach(), [n.detach() for n in noise]
        known = value.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        if self.reward is None:
            better = torch.ones_like(known, dtype=torch.bool)
            kept = (known, x0.clone(), media.clone(), [n.clone() for n in noise])
        else:
            better = known > self.reward
            mine = [where_rows(better, new, old) for new, old in zip(noise, self.noise, strict=True)]
            chosen = (where_rows(better, new, old) for new, old in ((x0, self.x0), (media, self.media)))
            kept = (torch.where(better, known, self.reward), *chosen, mine)
        self.reward, self.x0, self.media, self.noise = kept  # at once: an interrupt finds what belongs together
        self.last, self.last_noise = (value, x0, media), noise
        self.note(reward=value, best=self.reward)
        return better

    def note(self, **values: Tensor) -> None:
        """Adds to the history of this iterate."""
        for name, value in values.items():
            self.history.setdefault(name, []).append(value.detach().double().cpu())


class Outer(Steering):
    """A method that makes many rollouts; see the module docstring.

    Attributes:
        rounds: how many iterates it makes at most.
        keeps: whether a chain's result is its best sample or its last (samplers).
        spends: whether it makes its iterates as large as the budget allows.
    """

    outside = True
    rounds: int
    keeps: Literal["best", "last"] = "best"
    spends: bool = False

    @abstractmethod
    def iterations(self, problem: Problem, found: Found) -> Generator[float | None]:
        """Offers the samples of one iterate to `found`, then yields; the first ones are those of the problem's own noise.

        Yields how many times as much the next iterate will cost, where it will not cost the same.
        """

    def run(self, problem: Problem) -> Trajectory:
        """Iterates until the rounds or the budget are spent.

        Raises:
            ValueError: it cannot work on this problem; raised before the network runs.
            Interrupted: Ctrl-C, a reward that could judge nothing, or whatever went wrong once there were samples; carries the
                best so far.
        """
        check(self._context(problem))
        found, work, done = Found(), None, 0
        try:
            work = self.iterations(problem, found)
            before = 0.0
            for growth in work:
                done += 1
                assert found.reward is not None
                if bool((found.reward == -torch.inf).all()):  # nothing at all: not worth another iterate
                    self._refuse_unjudged(problem, found)
                if problem.seen is not None:
                    problem.seen(self._iterate(problem, found, done))
                spent = problem.spent
                expected = (spent - before) * (1.0 if growth is None else growth)
                if problem.budget is not None and spent + expected > problem.budget.amount:
                    break  # one more iterate would not fit
                before = spent
            self._refuse_unjudged(problem, found)
        except (KeyboardInterrupt, Exception) as stop:
            cause = stop.__cause__ if isinstance(stop, Interrupted) and stop.__cause__ is not None else stop
            partial = stop.trajectory if isinstance(stop, Interrupted) else None
            if found.reward is None and (partial is None or len(partial.x0) != problem.rows):
                raise cause from None
            made = partial if found.reward is None else self._trajectory(problem, found, done)
            assert made is not None
            raise Interrupted(
                made, cause, f"{type(self).__name__} stopped after {done} of {self.rounds} iterates"
            ) from cause
        finally:
            if work is not None:
                work.close()
        return self._trajectory(problem, found, None)

    def _iterate(self, problem: Problem, found: Found, done: int) -> Iterate:
        assert found.reward is not None
        latest, best = (v.reshape(-1, problem.particles) for v in (found.last[0], found.reward))
        return Iterate(done - 1, self.rounds, latest, best, found, problem.ledger)

    @staticmethod
    def _refuse_unjudged(problem: Problem, found: Found) -> None:
        assert found.reward is not None
        if bool((found.reward.reshape(-1, problem.particles) == -torch.inf).all(1).any()):
            raise RewardFailed("the reward could judge no sample of some prompt")

    def _context(self, problem: Problem) -> Context:
        how = (problem.policy, problem.kernel, problem.cond, problem.levels, problem.noise)
        return Context(*how, problem.particles, problem.prompts, self)  # pyright: ignore

    def _trajectory(self, problem: Problem, found: Found, stopped_at: int | None) -> Trajectory:
        assert found.reward is not None
        reward, x0, media = (found.reward, found.x0, found.media) if self.keeps == "best" else found.last
        groups, table = problem.rows // problem.particles, (-1, problem.particles)
        unknown = torch.full((groups,), torch.nan, dtype=torch.float64)
        return Trajectory(
            x0=x0,
            levels=problem.levels,
            cond=problem.cond,
            latents=None,
            log_prob=None,
            stochastic=problem.kernel.stds(problem.levels) > 0,
            log_w=torch.zeros(groups, problem.particles, dtype=torch.float64),
            log_z=unknown if found.log_z is None else found.log_z,
            ess=torch.zeros(groups, 0, dtype=torch.float64),
            ancestors=torch.zeros(groups, 0, problem.particles, dtype=torch.long),
            selected_at=(),
            rewards=reward.nan_to_num(-torch.inf, torch.inf, -torch.inf).reshape(table),
            media=media,
            failures=problem.failures,
            ledger=problem.ledger,
            stopped_at=stopped_at,
            noise=tuple(found.noise if self.keeps == "best" else found.last_noise),
            history={name: torch.stack(rows).reshape(len(rows), *table) for name, rows in found.history.items()},
        )


def run(problem: Problem, steering: Steering = FREE) -> Trajectory:
    """Samples a problem with any steering: within one rollout, or around many.

    Raises:
        ValueError: the steering does not fit the problem; raised before the network runs.
        Interrupted: Ctrl-C, or a reward that could judge nothing; carries what there was.
    """
    if isinstance(steering, Outer):
        return steering.run(problem)
    return rollout(
        problem.policy,
        problem.kernel,
        problem.cond,
        problem.levels,
        problem.noise,
        particles=problem.particles,
        prompts=problem.prompts,
        steering=steering,
        watch=problem.watch,
    )


def _padded(noises: Sequence[Tensor], kernel: Kernel, levels: Levels) -> Noise:
    """noise(i) of a list; beyond it zeros, for steps that use none."""
    if kernel.diversifies(levels, len(noises) - 1):
        raise ValueError(f"{kernel} needs noise at every step: got {len(noises)} noises for {levels.steps} steps")

    def noise(i: int) -> Tensor:
        return noises[i] if i < len(noises) else torch.zeros_like(noises[0])

    return noise


def where_rows(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the mask (B,) is true, else `old`, row by row."""
    return torch.where(rows.to(new.device).reshape(-1, *[1] * (new.ndim - 1)), new, old)
