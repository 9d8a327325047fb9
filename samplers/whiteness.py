"""How unlike white noise a noise is: the regularisers of noise optimisation.

A generator was trained on z ~ N(0, I) and is at home only there. Noises of a row are z (V, …), n numbers in all, d in each.

    norm            Σ over noises of |z|²/2 − (d − 1)·log|z|: minus the log density of a χ_d radius, least at |z| = sqrt(d − 1)
    concentration   −(log p₁ + log p₂) of z cut into m vectors of k = 4 numbers, plus the mean of the same over random orders:
                        log p₁ = min(log 2 − m·M₁²/(2k), 0),                              M₁ = |mean|
                        log p₂ = min(log 2 − m·max(sqrt(1 + M₂) − 1 − sqrt(k/m), 0)²/2, 0),   M₂ = ‖second moment − I‖₂
                    both bound the probability that true noise strays as far; 0 for most of it
    whiteness       Σ over channels and scales of the squared autocorrelation along rows and along columns

`norm` is the regulariser of ReNO (2406.04312) and D-Flow (2402.14017), `concentration` that of DNO (2405.18881), `whiteness`
that of image inversion (pix2pix-zero, 2302.03027; ReNoise, 2403.14602). Deviations: the published log p leave out the
constant log 2; the published whiteness draws 5 shifts between 0 and half the side, shift 0 among them, which only shrinks
the noise, where ours is the exact mean over all other shifts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Regulariser", "autocorrelation", "log_bounds", "penalise", "radius"]

Regulariser = Literal["none", "norm", "concentration", "whiteness"]
DIMENSION = 4  # of the vectors that "concentration" cuts noise into, as published
ORDERS = 100  # random orders a time, as published
SMALLEST = 8  # the side at which whiteness stops halving, as published


def penalise(kind: Regulariser, z: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """The penalty (B,) of noises z (B, V, …), and its gradient (B, V, …).

    Args:
        generators: one a row, for the random orders of "concentration".
    """
    total, gradient = z.new_zeros(len(z)), torch.zeros_like(z)
    for term in _terms(kind, z, generators):
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            value = term(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        total, gradient = total + value.detach(), gradient + slope
    return total, gradient


def _terms(kind: Regulariser, z: Tensor, generators: Sequence[torch.Generator]) -> Iterator[Callable[[Tensor], Tensor]]:
    """What adds up to the penalty; differentiated one at a time, so that memory does not grow with the orders."""
    if kind == "norm":
        yield radius
    elif kind == "whiteness":
        yield autocorrelation
    elif kind == "concentration":
        yield lambda leaf: -log_bounds(leaf.flatten(1)).sum(0)
        size = z[0].numel()
        for _ in range(ORDERS):
            order = torch.stack([torch.randperm(size, generator=g) for g in generators]).to(z.device)
            yield lambda leaf, order=order: -log_bounds(leaf.flatten(1).gather(1, order)).sum(0) / ORDERS


def radius(z: Tensor) -> Tensor:
    """(B,) Σ over noises of |z|²/2 − (d − 1)·log|z|, for z (B, V, …)."""
    each = z.flatten(2)
    square = each.square().sum(2)
    return (0.5 * square - 0.5 * (each.shape[2] - 1) * square.log()).sum(1)


def log_bounds(z: Tensor, dimension: int = DIMENSION) -> Tensor:
    """(2, B) log p₁ and log p₂ of noises z (B, n); numbers beyond a multiple of `dimension` are left out."""
    count = z.shape[1] // dimension
    vectors = z[:, : count * dimension].reshape(len(z), count, dimension)
    mean = vectors.mean(1).square().sum(1)
    moment = vectors.mT @ vectors / count - torch.eye(dimension, device=z.device, dtype=z.dtype)
    spread = torch.linalg.eigvalsh(moment).abs().amax(1)
    beyond = ((1 + spread).sqrt() - 1 - math.sqrt(dimension / count)).clamp(min=0)
    logs = torch.stack([-count * mean / (2 * dimension), -count * beyond.square() / 2])
    return (math.log(2) + logs).clamp(max=0)


def autocorrelation(z: Tensor) -> Tensor:
    """(B,) Σ over channels and scales of mean over shifts of (mean of z·shifted z)², both axes, for z (B, V, …, H, W)."""
    field, total = z.flatten(1, -3), z.new_zeros(len(z))
    while True:
        for images in (field, field.mT):
            power = torch.fft.rfft(images).abs().square().mean(2)
            shifted = torch.fft.irfft(power, images.shape[3])[..., 1:] / images.shape[3]
            total = total + shifted.square().mean(2).sum(1)
        if min(field.shape[2:]) <= SMALLEST:
            return total
        field = F.avg_pool2d(field, 2)
