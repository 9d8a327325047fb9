"""Exact laws that the tests compare samplers, steering and training against. All in float64, nothing sampled.

Levels run from noise to data: `alpha[0]`, `sigma[0]` belong to the initial noise and index T to the last state, as in
`samplers.levels`. These laws are derived anew and import nothing of the packages, so that a mistake there cannot hide.

* Gaussian data and any kernel: the law of every state of the **discretised** chain, which is not the law of the data.
* Tilts by exp(r) of a Gaussian and of a Gaussian mixture, for linear and quadratic r.
* The posterior of a Gaussian mixture, hence the exact denoiser and the exact soft value of a state.
* Masked diffusion over a handful of tokens, by enumeration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Coefficients = Callable[[int], tuple[float, float]]
"""Step i (from level i to level i + 1) -> (b, std): x_s ~ N(alpha_s·x0hat + b·epshat, std²)."""


def as_float64(values: Sequence[float] | Tensor) -> Tensor:
    """Values in float64 on the CPU; plain numbers never pass through float32."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()


# The linear-Gaussian chain


class GaussianChain(NamedTuple):
    """The law of every state of a chain, per dimension.

    Attributes:
        mean: (T+1,) E[x] at each level.
        var: (T+1,) Var[x] at each level.
        slope, offset, noise: (T,) the steps x_s = slope·x_t + offset + sqrt(noise)·ε.
    """

    mean: Tensor
    var: Tensor
    slope: Tensor
    offset: Tensor
    noise: Tensor


def cosine_levels(steps: int = 10, final_alpha_bar: float = 1.0) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), (T+1,) each, of abar_t = cos(0.49 π t / T)², the last abar replaced by `final_alpha_bar`."""
    t = torch.arange(steps, -1, -1, dtype=torch.float64)
    alpha_bar = (0.49 * math.pi * t / steps).cos().square()
    alpha_bar[-1] = final_alpha_bar
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def flow_levels(steps: int = 10) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the rectified flow on an even grid: alpha = 1 − t, sigma = t, from t = 1 to t = 0."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return 1 - t, t


def ddim_coefficients(alpha: Tensor, sigma: Tensor, eta: float) -> Coefficients:
    """DDIM: std = η σ_s sqrt(1 − (α_t σ_s / α_s σ_t)²), b = sqrt(σ_s² − std²). η = 1 is DDPM, η = 0 the ODE."""

    def at(i: int) -> tuple[float, float]:
        ratio = float(alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i]))
        std = eta * float(sigma[i + 1]) * math.sqrt(1 - ratio**2)
        return math.sqrt(float(sigma[i + 1]) ** 2 - std**2), std

    return at


def consistency_coefficients(sigma: Tensor) -> Coefficients:
    """Multistep consistency sampling: x_s = α_s·x0hat + σ_s·ε."""
    return lambda i: (0.0, float(sigma[i + 1]))


def gaussian_denoiser(alpha: float, sigma: float, mean: float, std: float) -> tuple[float, float]:
    """(K, c) of the posterior mean E[x0 | x_t] = K·x_t + c for data N(mean, std²) and x_t = alpha·x0 + sigma·ε."""
    gain = std**2 * alpha / (std**2 * alpha**2 + sigma**2)
    return gain, mean * (1 - gain * alpha)


def gaussian_chain(
    alpha: Tensor, sigma: Tensor, mean: float, std: float, kernel_coefficients: Coefficients
) -> GaussianChain:
    """Propagates N(0, 1) through a sampler that uses the exact denoiser of data N(mean, std²).

    Args:
        alpha, sigma: (T+1,) levels, noise first; sigma is positive except possibly at the end.
        mean, std: the data law, per dimension.
        kernel_coefficients: the kernel, see `Coefficients`; `ddim_coefficients` makes the common ones.
    """
    alpha, sigma = as_float64(alpha), as_float64(sigma)
    means, variances, slopes, offsets, noises = [0.0], [1.0], [], [], []
    for i in range(len(alpha) - 1):
        b, step_std = kernel_coefficients(i)
        gain, shift = gaussian_denoiser(float(alpha[i]), float(sigma[i]), mean, std)
        # x_s = alpha_s x0hat + b (x - alpha_t x0hat) / sigma_t + std ε, and x0hat = gain x + shift
        on_x0 = float(alpha[i + 1]) - b * float(alpha[i]) / float(sigma[i])
        slope, offset = on_x0 * gain + b / float(sigma[i]), on_x0 * shift
        means.append(slope * means[-1] + offset)
        variances.append(slope**2 * variances[-1] + step_std**2)
        slopes.append(slope)
        offsets.append(offset)
        noises.append(step_std**2)
    return GaussianChain(*(as_float64(v) for v in (means, variances, slopes, offsets, noises)))


def gaussian_continuation(chain: GaussianChain) -> tuple[Tensor, Tensor, Tensor]:
    """The law of the final state given the state at each level: N(slope·x + offset, var), three (T+1,) tensors."""
    slope, offset, var = [1.0], [0.0], [0.0]
    for a, b, v in reversed(list(zip(chain.slope.tolist(), chain.offset.tolist(), chain.noise.tolist(), strict=True))):
        var.insert(0, var[0] + slope[0] ** 2 * v)
        offset.insert(0, offset[0] + slope[0] * b)
        slope.insert(0, slope[0] * a)
    return as_float64(slope), as_float64(offset), as_float64(var)


# Tilted Gaussians


def tilted_linear(mean: float, var: float, lam: float) -> tuple[float, float, float]:
    """(log Z, mean, var) of N(mean, var) tilted by exp(lam·x)."""
    return lam * mean + lam**2 * var / 2, mean + lam * var, var


def tilted_quadratic(mean: float, var: float, a: float, b: float) -> tuple[float, float, float]:
    """(log Z, mean, var) of N(mean, var) tilted by exp(−a (x − b)²), a > −1/(2 var)."""
    stretch = 1 + 2 * a * var
    return -math.log(stretch) / 2 - a * (mean - b) ** 2 / stretch, (mean + 2 * a * var * b) / stretch, var / stretch


# Gaussian mixtures in one dimension


class Mixture(NamedTuple):
    """Components along the last axis: weights sum to one, then means and variances. Leading axes are a batch."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x]."""
        return (self.weights * self.means).sum(-1)

    @property
    def var(self) -> Tensor:
        """Var[x]."""
        return (self.weights * (self.variances + self.means.square())).sum(-1) - self.mean.square()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at x, of the shape of x (batch axes must broadcast)."""
        return torch.logsumexp(self.weights.log() + normal_log_prob(x[..., None], self.means, self.variances), -1)


def mixture(weights: Sequence[float], means: Sequence[float], stds: Sequence[float]) -> Mixture:
    """A mixture from plain numbers."""
    return Mixture(as_float64(weights), as_float64(means), as_float64(stds).square())


MIXTURE = mixture((0.7, 0.3), (-2.0, 1.5), (0.6, 0.4))
"""Two modes, the likelier one far from high x: tilted by exp(1.5 x) the second takes 98%."""


def normal_log_prob(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Log-density of N(mean, var)."""
    return -((x - mean).square() / var + var.log() + math.log(2 * math.pi)) / 2


def mixture_tilted_linear(data: Mixture, lam: float) -> tuple[Tensor, Mixture]:
    """(log Z, law) of the mixture tilted by exp(lam·x); batch axes are kept."""
    log_parts = data.weights.log() + lam * data.means + lam**2 * data.variances / 2
    tilted = Mixture(log_parts.softmax(-1), data.means + lam * data.variances, data.variances)
    return log_parts.logsumexp(-1), tilted


def mixture_tilted_quadratic(data: Mixture, a: float, b: float) -> tuple[Tensor, Mixture]:
    """(log Z, law) of the mixture tilted by exp(−a (x − b)²)."""
    stretch = 1 + 2 * a * data.variances
    log_parts = data.weights.log() - stretch.log() / 2 - a * (data.means - b).square() / stretch
    tilted = Mixture(
        log_parts.softmax(-1), (data.means + 2 * a * b * data.variances) / stretch, data.variances / stretch
    )
    return log_parts.logsumexp(-1), tilted


def mixture_marginal(alpha: float, sigma: float, data: Mixture) -> Mixture:
    """The law of x_t = alpha·x0 + sigma·ε."""
    return Mixture(data.weights, alpha * data.means, alpha**2 * data.variances + sigma**2)


def mixture_posterior(x: Tensor, alpha: float, sigma: float, data: Mixture) -> Mixture:
    """The law of x0 given x_t = x: a mixture with components along a new last axis of `x`."""
    x = as_float64(x)[..., None]
    noisy = mixture_marginal(alpha, sigma, data)
    weights = (data.weights.log() + normal_log_prob(x, noisy.means, noisy.variances)).softmax(-1)
    means = data.means + alpha * data.variances / noisy.variances * (x - noisy.means)
    return Mixture(weights, means, (data.variances * sigma**2 / noisy.variances).expand_as(means))


def mixture_posterior_mean(x: Tensor, alpha: float, sigma: float, data: Mixture) -> Tensor:
    """E[x0 | x_t = x], the exact denoiser, of the shape of `x`."""
    return mixture_posterior(x, alpha, sigma, data).mean


def mixture_soft_value(x: Tensor, alpha: float, sigma: float, data: Mixture, lam: float) -> Tensor:
    """V_t(x) = (1/lam) log E[exp(lam·x0) | x_t = x] under the exact reverse process."""
    return mixture_tilted_linear(mixture_posterior(x, alpha, sigma, data), lam)[0] / lam


# Masked diffusion over a few tokens
#
# A state is a tuple of L tokens in 0..V, V being the mask. `table[state]` (L, V) holds the probabilities of the clean
# token at every position: `table` is (V+1,)*L + (L, V), and `table[tuple(x.T)]` reads the rows of tokens x (B, L).


def masked_table(length: int = 3, symbols: int = 3, seed: int = 0, temperature: float = 1.0) -> Tensor:
    """A fixed model: independent random tables, one a state. A position that is not masked keeps its token."""
    generator = torch.Generator().manual_seed(seed)
    shape = (symbols + 1,) * length + (length, symbols)
    table = (torch.randn(shape, generator=generator, dtype=torch.float64) / temperature).softmax(-1)
    for state in itertools.product(range(symbols + 1), repeat=length):
        for position, token in enumerate(state):
            if token < symbols:
                table[state][position] = torch.eye(symbols, dtype=torch.float64)[token]
    return table


def _dimensions(table: Tensor) -> tuple[int, int]:
    return table.shape[-2], table.shape[-1]


def unmasking_probability(alpha: Tensor, i: int) -> float:
    """P(a masked position is revealed in step i) = (α_s − α_t) / (1 − α_t)."""
    now, to = float(alpha[i]), float(alpha[i + 1])
    return (to - now) / (1 - now)


def unmasking_step(table: Tensor, state: tuple[int, ...], reveal: float) -> Tensor:
    """The law of the next state, (V+1,)*L, each masked position being revealed with probability `reveal`."""
    length, symbols = _dimensions(table)
    law = torch.ones((), dtype=torch.float64)
    for position in range(length):
        here = torch.zeros(symbols + 1, dtype=torch.float64)
        if state[position] < symbols:
            here[state[position]] = 1
        else:
            here[:symbols], here[symbols] = reveal * table[state][position], 1 - reveal
        law = law[..., None] * here
    return law


def unmasking_laws(table: Tensor, alpha: Tensor) -> list[Tensor]:
    """The law of the state at each of the T+1 levels, (V+1,)*L each, from the fully masked state.

    Args:
        table: see above.
        alpha: (T+1,) P(token kept), noise first; 1 at the end, where every position is revealed.
    """
    length, symbols = _dimensions(table)
    alpha = as_float64(alpha)
    law = torch.zeros((symbols + 1,) * length, dtype=torch.float64)
    law[(symbols,) * length] = 1
    laws = [law]
    for i in range(len(alpha) - 1):
        reveal = unmasking_probability(alpha, i)
        after = torch.zeros_like(law)
        for state in itertools.product(range(symbols + 1), repeat=length):
            if law[state] > 0:
                after += law[state] * unmasking_step(table, state, reveal)
        law = after
        laws.append(law)
    return laws


def unmasking_law(table: Tensor, alpha: Tensor) -> Tensor:
    """The exact law of the final tokens, (V,)*L."""
    length, symbols = _dimensions(table)
    return unmasking_laws(table, alpha)[-1][(slice(symbols),) * length]


def tilted_law(law: Tensor, reward: Tensor, lam: float) -> tuple[float, Tensor]:
    """(log Z, tilted law) of an enumerated law and the reward of every outcome, both of one shape."""
    log_joint = law.log() + lam * as_float64(reward)
    log_z = log_joint.flatten().logsumexp(0)
    return float(log_z), (log_joint - log_z).exp()


def unmasking_values(table: Tensor, alpha: Tensor, reward: Tensor, lam: float) -> list[Tensor]:
    """log E[exp(lam·r(x_0)) | state] under the chain itself, (V+1,)*L at each level; divide by lam for the soft value.

    Args:
        table, alpha: as in `unmasking_laws`.
        reward: (V,)*L, the reward of every clean outcome.
        lam: the strength of the tilt. States that still hold a mask at the last level get −inf.
    """
    length, symbols = _dimensions(table)
    alpha = as_float64(alpha)
    value = torch.full((symbols + 1,) * length, -torch.inf, dtype=torch.float64)
    value[(slice(symbols),) * length] = lam * as_float64(reward)
    values = [value]
    for i in reversed(range(len(alpha) - 1)):
        reveal = unmasking_probability(alpha, i)
        before = torch.empty_like(value)
        for state in itertools.product(range(symbols + 1), repeat=length):
            step = unmasking_step(table, state, reveal)
            before[state] = (step.log() + value).flatten().logsumexp(0)
        value = before
        values.insert(0, value)
    return values


def factorised_value(table: Tensor, state: tuple[int, ...], reward: Tensor, lam: float) -> float:
    """log E[exp(lam·r)] when all masked positions are drawn at once from `table[state]`.

    This is the limit of a one-shot estimate of `unmasking_values`. It differs because the chain lets later tokens see
    earlier ones.
    """
    length, symbols = _dimensions(table)
    law = unmasking_step(table, state, 1.0)[(slice(symbols),) * length]
    return tilted_law(law, reward, lam)[0]
