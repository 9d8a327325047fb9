"""The exact laws against quoted numbers, quadrature and Monte Carlo."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.oracles import MIXTURE

GRID = torch.linspace(-14, 14, 56_001, dtype=torch.float64)


def integrate(log_density: Tensor) -> tuple[float, float, float]:
    """(log Z, mean, var) of an unnormalised log-density on GRID."""
    z = torch.trapezoid(log_density.exp(), GRID)
    mean = torch.trapezoid(log_density.exp() * GRID, GRID) / z
    var = torch.trapezoid(log_density.exp() * (GRID - mean).square(), GRID) / z
    return float(z.log()), float(mean), float(var)


def normal(mean: float, var: float) -> Tensor:
    return oracles.normal_log_prob(GRID, *oracles.as_float64([mean, var]))


def ddpm(final_alpha_bar: float = 1.0) -> oracles.GaussianChain:
    alpha, sigma = oracles.cosine_levels(10, final_alpha_bar)
    return oracles.gaussian_chain(alpha, sigma, 0.5, 0.8, oracles.ddim_coefficients(alpha, sigma, 1.0))


def test_ddpm_chain_reproduces_the_published_numbers():
    chain = ddpm()
    assert float(chain.mean[-1]) == pytest.approx(0.4996842, abs=5e-8)
    assert float(chain.var[-1]) == pytest.approx(0.4269687, abs=5e-8)
    log_z, mean, var = oracles.tilted_linear(float(chain.mean[-1]), float(chain.var[-1]), 2.0)
    assert log_z == pytest.approx(1.8533057, abs=1e-7)
    assert mean == pytest.approx(1.3536215, abs=1e-7)
    assert var == float(chain.var[-1])


def test_the_chain_that_stops_short_of_clean_data():
    chain = ddpm(0.999)
    assert float(chain.mean[-1]) == pytest.approx(0.4994338, abs=5e-8)
    assert float(chain.var[-1]) == pytest.approx(0.4288355, abs=5e-8)
    log_z, mean, var = oracles.tilted_quadratic(float(chain.mean[-1]), float(chain.var[-1]), 4.0, 1.6)
    assert log_z == pytest.approx(-1.8377841, abs=1e-7)
    assert mean == pytest.approx(1.3516035, abs=1e-7)
    assert var == pytest.approx(0.0967876, abs=1e-7)


@pytest.mark.parametrize("final_alpha_bar", [1.0, 0.999])
def test_ddpm_in_the_ancestral_form(final_alpha_bar):
    """The textbook posterior step c0·x0hat + c1·x with its own variance is the same chain."""
    alpha, _ = oracles.cosine_levels(10, final_alpha_bar)
    alpha_bar = alpha.square()
    mean, var, chain = 0.0, 1.0, ddpm(final_alpha_bar)
    for i, (now, to) in enumerate(itertools.pairwise(alpha_bar.tolist())):
        gain = 0.64 * math.sqrt(now) / (0.64 * now + 1 - now)
        c0 = math.sqrt(to) * (1 - now / to) / (1 - now)
        c1 = math.sqrt(now / to) * (1 - to) / (1 - now)
        slope = c0 * gain + c1
        mean = slope * mean + 0.5 * c0 * (1 - gain * math.sqrt(now))
        var = slope**2 * var + (1 - to) / (1 - now) * (1 - now / to)
        assert float(chain.mean[i + 1]) == pytest.approx(mean, abs=1e-12)
        assert float(chain.var[i + 1]) == pytest.approx(var, abs=1e-12)


@pytest.mark.parametrize("kind", ["ode", "ddim", "consistency", "flow ode"])
def test_gaussian_chain_by_monte_carlo(kind):
    """Simulates the sampler from its definition, with x0hat and epshat, rather than from slopes."""
    alpha, sigma = oracles.flow_levels(6) if "flow" in kind else oracles.cosine_levels(6)
    coefficients = {
        "ddim": oracles.ddim_coefficients(alpha, sigma, 0.6),
        "consistency": oracles.consistency_coefficients(sigma),
    }.get(kind, lambda i: (float(sigma[i + 1]), 0.0))
    chain = oracles.gaussian_chain(alpha, sigma, -0.3, 0.5, coefficients)
    g, n = torch.Generator().manual_seed(0), 200_000
    x = torch.randn(n, generator=g, dtype=torch.float64)
    for i in range(6):
        marginal = float(alpha[i] ** 2 * 0.25 + sigma[i] ** 2)
        x0 = -0.3 + 0.25 * alpha[i] / marginal * (x + 0.3 * alpha[i])
        eps = (x - alpha[i] * x0) / sigma[i]
        b, std = coefficients(i)
        x = alpha[i + 1] * x0 + b * eps + std * torch.randn(n, generator=g, dtype=torch.float64)
        assert abs(x.mean() - chain.mean[i + 1]) < 4 * (chain.var[i + 1] / n).sqrt() + 1e-12
        assert abs(x.var() / chain.var[i + 1] - 1) < 4 * math.sqrt(2 / n)


def test_the_ode_reaches_the_data_law_as_steps_grow():
    errors = []
    for steps in (10, 20, 40, 80, 160):
        alpha, sigma = oracles.flow_levels(steps)
        chain = oracles.gaussian_chain(alpha, sigma, 0.5, 0.8, oracles.ddim_coefficients(alpha, sigma, 0.0))
        assert float(chain.mean[-1]) == pytest.approx(0.5, abs=0.05)
        errors.append(abs(float(chain.var[-1]) - 0.64))
    assert all(1.7 < a / b < 2.3 for a, b in itertools.pairwise(errors)), "the error of a first order scheme halves"


def test_ddim_and_euler_are_one_step_on_a_flow():
    """With η = 0 the general form is Euler's x − (t − s)·(eps − x0)."""
    alpha, sigma = oracles.flow_levels(5)
    chain = oracles.gaussian_chain(alpha, sigma, 0.2, 0.7, oracles.ddim_coefficients(alpha, sigma, 0.0))
    for i in range(5):
        gain, shift = oracles.gaussian_denoiser(float(alpha[i]), float(sigma[i]), 0.2, 0.7)
        t, dt = float(sigma[i]), float(sigma[i] - sigma[i + 1])
        assert float(chain.slope[i]) == pytest.approx(1 - dt * (1 - gain) / t, abs=1e-12)
        assert float(chain.offset[i]) == pytest.approx(dt * shift / t, abs=1e-12)


def test_continuation_obeys_total_variance():
    chain = ddpm()
    slope, offset, var = oracles.gaussian_continuation(chain)
    torch.testing.assert_close(slope * chain.mean + offset, chain.mean[-1].expand(11), rtol=0, atol=1e-12)
    torch.testing.assert_close(slope**2 * chain.var + var, chain.var[-1].expand(11), rtol=0, atol=1e-12)
    assert (slope[-1], offset[-1], var[-1]) == (1, 0, 0)


@pytest.mark.parametrize(("mean", "var", "lam"), [(0.5, 0.43, 2.0), (-1.0, 1.7, -0.6), (0.0, 1.0, 0.0)])
def test_linear_tilt_by_quadrature(mean, var, lam):
    assert oracles.tilted_linear(mean, var, lam) == pytest.approx(integrate(normal(mean, var) + lam * GRID), abs=1e-9)


@pytest.mark.parametrize(("a", "b"), [(4.0, 1.6), (0.3, -2.0), (-0.2, 0.5)])
def test_quadratic_tilt_by_quadrature(a, b):
    expected = integrate(normal(0.5, 0.43) - a * (GRID - b).square())
    assert oracles.tilted_quadratic(0.5, 0.43, a, b) == pytest.approx(expected, abs=1e-9)


def test_mixture_reproduces_the_published_numbers():
    log_z, tilted = oracles.mixture_tilted_linear(MIXTURE, 1.5)
    assert float(MIXTURE.mean) == pytest.approx(-0.95, abs=1e-12)
    assert float(log_z) == pytest.approx(1.2412445, abs=1e-7)
    assert float(tilted.weights[1]) == pytest.approx(0.9848979, abs=1e-7)
    assert float(tilted.mean) == pytest.approx(1.6916732, abs=1e-7)


@pytest.mark.parametrize("lam", [1.5, -0.7, 0.0])
def test_mixture_linear_tilt_by_quadrature(lam):
    log_z, tilted = oracles.mixture_tilted_linear(MIXTURE, lam)
    log_density = MIXTURE.log_prob(GRID) + lam * GRID
    assert (float(log_z), float(tilted.mean), float(tilted.var)) == pytest.approx(integrate(log_density), abs=1e-9)
    torch.testing.assert_close(tilted.log_prob(GRID), log_density - log_z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("a", "b"), [(0.8, 1.0), (3.0, -0.5)])
def test_mixture_quadratic_tilt_by_quadrature(a, b):
    log_z, tilted = oracles.mixture_tilted_quadratic(MIXTURE, a, b)
    log_density = MIXTURE.log_prob(GRID) - a * (GRID - b).square()
    assert (float(log_z), float(tilted.mean), float(tilted.var)) == pytest.approx(integrate(log_density), abs=1e-9)
    torch.testing.assert_close(tilted.log_prob(GRID), log_density - log_z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.6, 0.8), (0.95, 0.1), (0.3, 0.7), (0.0, 1.0), (1.0, 2.5)])
def test_mixture_posterior_by_quadrature(alpha, sigma):
    x = torch.tensor([-3.0, -0.4, 0.1, 1.7], dtype=torch.float64)
    posterior = oracles.mixture_posterior(x, alpha, sigma, MIXTURE)
    found = torch.stack([posterior.mean, posterior.var, oracles.mixture_soft_value(x, alpha, sigma, MIXTURE, 1.5)])
    for column, value in zip(found.T, x, strict=True):
        joint = MIXTURE.log_prob(GRID) - (value - alpha * GRID).square() / (2 * sigma**2)
        evidence, mean, var = integrate(joint)
        soft_value = (integrate(joint + 1.5 * GRID)[0] - evidence) / 1.5
        assert column.tolist() == pytest.approx([mean, var, soft_value], abs=1e-9)
    assert torch.equal(oracles.mixture_posterior_mean(x, alpha, sigma, MIXTURE), posterior.mean)


def test_posterior_mean_obeys_tweedie():
    """E[x0 | x] = (x + σ² ∇ log p_t(x)) / α."""
    alpha, sigma = 0.6, 0.8
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(oracles.mixture_marginal(alpha, sigma, MIXTURE).log_prob(x).sum(), x)
    tweedie = (x + sigma**2 * score) / alpha
    found = oracles.mixture_posterior_mean(x, alpha, sigma, MIXTURE)
    torch.testing.assert_close(found, tweedie.detach(), rtol=1e-10, atol=1e-10)


def test_one_component_is_the_gaussian_chain_denoiser():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    gain, shift = oracles.gaussian_denoiser(0.7, 0.5, 0.3, 0.8)
    found = oracles.mixture_posterior_mean(x, 0.7, 0.5, oracles.mixture([1.0], [0.3], [0.8]))
    torch.testing.assert_close(found, gain * x + shift, rtol=1e-12, atol=1e-12)


# Masked diffusion

ALPHA = torch.tensor([0.0, 0.2, 0.65, 1.0], dtype=torch.float64)
TABLE = oracles.masked_table()
REWARD = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def test_masked_table_is_a_model():
    torch.testing.assert_close(TABLE.sum(-1), torch.ones(4, 4, 4, 3, dtype=torch.float64))
    assert TABLE[0, 3, 2, 0].tolist() == [1, 0, 0]
    assert TABLE[0, 3, 2, 2].tolist() == [0, 0, 1]
    tokens = torch.tensor([[0, 3, 2], [3, 3, 3]])
    assert torch.equal(TABLE[tuple(tokens.T)][0], TABLE[0, 3, 2])


def test_unmasking_laws_are_laws_with_the_right_number_of_masks():
    for level, law in enumerate(oracles.unmasking_laws(TABLE, ALPHA)):
        assert float(law.sum()) == pytest.approx(1, abs=1e-12)
        kept = 1 - law.movedim(1, 0)[3].sum()  # the second position is not masked
        assert float(kept) == pytest.approx(float(ALPHA[level]), abs=1e-12)


def test_final_law_by_enumerating_reveal_times():
    """A second derivation: sum over the step in which each position is revealed, instead of over states."""
    step_of = (ALPHA[1:] - ALPHA[:-1]).tolist()  # P(revealed in step i), independent over positions
    law = torch.zeros(3, 3, 3, dtype=torch.float64)
    for times in itertools.product(range(3), repeat=3):
        chance = math.prod(step_of[i] for i in times)
        for tokens in itertools.product(range(3), repeat=3):
            p = chance
            for position, when in enumerate(times):
                seen = tuple(v if times[q] < when else 3 for q, v in enumerate(tokens))
                p *= float(TABLE[seen][position, tokens[position]])
            law[tokens] += p
    torch.testing.assert_close(oracles.unmasking_law(TABLE, ALPHA), law, rtol=1e-12, atol=0)


def test_final_law_by_monte_carlo():
    g, n = torch.Generator().manual_seed(0), 200_000
    x = torch.full((n, 3), 3)
    for i in range(3):
        reveal = torch.rand(n, 3, generator=g, dtype=torch.float64) < oracles.unmasking_probability(ALPHA, i)
        clean = torch.multinomial(TABLE[tuple(x.T)].reshape(-1, 3), 1, generator=g).reshape(n, 3)
        x = torch.where((x == 3) & reveal, clean, x)
    assert (x < 3).all()
    law = oracles.unmasking_law(TABLE, ALPHA).flatten()
    observed = torch.bincount(x[:, 0] * 9 + x[:, 1] * 3 + x[:, 2], minlength=27)
    chi_square = ((observed - n * law).square() / (n * law)).sum()
    assert chi_square < 26 + 4 * math.sqrt(52)


@pytest.mark.parametrize("alpha", [ALPHA, torch.linspace(0, 1, 8), torch.tensor([0.0, 1.0])])
def test_values_and_the_tilted_law_agree(alpha):
    law = oracles.unmasking_law(TABLE, alpha)
    log_z, tilted = oracles.tilted_law(law, REWARD, 2.0)
    assert log_z == pytest.approx(math.log(float((law * (2 * REWARD).exp()).sum())), abs=1e-12)
    assert float(tilted.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(tilted, law * (2 * REWARD).exp() / math.exp(log_z), rtol=1e-12, atol=0)
    values = oracles.unmasking_values(TABLE, alpha, REWARD, 2.0)
    for level, state_law in enumerate(oracles.unmasking_laws(TABLE, alpha)):
        reached = state_law > 0
        average = (state_law[reached].log() + values[level][reached]).logsumexp(0)
        assert float(average) == pytest.approx(log_z, abs=1e-12)  # E[exp V] is the same at every level


def test_one_shot_draws_are_biased_unless_there_is_one_step():
    masked = (3, 3, 3)
    one_shot = oracles.factorised_value(TABLE, masked, REWARD, 2.0)
    single = oracles.unmasking_values(TABLE, torch.tensor([0.0, 1.0]), REWARD, 2.0)[0][masked]
    assert one_shot == pytest.approx(float(single), abs=1e-12)
    chain = oracles.unmasking_values(TABLE, ALPHA, REWARD, 2.0)[0][masked]
    assert abs(one_shot - float(chain)) > 0.01
    last = (0, 3, 2)  # one masked position left: nothing to factorise
    value = oracles.unmasking_values(TABLE, ALPHA, REWARD, 2.0)[2][last]
    assert oracles.factorised_value(TABLE, last, REWARD, 2.0) == pytest.approx(float(value), abs=1e-12)
