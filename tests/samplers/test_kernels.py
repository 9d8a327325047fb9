"""Laws of the kernels: each row of the table against its paper's own formula, marginals, diffusers' steps, masks, rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from samplers import (
    CPS,
    DDIM,
    ODE,
    Categorical,
    Clean,
    Consistency,
    DanceSDE,
    FlowSDE,
    Levels,
    Unmask,
    diffuse,
    to_clean,
)

ANGLES = torch.linspace(0.485, 0, 6, dtype=torch.float64) * math.pi
VP = Levels(ANGLES, ANGLES.cos(), ANGLES.sin())
GRID = torch.tensor([1.0, 0.9, 0.72, 0.5, 0.2, 0.0], dtype=torch.float64)  # uneven, like a shifted schedule
FLOW = Levels(GRID, 1 - GRID, GRID)
STEPS = range(5)
ETAS = [0.0, 0.5, 1.0]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def pair(rows: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> Clean:
    generator = torch.Generator().manual_seed(seed)
    return Clean(*(torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)))


def weights(kernel, levels: Levels, i: int) -> tuple[float, float, float]:
    """(weight of x0, weight of eps, std) of a step, read off the law."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    a, b = kernel(Clean(one, zero), one, levels, i), kernel(Clean(zero, one), one, levels, i)
    return float(a.mean), float(b.mean), float(a.std)


@pytest.mark.parametrize("i", STEPS)
@pytest.mark.parametrize("eta", ETAS)
def test_ddim_is_equation_12_and_16_of_its_paper(eta, i):
    clean = pair()
    bar_t, bar_s = VP.alpha[i] ** 2, VP.alpha[i + 1] ** 2
    variance = eta**2 * (1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s)
    law = DDIM(eta)(clean, diffuse(*clean, VP[i]), VP, i)
    mean = bar_s.sqrt() * clean.x0 + (1 - bar_s - variance).clamp(min=0).sqrt() * clean.eps
    torch.testing.assert_close(law.mean, mean, **CLOSE)
    torch.testing.assert_close(law.std**2, variance, **CLOSE)


@pytest.mark.parametrize("i", STEPS)
def test_ddim_with_full_noise_is_the_ancestral_posterior(i):
    clean = pair(seed=1)
    x = diffuse(*clean, VP[i])
    bar_t, bar_s = VP.alpha[i] ** 2, VP.alpha[i + 1] ** 2
    step = bar_t / bar_s  # α_t of DDPM, for a step of any length
    mean = bar_s.sqrt() * (1 - step) / (1 - bar_t) * clean.x0 + step.sqrt() * (1 - bar_s) / (1 - bar_t) * x
    law = DDIM(1.0)(clean, x, VP, i)
    torch.testing.assert_close(law.mean, mean, **CLOSE)
    torch.testing.assert_close(law.std**2, (1 - bar_s) / (1 - bar_t) * (1 - step), **CLOSE)


@pytest.mark.parametrize("levels", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("i", STEPS)
def test_ddim_with_full_noise_is_bayes_rule_in_any_frame(levels, i):
    """q(x_s | x_t, x0) ∝ q(x_t | x_s)·q(x_s | x0) with x_t = (α_t/α_s)·x_s + noise."""
    clean = pair(seed=1)
    now, to = levels[i], levels[i + 1]
    x = diffuse(*clean, now)
    ratio = now.alpha / to.alpha
    added = now.sigma**2 - ratio**2 * to.sigma**2
    precision = ratio**2 / added + 1 / to.sigma**2
    law = DDIM(1.0)(clean, x, levels, i)
    torch.testing.assert_close(law.std**2, 1 / precision, **CLOSE)
    if to.sigma > 0:
        mean = (ratio * x / added + to.alpha * clean.x0 / to.sigma**2) / precision
        torch.testing.assert_close(law.mean, mean, **CLOSE)


@pytest.mark.parametrize("i", STEPS)
def test_ode_is_an_euler_step_on_flows(i):
    clean = pair(seed=2)
    x, velocity = diffuse(*clean, FLOW[i]), clean.eps - clean.x0
    law = ODE()(clean, x, FLOW, i)
    torch.testing.assert_close(law.mean, x + (GRID[i + 1] - GRID[i]) * velocity, **CLOSE)
    assert not law.stochastic


@pytest.mark.parametrize("i", STEPS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
def test_flow_sde_is_the_step_of_flow_grpo(eta, i):
    clean = pair(seed=3)
    x, velocity = diffuse(*clean, FLOW[i]), clean.eps - clean.x0
    sigma, dt = GRID[i], GRID[i + 1] - GRID[i]
    g = eta * (sigma / (1 - (GRID[1] if sigma == 1 else sigma))).sqrt()
    mean = x * (1 + g**2 / (2 * sigma) * dt) + velocity * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    law = FlowSDE(eta)(clean, x, FLOW, i)
    torch.testing.assert_close(law.mean, mean, **CLOSE)
    torch.testing.assert_close(law.std, g * (-dt).sqrt(), **CLOSE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_that_begins_within_a_training_step_of_one_is_as_noisy_as_from_one(shift):
    """A solver's first level is 1 − 1/1000 before its shift: the rule taken at its word would add 5 units of noise there."""
    stds = []
    for first in (1.0, 1 - 1 / 1000):
        even = torch.tensor([first, 0.95, 0.5, 0.0], dtype=torch.float64)
        grid = shift * even / (1 + (shift - 1) * even)
        stds.append(FlowSDE(0.7).stds(Levels(grid, 1 - grid, grid)))
    torch.testing.assert_close(stds[0], stds[1], rtol=2e-2, atol=0)


@pytest.mark.parametrize("i", STEPS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
def test_dance_sde_is_the_step_of_dance_grpo(eta, i):
    clean = pair(seed=4)
    x, velocity = diffuse(*clean, FLOW[i]), clean.eps - clean.x0
    sigma, dt = GRID[i], GRID[i + 1] - GRID[i]
    score = -(x - (1 - sigma) * (x - sigma * velocity)) / sigma**2
    law = DanceSDE(eta)(clean, x, FLOW, i)
    torch.testing.assert_close(law.mean, x + velocity * dt - 0.5 * eta**2 * score * dt, **CLOSE)
    torch.testing.assert_close(law.std, eta * (-dt).sqrt(), **CLOSE)


@pytest.mark.parametrize("i", range(1, 5))
def test_flow_sde_is_dance_sde_with_a_coefficient_of_the_level(i):
    clean = pair(seed=5)
    x = diffuse(*clean, FLOW[i])
    flow = FlowSDE(0.6)(clean, x, FLOW, i)
    dance = DanceSDE(0.6 * math.sqrt(GRID[i] / (1 - GRID[i])))(clean, x, FLOW, i)
    torch.testing.assert_close(flow.mean, dance.mean, **CLOSE)
    torch.testing.assert_close(flow.std, dance.std, **CLOSE)


@pytest.mark.parametrize("i", STEPS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 0.7, 1.0])
def test_cps_is_the_coefficients_preserving_step(eta, i):
    clean = pair(seed=6)
    x, velocity = diffuse(*clean, FLOW[i]), clean.eps - clean.x0
    s = GRID[i + 1]
    std = s * math.sin(eta * math.pi / 2)
    x1 = x + (1 - GRID[i]) * velocity
    law = CPS(eta)(clean, x, FLOW, i)
    mean = (1 - s) * (x - GRID[i] * velocity) + s * math.cos(eta * math.pi / 2) * x1  # sqrt(s² − std²) = s·cos
    torch.testing.assert_close(law.mean, mean, **CLOSE)
    torch.testing.assert_close(law.std, std, **CLOSE)


@pytest.mark.parametrize("i", STEPS)
def test_consistency_noises_the_estimate_afresh(i):
    clean, noise = pair(seed=7), pair(seed=8).x0
    law = Consistency()(clean, diffuse(*clean, VP[i]), VP, i)
    torch.testing.assert_close(law.sample(noise), diffuse(clean.x0, noise, VP[i + 1]), **CLOSE)


EXACT = [ODE(), DDIM(0.0), DDIM(0.3), DDIM(1.0), CPS(0.0), CPS(0.7), CPS(1.0), Consistency()]


@pytest.mark.parametrize("levels", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("kernel", EXACT, ids=repr)
@pytest.mark.parametrize("i", STEPS)
def test_true_pairs_are_pushed_to_the_exact_marginal(kernel, levels, i):
    """α_s·x0 + b·eps + std·z has the law of α_s·x0 + σ_s·ε iff b² + std² = σ_s²."""
    of_x0, of_eps, std = weights(kernel, levels, i)
    assert of_x0 == pytest.approx(float(levels.alpha[i + 1]), abs=1e-12)
    assert of_eps**2 + std**2 == pytest.approx(float(levels.sigma[i + 1]) ** 2, abs=1e-12)
    assert of_eps >= 0


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), DanceSDE(0.7)], ids=repr)
@pytest.mark.parametrize("start", [0.9, 0.5, 0.3])
def test_sde_steps_miss_the_marginal_by_the_square_of_their_length_only(kernel, start):
    errors = []
    for length in (1e-3, 5e-4):
        grid = torch.tensor([start, start - length, 0.0], dtype=torch.float64)
        _, of_eps, std = weights(kernel, Levels(grid, 1 - grid, grid), 0)
        errors.append(abs(of_eps**2 + std**2 - (start - length) ** 2))
    assert errors[0] < 0.05 * 1e-3
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)


def levels_of(scheduler) -> Levels:
    """The scheduler's own alphas, made float64 in place so that parity is not limited by rounding."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    bar = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod.reshape(1)])
    return Levels(torch.cat([scheduler.timesteps.double(), torch.zeros(1)]), bar.sqrt(), (1 - bar).sqrt())


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
@pytest.mark.parametrize("to_one", [True, False])
def test_parity_with_diffusers_ddim(theirs, ours, eta, to_one):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type=theirs, clip_sample=False, set_alpha_to_one=to_one)
    scheduler.set_timesteps(5)
    levels = levels_of(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        (output, x), noise = pair(seed=10 + i), pair(seed=20 + i).x0
        given = {"variance_noise": noise} if eta else {}
        expected = scheduler.step(output, int(t), x, eta=eta, **given).prev_sample
        law = DDIM(eta)(to_clean(ours, output, x, levels[i]), x, levels, i)
        torch.testing.assert_close(law.sample(noise), expected, rtol=1e-9, atol=1e-10)


def test_parity_with_diffusers_lcm():
    from diffusers import LCMScheduler

    scheduler = LCMScheduler()
    scheduler.set_timesteps(4)
    levels = levels_of(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        output, x = pair(seed=30 + i)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)
        expected = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        law = Consistency()(to_clean("consistency", output, x, levels[i]), x, levels, i)
        torch.testing.assert_close(law.sample(noise), expected, rtol=1e-7, atol=1e-7)  # their time is float32


@pytest.mark.parametrize(("stochastic", "kernel"), [(False, ODE()), (True, Consistency())])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_parity_with_diffusers_flow_match_euler(stochastic, kernel, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic)
    scheduler.set_timesteps(6)
    sigma = scheduler.sigmas.double()
    levels = Levels(sigma, 1 - sigma, sigma)
    for i, t in enumerate(scheduler.timesteps):
        output, x = pair(seed=40 + i, dtype=torch.float32)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        expected = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        law = kernel(to_clean("flow", output, x, levels[i]), x, levels, i)
        torch.testing.assert_close(law.sample(noise), expected, rtol=1e-6, atol=1e-6)


MASKED = [
    (lambda noisy: DDIM(0.8, noisy_steps=noisy), VP),
    (lambda noisy: CPS(0.8, noisy_steps=noisy), FLOW),
    (lambda noisy: Consistency(noisy_steps=noisy), VP),
    (lambda noisy: FlowSDE(0.8, noisy_steps=noisy), FLOW),
    (lambda noisy: DanceSDE(0.8, noisy_steps=noisy), FLOW),
]


@pytest.mark.parametrize(("build", "levels"), MASKED)
def test_quiet_steps_are_ode_steps_and_noisy_ones_are_untouched(build, levels):
    noisy = [False, True, True, False, False]
    kernel, clean = build(noisy), pair(seed=9)
    for i in STEPS:
        x = diffuse(*clean, levels[i])
        law, expected = kernel(clean, x, levels, i), (build(None) if noisy[i] else ODE())(clean, x, levels, i)
        torch.testing.assert_close(law.mean, expected.mean, rtol=0, atol=1e-15)
        assert float(law.std) == float(expected.std)
    assert kernel.diversifies(levels)
    assert not build([False] * 5).diversifies(levels)
    with pytest.raises(ValueError, match="one entry a step: got 3 for 5"):
        build([True] * 3)(clean, clean.x0, levels, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("build", "levels"), MASKED)
def test_rows_at_mixed_steps_equal_each_row_alone_bitwise(build, levels, dtype):
    kernel, clean, steps = (
        build([True, True, False, True, True]),
        pair(seed=10, dtype=dtype),
        torch.tensor([3, 0, 4, 2]),
    )
    x = diffuse(*clean, levels[steps])
    law = kernel(clean, x, levels, steps)
    for row, i in enumerate(steps.tolist()):
        one = slice(row, row + 1)
        alone = kernel(Clean(clean.x0[one], clean.eps[one]), x[one], levels, i)
        assert torch.equal(law.mean[one], alone.mean)
        assert float(law.std[row]) == float(alone.std.to(dtype))
        if alone.stochastic:
            noisy_row = type(law)(law.mean[one], law.std[one])
            assert torch.equal(noisy_row.log_prob(x[one]), alone.log_prob(x[one]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_estimates_make_float32_laws(dtype):
    clean = pair(dtype=dtype)
    for i in (0, torch.tensor([0, 1, 2, 3])):
        law = DDIM(1.0)(clean, clean.x0, VP, i)
        assert law.mean.dtype == torch.float32
        assert law.log_prob(clean.x0).dtype == torch.float32


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE()], ids=repr)
@pytest.mark.parametrize("i", [1, torch.tensor([1, 2, 3, 4])], ids=["one", "rows"])
def test_sde_of_flows_refuses_diffusion_levels(kernel, i):
    clean = pair()
    with pytest.raises(ValueError, match="rectified flows"):
        kernel(clean, clean.x0, VP, i)


@pytest.mark.parametrize("kernel", [ODE(), DDIM(), CPS(), Consistency(), FlowSDE(), DanceSDE()], ids=repr)
def test_continuous_kernels_refuse_tokens(kernel):
    with pytest.raises(ValueError, match="Unmask"):
        kernel(Clean(torch.zeros(1, 2, 3), None), torch.zeros(1, 2, dtype=torch.long), FLOW, 1)


@pytest.mark.parametrize(
    ("kernel", "value"),
    [(DDIM, -0.1), (DDIM, 1.1), (CPS, 1.5), (CPS, -1), (FlowSDE, -0.1), (DanceSDE, -2), (DDIM, math.nan)],
)
def test_impossible_noise_is_refused(kernel, value):
    with pytest.raises(ValueError, match="eta must lie in"):
        kernel(value)


def test_which_kernels_diversify():
    assert not ODE().diversifies(FLOW)
    assert not DDIM(0.0).diversifies(VP)
    assert DDIM(0.1).diversifies(VP)
    assert Consistency().diversifies(VP)
    straight = Levels(*(torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.0], [0.1, 1.0], [0.9, 0.0])))
    assert not Consistency().diversifies(straight)  # one step lands on the estimate itself


# Tokens

KEPT = torch.tensor([0.0, 0.3, 0.55, 0.8, 1.0], dtype=torch.float64)
TOKENS = Levels(1 - KEPT, KEPT, 1 - KEPT)
MASK = 5


def tokens(dtype: torch.dtype = torch.float64) -> tuple[Clean, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, MASK, generator=generator, dtype=torch.float64)
    logits[0, 0, 2] = -torch.inf
    x = torch.randint(0, MASK, (4, 6), generator=generator)
    x[:, ::2] = MASK
    return Clean(logits.to(dtype).log_softmax(-1), None), x


@pytest.mark.parametrize("i", [0, 1, 2, 3, torch.tensor([0, 3, 1, 2])], ids=["0", "1", "2", "3", "rows"])
def test_unmask_is_the_absorbing_posterior(i):
    """P(v) = p(v)·(m_t − m_s)/m_t and P(mask) = m_s/m_t, with m = 1 − α the chance of being masked."""
    clean, x = tokens()
    law = Unmask()(clean, x, TOKENS, i)
    m_t, m_s = (m.expand(4)[:, None] for m in (1 - KEPT[i], 1 - KEPT[i + 1]))
    p, hidden = law.log_probs.exp(), x == MASK
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 6, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(law.logits.logsumexp(-1), torch.zeros(4, 6, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(p[..., MASK][hidden], (m_s / m_t).expand(4, 6)[hidden], **CLOSE)
    expected = clean.x0.exp() * ((m_t - m_s) / m_t)[..., None]
    torch.testing.assert_close(p[..., :MASK][hidden], expected[hidden], **CLOSE)
    torch.testing.assert_close(p[~hidden], torch.nn.functional.one_hot(x, MASK + 1).double()[~hidden], **CLOSE)


def test_unmask_never_touches_revealed_tokens_and_the_last_step_reveals_all():
    clean, x = tokens(torch.float32)
    generator = torch.Generator().manual_seed(1)
    for i in range(TOKENS.steps):
        before = x
        x = Unmask()(clean, x, TOKENS, i).sample(torch.randn(4, 6, MASK + 1, generator=generator))
        assert torch.equal(x[before != MASK], before[before != MASK])
    assert bool((x != MASK).all())
    assert x[0, 0] != 2  # impossible under the network


def test_unmask_keeps_the_marginal_chance_of_a_mask():
    survived = torch.ones((), dtype=torch.float64)
    clean, x = tokens()
    for i in range(TOKENS.steps):
        survived = survived * Unmask()(clean, x, TOKENS, i).log_probs.exp()[0, 0, MASK]
        torch.testing.assert_close(survived, 1 - KEPT[i + 1], **CLOSE)


def test_unmask_rows_at_mixed_steps_equal_each_row_alone():
    clean, x = tokens()
    steps = torch.tensor([2, 0, 3, 1])
    law = Unmask(0.7)(clean, x, TOKENS, steps)
    for row, i in enumerate(steps.tolist()):
        alone = Unmask(0.7)(Clean(clean.x0[row : row + 1], None), x[row : row + 1], TOKENS, i)
        torch.testing.assert_close(law.logits[row : row + 1], alone.logits, **CLOSE)


def test_unmask_temperature_divides_logits():
    clean, x = tokens()
    sharp = Unmask(0.25)(clean, x, TOKENS, 3)
    expected = Categorical(clean.x0 / 0.25).log_probs.exp()
    torch.testing.assert_close(sharp.log_probs.exp()[..., :MASK][x == MASK], expected[x == MASK], **CLOSE)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        Unmask(0.0)
