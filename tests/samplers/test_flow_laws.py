"""Laws of sampling a rectified flow: runs against the papers' own steps, the exact law of the discretised chain, limits, replay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from align.batches import Batch, Paths
from align.evidence import law, reduced
from samplers import CPS, DDIM, ODE, Consistency, DanceSDE, FlowSDE, Levels, SeededNoise, rollout
from samplers.families.gaussian import GaussianPolicy
from tests.oracles import gaussian_denoiser

F64 = torch.float64
MEAN, STD = 1.5, 0.5
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

Step = Callable[[float, float, float], tuple[float, float, float]]
"""(σ, the next σ, the second σ of the table) -> (weight of x, weight of v, std): x' = w_x·x + w_v·v + std·ε."""


def flows(steps: int, shift: float = 3.0) -> Levels:
    """An even grid moved toward noise: σ = s·u/(1 + (s − 1)·u)."""
    u = torch.linspace(1, 0, steps + 1, dtype=F64)
    sigma = shift * u / (1 + (shift - 1) * u)
    return Levels(sigma, 1 - sigma, sigma)


# The papers' steps, in velocities


def euler(now: float, to: float, second: float) -> tuple[float, float, float]:
    return 1.0, to - now, 0.0


def flow_grpo(a: float) -> Step:
    """Flow-GRPO's code: the coefficient a·sqrt(σ/(1 − σ)), with the second level in place of σ = 1."""

    def step(now, to, second):
        g, dt = a * math.sqrt(now / (1 - (second if now == 1 else now))), to - now
        return 1 + g**2 / (2 * now) * dt, (1 + g**2 * (1 - now) / (2 * now)) * dt, g * math.sqrt(-dt)

    return step


def dance_grpo(eta: float) -> Step:
    """DanceGRPO's code: Euler, less η²/2·score·dt with score = −(x − (1 − σ)·x0)/σ² and x0 = x − σ·v."""

    def step(now, to, second):
        dt = to - now
        score_x, score_v = -(1 - (1 - now)) / now**2, -(1 - now) * now / now**2
        drift = -0.5 * eta**2 * dt
        return 1 + drift * score_x, dt + drift * score_v, eta * math.sqrt(-dt)

    return step


def cps(eta: float) -> Step:
    """Coefficients-preserving sampling: (1 − t')·x0 + t'·cos(ηπ/2)·x1 and t'·sin(ηπ/2) of fresh noise."""

    def step(now, to, second):
        x1 = to * math.cos(eta * math.pi / 2)
        return 1 - to + x1, -(1 - to) * now + x1 * (1 - now), to * math.sin(eta * math.pi / 2)

    return step


def ancestral(now: float, to: float, second: float) -> tuple[float, float, float]:
    """Bayes' rule for x_s given x_t and x0, x_t being (α_t/α_s)·x_s and noise."""
    keep = (1 - now) / (1 - to)
    added = now**2 - keep**2 * to**2
    of_x, of_x0 = keep * to**2 / now**2, (1 - to) * added / now**2
    return of_x + of_x0, -of_x0 * now, math.sqrt(added) * to / now


def within(noisy: list[bool], step: Step) -> list[Step]:
    """MixGRPO: a stochastic step inside the window, Euler outside."""
    return [step if inside else euler for inside in noisy]


WINDOW = [False, True, True, False, False, False]
PUBLISHED = [
    (ODE(), [euler] * 6),
    (FlowSDE(0.7), [flow_grpo(0.7)] * 6),
    (FlowSDE(1.3), [flow_grpo(1.3)] * 6),
    (DanceSDE(0.3), [dance_grpo(0.3)] * 6),
    (CPS(0.8), [cps(0.8)] * 6),
    (Consistency(), [cps(1.0)] * 6),
    (DDIM(1.0), [ancestral] * 6),
    (FlowSDE(0.7, WINDOW), within(WINDOW, flow_grpo(0.7))),
    (DanceSDE(0.7, WINDOW), within(WINDOW, dance_grpo(0.7))),
    (CPS(0.7, WINDOW), within(WINDOW, cps(0.7))),
]
NAMES = [repr(kernel) for kernel, _ in PUBLISHED]


def mixture(dtype: torch.dtype = F64) -> GaussianPolicy:
    """A velocity that bends."""
    means = torch.tensor([[1.5, -1.0, 0.3], [-0.5, 0.8, 1.2]], dtype=dtype)
    return GaussianPolicy(means, [0.4, 0.7], [0.3, 0.7], frame="flow", prediction="flow", dtype=dtype)


def sampled(policy: GaussianPolicy, kernel, levels: Levels, rows: int = 5, dtype: torch.dtype = F64):
    noise = SeededNoise(range(rows), policy.size, dtype=dtype)
    return rollout(policy, kernel, policy.encode(["a"] * rows), levels, noise, record="path"), noise


@pytest.mark.parametrize(("kernel", "steps"), PUBLISHED, ids=NAMES)
def test_a_run_is_the_papers_own_loop(kernel, steps):
    """States and published log-probabilities, means over elements, of every step of a bent flow on a shifted grid."""
    policy, levels = mixture(), flows(6)
    run, noise = sampled(policy, kernel, levels)
    sigma, x = levels.sigma.tolist(), noise(0)
    assert run.latents is not None and run.log_prob is not None
    for i, step in enumerate(steps):
        of_x, of_v, std = step(sigma[i], sigma[i + 1], sigma[1])
        mean = of_x * x + of_v * policy.output(x, levels[i], run.cond)
        x = mean + std * noise(i + 1)
        torch.testing.assert_close(run.latents[:, i + 1], x, **CLOSE)
        if std:
            log_prob = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
            torch.testing.assert_close(reduced(run.log_prob[:, i], x, "mean"), log_prob.mean(1), **CLOSE)
        else:
            assert not run.log_prob[:, i].any()


# The law of the chain


def responses(kernel, levels: Levels) -> tuple[Tensor, Tensor]:
    """(T+1,) every state without noise, and (T+1, T+1) what a unit of noise(j) adds to it, for Gaussian data: a run is affine."""
    policy = GaussianPolicy([[MEAN]], [STD], frame="flow", prediction="flow")
    rows = levels.steps + 2
    unit = torch.cat([torch.zeros(1, rows - 1, dtype=F64), torch.eye(rows - 1, dtype=F64)])
    run = rollout(policy, kernel, policy.encode(["a"] * rows), levels, lambda i: unit[:, i : i + 1], record="path")
    assert run.latents is not None
    states = run.latents[..., 0]
    return states[0], states[1:] - states[0]


def chain(kernel, levels: Levels) -> tuple[Tensor, Tensor]:
    """(T+1,) exact mean and variance of every state for Gaussian data."""
    mean, noise = responses(kernel, levels)
    return mean, noise.square().sum(0)


@pytest.mark.parametrize(("kernel", "steps"), PUBLISHED, ids=NAMES)
def test_the_law_of_every_state_on_gaussian_data(kernel, steps):
    """m' = (w_x + w_v·K)·m + w_v·c and V' = (w_x + w_v·K)²·V + std², v = K·x + c being the velocity of N(μ, s²)."""
    levels = flows(6)
    sigma, mean, var = levels.sigma.tolist(), [0.0], [1.0]
    for i, step in enumerate(steps):
        of_x, of_v, std = step(sigma[i], sigma[i + 1], sigma[1])
        gain, shift = gaussian_denoiser(1 - sigma[i], sigma[i], MEAN, STD)
        slope = of_x + of_v * (1 - gain) / sigma[i]
        mean.append(slope * mean[-1] - of_v * shift / sigma[i])
        var.append(slope**2 * var[-1] + std**2)
    found = chain(kernel, levels)
    torch.testing.assert_close(found[0], torch.tensor(mean, dtype=F64), **CLOSE)
    torch.testing.assert_close(found[1], torch.tensor(var, dtype=F64), **CLOSE)


FRESH = [CPS(0.3), CPS(0.7), Consistency()]
"""Kernels that draw a fixed share of the noise afresh, however short the step."""


def misses(kernel, steps: int) -> tuple[float, float]:
    """How far mean and standard deviation of the samples are from the data's, on an even grid."""
    mean, var = chain(kernel, flows(steps, shift=1.0))
    return abs(float(mean[-1]) - MEAN), float(var[-1].sqrt()) - STD


@pytest.mark.parametrize("kernel", [ODE(), DDIM(0.5), DDIM(1.0), DanceSDE(0.3), DanceSDE(1.0)], ids=repr)
def test_more_steps_approach_the_data_law_at_first_order(kernel):
    """Whatever the noise: the SDE has the marginals of the ODE."""
    (mean, first), (_, second), (_, third) = (misses(kernel, steps) for steps in (200, 400, 800))
    assert mean < 1e-9
    assert abs(third) < 3e-3
    assert [second / first, third / second] == pytest.approx([0.5, 0.5], abs=0.03)


@pytest.mark.parametrize("kernel", FRESH, ids=repr)
def test_a_share_of_noise_a_step_narrows_the_samples_for_good(kernel):
    """No number of steps mends it: what is drawn afresh each time replaces what the state knew of its own sample."""
    assert misses(kernel, 400)[1] < -0.01
    assert misses(kernel, 400)[1] / misses(kernel, 200)[1] > 0.85


@pytest.mark.parametrize("eta", [0.3, 0.7, math.sqrt(2)])
def test_the_first_step_of_flow_sde_adds_noise_that_no_grid_makes_small(eta):
    """At σ = 1 its coefficient is a²/(1 − σ_1), so that a² of fresh variance meets (1 − a²/2)² of the old: 1 + a⁴/4 for 1."""
    _, var = chain(FlowSDE(eta), flows(10_000, shift=1.0)[:2])
    assert float(var[-1]) == pytest.approx(1 + eta**4 / 4, abs=1e-3)


@pytest.mark.parametrize(("eta", "std"), [(0.3, 0.4993), (0.7, 0.5011), (math.sqrt(2), 0.5000)])
def test_flow_sde_forgets_it_on_the_way(eta, std):
    mean, off = misses(FlowSDE(eta), 400)
    assert mean < 1e-9
    assert STD + off == pytest.approx(std, abs=1e-4)


def test_what_adjoint_matching_calls_memoryless_forgets_where_it_began():
    """DDIM(1) at once and altogether, FlowSDE(√2) by the share h of a step; other noise does not."""

    def remembered(kernel, steps):
        return float(responses(kernel, flows(steps, shift=1.0))[1][0, -1].abs())

    assert remembered(DDIM(1.0), 20) < 1e-12
    coarse, fine = (remembered(FlowSDE(math.sqrt(2)), steps) for steps in (100, 200))
    assert coarse < 0.01
    assert fine / coarse < 0.55
    assert remembered(FlowSDE(0.7), 200) > 0.05
    assert remembered(ODE(), 200) == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("kernel", [ODE(), DDIM(0.5), DDIM(1.0), CPS(0.7), Consistency()], ids=repr)
def test_a_flow_and_a_diffusion_of_equal_signal_make_the_same_samples(kernel):
    """These kernels know levels by σ/α alone: a state of the flow is sqrt(α² + σ²) times one of variance preserving diffusion."""
    flow, levels = mixture(), flows(6)
    scale = (levels.alpha**2 + levels.sigma**2).sqrt()
    diffusion = GaussianPolicy(flow.network.means.data, [0.4, 0.7], [0.3, 0.7], frame="vp")
    one, _ = sampled(flow, kernel, levels)
    other, _ = sampled(diffusion, kernel, Levels(levels.t, levels.alpha / scale, levels.sigma / scale))
    assert one.latents is not None and other.latents is not None
    torch.testing.assert_close(one.latents, scale[:, None] * other.latents, **CLOSE)


# Limits


@pytest.mark.parametrize(
    "still", [FlowSDE(0.0), DanceSDE(0.0), CPS(0.0), DDIM(0.0), FlowSDE(0.7, [False] * 6)], ids=repr
)
def test_without_noise_every_kernel_is_euler(still):
    policy, levels = mixture(), flows(6)
    expected, _ = sampled(policy, ODE(), levels)
    torch.testing.assert_close(sampled(policy, still, levels)[0].x0, expected.x0, **CLOSE)


def test_ancestral_sampling_of_a_flow_is_flow_sde_with_the_square_root_of_two_in_short_steps():
    """Both have the memoryless coefficient 2σ/(1 − σ): variances differ by the share h, means by h², of a step h."""
    policy, levels, gaps = mixture(), [flows(2 * n, shift=1.0) for n in (200, 400)], []
    x = SeededNoise([0], policy.size, dtype=F64)(0)
    cond = policy.encode(["a"])
    for table in levels:
        i = table.steps // 2
        clean = policy.denoise(x, table[i], cond)
        one, other = (kernel(clean, x, table, i) for kernel in (DDIM(1.0), FlowSDE(math.sqrt(2))))
        gaps.append([float((one.std / other.std) ** 2 - 1), float((one.mean - other.mean).norm())])
    assert abs(gaps[1][0]) < 0.01
    assert gaps[1][0] / gaps[0][0] == pytest.approx(0.5, rel=0.02)
    assert gaps[1][1] / gaps[0][1] == pytest.approx(0.25, rel=0.02)


# Replay


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("kernel", [k for k, _ in PUBLISHED if k.diversifies(flows(6))], ids=repr)
def test_replayed_ratios_are_exactly_one(kernel, dtype):
    """Steps of all levels in one batch, out of order, have the log-densities of the run bit for bit."""
    policy, levels = mixture(dtype), flows(6)
    run, _ = sampled(policy, kernel, levels, dtype=dtype if dtype == F64 else torch.float32)
    assert run.latents is not None and run.log_prob is not None and run.latents.dtype == dtype
    noisy = (kernel.stds(levels) > 0).nonzero().flatten()
    batch = Batch(Paths(run.latents, run.cond, kernel, levels), {"old": run.log_prob})
    steps = batch.steps(noisy[torch.randperm(len(noisy), generator=torch.Generator().manual_seed(0))].expand(5, -1))
    replayed = law(policy, steps.rows).log_prob(steps.rows.following)
    assert torch.equal(replayed, steps.columns["old"])
