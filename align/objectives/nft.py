"""DiffusionNFT: reinforcement on the forward process, by contrast with the weights that sampled.

Samples x0 of the weights `old` are noised to x_t, and an implicit pair of estimates is drawn symmetrically about old's,

    x0⁺ = x0_old + β·(x0_θ − x0_old),        x0⁻ = x0_old − β·(x0_θ − x0_old),

of which a good sample pulls the first towards itself and a bad one the second. With r = clip(A, ±c)/2c + 1/2 of the advantage,

    L = c/β · mean[r·l⁺ + (1 − r)·l⁻] + kl_weight · mean|output_θ − output_ref|²,
    l± = mean_d (x0± − x0)² / max(mean_d |x0± − x0|, floor),

the denominators held fixed. At θ = old the gradient is c·(2r − 1) times that of the weighted denoising error of x0, whatever β:
there the loss says nothing, its gradient does. With fixed denominators c·β is the strength of a trust region around old.

After the updates of each collection old ← d·old + (1 − d)·θ, with d by the number n of updates so far

    decay 0    d = 0                                     old is the policy that begins the next collection
    decay 1    d = min(0.001·n, 0.5)
    decay 2    d = 0 while n < 75, then min(0.0075·(n − 75), 0.999)

The samples must come from old: give the source speaker="old".

Source: DiffusionNFT, 2509.16117, and its code.

Deviations. The formula is written on clean estimates, so that networks of any prediction can use it; for velocities it is the
published one. The last term compares the network's own outputs, as published. Levels are those of the source's draws, not
the rollout's grid. An update that is skipped at the end of a collection leaves old as it is until the next collection ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from samplers import Policy, to_clean
from samplers.levels import at_least_float32
from samplers.transitions import widest

from ..batches import Batch, Noised
from .base import Metrics, Objective

if TYPE_CHECKING:
    from ..sampling import Sampling
    from ..sources import Source

__all__ = ["DiffusionNFT", "contrast", "decayed"]


class DiffusionNFT(Objective):
    """Contrasts policy and sampling weights on noised samples, weighed by advantage (DiffusionNFT).

    Args:
        beta: how far the implicit pair lies apart, > 0. Published: 1, or 0.1 for faster and less stable training.
        clip: c, the advantage at which a sample counts as wholly good or bad.
        kl_weight: of the squared distance to the reference's outputs, which is not computed at 0.
        decay: how `old` follows the policy; see the module docstring.
        every: updates a collection: the source's updates × epochs.
        floor: no denominator is smaller.
    """

    source = "rollouts"
    takes = (Noised,)
    needs = ("advantage",)
    remembers = ("old",)

    def __init__(
        self,
        beta: float = 1.0,
        clip: float = 5.0,
        kl_weight: float = 1e-4,
        decay: Literal[0, 1, 2] = 1,
        every: int = 1,
        floor: float = 1e-5,
    ) -> None:
        for name, value in (("beta", beta), ("clip", clip), ("every", every), ("floor", floor)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0; got {value}")
        if decay not in (0, 1, 2) or kl_weight < 0:
            raise ValueError(f"decay must be 0, 1 or 2 and kl_weight ≥ 0; got {decay} and {kl_weight}")
        self.beta, self.clip, self.kl_weight = beta, clip, kl_weight
        self.decay, self.every, self.floor = decay, every, floor

    def check_source(self, source: Source, sampling: Sampling) -> None:
        if source.speaker != "old" or self.every != source.updates * source.epochs:
            raise ValueError(
                "DiffusionNFT trains on samples of the weights called old, which move once a collection: the source needs "
                f"speaker 'old' (it has {source.speaker!r}), and every must be its updates × epochs = "
                f"{source.updates * source.epochs} (it is {self.every})"
            )

    def begin(self, policy: Policy) -> None:
        policy.remember("old")

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        rows = batch.rows
        assert isinstance(rows, Noised)
        x0 = at_least_float32(rows.x0)
        with torch.no_grad(), policy.acting_as("old"):
            old = _estimate(policy, rows)[0]
        mine, output = _estimate(policy, rows)
        advantage = batch.column("advantage").to(x0)
        good = (advantage.clamp(-self.clip, self.clip) / (2 * self.clip) + 0.5).clamp(0, 1)
        loss = self.clip * contrast(mine, old, x0, good, self.beta, self.floor).mean()
        metrics = {
            "good": good.mean(),
            "good_std": good.std(correction=0),
            "error": (mine.detach() - x0).square().mean(),
            "old_distance": (mine.detach() - old).square().mean(),
        }
        if self.kl_weight:
            with torch.no_grad(), policy.acting_as("reference"):
                reference = _estimate(policy, rows)[1]
            distance = (output - reference).square().mean()
            loss, metrics["reference_distance"] = loss + self.kl_weight * distance, distance.detach()
        return loss, metrics

    def updated(self, policy: Policy, update: int) -> None:
        if update % self.every:
            return
        d = decayed(self.decay, update)
        for name, p in policy.trainable.items():
            policy.voices["old"][name].lerp_(p.detach(), 1 - d)


def contrast(mine: Tensor, old: Tensor, x0: Tensor, good: Tensor, beta: float, floor: float) -> Tensor:
    """(B,) (r·l⁺ + (1 − r)·l⁻)/β; see the module docstring.

    Args:
        mine, old, x0: (B, …) the policy's and old's estimates, and the sample.
        good: (B,) r in [0, 1].
    """

    def pull(estimate: Tensor) -> Tensor:
        gap = (estimate - x0).flatten(1)
        size = widest(gap.detach()).abs().mean(1).clamp(min=floor)
        return gap.square().mean(1) / size.to(gap)

    step = beta * (mine - old)
    return (good * pull(old + step) + (1 - good) * pull(old - step)) / beta


def decayed(kind: int, update: int) -> float:
    """d after this many updates."""
    return (0.0, min(0.001 * update, 0.5), min(max(0.0075 * (update - 75), 0.0), 0.999))[kind]


def _estimate(policy: Policy, rows: Noised) -> tuple[Tensor, Tensor]:
    """(B, …) the clean estimates of the weights that speak, and their network's outputs, in at least float32."""
    x = rows.x
    output = policy.output(x.to(policy.dtype), rows.at, rows.cond)
    return to_clean(policy.prediction, output, x, rows.at).x0, at_least_float32(output)
