"""Gaussian and Gaussian-mixture data with the exact denoiser: the oracle every method is proven on first.

For data Σ_k π_k N(μ_k, s_k²·I) in d dimensions and x_t = α·x0 + σ·ε, component k has p(x_t | k) = N(α·μ_k, v_k·I) with
v_k = α²·s_k² + σ², and

    E[x0 | x_t] = Σ_k p(k | x_t) · (μ_k + α·s_k²/v_k · (x_t − α·μ_k)).

The "network" is this formula; its means are parameters, so objectives have something to train whose optimum is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..levels import Levels, Prediction, spread, to_clean
from ..policy import Cond, Policy, Size

__all__ = ["GaussianPolicy"]


class MixturePosterior(nn.Module):
    """E[x0 | x_t] of a Gaussian mixture, as a network with trainable means."""

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor) -> None:
        super().__init__()
        self.log_weights: Tensor
        self.variances: Tensor
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("variances", stds**2)
        self.means = nn.Parameter(means)

    def forward(self, x: Tensor, at: Levels) -> Tensor:
        # (1, 1, 1) or (B, 1, 1): one level and one level a row round alike, so that replayed ratios are exactly 1
        alpha, sigma = (spread(torch.atleast_1d(v), x[:, None]) for v in (at.alpha, at.sigma))
        variances = self.variances[:, None]  # (K, 1)
        marginal = alpha**2 * variances + sigma**2
        centred = x[:, None] - alpha * self.means  # (B, K, d)
        log_density = -0.5 * (centred**2 / marginal + marginal.log()).sum(-1)
        share = (self.log_weights + log_density).softmax(1)[..., None]  # (B, K, 1)
        return (share * (self.means + alpha * variances / marginal * centred)).sum(1)


class GaussianPolicy(Policy):
    """A mixture of K isotropic Gaussians in d dimensions; media are the states themselves.

    Args:
        means: (K, d) or (d,) component means.
        stds: (K,) component standard deviations.
        weights: (K,) mixture weights, normalised here.
        frame: "vp" (α = cos, σ = sin of an angle that stops short of π/2) or "flow" (α = 1 − t, σ = t).
        prediction: which output the network is made to give; all are exact.
        dtype: float64 unless a test is about precision.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]] | Tensor,
        stds: Sequence[float] | Tensor = (1.0,),
        weights: Sequence[float] | Tensor = (1.0,),
        *,
        frame: Literal["vp", "flow"] = "vp",
        prediction: Prediction = "x0",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        velocity = {"vp": "v", "flow": "flow"}.get(frame)
        if velocity is None or prediction not in ("eps", "x0", velocity):
            raise ValueError(
                f"GaussianPolicy predicts eps, v or x0 in frame vp, and eps, flow or x0 in frame flow; "
                f"got {prediction!r} in frame {frame!r}"
            )
        means_ = torch.atleast_2d(torch.as_tensor(means, dtype=dtype))
        stds_, weights_ = (torch.as_tensor(v, dtype=dtype).expand(len(means_)) for v in (stds, weights))
        self.network = MixturePosterior(weights_, means_.clone(), stds_.clone()).requires_grad_(False)
        self.frame, self.prediction, self.size = frame, prediction, (means_.shape[1],)
        self.eval()

    def encode(self, prompts) -> Cond:
        return Cond({"row": torch.zeros(len(prompts), 1, device=self.device)})

    def shape(self, size: Size) -> tuple[int, ...]:
        return size

    def levels(self, steps: int, size: Size = ()) -> Levels:
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        if self.frame == "flow":
            return Levels(grid, 1 - grid, grid)
        angle = grid * (0.49 * math.pi)  # ᾱ = cos(0.49πt/T)²: almost, but not quite, pure noise at the start
        return Levels(grid, angle.cos(), angle.sin())

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x0 = self.network(x, at)
        if self.prediction == "x0":
            return x0
        eps = to_clean("x0", x0, x, at).eps
        alpha, sigma = at.like(x)
        return {"eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[self.prediction]

    def decode(self, x0: Tensor, frames: slice | None = None) -> Tensor:
        return x0

    def encode_media(self, media: Tensor) -> Tensor:
        return media
