"""MaPO: preferences without a reference model, on noised pairs.

With e the mean squared denoising error of winner and loser at one shared noise draw,

    L = mean e_w − β·mean log σ(T·δ),     δ = f(k·e_w) − f(k·e_l),     f(x) = x / (exp(x) − 1).

f falls from 1 with slope −1/2, so that for small errors δ ≈ k·(e_l − e_w)/2. The first term is supervised fine-tuning
on the winners, and β = 0 leaves it alone.

Source: Margin-aware Preference Optimization for Aligning Diffusion Models without Reference, 2406.06424.

Deviations: f is computed as x·exp(−x)/(1 − exp(−x)), by its series below 1e-4, so that neither small nor large errors
lose digits or overflow. A tie has no winner: it adds the constant β·log 2 and no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from samplers import Policy

from ..batches import Batch, Noised
from ..evidence import errors
from .base import Metrics, Objective

__all__ = ["MaPO", "likelihood"]


def likelihood(x: Tensor) -> Tensor:
    """f(x) = x / (exp(x) − 1) for x ≥ 0; 1 at 0."""
    small = x < 1e-4
    safe = x.masked_fill(small, 1.0)
    return torch.where(small, 1 - x / 2 + x.square() / 12, safe * torch.exp(-safe) / -torch.expm1(-safe))


class MaPO(Objective):
    """Preferences as a margin between denoising errors, without a reference; defaults as published for SDXL.

    Args:
        beta: weight of the margin.
        snr: k, the scale of errors inside f.
        steps: T, the number of noise levels the model was trained with.
    """

    source = "data"
    takes = (Noised,)
    needs = ("quality",)
    members = 2

    def __init__(self, beta: float = 0.1, snr: float = 0.5, steps: int = 1000) -> None:
        if beta < 0 or snr <= 0 or steps < 1:
            raise ValueError(f"MaPO needs beta ≥ 0, snr > 0 and steps ≥ 1; got {beta}, {snr} and {steps}")
        self.beta, self.snr, self.steps = beta, snr, steps

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        assert isinstance(batch.rows, Noised)
        error = errors(policy, batch.rows).reshape(-1, 2)
        order = batch.column("quality").reshape(-1, 2).diff(dim=1).squeeze(1).sign().to(error)  # 1: the second won
        first, second = error.unbind(1)
        winner, loser = torch.where(order > 0, second, first), torch.where(order > 0, first, second)
        told_apart = order.abs()
        delta = told_apart * (likelihood(self.snr * winner) - likelihood(self.snr * loser))
        loss = batch.mean(told_apart * winner - self.beta * logsigmoid(self.steps * delta))
        return loss, {
            "accuracy": ((delta > 0).to(error) + 0.5 * (delta == 0).to(error)).mean(),
            "margin": self.steps * delta.detach().mean(),
            "winner_error": winner.detach().mean(),
            "loser_error": loser.detach().mean(),
        }
