"""Gradient guidance: the mean of a step moves along the gradient of a reward.

With g = ∇_x r(decode(x0(x))), scale w, tempering γ, and the pull c = α_s − b·α_t/σ_t by which a step t → s carries a change of the
clean estimate at fixed x over to the next state (see `kernels`), the mean moves by w·γ·size·g:

    form     size          unit               what it is
    law      std²          std                the first-order tilt of the step's law by exp(w·γ·r): TDS, 2306.17775; DAS, 2501.05803
    score    c·σ_t²/α_t    c·σ_t/α_t·rms(ε)   w·γ·g added to the score, so ε −= σ_t·w·γ·g: universal guidance, 2302.07121; FreeDoM,
                                              2303.09833; Flow-NRG, 2501.13918. Exact where w·r is log E[exp(w·r(x0)) | x_t]
    state    1             1                  the next state itself moves, as in DPS, 2209.14687

For η = 1 and small steps "law" and "score" agree. A deterministic step has no law to tilt, but a score. At α_t = 0 the estimate
says nothing of x0, and "score" does nothing. Normalised, g has rms 1 in every sample and the mean moves by w·γ·unit·g; a cap
bounds the rms of the move by cap·unit. Both look at one sample at a time: the published code takes norms over the batch.

`through="x0"` is manifold preserving guidance, MPGD (2311.16424): the gradient is that of the clean estimate alone, without the
network. The Jacobian ∂x0/∂x, on Gaussian data of variance v equal to v·α/(v·α² + σ²), is replaced by its value at v = 1,
which is a heuristic for anything else. MPGD's own step is "score" with a normalised gradient.

Alone, every guidance is a heuristic. Under `FeynmanKac` all are exact: any move of the mean is a legal proposal, and its log p/q
goes into the weights; steps without a density are then left alone.
"""

from __future__ import annotations

from typing import Literal, Optional

import torch
from torch import Tensor

from rewards.base import Reward

from .steering import Context, Schedule, Steering, Through, Tilt, scheduled
from .transitions import Gaussian, Transition
from .values import Value

__all__ = ["Backward", "Guided", "TimeTravel"]


class _Windowed(Steering):
    """Acts within a window of the run."""

    def __init__(self, start: float, stop: float) -> None:
        if not 0 <= start < stop <= 1:
            raise ValueError(f"start and stop are fractions of the run, 0 <= start < stop <= 1; got {start}, {stop}")
        self.start, self.stop = start, stop

    def within(self, progress: float) -> bool:
        return self.start <= progress < self.stop

    def check(self, ctx: Context) -> None:
        if ctx.policy.prediction == "logits":
            raise ValueError(
                f"{type(self).__name__} moves continuous states, and this model makes tokens: use FeynmanKac, SVDD or BestOfN"
            )

    def _check_gradient(self, judge: Reward | Value) -> None:
        if not judge.differentiable:
            raise ValueError(
                f"{type(self).__name__} needs the gradient of its reward, and {judge.name} has none: choose by it instead "
                "(FeynmanKac, SVDD, BestOfN, noise search), optimise noise by its hybrid gradient, or take a reward that has one"
            )


class Guided(_Windowed):
    """Gradient guidance: moves each step's law along the gradient of the reward at decode(x0).

    By default the move is scale·std²·∇_x r through the network (TDS, DAS), which needs stochastic steps. In
    `Compose(Guided(r, 1/beta), FeynmanKac(r, beta))` it is the near-optimal proposal of an exact sampler.

    Args:
        reward: a differentiable reward; None takes the run's.
        scale: strength, in units of 1/beta; the default matches FeynmanKac's. With normalise="unit" it is the size of the move in
            units of the step's noise ("law"), or of the noise prediction ("score").
        start, stop: the fraction of the run's steps, in [0, 1], within which to guide.
        tempering: how the scale grows with the steps, as estimates become worth following; see `scheduled`.
        full_at: the share of the run, in (0, 1], at which the tempered scale is full.
        through: what is differentiated: the "network" too, or the estimate "x0" alone, at a third of the cost.
        form: what moves: the step's "law", the "score" or the "state"; the last two also guide deterministic steps.
        normalise: "unit" gives the gradient of every sample the rms 1.
        cap: bounds the rms of the move of every sample, in the same units as a normalised scale; None for no bound.
        value: judges the noisy state in place of the reward of the clean estimate; its gradient needs no network or decoder.

    Raises:
        ValueError: an argument out of range; at run time, a reward without a gradient, or a form that cannot move these steps.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        scale: float = 10.0,
        start: float = 0.0,
        stop: float = 1.0,
        tempering: Schedule = "constant",
        full_at: float = 1.0,
        through: Through = "network",
        form: Literal["law", "score", "state"] = "law",
        normalise: Literal["none", "unit"] = "none",
        cap: Optional[float] = None,
        value: Optional[Value] = None,
    ) -> None:
        super().__init__(start, stop)
        if not 0 < full_at <= 1:
            raise ValueError(f"full_at is a share of the run in (0, 1]; got {full_at}")
        if cap is not None and not cap > 0:
            raise ValueError(f"cap must be > 0, or None for no bound; got {cap}")
        if value is not None and through == "x0":
            raise ValueError(
                "a value judges the state, so there is no clean estimate to differentiate: leave out through='x0'"
            )
        self.reward, self.value, self.scale, self.full_at, self.cap = reward, value, scale, full_at, cap
        self.tempering: Schedule = tempering
        self.through: Through = through
        self.form, self.normalise = form, normalise

    @property
    def judge(self) -> Reward | Value:
        """What is differentiated."""
        return self._need_reward() if self.value is None else self.value

    def tilting(self, progress: float) -> list[Tilt]:
        return [Tilt(self.judge, self.through)] if self.within(progress) else []

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        self._check_gradient(self.judge)
        if self.value is not None:
            self.value.attach(ctx.policy)
        if (self.form == "law" or ctx.steering.weighs) and not ctx.kernel.diversifies(ctx.levels):
            other = "" if ctx.steering.weighs else ", or guide deterministic steps with form='score'"
            raise ValueError(
                "Guided tilts stochastic steps, and this kernel has none: use DDIM(eta=1), CPS or an SDE kernel" + other
            )

    def propose(self, ctx: Context, base: Transition) -> Transition:
        blind = self.form == "score" and ctx.levels.alpha[ctx.step] <= 0
        bound = self.form == "law" or ctx.steering.weighs  # to steps that have a density
        if blind or (bound and not base.stochastic) or not self.within(ctx.step / ctx.levels.steps):
            return base
        assert isinstance(base, Gaussian)
        gradient = ctx.gradient(self.judge, self.through).to(base.mean.dtype)
        size, unit = self._sizes(ctx, base)
        if self.through == "x0":
            now = ctx.levels[ctx.step]
            size = size * (now.alpha / (now.alpha**2 + now.sigma**2))
        if self.normalise == "unit":
            size = torch.where((rms := _rms(gradient)) > 0, unit / rms, 0.0)
        gamma = scheduled(self.tempering, ctx.step, ctx.levels.steps, self.full_at)
        move = self.scale * gamma * size * gradient
        if self.cap is not None:
            move = move * (self.cap * unit / _rms(move)).clamp(max=1)
        return Gaussian(base.mean + move, base.std)

    def _sizes(self, ctx: Context, base: Gaussian) -> tuple[Tensor, Tensor]:
        """The table's size and unit."""
        if self.form == "law":
            return base.std.square(), base.std
        if self.form == "state":
            return torch.ones(()), torch.ones(())
        assert ctx.clean.eps is not None
        now = ctx.levels[ctx.step]
        pull = _pull(ctx) * now.sigma / now.alpha
        return pull * now.sigma, pull * _rms(ctx.clean.eps)


class Backward(_Windowed):
    """Backward universal guidance: moves the clean estimate uphill by gradient ascent on the reward, without the network.

    m steps of x0 ← x0 + rate·∇r(decode(x0)), from wherever earlier steerings moved the estimate; then the step's mean follows with
    ε = (x − α·x0)/σ (2302.07121). `Compose(Guided(form="score"), Backward())` is universal guidance. The published code
    ascends by Adam with a cosine rate and a loss below which it stops; this is the plain gradient of the paper.

    Args:
        reward: a differentiable reward; None takes the run's.
        steps: m, ascents at each step of the run.
        rate: of an ascent, in units of x0² per unit of reward.
        start, stop: the fraction of the run's steps, in [0, 1], within which to guide.

    Raises:
        ValueError: an argument out of range; at run time, a reward without a gradient.
    """

    def __init__(
        self,
        reward: Reward | None = None,
        steps: int = 10,
        rate: float = 0.1,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        super().__init__(start, stop)
        if steps < 1:
            raise ValueError(f"steps must be ≥ 1; got {steps}")
        self.reward, self.steps, self.rate = reward, steps, rate

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        self._check_gradient(self._need_reward())

    def propose(self, ctx: Context, base: Transition) -> Transition:
        if not self.within(ctx.step / ctx.levels.steps) or (ctx.steering.weighs and not base.stochastic):
            return base
        free = ctx.kernel(ctx.clean, ctx.x, ctx.levels, ctx.step)
        assert isinstance(base, Gaussian) and isinstance(free, Gaussian)
        pull = _pull(ctx)
        estimate = ctx.clean.x0.detach() + (base.mean - free.mean) / pull
        moved = estimate
        for _ in range(self.steps):
            moved = moved + self.rate * ctx.slope(moved, self._need_reward())
        return Gaussian(base.mean + pull * (moved - estimate), base.std)


class TimeTravel(_Windowed):
    """Recurrence: noises the state back after a step and walks the step again, so that guidance and model agree.

    x_t ← (α_t/α_s)·x_s + sqrt(σ_t² − (α_t/α_s)²·σ_s²)·z with fresh z (self-recurrence, 2302.07121; time travel, 2303.09833). Use it
    in a `Compose` with guidance. It has no density, so it fits neither weights nor training; rows are selected in the last walk
    of a step.

    Args:
        repeats: walks of a step beside the first.
        start, stop: the fraction of the run's steps, in [0, 1], within which steps are repeated.

    Raises:
        ValueError: an argument out of range; at run time, weights that need the density of a step.
    """

    def __init__(self, repeats: int = 2, start: float = 0.0, stop: float = 1.0) -> None:
        super().__init__(start, stop)
        if repeats < 0:
            raise ValueError(f"repeats must be ≥ 0; got {repeats}")
        self.repeats = repeats

    def again(self, progress: float) -> int:
        return self.repeats if self.within(progress) else 0

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        if self.repeats and ctx.steering.weighs:
            raise ValueError(
                "TimeTravel walks steps more than once, which has no density, so that weights cannot be exact: leave it out, or "
                "choose without weights (BestOfN, CoDe, beta=0)"
            )


def _pull(ctx: Context) -> float:
    """c, how far the step's mean moves with the clean estimate at fixed x."""
    now, to = ctx.levels[ctx.step], ctx.levels[ctx.step + 1]
    b = ctx.kernel.noise_weight(now, to, ctx.kernel.stds(ctx.levels)[ctx.step])
    return float(to.alpha - b * now.alpha / now.sigma)


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, shaped to broadcast."""
    return x.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (x.ndim - 1))
