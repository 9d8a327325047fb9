"""REBEL: whole trajectories of one prompt regress the difference of their rewards.

With l(y) the log-density of trajectory y, summed over its stochastic steps, and A_y its advantage, a pair y, y' of one prompt has

    L = (η·[(l_θ(y) − l_old(y)) − (l_θ(y') − l_old(y'))] − (A_y − A_y'))².

At θ = old L = (A_y − A_y')² and ∇L = −2η·(A_y − A_y')·∇(l(y) − l(y')): a policy gradient of pairs, with no ratio to clip. Where
L = 0 for all pairs, the policy is proportional to old·exp(A/η), for true sums l; with "mean" to old·exp(D·A/η).

A row is a trajectory (`Paths`), so an item is two whole trajectories, and all their steps pass through the network at once: in
memory a pair costs 2·T rows, which `micro_batch` and block checkpointing bound.

Sources: REBEL, 2404.16767; on consistency models the code of RLCM, 2404.03673.

Deviations. The code concatenates the log-densities of all steps and samples, so that its l_θ is one number, the sum over the
batch, which is compared with the l_old of each sample; here l_θ is a trajectory's own. It counts the noise that it draws, and
discards, after the last step; that step is deterministic here, so it has no density. Pairs with equal rewards are left out by
the source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samplers import Policy

from ..batches import Batch, Paths, Steps
from ..drawing import trainable_steps
from ..evidence import Reduction, evidence, reduced
from .base import Metrics, Objective

__all__ = ["Rebel"]


class Rebel(Objective):
    """Regresses log-density ratios of whole trajectories on differences of advantage (REBEL).

    Args:
        eta: η, which multiplies the ratios, > 0. Published: 1, with "mean".
        reduction: over the elements of a sample; see `align.evidence`.
    """

    source = "rollouts"
    takes = (Paths,)
    needs = ("advantage", "old")
    members = 2

    def __init__(self, eta: float = 1.0, reduction: Reduction = "mean") -> None:
        if not eta > 0:
            raise ValueError(f"eta must be > 0; got {eta}")
        self.reduction: Reduction = reduction
        self.eta = eta

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        assert isinstance(batch.rows, Paths) and batch.members == 2
        noisy = trainable_steps(batch.rows.kernel, batch.rows.levels, skip_last=0)
        steps = batch.steps(noisy.expand(batch.items, -1))
        assert isinstance(steps.rows, Steps)
        now = evidence(policy, steps.rows, self.reduction)
        old = reduced(steps.column("old"), steps.rows.x, self.reduction)
        gain = (now - old.to(now)).reshape(batch.items, -1, 2).sum(1)  # (N*S*2,) -> (N, 2)
        wanted = _apart(batch.column("advantage").to(now).reshape(-1, 2))
        found = self.eta * _apart(gain)
        with torch.no_grad():
            metrics = {
                "ratio_deviation": (gain.exp() - 1).abs().mean(),
                "explained": (found * wanted > 0).to(now).mean(),  # pairs whose better trajectory has become likelier
                "wanted": wanted.abs().mean(),
                "found": found.abs().mean(),
            }
        return batch.mean((found - wanted).square()), metrics


def _apart(pairs: Tensor) -> Tensor:
    """(N,) the first minus the second of pairs (N, 2)."""
    return pairs[:, 0] - pairs[:, 1]
