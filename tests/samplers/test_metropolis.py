"""Chains over noise: exact at any step and with any drift, against closed forms, quadrature and enumeration."""

import itertools
import math

import pytest
import torch

import align
from rewards import CrossEncoder
from samplers import DDIM, ODE, PCN, PCNL, BestOfN, NoiseBank, Problem, SeededNoise, Unmask, run
from samplers.families.gaussian import GaussianPolicy
from samplers.metropolis import Chains
from tests.conftest import Linear, Quadratic, Table, TokenReward, z_score
from tests.oracles import (
    MIXTURE,
    cosine_levels,
    ddim_coefficients,
    gaussian_chain,
    normal_log_prob,
    tilted_law,
    tilted_linear,
    tilted_quadratic,
    unmasking_law,
)

STEPS, MEAN, STD = 3, 0.5, 0.8


def exact():
    """Mean and variance of what the plain chain ends with."""
    alpha, sigma = cosine_levels(STEPS)
    chain = gaussian_chain(alpha, sigma, MEAN, STD, ddim_coefficients(alpha, sigma, 1.0))
    return float(chain.mean[-1]), float(chain.var[-1])


def problem(chains, kernel=None, policy=None, steps=STEPS, seed=0, shape=(1,), **options):
    policy = policy or GaussianPolicy([MEAN], [STD])
    g = torch.Generator().manual_seed(seed)
    noise = NoiseBank([torch.randn(chains, *shape, generator=g, dtype=torch.float64) for _ in range(steps + 1)])
    levels, cond = policy.levels(steps, policy.size), policy.encode(["a"])
    return Problem(policy, kernel or DDIM(1.0), cond, levels, noise, particles=chains, batch=10**6, **options)


def settled(steering, chains=500, after=30, **options):
    """(chains, iterates) rewards once the chains have forgotten their start, and the run."""
    ended = run(problem(chains, **options), steering)
    return ended.history["reward"][after:, 0].T, ended


@pytest.mark.parametrize("step", [0.3, 0.9**0.5, 1.0])
@pytest.mark.parametrize("method", [PCN, PCNL])
def test_without_reward_noise_stays_gaussian_at_any_step(method, step):
    """Of plain Langevin the variance would be (1 − h/2)² + h = 1.2 at h = 0.9 after one step, and 1.29 in the end."""
    ended = run(problem(3000), method(Linear(0.0), 1.0, step, rounds=6, burn_in=0))
    z = torch.stack(ended.noise).flatten()
    assert abs(z.mean()) < 4 / len(z) ** 0.5
    assert abs(z.var() - 1) < 4 * (2 / len(z)) ** 0.5
    assert bool((ended.history["accepted"] == 1).all())
    if step == 1:
        assert (
            abs(torch.corrcoef(torch.stack([ended.noise[0].flatten(), problem(3000).bank()[0].flatten()]))[0, 1]) < 0.08
        )


@pytest.mark.parametrize(
    "steering",
    [
        PCN(Linear(), 0.8, 0.6),
        PCN(Linear(), 0.8, 1.0, burn_in=0),
        PCNL(Linear(), 0.8, 0.6),
        PCNL(Linear(), 0.8, 0.6, burn_in=0, accept=False),
    ],
    ids=repr,
)
def test_linear_rewards_tilt_exactly(steering):
    mean, var = exact()
    _, tilted_mean, tilted_var = tilted_linear(mean, var, 1 / 0.8)
    x, _ = settled(steering)
    assert abs(z_score(x.mean(1), tilted_mean)) < 4
    assert abs(z_score((x - tilted_mean).square().mean(1), tilted_var)) < 4


@pytest.mark.parametrize(
    ("steering", "right"),
    [
        (PCN(Quadratic(2.0, 1.5), 0.7, 0.7), True),
        (PCNL(Quadratic(2.0, 1.5), 0.7, 0.8), True),
        (PCNL(Quadratic(2.0, 1.5), 0.7, 0.8, clip=0.5), True),
        (PCNL(Quadratic(2.0, 1.5), 0.7, 0.8, burn_in=0, accept=False), False),
    ],
    ids=["pcn", "pcnl", "clipped", "unadjusted"],
)
def test_quadratic_rewards_tilt_exactly_if_proposals_may_be_rejected(steering, right):
    mean, var = exact()
    _, tilted_mean, tilted_var = tilted_quadratic(mean, var, 2.0 / 0.7, 1.5)
    distance, _ = settled(steering)  # −2·(x − 1.5)²
    expected = -2 * ((tilted_mean - 1.5) ** 2 + tilted_var)
    assert (abs(z_score(distance.mean(1), expected)) < 4) == right


@pytest.mark.parametrize("method", [PCN, PCNL])
def test_the_modes_of_a_mixture_get_their_tilted_weights(method):
    """A deterministic run of one noise, so that the exact law is an integral over a line."""
    policy = GaussianPolicy(MIXTURE.means[:, None], MIXTURE.variances.sqrt(), MIXTURE.weights)
    line = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    grid = problem(4001, ODE(), policy, 8)
    x = grid.sample([line]).x0.flatten()
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    weights = (normal_log_prob(line.flatten(), zero, one) + x / 2.0).softmax(0)
    x_of, _ = settled(method(Linear(), 2.0, 0.9), kernel=ODE(), policy=policy, steps=8)
    share = float(weights[x > 0].sum())
    assert 0.5 < share < 0.9  # the plain sample has 0.3
    assert abs(z_score((x_of > 0).double().mean(1), share)) < 4
    assert abs(z_score(x_of.mean(1), float((weights * x).sum()))) < 4


def test_tokens_follow_the_enumerated_tilted_law():
    policy, chains = Table(), 1500
    g = torch.Generator().manual_seed(0)
    table = torch.randn(3, 3, 3, generator=g, dtype=torch.float64)
    values = {state: table[state].item() for state in itertools.product(range(3), repeat=3)}
    levels = policy.levels(3)
    _, tilted = tilted_law(unmasking_law(policy.table, levels.alpha), table, 1.0)
    normals = [torch.randn(chains, 3, 4, generator=g) for _ in range(3)]

    def noise(i):
        return torch.full((chains, 3), 3) if i == 0 else normals[i - 1]

    one = Problem(policy, Unmask(), policy.encode(["a"]), levels, noise, particles=chains, batch=chains)
    ended = run(one, PCN(TokenReward(values), 1.0, 0.7, rounds=25, burn_in=8))
    index = (ended.x0 * torch.tensor([9, 3, 1])).sum(1)
    expected = tilted.flatten() * chains
    chi = ((torch.bincount(index, minlength=27) - expected).square() / expected).sum()
    assert chi < 54  # 26 degrees of freedom: p = 0.001


def test_acceptance_rates_are_those_of_the_closed_form():
    """Under the tilted law of a linear reward A ~ N(−v/2, v), v = 2·(1 − a)·Var(x)/β², accepted with 2Φ(−sqrt(v)/2)."""
    step, beta = 0.8, 0.5
    v = 2 * (1 - (1 - step**2) ** 0.5) * exact()[1] / beta**2
    _, ended = settled(PCN(Linear(), beta, step, burn_in=0))
    accepted = ended.history["accepted"][30:, 0].T
    assert abs(z_score(accepted.mean(1), math.erfc(v**0.5 / 2 / 2**0.5))) < 4
    _, ended = settled(PCNL(Linear(), beta, step, burn_in=0), chains=50)
    assert bool((ended.history["accepted"] == 1).all())


@pytest.mark.parametrize(("start", "target"), [(1.0, 0.8), (0.02, 0.5)])
def test_steps_adapt_in_the_burn_in_only(start, target):
    _, ended = settled(PCN(Linear(), 0.3, start, rounds=120, burn_in=60, target=target), chains=200)
    step, accepted = (ended.history[name][:, 0] for name in ("step", "accepted"))
    assert torch.equal(step[61:], step[61].expand_as(step[61:]))
    assert not torch.equal(step[60], step[59])
    assert abs(accepted[61:].mean() - target) < 0.06


def test_the_ratio_is_that_of_the_densities():
    """A = log π(z')·q(z'→z) − log π(z)·q(z→z'), for drifts that are no gradients, and noises that are not varied."""
    g = torch.Generator().manual_seed(0)
    chains, beta = 5, 0.7
    step = torch.tensor([0.1, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64)
    draw = lambda: torch.randn(chains, 2, 3, generator=g, dtype=torch.float64)  # noqa: E731
    here, there = (Chains(draw()[:, 0, 0], [draw(), draw()], draw(), draw(), [draw(), draw()]) for _ in range(2))
    a = (1 - step**2).sqrt()[:, None, None]

    def log_density(at, to):
        """log π(at) + log q(at → to)."""
        total = at.rewards / beta
        for z, drift, new in zip(at.noise, at.drift, to.noise, strict=True):
            mean = a * z + (1 - a) / beta * drift
            total = total - z.square().sum((1, 2)) / 2
            total = total - ((new - mean) / step[:, None, None]).square().sum((1, 2)) / 2
        return total

    chance = PCNL(Linear(), beta)._chance(here, there, step)
    exact = (log_density(there, here) - log_density(here, there)).clamp(max=0).exp()
    torch.testing.assert_close(chance, exact)
    assert 0 < chance.min() < 1


class Shy(Linear):
    """Judges nothing above a bound."""

    def measure(self, media, prompts):
        scores = super().measure(media, prompts)
        return scores.masked_fill(scores > 0.8, torch.nan)


@pytest.mark.parametrize("method", [PCN, PCNL])
def test_what_is_not_judged_is_never_moved_to(method):
    plain = run(problem(200), method(Shy(), 0.3, rounds=1))
    ended = run(problem(200), method(Shy(), 0.3, 0.6, rounds=20))
    assert ended.failures["Shy"] > plain.failures["Shy"] > 0
    judged = ended.rewards > -torch.inf
    assert bool((ended.rewards[judged] <= 0.8).all())
    assert judged.double().mean() > 0.97


def test_a_gradient_that_is_not_finite_is_no_drift():
    class Kinked(Linear):
        def measure(self, media, prompts):
            return super().measure(media, prompts) + 0 * (media * (media > 0.5)).flatten(1)[:, 0].sqrt()

    ended = run(problem(50), PCNL(Kinked(), 0.5, rounds=8))
    assert not ended.failures  # nothing was made from noise that is not finite
    assert bool((ended.history["accepted"][1:].sum(0) > 0).all())


def test_proposals_of_which_none_is_judged_are_rejected():
    """Then there is no graph at all, as where no sample is finite."""

    class Silent(Linear):
        calls = 0

        def measure(self, media, prompts):
            self.calls += 1
            return super().measure(media, prompts) if self.calls != 2 else torch.full((len(media),), torch.nan)

    ended = run(problem(6), PCNL(Silent(), 0.5, rounds=4))
    rewards = ended.history["reward"]
    assert torch.equal(rewards[1], rewards[0])
    assert not torch.equal(rewards[2], rewards[1])
    assert ended.failures == {"Silent": 6}


def test_origen_is_a_chain_that_accepts_all():
    """z' = sqrt(1 − h)·z + η·h·clip(∇R) + sqrt(h)·ξ, h = 0.3, η = 0.8, elements clipped at 0.2."""
    h, eta, clip = 0.3, 0.8, 0.2
    beta = (1 - (1 - h) ** 0.5) / (eta * h)
    how = {"beta": beta, "step": h**0.5, "burn_in": 0, "clip": clip, "accept": False}
    reward = Quadratic(0.3, 1.0)
    one = problem(6, ODE(), GaussianPolicy([[0.5, 1.0]], [0.8]), 8, shape=(2,))
    (z,) = one.bank()
    start = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(reward(one.sample([start], grad=lambda i, steps: True).x0, []).sum(), start)
    assert bool((slope.abs() > clip).any())
    assert bool((slope.abs() < clip).any())
    moved = run(one, PCNL(reward, rounds=2, **how)).noise[0]
    still = run(one, PCNL(Linear(0.0), rounds=2, **how)).noise[0]  # sqrt(1 − h)·z + sqrt(h)·ξ
    torch.testing.assert_close(moved - still, eta * h * slope.clamp(-clip, clip))
    best = run(one, PCNL(reward, rounds=9, keeps="best", **how))
    assert torch.equal(best.rewards, best.history["reward"].amax(0))


def test_the_initial_noise_alone_may_move():
    one = problem(8)
    ended = run(one, PCN(Linear(), 1.0, noises="initial", rounds=9))
    assert not torch.equal(ended.noise[0], one.bank()[0])
    assert all(torch.equal(a, b) for a, b in zip(ended.noise[1:], one.bank()[1:], strict=True))


class Stubborn(Linear):
    differentiable = False


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda: PCN(beta=0.0), "greedy"),
        (lambda: PCN(beta=math.inf), "finite"),
        (lambda: PCN(step=0.0), "share of fresh noise"),
        (lambda: PCN(step=1.2), "share of fresh noise"),
        (lambda: PCN(rounds=0), "rounds"),
        (lambda: PCN(target=1.0), "acceptance"),
        (lambda: PCNL(clip=0.0), "clip"),
        (lambda: PCNL(accept=False), "burn_in"),
        (lambda: run(problem(2), PCN()), "needs a reward"),
        (lambda: run(problem(2), PCNL(Stubborn())), "use PCN"),
    ],
)
def test_bad_input(how, message):
    with pytest.raises(ValueError, match=message):
        how()


def test_tokens_have_no_gradient_and_start_masked():
    policy = Table()
    masks = SeededNoise([0, 1], (3,), dtype=torch.int64)
    one = Problem(policy, Unmask(), policy.encode(["a"]), policy.levels(3), masks, particles=2)
    with pytest.raises(ValueError, match="use PCN"):
        run(one, PCNL(Linear()))
    with pytest.raises(ValueError, match="all masks"):
        run(one, PCN(Linear(), noises="initial"))


@pytest.mark.slow
@pytest.mark.parametrize("steering", [PCN(beta=0.5, step=0.7), PCNL(beta=0.5, step=0.5)], ids=["pcn", "pcnl"])
def test_chains_on_the_embedded_few_step_model_agree_with_weighted_samples(steering):
    """E[r] under the tilted law: of 512 plain samples weighted by exp(r/beta), and of chains."""
    policy, reward, chains = align.load_policy("tiny-turbo", device="cpu"), CrossEncoder(), 24
    how = {"steps": 2, "particles": chains, "plain": False, "gold": None, "batch": 64}
    prompt = "an orange ring left of a black square"
    free = align.steer(policy, prompt, BestOfN(reward), **{**how, "particles": 512, "batch": 512, "seed": 1000})
    r = torch.tensor([s.scores["CrossEncoder"] for s in free.samples], dtype=torch.float64)
    w = (r / 0.5).softmax(0)
    tilted = float((w * r).sum())
    error = float((w * (r - tilted)).square().sum().sqrt())
    seen = []
    align.steer(policy, prompt, steering.bind(reward), **how, seen=lambda iterate: seen.append(iterate.rewards))
    means = torch.cat(seen[25:]).mean(0)  # (chains,)
    assert tilted > r.mean() + 4 * error
    assert abs(means.mean() - tilted) < 4 * math.hypot(error, means.std() / chains**0.5)
