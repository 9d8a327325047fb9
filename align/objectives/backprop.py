"""Backpropagation of a reward through the sampler.

A rollout x_T → x_0 of the policy is a differentiable function of its weights θ, so an update descends

    L(θ) = scale · E[ℓ(r(decode(x_0), c))] + kl_weight · E[Σ_i KL(p_θ(· | x_i) ‖ p_ref(· | x_i))],

with ℓ(r) = −r, |r − target| (AlignProp's aesthetic loss) or max(0, threshold − r) (ReFL). Methods differ in which of the T
network calls carry a gradient, `truncation`:

    "last"          the last k                                            DRaFT-K, 2309.17400
    "random"        the last k, k uniform in low … high                   AlignProp, 2310.03739
    "gaussian"      the last ⌈z⌉ < T, z ~ N(k, std²)                      AlignProp's code of 2024 (T = 50, k = 8, std = 5)
    "per_step"      step i = 0 … T − 1 with probability (i + 1)/(T + 1)   AlignProp's code of 2023 and its port in TRL
    "all"           every one                                             2309.17400 and 2310.03739 advise against it: it collapses
    "low_variance"  one-step estimates from n re-noisings of x_0          DRaFT-LV, 2309.17400
    "one_step"      the k-th from the end, whose own estimate is scored   ReFL, 2304.05977

"per_step" is no truncation: a step that is left out still lets the gradient pass along its linear skip path x_t → x_s. With
"one_step" the rollout stops at that step, and the reward sees E[x_0 | x_i] instead of a sample.

Deviations. Random numbers are drawn once an update, not once a micro-batch or process. "per_step" is drawn again when it would
leave no step at all. Steps before the window run without a graph, which changes no gradient. Nothing is clipped, and rewards
enter in their published scale, so `scale` is the loss coefficient of the papers' code. DRaFT-LV has no public code: as its
description says, x_0 is held fixed, and the reward gradients of the n estimates are averaged. The KL is that of the steps with
gradient and of non-zero variance, on states held fixed; it costs one more network call a step with gradient and one of the
reference. ReFL's second loss, on real data, is an objective of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rewards import Prompt, Reward
from samplers import Clean, Cond, Kernel, Levels, Policy, SeededNoise, diffuse, never, rollout

from ..batches import Batch, Starts, Steps
from ..evidence import Reduction, law, reduced
from .base import Metrics, Objective

if TYPE_CHECKING:
    from ..sampling import Sampling
    from ..sources import Source

__all__ = ["Backprop", "check_reward", "estimate", "judged", "leaving_out", "seeded", "sound", "watched"]

Truncation = Literal["last", "random", "gaussian", "per_step", "all", "low_variance", "one_step"]


@dataclass(frozen=True)
class _Sample:
    """What is scored, and the steps that carry its gradient.

    Attributes:
        x0: (n·B, …) with its graph, all rows of the first copy first.
        states: (B, S, …) the states at those steps, without a graph; None where no KL asks for them.
        steps: (S,) which steps.
    """

    x0: Tensor
    states: Tensor | None
    steps: Tensor


class Backprop(Objective):
    """Differentiates the reward of a sample through the sampler (DRaFT, AlignProp, ReFL).

    Args:
        truncation: which steps carry a gradient; see the module docstring.
        k: how many for "last"; about how many for "gaussian".
        low, high: the range of k for "random" and "one_step", counted from the end; `high` defaults to all steps.
        std: the spread of "gaussian".
        copies: n of "low_variance".
        scale: multiplies the reward's loss.
        target: minimise |r − target| instead of −r.
        threshold: minimise max(0, threshold − r) instead of −r.
        kl_weight: weight of the KL to the reference.
        reduction: of the KL over the elements of a sample; see `evidence`.
        guided: whether rollouts use guidance; ReFL's do not.
        reward: what is maximised; the run's by default.
    """

    source = "prompts"
    takes = (Starts,)

    def __init__(
        self,
        truncation: Truncation = "last",
        k: int = 1,
        low: int = 1,
        high: int | None = None,
        std: float = 5.0,
        copies: int = 2,
        scale: float = 1.0,
        target: float | None = None,
        threshold: float | None = None,
        kl_weight: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        guided: bool = True,
        reward: Reward | None = None,
    ) -> None:
        if target is not None and threshold is not None:
            raise ValueError("target and threshold are two different losses: give one of them")
        for name, value, least in (("k", k, 1), ("low", low, 1), ("high", high or low, low), ("copies", copies, 1)):
            if value < least:
                raise ValueError(f"{name} must be ≥ {least}; got {value}")
        if truncation not in get_args(Truncation):
            raise ValueError(f"truncation must be one of {', '.join(get_args(Truncation))}; got {truncation!r}")
        self.truncation, self.k, self.low, self.high, self.std = truncation, k, low, high, std
        self.copies, self.scale, self.target, self.threshold = copies, scale, target, threshold
        self.kl_weight, self.guided, self.reward = kl_weight, guided, reward
        self.reduction: Reduction = reduction

    def check(self, policy: Policy) -> None:
        check_reward(self, policy)

    def check_source(self, source: Source, sampling: Sampling) -> None:
        self._length(sampling.levels.steps, torch.Generator())
        if self.kl_weight:
            self._need_noise(sampling.kernel, sampling.levels)

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        rows = batch.rows
        assert isinstance(rows, Starts) and self.reward is not None
        if not self.guided:
            rows = replace(rows, cond=rows.cond.with_guidance(1.0))
        kept = self.kept(rows)
        sample = self._sample(policy, rows, kept)
        copies = len(sample.x0) // len(rows)
        fine = sound(sample.x0).reshape(copies, -1).all(0)
        if not bool(fine.all()) and not policy.sharded:  # a second pass that other processes would not make
            return leaving_out(self, policy, batch, fine, ("reward", "k", *["kl"] * bool(self.kl_weight)))
        reward, ok = judged(self.reward, policy.decode(sample.x0), batch.prompts * copies)
        # one share a row of the batch, judged or not: so micro-batches add up to the batch
        loss = self.scale * torch.where(ok, self._minimised(reward), 0).mean()
        metrics = watched(reward, ok)
        metrics["k"] = torch.full_like(loss, len(kept) - kept.index(True))
        if self.kl_weight:
            kl = self._kl(policy, rows, sample).mean()
            loss, metrics["kl"] = loss + self.kl_weight * kl, kl.detach()
        return loss, metrics

    def kept(self, rows: Starts) -> list[bool]:
        """(T,) which steps' network calls carry a gradient: a function of `rows.draw`."""
        steps, generator = rows.levels.steps, torch.Generator().manual_seed(rows.draw)
        if self.truncation == "per_step":
            kept, chance = torch.zeros(steps, dtype=torch.bool), torch.arange(1, steps + 1) / (steps + 1)
            while not kept.any():
                kept = torch.rand(steps, generator=generator) < chance
            return kept.tolist()
        k = self._length(steps, generator)
        if self.truncation == "one_step":
            return [i == steps - k for i in range(steps)]
        return [i >= steps - k for i in range(steps)]

    def reach(self, steps: int) -> int:
        """How many steps from the end the gradient may begin, at most."""
        reach = {"last": self.k, "low_variance": 1, "random": self.high, "one_step": self.high}.get(self.truncation)
        return reach or steps

    def reaching(self, k: int) -> Backprop:
        """A copy whose gradient always begins k steps from the end."""
        other = copy.copy(self)
        other.truncation, other.k = "last", k
        return other

    def _length(self, steps: int, generator: torch.Generator) -> int:
        """How many steps from the end the gradient begins."""
        furthest = self.high or self.low
        furthest = {"last": self.k, "gaussian": self.k + 1, "random": furthest, "one_step": furthest}.get(
            self.truncation, 1
        )
        if furthest > steps:
            raise ValueError(
                f"truncation={self.truncation!r} with these settings needs ≥ {furthest} steps; "
                f"the run takes {steps}: lower k, low or high, or take more steps"
            )
        if self.truncation in ("random", "one_step"):
            return int(torch.randint(self.low, (self.high or steps) + 1, (), generator=generator))
        k = {"all": steps, "last": self.k, "low_variance": 1}.get(self.truncation, 0)
        while not 1 <= k <= steps - (self.truncation == "gaussian"):  # drawn again, as published, until it fits
            k = math.ceil(self.k + self.std * float(torch.randn((), generator=generator)))
        return k

    def _sample(self, policy: Policy, rows: Starts, kept: list[bool]) -> _Sample:
        """Rolls out, with gradient where `kept`."""
        noise, levels, last = seeded(policy, rows), rows.levels, rows.levels.steps - 1
        if self.truncation == "one_step":
            m = kept.index(True)
            x = rollout(policy, _first(rows.kernel, m), rows.cond, levels[: m + 1], noise).x0
            return _Sample(estimate(policy, x, levels[m], rows.cond).x0, x[:, None], torch.tensor([m]))
        if self.truncation == "low_variance":
            x0 = rollout(policy, rows.kernel, rows.cond, levels, noise, grad=never).x0
            fresh = seeded(policy, rows, stream=1)
            x = torch.stack([diffuse(x0, fresh(j), levels[last]) for j in range(self.copies)]).to(x0.dtype)
            cond = rows.cond[torch.arange(len(rows)).repeat(self.copies).to(policy.device)]
            x0 = estimate(policy, x.flatten(0, 1), levels[last], cond).x0
            return _Sample(x0, x.transpose(0, 1), torch.full((self.copies,), last))
        how = {"grad": lambda i, steps: kept[i], "record": "path" if self.kl_weight else "final"}
        run = rollout(policy, rows.kernel, rows.cond, levels, noise, **how)
        steps = torch.tensor(kept).nonzero().flatten()
        return _Sample(run.x0, None if run.latents is None else run.latents.detach()[:, steps.to(policy.device)], steps)

    def _minimised(self, reward: Tensor) -> Tensor:
        if self.threshold is not None:
            return (self.threshold - reward).relu()
        return -reward if self.target is None else (reward - self.target).abs()

    def _kl(self, policy: Policy, rows: Starts, sample: _Sample) -> Tensor:
        """(B,) KL to the reference, summed over steps; averaged over copies."""
        assert sample.states is not None
        count, noisy = len(rows), self._need_noise(rows.kernel, rows.levels)
        chosen = noisy[sample.steps]
        at = sample.steps[chosen]
        if not len(at):  # this update's window is deterministic
            return torch.zeros(count, device=policy.device)
        x = sample.states[:, chosen.to(policy.device)].flatten(0, 1)
        cond = rows.cond[torch.arange(count).repeat_interleave(len(at)).to(policy.device)]
        unfolded = Steps(x, x, at.repeat(count), cond, rows.kernel, rows.levels)
        with torch.no_grad(), policy.acting_as("reference"):
            reference = law(policy, unfolded)
        kl = reduced(law(policy, unfolded).kl(reference), x, self.reduction).reshape(count, -1)
        return kl.mean(1) if self.truncation == "low_variance" else kl.sum(1)

    def _need_noise(self, kernel: Kernel, levels: Levels) -> Tensor:
        """(T,) which steps have a density; some step that may carry a gradient must."""
        steps, noisy = levels.steps, kernel.stds(levels) > 0
        if not bool(noisy[steps - self.reach(steps) :].any()):
            raise ValueError(
                f"kl_weight needs a stochastic step among those with gradient, but {kernel} has none there: "
                "use a stochastic kernel such as DDIM(eta=1), more steps with gradient, or kl_weight=0"
            )
        return noisy


def check_reward(objective: Objective, policy: Policy) -> None:
    """Raises unless the objective has a reward that judges what the policy makes, with a gradient."""
    name, reward = type(objective).__name__, objective.reward
    if reward is None:
        raise ValueError(f"{name} needs a reward: pass reward=…")
    if reward.modality != policy.modality:
        raise ValueError(
            f"{reward.name} scores {reward.modality}, but the model makes {policy.modality}: choose another reward"
        )
    if not reward.differentiable:
        raise ValueError(
            f"{reward.name} is not differentiable, and {name} needs its gradient: "
            "choose a differentiable reward, or an objective that only asks for scores"
        )


def seeded(policy: Policy, rows: Starts, stream: int = 0) -> SeededNoise:
    """The noise of rollouts to be made."""
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    return SeededNoise(rows.seeds.tolist(), rows.shape, device=policy.device, dtype=dtype, stream=stream)


def estimate(policy: Policy, x: Tensor, at: Levels, cond: Cond) -> Clean:
    """The clean estimate with its graph, recomputed in the backward pass if the policy checkpoints steps."""
    if policy.checkpointing == "step":
        how = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(policy.denoise, x, at, cond, **how)  # pyright: ignore
    return policy.denoise(x, at, cond)


def sound(x0: Tensor) -> Tensor:
    """(B,) which samples are finite. The others must leave the graph: a gradient of 0 through infinities is NaN."""
    return x0.detach().flatten(1).isfinite().all(1).cpu()


def judged(reward: Reward, media: Tensor, prompts: tuple[Prompt, ...]) -> tuple[Tensor, Tensor]:
    """(B,) scores, and which of them were given; samples that could not be judged score 0 and pass no gradient on."""
    if media.requires_grad:
        media = media.view_as(media)  # a tensor of our own to hang the hook on
        media.register_hook(lambda gradient: torch.where(ok.reshape(-1, *[1] * (gradient.ndim - 1)), gradient, 0))
    scores = reward(media, prompts)
    ok = ~scores.detach().isnan()
    return torch.where(ok, scores, 0), ok


def watched(reward: Tensor, ok: Tensor) -> dict[str, Tensor]:
    """The mean of the scores that were given, and the share that was not."""
    reward = reward.detach()
    failed = 1 - ok.to(reward).mean()
    return {"reward": torch.where(ok, reward, torch.nan).nanmean(), "reward_failed": failed}


def leaving_out(
    objective: Objective, policy: Policy, batch: Batch, fine: Tensor, names: Sequence[str]
) -> tuple[Tensor, Metrics]:
    """The loss of a batch some of whose samples are not finite: without them, but still a mean over all rows.

    Args:
        fine: (B,) which rows to keep.
        names: what the objective watches besides "reward_failed".
    """
    rows = fine.nonzero().flatten()
    share = len(rows) / len(batch)
    if not len(rows):
        zero = _zero(policy)
        unknown = torch.full_like(zero.detach(), torch.nan)
        return zero, {**dict.fromkeys(names, unknown), "reward_failed": torch.ones_like(unknown)}
    loss, metrics = objective.loss(policy, batch[rows])
    return loss * share, {**metrics, "reward_failed": 1 - share * (1 - metrics["reward_failed"])}


def _zero(policy: Policy) -> Tensor:
    """A loss of 0 whose gradient is 0."""
    return sum((0 * p.sum() for p in policy.trainable.values()), start=torch.zeros((), device=policy.device))


def _first(kernel: Kernel, steps: int) -> Kernel:
    """The kernel for the first steps of its table."""
    if kernel.noisy_steps is None:
        return kernel
    shorter = copy.copy(kernel)
    shorter.noisy_steps = kernel.noisy_steps[:steps]
    return shorter
