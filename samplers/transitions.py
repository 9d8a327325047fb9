"""Transitions: the law of the next state x_s given x_t.

A transition knows how to be sampled from given noise (drawn elsewhere, so that a step is a deterministic, checkpointable
function), its log-density, its divergence from another transition, and how to tilt itself by a gradient. Two laws suffice:
`Gaussian` for continuous states and `Categorical` for tokens. All maths is in at least float32; log-densities are true sums
over every element of a sample, never means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .levels import at_least_float32

__all__ = ["Categorical", "Gaussian", "Transition"]


class Transition(Protocol):
    """The law of x_s given x_t, one independent law a row."""

    def sample(self, noise: Tensor) -> Tensor:
        """Draws x_s from standard normal `noise`; differentiable in the law's parameters."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) log-density of x, summed over all but the batch."""
        ...

    def kl(self, other: Transition) -> Tensor:
        """(B,) KL(self ‖ other) in closed form."""
        ...

    def log_ratio(self, other: Transition, x: Tensor) -> Tensor:
        """(B,) log self(x) − log other(x), with less round-off than the difference of two log-densities."""
        ...

    def shift(self, grad: Tensor, scale: float) -> Transition:
        """The first-order tilt of this law by exp(scale·r), given grad = ∇r."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether every row has a density (a deterministic step has none)."""
        ...


def widest(x: Tensor) -> Tensor:
    """float64, or float32 where the device has no float64 (Apple GPUs)."""
    return x.float() if x.device.type == "mps" else x.double()


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std²·I), a row at a time.

    Attributes:
        mean: (B, …).
        std: a scalar, or one number a row shaped (B, 1, …); 0 means a deterministic step.
    """

    mean: Tensor
    std: Tensor

    @property
    def stochastic(self) -> bool:
        return bool((self.std > 0).all())

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise.to(self.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Transition`.

        Raises:
            ValueError: std is 0 somewhere: a deterministic step has no density.
        """
        self._need_density("log_prob")
        std = self.std.to(
            self.mean.dtype
        )  # so that one level and one level a row round alike: replayed ratios are exactly 1
        log_scale = (torch.log(std.double()) + 0.5 * math.log(2 * math.pi)).to(std.dtype)
        log_density = -0.5 * ((at_least_float32(x) - self.mean) / std).square() - log_scale
        return log_density.flatten(1).sum(1)

    def kl(self, other: Transition) -> Tensor:
        """(B,) KL(self ‖ other): |Δmean|²/2s² + d·(log(s/std) + (std²/s² − 1)/2), with s the other's std."""
        if not isinstance(other, Gaussian):
            raise TypeError(f"KL needs two laws of one kind; got Gaussian and {type(other).__name__}")
        self._need_density("kl")
        other._need_density("kl")
        ratio = self.std / other.std
        spread = 0.5 * (ratio.square() - 1) - torch.log(ratio)
        return (0.5 * ((self.mean - other.mean) / other.std).square() + spread).flatten(1).sum(1)

    def log_ratio(self, other: Transition, x: Tensor) -> Tensor:
        """See `Transition`: ((x − m')²/s'² − (x − m)²/s²)/2 + log(s'/s), element by element, summed in float64."""
        if not isinstance(other, Gaussian):
            raise TypeError(f"a ratio needs two laws of one kind; got Gaussian and {type(other).__name__}")
        self._need_density("log_ratio")
        other._need_density("log_ratio")
        x = widest(x)
        z, z_other = ((x - widest(law.mean)) / law.std for law in (self, other))
        scale = torch.log(other.std / self.std)
        return (0.5 * (z_other - z) * (z_other + z) + scale).flatten(1).sum(1)

    def shift(self, grad: Tensor, scale: float) -> Gaussian:
        """Moves the mean by scale·std²·grad; the variance stays."""
        return Gaussian(self.mean + scale * self.std.square() * grad.to(self.mean.dtype), self.std)

    def _need_density(self, what: str) -> None:
        if not self.stochastic:
            raise ValueError(
                f"{what} needs std > 0, but this step is deterministic: use a stochastic kernel such as DDIM(eta=1), "
                "or leave this step out"
            )


@dataclass(frozen=True)
class Categorical:
    """Independent tokens: x_s[l] ~ softmax(logits[l]). Logits may be −inf.

    Attributes:
        logits: (B, L, V), normalised or not.
    """

    logits: Tensor

    @property
    def stochastic(self) -> bool:
        return True

    @property
    def log_probs(self) -> Tensor:
        """(B, L, V) normalised, at least float32."""
        return at_least_float32(self.logits).log_softmax(-1)

    def gumbel(self, noise: Tensor) -> Tensor:
        """Logits perturbed by Gumbel noise made from standard normal `noise` (B, L, V): their argmax is a draw."""
        half_tail = torch.special.log_ndtr(widest(noise))  # log Φ(noise), the log of a uniform; exact in both tails
        return self.log_probs - torch.log(-half_tail).to(self.log_probs.dtype)

    def sample(self, noise: Tensor) -> Tensor:
        return self.gumbel(noise).argmax(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_probs.gather(-1, x[..., None].long()).squeeze(-1).flatten(1).sum(1)

    def kl(self, other: Transition) -> Tensor:
        """(B,) KL(self ‖ other); outcomes of probability 0 under self contribute nothing."""
        if not isinstance(other, Categorical):
            raise TypeError(f"KL needs two laws of one kind; got Categorical and {type(other).__name__}")
        log_p, log_q = self.log_probs, other.log_probs
        dead = torch.isneginf(log_p)
        gap = log_p.masked_fill(dead, 0) - log_q.masked_fill(dead, 0)
        return (log_p.exp() * gap).flatten(1).sum(1)

    def log_ratio(self, other: Transition, x: Tensor) -> Tensor:
        return widest(self.log_prob(x)) - widest(other.log_prob(x))

    def shift(self, grad: Tensor, scale: float) -> Categorical:
        """Adds scale·grad to the logits (Taylor-approximated guidance); impossible outcomes stay impossible."""
        return Categorical(self.log_probs + scale * grad)
