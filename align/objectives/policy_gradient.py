"""Policy gradients on what was sampled: PPO's clipped ratio, with an optional divergence from the reference.

With ρ = exp(l_θ − l_old) of a row, l its evidence (`align.evidence`), and A its advantage,

    L = mean max(−A·ρ, −A·clip(ρ, 1 − c, 1 + c')) + w·KL(θ ‖ reference).

On `Steps` l is the log-density of one denoising step, which makes this DDPO, Flow-GRPO, DanceGRPO, MixGRPO and the
policy gradient of RLCM; which of them is a matter of kernel, advantage and numbers. On `Noised` rows l is minus the
denoising error, a likelihood up to constants, and ρ weighs samples by the forward process alone.

The divergence of a step is KL(N(μ, s²) ‖ N(μ_ref, s²)) = Σ_d (μ − μ_ref)²/2s². Flow-GRPO prints mean_d (μ − μ_ref)²/2g²
with s² = g²·|dt|, which is |dt|/D of that; its published weights belong to its own form. A noised row has log-density
−|output − target|² under N(output, I/2), so its divergence is |output − output_ref|².

Sources: PPO, 1707.06347; DDPO, 2305.13301; RLCM, 2404.03673; Flow-GRPO, 2505.05470; DanceGRPO, 2505.07818; MixGRPO,
2507.21802; unequal clip ranges, DAPO 2503.14476.

Deviations: advantages are clamped where they are made (`align.advantages`). The clipped side is a constant, so a ratio
that overflows there leaves no NaN behind; on the other side (A < 0, ρ large) the loss is as unbounded as PPO's. The
released CPS code drops 1/2s² from the log-density; here every kernel has its true one, so that code's clip ranges do
not carry over.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from samplers import Policy, Transition
from samplers.levels import at_least_float32
from samplers.transitions import Gaussian

from ..batches import Batch, Noised, Steps
from ..evidence import Reduction, law, reduced, target
from .base import Metrics, Objective

__all__ = ["PolicyGradient", "clipped"]

CHUNK = 16  # rows explained at a time where no graph is kept


def clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """(B,) max(−A·ρ, −A·clip(ρ, 1 − low, 1 + high)); where the clipped side is larger, ρ itself is not computed."""
    up = advantage >= 0
    floor = math.log1p(-low) if low < 1 else -math.inf
    outside = torch.where(up, log_ratio > math.log1p(high), log_ratio < floor)
    bound = torch.full_like(log_ratio, 1.0 - low).masked_fill(up, 1.0 + high)
    ratio = log_ratio.masked_fill(outside, 0.0).exp()
    return -advantage * torch.where(outside, bound, ratio)


class PolicyGradient(Objective):
    """Raises the likelihood of samples with positive advantage: DDPO, GRPO on flows, and their relatives.

    Args:
        clip: how far below 1, and above it unless `clip_high` says otherwise, a ratio may profit. The published 1e-4
            belongs to "mean"; infinite for plain importance weighting.
        clip_high: how far above 1.
        kl_weight: of the divergence from the reference, which is not computed at 0. Flow-GRPO: 0.04 or 0.01 of its own
            "published" form.
        kl: "exact", or "published" for Flow-GRPO's |dt| times that, on steps of rectified flows only.
        reduction: over the elements of a sample, of log-densities and divergences alike; see `align.evidence`.
    """

    source = "rollouts"
    takes = (Steps, Noised)
    needs = ("advantage",)  # and `old`, which `annotate` adds where the source records none

    def __init__(
        self,
        clip: float = 1e-4,
        clip_high: float | None = None,
        kl_weight: float = 0.0,
        kl: Literal["exact", "published"] = "exact",
        reduction: Reduction = "mean",
    ) -> None:
        high = clip if clip_high is None else clip_high
        if clip < 0 or high < 0 or kl_weight < 0:
            raise ValueError(f"clip, clip_high and kl_weight must be ≥ 0; got {clip}, {clip_high} and {kl_weight}")
        if kl not in ("exact", "published"):
            raise ValueError(f"kl must be 'exact' or 'published'; got {kl!r}")
        self.reduction: Reduction = reduction
        self.low, self.high, self.kl_weight, self.kl = clip, high, kl_weight, kl

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        rows = batch.rows
        assert isinstance(rows, (Steps, Noised))
        mine = _law(policy, rows)
        now, old = self._evidence(policy, mine, rows), batch.column("old")
        if isinstance(rows, Steps):
            old = reduced(old, rows.x, self.reduction)  # a rollout records true sums
        log_ratio = now - old.to(now)
        loss = clipped(log_ratio, batch.column("advantage").to(now), self.low, self.high).mean()
        ratio = log_ratio.detach().exp()
        outside = (ratio > 1 + self.high) | (ratio < 1 - self.low)
        metrics = {
            "ratio": ratio.mean(),
            "ratio_deviation": (ratio - 1).abs().mean(),
            "ratio_max_deviation": (ratio - 1).abs().max(),
            "clip_fraction": outside.to(ratio).mean(),
            "approx_kl": 0.5 * log_ratio.detach().square().mean(),
        }
        if self.kl_weight:
            divergence = self._divergence(policy, mine, rows).to(now).mean()
            loss = loss + self.kl_weight * divergence
            metrics["kl"] = divergence.detach()
        return loss, metrics

    def annotate(self, policy: Policy, batch: Batch, seed: int) -> Batch:
        """Adds `old` to noised rows that lack it: their evidence under the weights that speak now."""
        if "old" in batch.columns or not isinstance(batch.rows, Noised):
            return batch
        parts = []
        with torch.no_grad():
            for some in torch.arange(len(batch)).split(CHUNK):
                rows = batch.rows[some]
                parts.append(self._evidence(policy, _law(policy, rows), rows))
        return replace(batch, columns={**batch.columns, "old": torch.cat(parts)})

    def _evidence(self, policy: Policy, mine: Transition, rows: Steps | Noised) -> Tensor:
        if isinstance(rows, Steps):
            return reduced(mine.log_prob(rows.following), rows.x, self.reduction)
        assert isinstance(mine, Gaussian)
        return reduced(-(mine.mean - target(policy, rows)).square().flatten(1).sum(1), rows.x0, self.reduction)

    def _divergence(self, policy: Policy, mine: Transition, rows: Steps | Noised) -> Tensor:
        """(B,) from the reference; the gradient reaches the first law only."""
        if self.kl == "published" and not (isinstance(rows, Steps) and _rectified(rows)):
            raise ValueError("kl='published' is defined on denoising steps of rectified flows only: choose kl='exact'")
        with torch.no_grad(), policy.acting_as("reference"):
            reference = _law(policy, rows)
        exact = reduced(mine.kl(reference), rows.x, self.reduction)
        if self.kl == "exact":
            return exact
        assert isinstance(rows, Steps)
        now, to = rows.levels[rows.step], rows.levels[rows.step + 1]
        return exact * (now.sigma - to.sigma).to(exact)


def _law(policy: Policy, rows: Steps | Noised) -> Transition:
    """What the weights that speak say of each row: the law of its next state, or N(output, I/2) of its target."""
    if isinstance(rows, Steps):
        return law(policy, rows)
    output = at_least_float32(policy.output(rows.x.to(policy.dtype), rows.at, rows.cond))
    return Gaussian(output, torch.tensor(math.sqrt(0.5), dtype=output.dtype, device=output.device))


def _rectified(rows: Steps) -> bool:
    return bool(((rows.levels.alpha + rows.levels.sigma - 1).abs() < 1e-6).all())
