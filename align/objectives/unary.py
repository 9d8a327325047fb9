"""Single judged samples: good ones become likelier and bad ones less likely, each against a common baseline.

With y ∈ {0, 1} the label of a noised row, s = 2y − 1, and g = e_ref − e_θ how much better its noise is predicted than
by the reference,

    u = s·β·(g − z),     z = max(0, mean g) without gradient,     L = mean w_y·(1 − h(u)).

h is the utility: "kto" σ(u), S-shaped and the published default; "loss_averse" log σ(u), concave; "risk_seeking" −log
σ(−u), convex. The released code also has two that are not functions of u alone, with x = β·(g − z):
"risk_seeking_signed" −s·log σ(−x) and "risk_seeking_exponential" s·exp(x/100) − 1, which overflows where x is in the
ten thousands.

The mean in z runs over the whole update: `shared` offers every item's g, and the clamp at 0 comes after the average.

Sources: Aligning Diffusion Models by Optimizing Human Utility, 2404.04465; KTO, 2402.01306.

Deviations: z averages the rows that are trained, as the released code does by default; the paper averages mismatched
pairs of image and prompt. There is no factor 1/2: a β of `Pairwise` is twice as strong here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from samplers import Policy

from ..batches import Batch, Noised
from ..evidence import Reduction, evidence, reference_evidence
from .base import Metrics, Objective

__all__ = ["Unary", "Utility", "worth"]

Utility = Literal["kto", "loss_averse", "risk_seeking", "risk_seeking_signed", "risk_seeking_exponential"]


def worth(kind: Utility, x: Tensor, sign: Tensor) -> Tensor:
    """(B,) what outcomes x = β·(g − z) are worth.

    Args:
        x: (B,) gains over the baseline.
        sign: (B,) 1 where gains are wanted, −1 where they are not.
    """
    if kind == "kto":
        return torch.sigmoid(sign * x)
    if kind == "loss_averse":
        return logsigmoid(sign * x)
    if kind == "risk_seeking":
        return -logsigmoid(-sign * x)
    if kind == "risk_seeking_signed":
        return -sign * logsigmoid(-x)
    return sign * torch.exp(x / 100) - 1


class Unary(Objective):
    """Learns from samples labelled good or bad one by one: Diffusion-KTO.

    Args:
        utility: h; see the module docstring.
        beta: how sharply gains are felt. The published 1000 belongs to "mean".
        desirable, undesirable: weights of the two labels.
        reduction: over the elements of a sample; see `align.evidence`.
    """

    source = "data"
    takes = (Noised,)
    needs = ("label",)

    def __init__(
        self,
        utility: Utility = "kto",
        beta: float = 1000.0,
        desirable: float = 1.0,
        undesirable: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        if utility not in get_args(Utility):
            raise ValueError(f"utility must be one of {', '.join(get_args(Utility))}; got {utility!r}")
        if beta <= 0 or desirable < 0 or undesirable < 0:
            raise ValueError(f"beta must be > 0 and weights ≥ 0; got {beta}, {desirable} and {undesirable}")
        self.utility: Utility = utility
        self.reduction: Reduction = reduction
        self.beta = beta
        self.desirable, self.undesirable = desirable, undesirable

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        label = batch.column("label")
        if not bool(((label == 0) | (label == 1)).all()):
            raise ValueError(f"labels must be 1 (good) or 0 (bad); got {sorted(set(label.tolist()))[:5]}")
        gain = self._gain(policy, batch)
        mean = batch.shared["baseline"].to(gain) if "baseline" in batch.shared else gain.detach().mean()
        baseline = mean.clamp(min=0)
        good = label.to(gain)
        weight = self.desirable * good + self.undesirable * (1 - good)
        sign, x = 2 * good - 1, self.beta * (gain - baseline)
        loss = batch.mean(weight * (1 - worth(self.utility, x, sign)))
        right = (sign * x).detach()
        return loss, {
            "gain": gain.detach().mean(),
            "baseline": baseline,
            "accuracy": ((right > 0).to(gain) + 0.5 * (right == 0).to(gain)).mean(),
            "desirable": good.mean(),
        }

    def shared(self, policy: Policy, batch: Batch) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"baseline": self._gain(policy, batch)}

    def _gain(self, policy: Policy, batch: Batch) -> Tensor:
        rows = batch.rows
        assert isinstance(rows, Noised)
        return evidence(policy, rows, self.reduction) - reference_evidence(policy, rows, self.reduction)
