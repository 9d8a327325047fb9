"""Feynman–Kac steering: sequential Monte Carlo toward p(x0)·exp(r(x0)/β), a population a prompt.

At chosen steps ("events") every particle's log weight grows by a log potential g, made from the reward of its clean estimate;
at the end by what makes the sum along each lineage equal r(x0)/β exactly. With v the soft value r/β (tempered by γ), S the
sum of a lineage's earlier g, and proposals q instead of p:

    difference   g = γ·v − S                     (telescopes by itself)
    max          g = γ·max over events of v
    sum          g = γ·sum over events of v
    terminal     no events
    last event   g = r(x0)/β − S, whatever the potential
    always       + log p(x_s|x_t) − log q(x_s|x_t) for every guided step since

Weights are float64 logarithms and are **carried** between resamplings. Resampling sets the log weights of a group to their log
mean, so at any time log mean exp of the weights is the unbiased evidence estimate log Ẑ. The target is the law of the
discretised chain, tilted.

Sources: Feynman–Kac steering, 2501.06848; particle Monte Carlo, 2502.01618; TDS, 2306.17775; DAS, 2501.05803; SVDD,
2408.08252; CoDe, 2502.00968. Deviations from the published FK code: weights survive skipped resamplings; the last potential
of max and sum uses r(x0); the maximum starts at −∞, not 0; all on the log scale, never clamped; events weigh the state the
estimate was made from, with no lag; a many-draw value is β·log mean exp(r/β).
"""

from __future__ import annotations

import math
from typing import Literal, Optional

import torch
from torch import Tensor

from rewards.base import Reward

from .resampling import UNBIASED, Scheme, ess, log_mean_exp, resample, soft_mean, temper
from .steering import Context, RewardFailed, Schedule, Steering, scheduled
from .values import Value

__all__ = ["SVDD", "BestOfN", "CoDe", "FeynmanKac", "Potential", "Tempering"]

Potential = Literal["difference", "max", "sum", "terminal"]
Tempering = Literal[Schedule, "adaptive"]


class FeynmanKac(Steering):
    """Feynman–Kac steering: a population of particles, weighted by intermediate rewards and resampled.

    Args:
        reward: what to steer by; None takes the run's.
        beta: temperature of the tilt exp(r/beta), in units of the reward, ≥ 0. Small is greedy; 0 keeps only the best of a
            group at each event (no longer a sampler: log Z is then NaN); infinity leaves the model as it is. The default is the
            paper's λ = 10, for a reward of about unit variance.
        potential: how intermediate rewards become weights; all reach the same target.
        resampler: see `samplers.resampling`; "argmax" is greedy and leaves log Z without meaning.
        ess_threshold: resample a group when its effective sample size is at most this share of K; 1 resamples at every event,
            0 never. Two or three particles use at least 0.75: the size of a pair lies in [1, 2], so that 0.5 would be never.
        every: steps between events, ≥ 1.
        start, stop: the fraction of the run's steps, in [0, 1], within which events lie. The last weighting always happens,
            and there is no event after the last stochastic step, from which on copies of a particle would stay identical.
        tempering: γ, the strength of intermediate potentials: "constant" 1, "linear" in steps, "exp" (see `scheduled`), or
            "adaptive": the largest value that keeps the effective sample size at the threshold, never decreasing.
        full_at: the share of the run, in (0, 1], at which "linear" and "exp" reach γ = 1.
        draws: clean estimates averaged into an intermediate value; more than 1 looks ahead stochastically, which costs one
            network evaluation a draw.
        value: judges the noisy states of events in place of the reward of their clean estimates. The last weighting is always
            by the reward, so that log Z stays unbiased whatever the value says.

    Raises:
        ValueError: an argument out of range; at run time, resampling with a deterministic kernel.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        beta: float = 0.1,
        potential: Potential = "difference",
        resampler: Scheme = "systematic",
        ess_threshold: float = 0.5,
        every: int = 1,
        start: float = 0.0,
        stop: float = 1.0,
        tempering: Tempering = "constant",
        draws: int = 1,
        value: Optional[Value] = None,
        full_at: float = 1.0,
    ) -> None:
        if not 0 < full_at <= 1:
            raise ValueError(f"full_at is a share of the run in (0, 1]; got {full_at}")
        if not beta >= 0:
            raise ValueError(f"beta must be ≥ 0; got {beta}")
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold is a share of the particles in [0, 1]; got {ess_threshold}")
        if every < 1 or draws < 1:
            raise ValueError(f"every and draws must be ≥ 1; got {every} and {draws}")
        if value is not None and draws > 1:
            raise ValueError(f"a value judges states themselves, so there are no draws to average; got draws {draws}")
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"start and stop are fractions of the run, 0 <= start <= stop <= 1; got {start}, {stop}")
        if tempering == "adaptive" and not 0 < ess_threshold < 1:
            raise ValueError(
                f"adaptive tempering keeps the effective sample size at ess_threshold, in (0, 1); got {ess_threshold}"
            )
        self.reward, self.beta, self.potential = reward, beta, potential
        self.resampler: Scheme = resampler
        self.ess_threshold, self.every, self.start, self.stop = ess_threshold, every, start, stop
        self.tempering: Tempering = tempering
        self.draws, self.value = draws, value
        self.full_at = full_at

    @property
    def weighs(self) -> bool:
        return self.beta > 0

    def events(self, steps: int) -> list[int]:
        """The steps at whose start the population is weighed, before the last weighting at `steps`."""
        if self.potential == "terminal":
            return []
        return [i for i in range(math.ceil(self.start * steps), steps, self.every) if i < self.stop * steps]

    def family(self, particles: int) -> int:
        """How many consecutive particles compete with one another: all of a prompt's."""
        return particles

    def check(self, ctx: Context) -> None:
        self._need_reward()
        if self.value is not None:
            self.value.attach(ctx.policy)
        wanted = self.events(ctx.levels.steps)
        resamples = self.family(ctx.particles) > 1 and self.resampler != "none" and self.ess_threshold > 0
        if wanted and resamples and not ctx.kernel.diversifies(ctx.levels, wanted[0]):
            raise ValueError(
                f"{type(self).__name__} resamples, but {ctx.kernel} is deterministic: copies of a particle would stay identical. "
                "Use a stochastic kernel such as DDIM(eta=1), or BestOfN"
            )

    def select(self, ctx: Context) -> Tensor | None:
        due = ctx.step in self.events(ctx.levels.steps) and ctx.kernel.diversifies(ctx.levels, ctx.step)
        if not ctx.final and not due:
            return None
        value, judged = self._value(ctx)
        proposals = self._take_log_ratio(ctx)
        if self.beta == 0:
            best = value.reshape(-1, self.family(ctx.particles))
            best = (best == best.amax(1, keepdim=True)).reshape_as(value)
            unseen = ~judged.any(1, keepdim=True)
            ctx.log_w = torch.where(best & ~torch.isneginf(value) | unseen, 0.0, -torch.inf).double()
        else:
            dead = torch.isneginf(value)
            value = torch.where(dead, -torch.inf, value.masked_fill(dead, 0) / self.beta)
            ctx.log_w = ctx.log_w + proposals + self._potential(ctx, value, judged, proposals)
        self._refuse_degenerate(ctx)
        families = ctx.log_w.reshape(-1, self.family(ctx.particles))
        alive = families.amax(1) > -torch.inf
        size = torch.zeros(len(families), dtype=torch.float64)
        size[alive] = ess(families[alive])
        ctx.ess.append(size.reshape(ctx.groups, -1).sum(1))
        if ctx.final and self.beta > 0 and self.resampler in UNBIASED | {"none"}:
            ctx.log_z = log_mean_exp(ctx.log_w)
        if ctx.final or self.resampler == "none":
            return None
        return self._resample(ctx, families, alive & (size <= self._enough(families.shape[1])))

    def _enough(self, width: int) -> float:
        """The effective sample size up to which a family of `width` is resampled."""
        share = max(self.ess_threshold, 0.75) if width < 4 and self.ess_threshold > 0 else self.ess_threshold
        return share * width * (1 + 1e-6)

    def _resample(self, ctx: Context, families: Tensor, due: Tensor) -> Tensor | None:
        """Ancestors (P, K) after resampling the families that are due; their log weights become their log mean."""
        width = families.shape[1]
        if width == 1 or not bool(due.any()):
            return None
        per_group = ctx.particles // width
        generators = [g for g in ctx.generators() for _ in range(per_group)]
        chosen = torch.arange(width).expand(len(families), width).clone()
        chosen[due] = resample(
            families[due], self.resampler, [g for g, d in zip(generators, due.tolist(), strict=True) if d]
        )
        level = torch.where(due[:, None], log_mean_exp(families.where(due[:, None], 0.0))[:, None], families)
        ctx.log_w = level.reshape(ctx.groups, ctx.particles)
        offsets = (torch.arange(per_group) * width).repeat(ctx.groups)[:, None]
        return (chosen + offsets).reshape(ctx.groups, ctx.particles)

    def _potential(self, ctx: Context, value: Tensor, judged: Tensor, proposals: Tensor) -> Tensor:
        """(P, K) the log potential of this event; the lineage's running sum, maximum and total follow.

        A particle that was not judged keeps its weight: the potential of a later event, at last of the end, makes up for it.
        """
        zero = torch.zeros_like(value)
        spent = ctx.rows.get("spent", zero)
        dead = torch.isneginf(value) & judged
        if ctx.final:
            return value - spent
        if self.potential == "max":
            value = ctx.rows["max"] = torch.maximum(value, ctx.rows.get("max", zero - torch.inf))
        elif self.potential == "sum":
            value = ctx.rows["sum"] = torch.where(judged, value, 0.0) + ctx.rows.get("sum", zero)

        def increment(gamma: Tensor) -> Tensor:
            grown = gamma * torch.where(torch.isneginf(value), 0.0, value)
            grown = grown - spent if self.potential == "difference" else grown
            return torch.where(judged, torch.where(dead, -torch.inf, grown), 0.0)

        step = increment(self._gamma(ctx, ctx.log_w + proposals, increment))
        ctx.rows["spent"] = spent + torch.where(dead, 0.0, step)
        return step

    def _gamma(self, ctx: Context, log_w: Tensor, increment) -> Tensor:
        if self.tempering != "adaptive":
            gamma = scheduled(self.tempering, ctx.step, ctx.levels.steps, self.full_at)
            return torch.full((ctx.groups, 1), gamma, dtype=torch.float64)
        floor = ctx.rows.get("gamma", torch.zeros_like(log_w))[:, 0]
        gamma = temper(log_w, increment, floor, max(1.0, self.ess_threshold * ctx.particles))
        ctx.rows["gamma"] = gamma.reshape(-1, 1).expand_as(log_w)
        return gamma.reshape(-1, 1)

    def _value(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """(P, K) float64 on the CPU: the reward of each clean estimate, or the value of each state before the end, −∞ if there
        is none; and which were judged.

        At the end, and where the estimate is not finite, a particle that could not be judged is dead.
        """
        reward = self._need_reward()
        estimate = self.draws == 1 and ctx.clean.eps is not None  # tokens have no mean: their estimate is a draw
        judge = reward if ctx.final or self.value is None else self.value
        if ctx.final or estimate or judge is self.value:
            scores = ctx.score(judge).cpu().double()
        else:
            drawn = [ctx.score_of(ctx.posterior_draw(j), reward).cpu().double() for j in range(self.draws)]
            scores = soft_mean(torch.stack(drawn), self.beta)
        value = scores.reshape(ctx.groups, ctx.particles)
        failed = value.isnan()
        if bool(failed.any()):
            ctx.failures[judge.name] = ctx.failures.get(judge.name, 0) + int(failed.sum())
            if bool(failed.all(1).any() if ctx.final else failed.all()):
                prompt = next(
                    (p.text for p, f in zip(ctx.prompts[:: ctx.particles], failed.all(1), strict=False) if f), ""
                )
                raise RewardFailed(f"{judge.name} could judge no sample of {prompt!r} at step {ctx.step}")
        lost = ~ctx.clean.x0.flatten(1).isfinite().all(1).cpu().reshape(value.shape) | ctx.final
        judged = ~failed | lost
        value = value.masked_fill(failed, -torch.inf)
        if bool(((value == -torch.inf) & judged).all(1).any()):
            raise RewardFailed(f"{judge.name} gave every particle of a prompt −∞ or NaN at step {ctx.step}")
        ctx.rows["reward"] = value
        return value, judged

    def _take_log_ratio(self, ctx: Context) -> Tensor:
        if ctx.log_ratio is None:
            return torch.zeros_like(ctx.log_w)
        ratio, ctx.log_ratio = ctx.log_ratio.cpu().double().reshape(ctx.groups, ctx.particles), None
        return ratio

    def _refuse_degenerate(self, ctx: Context) -> None:
        if bool(ctx.log_w.isnan().any()):
            raise RewardFailed(
                f"{self._need_reward().name} led to NaN weights at step {ctx.step}: is it finite everywhere?"
            )
        if bool((ctx.log_w.amax(1) == -torch.inf).any()):
            raise RewardFailed(
                f"every particle of a prompt is dead at step {ctx.step}: {self._need_reward().name} gave −∞ or NaN"
            )


class BestOfN(FeynmanKac):
    """Best of N: K independent samples, the one with the highest reward wins.

    KL(best of N ‖ model) = log N − (N − 1)/N for a continuous reward.

    Args:
        reward: what to choose by; None takes the run's.
    """

    def __init__(self, reward: Reward | None = None) -> None:
        super().__init__(reward, beta=0.0, potential="terminal")


class SVDD(FeynmanKac):
    """Soft value-based decoding: every step, one of M children is drawn by its value and continues alone.

    The K particles of a prompt are K/M independent chains with M children each; weights are carried across chains, so log Z
    stays unbiased. (The published code takes the argmax: that is beta = 0.)

    Args:
        reward: what to steer by; None takes the run's.
        beta: temperature; 0 keeps the best child.
        children: M, which must divide the particles; None makes one chain of them all.
        every, start, stop, value: as in `FeynmanKac`; the learned values of SVDD-MC are a `value`.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        beta: float = 0.1,
        children: int | None = None,
        every: int = 1,
        start: float = 0.0,
        stop: float = 1.0,
        value: Optional[Value] = None,
    ) -> None:
        how = {"every": every, "start": start, "stop": stop, "value": value}
        super().__init__(reward, beta, resampler="single", ess_threshold=1.0, **how)
        if children is not None and children < 1:
            raise ValueError(f"children must be ≥ 1; got {children}")
        self.children, self.least = children, children or 1

    def family(self, particles: int) -> int:
        return self.children or particles

    def check(self, ctx: Context) -> None:
        if ctx.particles % self.family(ctx.particles):
            raise ValueError(f"children must divide the particles; got {self.children} and {ctx.particles}")
        super().check(ctx)


class CoDe(SVDD):
    """Controlled denoising: every `block` steps the best particle replaces all others.

    block = 1 is SVDD's argmax; block = steps is best of N.

    Args:
        reward: what to steer by; None takes the run's.
        block: steps between selections.
    """

    def __init__(self, reward: Reward | None = None, block: int = 5) -> None:
        if block < 1:
            raise ValueError(f"block must be ≥ 1; got {block}")
        super().__init__(reward, beta=0.0, every=block)
        self.block = block

    def events(self, steps: int) -> list[int]:
        return list(range(self.block, steps, self.block))
