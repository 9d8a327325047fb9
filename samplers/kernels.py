"""Kernels: how a clean estimate becomes the law of the next state.

Every sampler here is one closed form. For the step t → s,

    x_s ~ N(α_s·x0 + b·eps, std²),

and a kernel is a choice of `std` and `b` (`Unmask` is the same idea for tokens):

    kernel          std(t, s)                                     b                    source
    ODE             0                                             σ_s                  DDIM 2010.02502, η = 0; Euler for flows
    DDIM(eta)       η·σ_s·sqrt(1 − (α_t σ_s / α_s σ_t)²)          sqrt(σ_s² − std²)    2010.02502; η = 1 is DDPM 2006.11239
    Consistency     σ_s                                           0                    2303.01469, 2310.04378
    CPS(eta)        σ_s·sin(η·π/2)                                sqrt(σ_s² − std²)    coefficients-preserving sampling 2509.05952
    FlowSDE(eta)    η·sqrt(σ_t/(1 − σ_t))·sqrt(t − s)             σ_s − std²/(2σ_t)    Flow-GRPO 2505.05470
    DanceSDE(eta)   η·sqrt(t − s)                                 σ_s − std²/(2σ_t)    DanceGRPO 2505.07818

FlowSDE's rule is infinite at σ_t = 1; there (1 − σ_t) takes the second grid point, 1 − σ_s, as its authors do, so that its
first step is as noisy on any grid; and likewise within a training step of 1, where solvers such as Sana's begin. The two SDE
kernels are defined on rectified flows only (α = 1 − σ). Consistency and CPS draw a share of the noise afresh however short the
step: more steps do not bring their samples to the data's law.

Multistep ODE solvers are left out on purpose: they are not Markov in x and so have no log-probability.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .levels import Clean, Levels, at_least_float32, spread
from .transitions import Categorical, Gaussian, Transition

__all__ = ["CPS", "DDIM", "ODE", "Consistency", "DanceSDE", "FlowSDE", "Kernel", "Unmask"]

NEARLY_ONE = 0.9989  # of a solver with 1000 training steps the first level is 0.999 or, shifted, more


class Kernel(ABC):
    """Maps a clean estimate at level i to the law of the state at level i + 1.

    Args:
        noisy_steps: which steps may be stochastic: one bool a step, or None for all. Elsewhere std is 0, which mixes ODE
            and SDE steps as Flow-GRPO-Fast and MixGRPO (2507.21802) do.
    """

    def __init__(self, noisy_steps: Sequence[bool] | None = None) -> None:
        self.noisy_steps = None if noisy_steps is None else tuple(bool(n) for n in noisy_steps)

    def __call__(self, clean: Clean, x: Tensor, levels: Levels, i: int | Tensor) -> Transition:
        """The law of x_{i+1}.

        Args:
            clean: estimates at level i.
            x: (B, …) the state at level i.
            levels: the table.
            i: the step: an int, or (B,) one a row.
        """
        index = i.cpu() if isinstance(i, Tensor) else i
        return self.law(clean, x, levels[index], levels[index + 1], self.stds(levels)[index])

    def law(self, clean: Clean, x: Tensor, now: Levels, to: Levels, std: Tensor) -> Transition:
        """N(α_s·x0 + b·eps, std²) in at least float32."""
        if clean.eps is None:
            raise ValueError(f"{type(self).__name__} moves continuous states; tokens need the Unmask kernel")
        x0, eps = at_least_float32(clean.x0), at_least_float32(clean.eps)
        mean = spread(to.alpha, x0) * x0 + spread(self.noise_weight(now, to, std), x0) * eps
        return Gaussian(mean, spread(std, x0))

    def stds(self, levels: Levels) -> Tensor:
        """(T,) the std of every step of a table."""
        std = self.std(levels[:-1], levels[1:])
        if self.noisy_steps is None:
            return std
        if len(self.noisy_steps) != levels.steps:
            raise ValueError(
                f"noisy_steps needs one entry a step: got {len(self.noisy_steps)} for {levels.steps} steps"
            )
        return std * torch.tensor(self.noisy_steps, dtype=std.dtype)

    def diversifies(self, levels: Levels, start: int = 0) -> bool:
        """Whether any step from `start` on is stochastic, so that copies of one state come apart."""
        return bool((self.stds(levels)[start:] > 0).any())

    def window(self, start: int, stop: int) -> Kernel:
        """This kernel on the steps start … stop − 1 of a table alone."""
        if self.noisy_steps is None:
            return self
        part = copy.copy(self)
        part.noisy_steps = self.noisy_steps[start:stop]
        return part

    @abstractmethod
    def std(self, now: Levels, to: Levels) -> Tensor:
        """The standard deviation of the step, shaped like the levels."""

    def noise_weight(self, now: Levels, to: Levels, std: Tensor) -> Tensor:
        """b, the weight of eps in the mean. The default preserves the marginal: b² + std² = σ_s²."""
        return (to.sigma**2 - std**2).clamp(min=0).sqrt()

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if v is not None)
        return f"{type(self).__name__}({fields})"


class ODE(Kernel):
    """Deterministic: DDIM with η = 0 on diffusion, Euler on flows."""

    def __init__(self) -> None:
        super().__init__()

    def std(self, now: Levels, to: Levels) -> Tensor:
        return torch.zeros_like(to.sigma)


class DDIM(Kernel):
    """DDIM with noise η in [0, 1]; η = 1 is ancestral DDPM sampling. Exact-marginal on flows too."""

    def __init__(self, eta: float = 1.0, noisy_steps: Sequence[bool] | None = None) -> None:
        super().__init__(noisy_steps)
        self.eta = _within(eta, 0, 1, "eta")

    def std(self, now: Levels, to: Levels) -> Tensor:
        kept = (now.alpha * to.sigma) / (to.alpha * now.sigma)
        return self.eta * to.sigma * (1 - kept**2).clamp(min=0).sqrt()


class Consistency(Kernel):
    """Multistep consistency sampling: noise the clean estimate afresh at every level (LCM, turbo and DMD students)."""

    def std(self, now: Levels, to: Levels) -> Tensor:
        return to.sigma.clone()


class CPS(Kernel):
    """Coefficients-preserving sampling: a share η in [0, 1] of the noise is fresh, levels are met exactly."""

    def __init__(self, eta: float = 0.7, noisy_steps: Sequence[bool] | None = None) -> None:
        super().__init__(noisy_steps)
        self.eta = _within(eta, 0, 1, "eta")

    def std(self, now: Levels, to: Levels) -> Tensor:
        return to.sigma * math.sin(self.eta * math.pi / 2)


class _FlowNoise(Kernel):
    """Euler–Maruyama on the reverse SDE of a rectified flow; subclasses choose the diffusion coefficient."""

    def __init__(self, eta: float, noisy_steps: Sequence[bool] | None = None) -> None:
        super().__init__(noisy_steps)
        self.eta = _within(eta, 0, math.inf, "eta")

    def noise_weight(self, now: Levels, to: Levels, std: Tensor) -> Tensor:
        return to.sigma - std**2 / (2 * now.sigma)

    def law(self, clean: Clean, x: Tensor, now: Levels, to: Levels, std: Tensor) -> Transition:
        if bool(((now.alpha + now.sigma - 1).abs() > 1e-6).any()):
            raise ValueError(
                f"{type(self).__name__} is defined on rectified flows (alpha = 1 − sigma) only; use DDIM or CPS on this model"
            )
        return super().law(clean, x, now, to, std)


class FlowSDE(_FlowNoise):
    """Flow-GRPO's SDE: std = η·sqrt(σ_t/(1 − σ_t))·sqrt(t − s)."""

    def __init__(self, eta: float = 0.7, noisy_steps: Sequence[bool] | None = None) -> None:
        super().__init__(eta, noisy_steps)

    def std(self, now: Levels, to: Levels) -> Tensor:
        below_one = torch.where(now.sigma > NEARLY_ONE, to.sigma, now.sigma)
        return self.eta * (now.sigma / (1 - below_one)).sqrt() * (now.sigma - to.sigma).sqrt()


class DanceSDE(_FlowNoise):
    """DanceGRPO's SDE: a constant diffusion coefficient, std = η·sqrt(t − s)."""

    def __init__(self, eta: float = 0.3, noisy_steps: Sequence[bool] | None = None) -> None:
        super().__init__(eta, noisy_steps)

    def std(self, now: Levels, to: Levels) -> Tensor:
        return self.eta * (now.sigma - to.sigma).sqrt()


class Unmask(Kernel):
    """Masked diffusion (2406.07524): each masked token is revealed with probability (α_s − α_t)/(1 − α_t).

    States are token ids (B, L) in [0, V]; V itself is the mask. `Clean.x0` holds log-probabilities (B, L, V). A revealed
    token never changes.

    Args:
        temperature: divides the logits of the clean token; 1 samples the model's own law.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0; got {temperature}")
        self.temperature = temperature

    def std(self, now: Levels, to: Levels) -> Tensor:
        return torch.zeros_like(to.sigma)

    def diversifies(self, levels: Levels, start: int = 0) -> bool:
        return start < levels.steps

    def law(self, clean: Clean, x: Tensor, now: Levels, to: Levels, std: Tensor) -> Transition:
        log_p = (clean.x0 / self.temperature).log_softmax(-1)
        mask = log_p.shape[-1]
        reveal = spread((to.alpha - now.alpha) / (1 - now.alpha), log_p)
        hidden = torch.cat([log_p + torch.log(reveal), torch.log(1 - reveal).to(log_p).expand_as(log_p[..., :1])], -1)
        settled = torch.full_like(hidden, -torch.inf).scatter(-1, x[..., None].long(), 0.0)
        return Categorical(torch.where((x == mask)[..., None], hidden, settled))


def _within(value: float, low: float, high: float, name: str) -> float:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}]; got {value}")
    return float(value)
