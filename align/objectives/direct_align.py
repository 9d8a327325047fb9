"""Direct-Align and SRPO: the reward's gradient through one network call at any level, with the noise known.

A sample x0 of the policy is noised with a known ε, moved from level t to level s by one deterministic step of the policy, and
recovered by taking the known noise off again:

    x_t = α_t·x0 + σ_t·ε,        x_s = α_s·x0_θ(x_t) + σ_s·ε_θ(x_t),        x̂0 = (x_s − σ_s·ε)/α_s.

An exact network gives x̂0 = x0 at every level, so that even noisy levels, where a one-step estimate is a blur, can be scored. Since

    ∂x̂0 = (1 − α_t σ_s/(α_s σ_t))·∂x0_θ,

a step to less noise ("denoise") learns what the reward likes, a step to more ("inversion") unlearns it, each the more gently the
shorter the step. SRPO's semantic-relative reward compares two wordings of the prompt, words put before it,

    R = (1 + k)·r(x̂0, positive) − r(x̂0, negative),

exchanges them in the inversion branch, and minimises −R, or max(0, threshold − R).

Source: SRPO, 2509.06942, and its code for FLUX, from which all numbers are.

Deviations. In terms of α and σ, so that it holds for diffusion as well as flows. Levels are drawn once an update, as quantiles of
the network's time: `low`, `high` and `gap` are the code's steps 5 to 25 of 50 and tenth of that list. Both branches use one
sample in one update; the code alternates. k runs linearly from the noisiest to the cleanest level. Left out: the paper's other
combination k·r(positive) + (1 − k)·r(negative), its discounted sum over several levels, and real images in place of samples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rewards import Prompt, Reward
from samplers import Clean, Levels, Policy, diffuse, rollout

from ..batches import Batch, Starts
from .backprop import check_reward, estimate, judged, leaving_out, seeded, sound, watched
from .base import Metrics, Objective

__all__ = ["DirectAlign", "recovered"]


class DirectAlign(Objective):
    """Differentiates a semantic-relative reward through one step from a noised sample (SRPO).

    Args:
        positive, negative: words put before the prompt: towards the first, away from the second. The defaults are examples.
        branch: steps towards less noise, more noise, or the mean of both losses.
        low, high: the range of levels in [0, 1], 0 almost clean and 1 almost noise.
        gap: the length of the step.
        k, inversion_k: the positive wording's surplus weight at the noisiest and at the cleanest level, in either branch.
        threshold: minimise max(0, threshold − R) instead of −R; published 0.7 for PickScore over 20.
        guided: whether the step with gradient uses guidance; sampling follows the run.
        scale: multiplies the loss.
        reward: what is maximised; the run's by default.
    """

    source = "prompts"
    takes = (Starts,)

    def __init__(
        self,
        positive: str = "Realistic photo.",
        negative: str = "CG render.",
        branch: Literal["denoise", "inversion", "both"] = "both",
        low: float = 0.5,
        high: float = 0.9,
        gap: float = 0.04,
        k: tuple[float, float] = (0.25, 0.1),
        inversion_k: tuple[float, float] = (0.01, 0.3),
        threshold: float | None = None,
        guided: bool = False,
        scale: float = 1.0,
        reward: Reward | None = None,
    ) -> None:
        if not (0 <= low < high <= 1 and 0 < gap <= high - low):
            raise ValueError(f"need 0 ≤ low < high ≤ 1 and 0 < gap ≤ high − low; got {low}, {high} and {gap}")
        if branch not in ("denoise", "inversion", "both"):
            raise ValueError(f"branch must be denoise, inversion or both; got {branch!r}")
        self.positive, self.negative, self.branch = positive, negative, branch
        self.low, self.high, self.gap, self.k, self.inversion_k = low, high, gap, k, inversion_k
        self.threshold, self.guided, self.scale, self.reward = threshold, guided, scale, reward

    def check(self, policy: Policy) -> None:
        check_reward(self, policy)
        if self.reward is not None and not self.reward.needs_prompt:
            raise ValueError(
                f"{self.reward.name} does not read the prompt, so positive and negative words are one to it: "
                "choose a reward of image and text, or Backprop"
            )

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        rows = batch.rows
        assert isinstance(rows, Starts) and self.reward is not None
        noise = seeded(policy, rows)
        x0, eps = rollout(policy, rows.kernel, rows.cond, rows.levels, noise).x0, noise(0)
        cond = rows.cond if self.guided else rows.cond.with_guidance(1.0)
        noisier, cleaner, place = self.drawn(policy, rows.draw)
        losses, watch = [], []
        branches = {
            "denoise": (noisier, cleaner, (self.positive, self.negative), self.k),
            "inversion": (cleaner, noisier, (self.negative, self.positive), self.inversion_k),
        }
        for at, to, (liked, disliked), k in (branches[b] for b in branches if self.branch in (b, "both")):
            clean = estimate(policy, diffuse(x0, eps, at).to(policy.dtype), at, cond)
            guess = recovered(clean, eps, to)
            if not bool((fine := sound(guess)).all()) and not policy.sharded:  # as in `Backprop`
                return leaving_out(self, policy, batch, fine, ("reward", "level"))
            media = policy.decode(guess)
            better, ok = judged(self.reward, media, _worded(liked, batch.prompts))
            worse, also = judged(self.reward, media, _worded(disliked, batch.prompts))
            ok, relative = ok & also, (1 + k[0] + place * (k[1] - k[0])) * better - worse
            each = -relative if self.threshold is None else (self.threshold - relative).relu()
            losses.append(self.scale * torch.where(ok, each, 0).mean())
            watch.append(watched(relative, ok))
        loss = torch.stack(losses).mean()
        metrics = {name: torch.stack([w[name] for w in watch]).mean() for name in watch[0]}
        return loss, {**metrics, "level": torch.full_like(loss, self.high - place * (self.high - self.low - self.gap))}

    def drawn(self, policy: Policy, draw: int) -> tuple[Levels, Levels, float]:
        """The noisier and the cleaner level of an update, and where between the noisiest (0) and the cleanest (1) they lie."""
        place = float(torch.rand((), generator=torch.Generator().manual_seed(draw), dtype=torch.float64))
        noisier = self.high - place * (self.high - self.low - self.gap)
        both = policy.training_levels(torch.tensor([noisier, noisier - self.gap], dtype=torch.float64))
        return both[0], both[1], place


def recovered(clean: Clean, eps: Tensor, to: Levels) -> Tensor:
    """(B, …) x̂0: a deterministic step to a level, less the known noise there."""
    assert clean.eps is not None
    return clean.x0 + to.sigma / to.alpha * (clean.eps - eps)


def _worded(words: str, prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    return tuple(replace(p, text=f"{words} {p.text}") for p in prompts)
