"""Noise levels, and the one conversion of what networks predict into a clean estimate.

Every family here lives in one frame: a state at level t is

    x_t = α(t)·x0 + σ(t)·ε,        ε ~ N(0, I),

and time runs from noise to data, t_0 > t_1 > … > t_T. Variance preserving diffusion has α² + σ² = 1; a rectified flow has
α = 1 − t, σ = t; masked diffusion has α = P(token kept), σ = 1 − α.

Legend, used in all of `samplers` and `align`: `x` or x_t a noisy state; `x0` a clean estimate; `eps` a noise estimate;
`alpha`, `sigma` signal and noise scale; a step goes t → s (`now` → `to`); `log_w` log importance weights; `log_z` log
evidence; `beta` the temperature of the tilt exp(r/β).

Sources: DDIM, 2010.02502 (eps); progressive distillation, 2202.00512 (v); flow matching, 2210.02747 (flow); latent
consistency models, 2310.04378 (consistency).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = ["Clean", "Levels", "Prediction", "diffuse", "diffuse_again", "to_clean"]

Prediction = Literal["eps", "v", "flow", "x0", "consistency", "logits"]


@dataclass(frozen=True)
class Levels:
    """A table of noise levels. Index it with an int for one level, or with a (B,) tensor for one level a row.

    The table stays on the CPU in float64: it is tiny, scalars taken from it enter tensor arithmetic on any device without
    a host sync, and no level is ever rounded.

    Attributes:
        t: (T+1,) the network's own time.
        alpha: (T+1,) signal scale.
        sigma: (T+1,) noise scale; 0 at the end unless the family stops short of clean data.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        for name in ("t", "alpha", "sigma"):
            value = torch.as_tensor(getattr(self, name)).detach()
            object.__setattr__(self, name, value.to("cpu", torch.float64) if value.ndim <= 1 else value)
        if not self.t.shape == self.alpha.shape == self.sigma.shape:
            raise ValueError(
                f"t, alpha and sigma must have one shape; got {tuple(self.t.shape)}, "
                f"{tuple(self.alpha.shape)}, {tuple(self.sigma.shape)}"
            )

    @property
    def steps(self) -> int:
        """T, the number of steps between the levels."""
        return len(self.t) - 1

    def __getitem__(self, i: int | Tensor | slice) -> Levels:
        index = i.cpu() if isinstance(i, Tensor) else i
        return Levels(self.t[index], self.alpha[index], self.sigma[index])

    def like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) shaped to broadcast against `x`: scalars stay scalars, (B,) becomes (B,1,…) on x's device."""
        return spread(self.alpha, x), spread(self.sigma, x)


class Clean(NamedTuple):
    """A clean estimate. For tokens, `x0` holds log-probabilities (B, L, V) of the clean token and `eps` is None."""

    x0: Tensor
    eps: Tensor | None


def spread(value: Tensor, x: Tensor) -> Tensor:
    """Shapes a scalar or (B,) quantity to broadcast against x (B, …). A CPU scalar is left as it is."""
    if value.ndim == 0:
        return value
    return value.to(x.device, x.dtype if x.is_floating_point() else torch.float32).reshape(-1, *[1] * (x.ndim - 1))


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def diffuse(x0: Tensor, eps: Tensor, at: Levels) -> Tensor:
    """The forward process: α·x0 + σ·ε at one level, or at one level a row."""
    alpha, sigma = at.like(x0)
    return alpha * x0 + sigma * eps


def diffuse_again(x: Tensor, eps: Tensor, now: Levels, to: Levels) -> Tensor:
    """The forward process from one level on to a noisier one: (α_to/α_now)·x + sqrt(σ_to² − (α_to/α_now)²·σ_now²)·ε."""
    keep = to.alpha / now.alpha
    added = (to.sigma**2 - keep**2 * now.sigma**2).clamp(min=0).sqrt()
    return spread(keep, x) * x + spread(added, x) * eps


def to_clean(kind: Prediction, output: Tensor, x: Tensor, at: Levels) -> Clean:
    """Converts a network's output at level `at` to (x0, eps), in at least float32.

    Args:
        kind: what the network predicts. "consistency" is an eps network under the boundary condition of latent consistency
            models, x0 = c_skip·x + c_out·x0(eps), with c computed from the network's time t (timestep scaling 10, σ_data 0.5).
        output: (B, …) the network's output, after guidance; (B, L, V) logits for tokens.
        x: (B, …) the state it was computed from.
        at: the level of x: a scalar level, or one a row.

    Raises:
        ValueError: an unknown kind, or a kind that does not determine x0 at this level.
    """
    if kind == "logits":
        return Clean(output.float().log_softmax(-1), None)
    if kind not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}; got {kind!r}")
    output, x = at_least_float32(output), at_least_float32(x)
    alpha, sigma = at.like(x)
    if kind in ("eps", "consistency") and bool((at.alpha <= 0).any()):
        raise ValueError(
            "an eps prediction says nothing about x0 at a level without signal (alpha = 0): "
            "zero-terminal-SNR schedules need a v prediction"
        )
    if kind == "v" and not _is_one(at.alpha**2 + at.sigma**2):
        raise ValueError("a v prediction belongs to variance preserving levels, alpha² + sigma² = 1; these are not")
    if kind == "flow" and not _is_one(at.alpha + at.sigma):
        raise ValueError("a flow prediction belongs to rectified flow levels, alpha + sigma = 1; these are not")
    if kind == "eps":
        return Clean((x - sigma * output) / alpha, output)
    if kind == "v":
        return Clean(alpha * x - sigma * output, sigma * x + alpha * output)
    if kind == "flow":
        return Clean(x - sigma * output, x + alpha * output)
    if kind == "consistency":
        scaled = spread(at.t, x) * 10.0
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        output = skip * x + out * (x - sigma * output) / alpha
    return Clean(output, (x - alpha * output) / sigma)


def _is_one(value: Tensor) -> bool:
    return bool(((value - 1).abs() < 1e-6).all())
