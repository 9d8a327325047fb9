"""Gradient guidance: exact where theory says so, legal as a proposal whatever it does, and never aware of the batch."""

import pytest
import torch

from align.description import build, describe
from rewards import Brightness, Sharpness, Weighted
from samplers import (
    CPS,
    DDIM,
    FREE,
    ODE,
    Backward,
    BestOfN,
    CoDe,
    Compose,
    Consistency,
    FeynmanKac,
    FlowSDE,
    Guided,
    SeededNoise,
    Steering,
    TimeTravel,
    Value,
    always,
    rollout,
)
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from samplers.levels import Levels, diffuse, diffuse_again
from samplers.steering import Tilt, scheduled
from tests.conftest import Linear, Quadratic, Table, build_pipeline, z_score
from tests.oracles import cosine_levels, ddim_coefficients, gaussian_chain, tilted_quadratic
from tests.samplers.test_smc import chain, run

T, DIM, MEAN, STD = 6, 3, 0.4, 0.7
SCORE = {"form": "score"}


def levels_of(policy, steps=T):
    """The policy's levels; of a flow, those from where there is some signal."""
    if policy.frame == "vp":
        return policy.levels(steps)
    t = torch.linspace(0.95, 0, steps + 1, dtype=torch.float64)
    return Levels(t, 1 - t, t)


def sample(steering, policy=None, kernel=None, seeds=range(4), steps=T, particles=1, **options):
    policy = policy or GaussianPolicy([MEAN] * DIM, [STD])
    levels, noise = levels_of(policy, steps), SeededNoise(seeds, (DIM,), dtype=torch.float64)
    cond = policy.encode([""] * (len(seeds) // particles))
    return rollout(policy, kernel or DDIM(1.0), cond, levels, noise, steering=steering, particles=particles, **options)


def first_move(steering, **options):
    """How far the first step's mean moves."""
    moved, free = (sample(how, record="path", **options).latents[:, 1] for how in (steering, FREE))
    return moved - free


def rms(x):
    return x.flatten(1).square().mean(1).sqrt()


KERNELS = [(k, "vp") for k in (ODE(), DDIM(1.0), DDIM(0.5), CPS(0.7), Consistency())]
KERNELS += [(k, "flow") for k in (ODE(), DDIM(1.0), FlowSDE(0.7))]


@pytest.mark.parametrize(("kernel", "frame"), KERNELS, ids=repr)
def test_a_linear_reward_guides_the_score_to_the_tilted_data(kernel, frame):
    """On Gaussian data exp(w·a·x) moves the mean by w·a·s²: every guided sample is the sample of that model at the same noise."""
    weight, a = 1.9, 0.5
    policy = GaussianPolicy([MEAN] * DIM, [STD], frame=frame)
    tilted = GaussianPolicy([MEAN + weight * a * STD**2] * DIM, [STD], frame=frame)
    guided = sample(Guided(Linear(a), weight, form="score"), policy, kernel)
    assert torch.allclose(guided.x0, sample(FREE, tilted, kernel).x0, atol=1e-10)
    assert not torch.allclose(guided.x0, sample(FREE, policy, kernel).x0, atol=0.1)


def test_law_and_score_agree_as_steps_shrink():
    """One step from the middle of runs of ever more steps: the gap falls in proportion to their length."""
    policy, noise = GaussianPolicy([MEAN] * DIM, [STD]), SeededNoise(range(4), (DIM,), dtype=torch.float64)

    def ends(steering, levels):
        return rollout(policy, DDIM(1.0), policy.encode([""] * 4), levels, noise, steering=steering).x0

    gaps = []
    for steps in (20, 200, 2000):
        middle = policy.levels(steps)[steps // 2 : steps // 2 + 2]
        law, score, free = (ends(how, middle) for how in (Guided(Linear(), 1.0), Guided(Linear(), 1.0, **SCORE), FREE))
        gaps.append(float(((score - free) / (law - free) - 1).abs().max()))
    assert gaps[2] < 0.005
    assert gaps[0] > 8 * gaps[1] > 64 * gaps[2]


def test_state_guidance_moves_the_state_itself():
    move = first_move(Guided(Linear(0.5), 3.0, form="state", through="x0"))
    alpha, sigma = levels_of(GaussianPolicy([0.0]))[0].like(move)
    assert torch.allclose(move, (3.0 * 0.5 * alpha / (alpha**2 + sigma**2)).expand_as(move))


class Both(Steering):
    """Asks for both gradients of a reward."""

    def __init__(self, reward):
        self.reward, self.seen = reward, []

    def tilting(self, progress):
        return [Tilt(self.reward, "x0"), Tilt(self.reward, "network")]

    def propose(self, ctx, base):
        pair = [ctx.gradient(self.reward, through) for through in ("network", "x0")]
        self.seen.append((ctx.step, ctx.clean.x0, *pair))
        return base


def test_the_gradient_at_the_estimate_is_that_through_the_network_up_to_the_jacobian():
    """The Jacobian of the denoiser of N(m, s²) is s²·α/(s²·α² + σ²) exactly, from one decode and one reward a step."""
    both, reward = Both(Quadratic(0.7, 1.0)), Quadratic(0.7, 1.0)
    ended = sample(both)
    assert ended.ledger.counts == {"network": 4 * T, "decode": 4 * T, "reward": 4 * T, "gradient": 4 * T}
    for step, x0, network, near in both.seen:
        at = ended.levels[step]
        jacobian = STD**2 * at.alpha / (STD**2 * at.alpha**2 + at.sigma**2)
        assert torch.allclose(near, -2 * reward.a * (x0 - reward.b), atol=1e-6)
        assert torch.allclose(network, jacobian * near, atol=1e-12)


@pytest.mark.parametrize("form", ["law", "score"])
@pytest.mark.parametrize("frame", ["vp", "flow"])
def test_mpgd_is_guidance_through_the_network_on_data_of_unit_variance(form, frame):
    policy = GaussianPolicy([MEAN] * DIM, [1.0], frame=frame)
    runs = [
        sample(Guided(Quadratic(0.3, 1.0), 0.8, form=form, through=through), policy) for through in ("network", "x0")
    ]
    assert torch.allclose(runs[0].x0, runs[1].x0, atol=1e-10)
    assert [r.ledger.counts["gradient"] for r in runs] == [4 * (T - (form == "law")), 0]


@pytest.mark.parametrize("form", ["law", "score", "state"])
def test_a_normalised_gradient_moves_every_sample_by_the_scale(form):
    policy, kernel = GaussianPolicy([MEAN] * DIM, [STD]), DDIM(1.0)
    move = first_move(Guided(Quadratic(7.0, 1.0), 0.3, form=form, normalise="unit"), policy=policy, kernel=kernel)
    levels, x = levels_of(policy), SeededNoise(range(4), (DIM,), dtype=torch.float64)(0)
    std, eps = kernel.stds(levels)[0], policy.denoise(x, levels[0], policy.encode([""] * 4)).eps
    pull = levels[1].alpha - (levels[1].sigma ** 2 - std**2).sqrt() * levels[0].alpha / levels[0].sigma
    unit = {"law": std.expand(4), "score": pull * levels[0].sigma / levels[0].alpha * rms(eps), "state": torch.ones(4)}
    assert torch.allclose(rms(move), 0.3 * unit[form].double(), rtol=1e-5)


def test_a_normalised_score_changes_the_noise_prediction_by_the_scale():
    """FreeDoM's rule: ε moves by a share of its own size, which a deterministic step shows directly."""
    policy = GaussianPolicy([MEAN] * DIM, [STD])
    levels, x = levels_of(policy), SeededNoise(range(4), (DIM,), dtype=torch.float64)(0)
    clean = policy.denoise(x, levels[0], policy.encode([""] * 4))
    ended = sample(Guided(Quadratic(7.0, 1.0), 0.02, form="score", normalise="unit"), kernel=ODE(), record="path")
    uphill = -(clean.x0 - 1.0) / rms(clean.x0 - 1.0)[:, None]
    eps = clean.eps - 0.02 * rms(clean.eps)[:, None] * uphill
    x0 = (x - levels[0].sigma * eps) / levels[0].alpha
    assert torch.allclose(ended.latents[:, 1], levels[1].alpha * x0 + levels[1].sigma * eps, atol=1e-6)


@pytest.mark.parametrize("through", ["network", "x0"])
def test_a_normalised_score_is_the_published_step(through):
    """CLIP guidance of FreeDoM (gradient of x) and MPGD (of x0): DDPM's mean moves by c1·σ/α·rms(ε)·0.02 along it."""
    policy = GaussianPolicy([[0.5] * DIM, [-1.0] * DIM], [0.8, 0.3], [0.6, 0.4])
    levels, noise = levels_of(policy), SeededNoise(range(4), (DIM,), dtype=torch.float64)
    x, cond = noise(0).requires_grad_(), policy.encode([""] * 4)
    clean = policy.denoise(x, levels[0], cond)
    loss = (clean.x0 - 1.0).norm(dim=1).sum()
    (gradient,) = torch.autograd.grad(loss, x if through == "network" else clean.x0, retain_graph=True)
    at, to = levels.alpha[0] ** 2, levels.alpha[1] ** 2  # the published ᾱ_t and ᾱ_s
    c1, c2 = to.sqrt() * (1 - at / to) / (1 - at), (at / to).sqrt() * (1 - to) / (1 - at)
    c3 = ((1 - to) * (1 - at / to) / (1 - at)).sqrt()
    rho = 0.02 * rms(clean.eps) * (1 - at).sqrt() / at.sqrt() * c1 / rms(gradient)
    published = c1 * clean.x0 + c2 * x + c3 * noise(1) - rho[:, None] * gradient
    ended = sample(
        Guided(Quadratic(1.0, 1.0), 0.02, form="score", normalise="unit", through=through), policy, record="path"
    )
    assert torch.allclose(ended.latents[:, 1], published, atol=1e-7)


@pytest.mark.parametrize("form", ["law", "score", "state"])
def test_a_cap_bounds_the_move_and_keeps_its_direction(form):
    reward = Quadratic(2.0, 1.0)
    free = first_move(Guided(reward, 1.0, form=form))
    unit = rms(first_move(Guided(reward, 1.0, form=form, normalise="unit")))
    cap = float((rms(free) / unit).median())
    capped = first_move(Guided(reward, 1.0, form=form, cap=cap))
    assert torch.allclose(rms(capped), torch.minimum(rms(free), cap * unit), rtol=1e-6)
    assert 0 < int((rms(capped) < 0.999 * rms(free)).sum()) < 4
    assert torch.allclose(torch.cosine_similarity(capped, free), torch.ones(4, dtype=torch.float64))


WAYS = {
    "law": Guided(Quadratic(2.0, 1.0), 0.5),
    "unit": Guided(Quadratic(2.0, 1.0), 0.1, form="score", normalise="unit"),
    "cap": Guided(Quadratic(2.0, 1.0), 1.0, form="score", cap=0.1, through="x0"),
    "backward": Backward(Quadratic(2.0, 1.0), steps=3, rate=0.05),
    "again": Compose(Guided(Quadratic(2.0, 1.0), 0.1, form="score", normalise="unit"), TimeTravel(2)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_sample_does_not_depend_on_its_batch(way):
    together = sample(WAYS[way], seeds=[5, 1, 8]).x0
    assert not torch.equal(together, sample(FREE, seeds=[5, 1, 8]).x0)
    for rows in ([1], [2, 0]):
        alone = sample(WAYS[way], seeds=[[5, 1, 8][r] for r in rows]).x0
        assert torch.equal(alone, together[rows])


class Gappy(Linear):
    """Cannot judge samples with a small sum."""

    def measure(self, media, prompts):
        value = media.flatten(1).sum(1)
        return value.masked_fill(value <= 1.2, torch.nan)


@pytest.mark.parametrize("through", ["network", "x0"])
def test_samples_without_a_gradient_go_on_unguided_and_are_counted(through):
    guided = Guided(Gappy(), 1.0, stop=0.1, through=through)
    move = first_move(guided, seeds=range(12))
    policy, x = GaussianPolicy([MEAN] * DIM, [STD]), SeededNoise(range(12), (DIM,), dtype=torch.float64)(0)
    judged = policy.denoise(x, levels_of(policy)[0], policy.encode([""] * 12)).x0.sum(1) > 1.2
    assert 0 < int(judged.sum()) < 12
    assert torch.equal(move.abs().amax(1) > 0, judged)
    assert sample(guided, seeds=range(12)).failures == {"gradient of Gappy": int((~judged).sum())}
    assert sample(Guided(Linear(), 1.0)).failures == {}


def test_a_gradient_of_zero_moves_nothing():
    for options in ({}, {"normalise": "unit"}, {"cap": 0.1}):
        assert torch.equal(sample(Guided(Linear(0.0), 1.0, **options)).x0, sample(FREE).x0)


def test_schedules():
    """DAS's k = 0.008 is full at step 87, and at no step of a run of 50: there it ends at 0.48 and the last weight jumps."""
    assert [scheduled("constant", i, 4, 0.5) for i in range(4)] == [1, 1, 1, 1]
    assert [scheduled("linear", i, 4) for i in range(4)] == [0.25, 0.5, 0.75, 1]
    assert [scheduled("linear", i, 4, 0.5) for i in range(4)] == [0.5, 1, 1, 1]
    published = [min(1.008 ** (i + 1) - 1, 1) for i in range(100)]
    assert max(abs(a - scheduled("exp", i, 100, 0.87)) for i, a in enumerate(published)) < 1e-3
    assert scheduled("exp", 43, 50, 0.87) == 1.0 and published[48] < 0.48


@pytest.mark.parametrize("tempering", ["linear", "exp"])
def test_tempering_scales_the_move(tempering):
    whole, part = (first_move(Guided(Linear(), 2.0, tempering=how, full_at=0.5)) for how in ("constant", tempering))
    assert torch.allclose(part, scheduled(tempering, 0, T, 0.5) * whole)


# Exactness under weights


def evidence(steering, groups=3000, particles=8, **options):
    """Ẑ/Z on the chain of spec 8.2: r = −4 (x − 1.6)² on a chain that ends in noise."""
    policy, levels, mean, var = chain(0.999)
    log_z, *_ = tilted_quadratic(mean, var, 4.0, 1.6)
    ended = run(steering, groups, particles, policy=policy, levels=levels, **options)
    return (ended.log_z - log_z).exp()


def weighed(*proposals, **options):
    """The proposals under DAS's weights: exponential tempering, SSP, ESS 0.5."""
    how = FeynmanKac(REWARD, 1.0, **{"resampler": "ssp", "tempering": "exp", **options})
    for proposal in proposals:
        how = Compose(proposal, how)
    return how


REWARD = Quadratic(4.0, 1.6)
PROPOSALS = {
    "das": Guided(REWARD, 1.0, tempering="exp"),
    "mpgd": Guided(REWARD, 1.0, tempering="exp", through="x0"),
    "score": Guided(REWARD, 0.4, tempering="exp", form="score"),
    "state": Guided(REWARD, 0.01, start=0.3, form="state"),
    "unit": Guided(REWARD, 0.5, normalise="unit"),
    "score of the noise": Guided(REWARD, 0.1, form="score", normalise="unit", through="x0"),
    "cap": Guided(REWARD, 1.0, cap=0.4),
    "window": Guided(REWARD, 0.6, start=0.35, stop=0.75),
    "backward": Backward(REWARD, steps=2, rate=0.005, start=0.3),
    "astray": Guided(Linear(-1.0), 0.5),
}


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_any_move_is_a_legal_proposal(proposal):
    ratios = evidence(weighed(PROPOSALS[proposal]))
    assert abs(z_score(ratios, 1.0)) < 3.5
    assert ratios.var() < 1  # so that three percent would be seen


def test_das_needs_a_tenth_of_the_particles():
    """Spec 8.2, there with a quadratic schedule: relative variance 0.077 against 0.354."""
    plain, das = evidence(weighed()), evidence(weighed(PROPOSALS["das"]))
    assert das.var() < 0.05 and 0.3 < plain.var() < 0.55
    assert das.var() < 0.1 * plain.var()


def test_an_uncorrected_proposal_is_caught():
    """The test above could fail: without log p/q the evidence is wrong."""

    class Silent(FeynmanKac):
        weighs = property(lambda self: False)

    how = Compose(PROPOSALS["das"], Silent(REWARD, 1.0, resampler="ssp", tempering="exp"))
    assert abs(z_score(evidence(how, 500), 1.0)) > 20


class KeepsTwist(FeynmanKac):
    """The published DAS code: after resampling, a child is weighed against the twist of whoever was in its place."""

    def _potential(self, ctx, value, judged, proposals):
        if ctx.step > 0:
            ctx.rows["spent"] = self.last
        step = super()._potential(ctx, value, judged, proposals)
        self.last = ctx.rows["spent"]
        return step


class KeepsGradient(Compose):
    """The published DAS code: a child is moved by the gradient of whoever was in its place. Legal, but noisier."""

    def select(self, ctx):
        chosen = super().select(ctx)
        self.kept = ctx._gradients
        return chosen

    def propose(self, ctx, base):
        ctx._gradients = self.kept
        return super().propose(ctx, base)


def test_what_is_not_reindexed_is_caught():
    """When every step resamples: 35 instead of 1 by the twist of another parent, noisier by its gradient (spec 8.2)."""
    always = {"resampler": "multinomial", "ess_threshold": 1.0, "tempering": "linear"}
    guided = Guided(REWARD, 1.0, tempering="linear")
    right = evidence(Compose(guided, FeynmanKac(REWARD, 1.0, **always)))
    twist = evidence(Compose(guided, KeepsTwist(REWARD, 1.0, **always)))
    gradient = evidence(KeepsGradient(guided, FeynmanKac(REWARD, 1.0, **always)))
    assert abs(z_score(right, 1.0)) < 3.5 and abs(z_score(gradient, 1.0)) < 3.5
    assert twist.mean() > 10
    assert gradient.var() > 1.3 * right.var()


def test_deterministic_steps_are_left_alone_under_weights():
    """Half of the steps have no density: under weights they are not moved, and the evidence stays right."""
    alpha, sigma = cosine_levels(10, 0.999)
    noisy = [i % 2 == 0 for i in range(10)]
    steps = [ddim_coefficients(alpha, sigma, float(n)) for n in noisy]
    law = gaussian_chain(alpha, sigma, 0.5, 0.8, lambda i: steps[i](i))
    log_z, *_ = tilted_quadratic(float(law.mean[-1]), float(law.var[-1]), 4.0, 1.6)
    policy, levels, _, _ = chain(0.999)
    for proposal in (PROPOSALS["score"], PROPOSALS["backward"]):
        ended = run(weighed(proposal), 3000, 8, policy=policy, levels=levels, kernel=DDIM(1.0, noisy_steps=noisy))
        assert abs(z_score((ended.log_z - log_z).exp(), 1.0)) < 3.5
        chosen = run(Compose(proposal, BestOfN(REWARD)), 4, 2, policy=policy, levels=levels, kernel=ODE())
        assert not torch.equal(chosen.x0, run(FREE, 4, 2, policy=policy, levels=levels, kernel=ODE()).x0)


# Several rewards


class Sum(Linear):
    """0.5·a + b."""

    def __init__(self, a, b):
        super().__init__()
        self.parts = (a, b)

    def measure(self, media, prompts):
        a, b = (part.measure(media, prompts) for part in self.parts)
        return 0.5 * a + b


@pytest.mark.parametrize("form", ["law", "score"])
@pytest.mark.parametrize("through", ["network", "x0"])
def test_several_rewards_are_one_weighted_sum_and_share_their_decodes(form, through):
    a, b, options = Quadratic(0.5, 1.0), Linear(-0.3), {"form": form, "through": through}
    apart = sample(Compose(Guided(a, 1.0, **options), Guided(b, 2.0, **options)))
    joined = sample(Guided(Sum(a, b), 2.0, **options))
    assert torch.allclose(apart.x0, joined.x0, atol=1e-6)
    guided = T - (form == "law")  # the last step is deterministic
    assert apart.ledger.counts["decode"] == joined.ledger.counts["decode"] == 4 * guided
    assert apart.ledger.counts["reward"] == 2 * joined.ledger.counts["reward"] == 8 * guided


def test_a_reward_that_only_weighs_shares_the_decode_of_the_one_that_guides():
    ended = sample(Compose(Guided(Linear(), 1.0), FeynmanKac(Quadratic(1.0, 0.0), 1.0)), particles=4)
    assert ended.ledger.counts["decode"] == 4 * T  # T − 1 noisy steps and the end
    assert ended.ledger.counts["reward"] == 4 * (2 * (T - 1) + 1)


def test_a_value_guides_by_its_own_gradient():
    """Flow-NRG: guided by the exact soft value of a linear reward, the score is that of the tilted data."""
    policy = GaussianPolicy([MEAN] * DIM, [STD], frame="flow")

    class Exact(Value):
        def forward(self, x, at, cond, prompts):
            alpha, sigma = at.like(x)
            return (0.5 * STD**2 * alpha / (STD**2 * alpha**2 + sigma**2) * x).sum(1)

    tilted = GaussianPolicy([MEAN + 0.5 * 1.9 * STD**2] * DIM, [STD], frame="flow")
    guided = sample(Guided(value=Exact(), scale=1.9, form="score"), policy, ODE())
    assert torch.allclose(guided.x0, sample(FREE, tilted, ODE()).x0, atol=1e-10)
    assert guided.ledger.counts["decode"] == guided.ledger.counts["gradient"] == 0
    with pytest.raises(ValueError, match="leave out through"):
        Guided(value=Exact(), through="x0")


# Walking steps again


class Exact(DDIM):
    """The exact reverse kernel of N(MEAN, STD²): DDPM's, plus what the posterior of x0 adds to its mean."""

    def std(self, now, to):
        ddpm = super().std(now, to)
        pull = to.alpha - (to.sigma**2 - ddpm**2).clamp(min=0).sqrt() * now.alpha / now.sigma
        posterior = STD**2 * now.sigma**2 / (STD**2 * now.alpha**2 + now.sigma**2)
        return (ddpm**2 + pull**2 * posterior).sqrt()

    def noise_weight(self, now, to, std):
        return (to.sigma**2 - super().std(now, to) ** 2).clamp(min=0).sqrt()


def test_noising_on_meets_the_marginal_of_the_noisier_level():
    levels = GaussianPolicy([0.0]).levels(8)
    x0, e, z = (torch.tensor([v], dtype=torch.float64) for v in (1.0, 0.0, 0.0))
    for now, to in ((5, 2), (8, 7), (3, 0)):
        signal = diffuse_again(diffuse(x0, e, levels[now]), z, levels[now], levels[to])
        assert torch.allclose(signal, levels[to].alpha * x0)
        noise = [
            diffuse_again(diffuse(0 * x0, e + i, levels[now]), z + j, levels[now], levels[to])
            for i, j in ((1, 0), (0, 1))
        ]
        assert torch.allclose(sum(n**2 for n in noise), levels[to].sigma ** 2)


@pytest.mark.parametrize("repeats", [0, 3])
def test_walking_steps_again_keeps_the_law_of_an_exact_chain(repeats):
    """From N(0, 1) at a level that is nearly pure noise to N(MEAN, STD²), repeats or not."""
    how = Compose(Guided(Linear(0.0), 1.0), TimeTravel(repeats)) if repeats else FREE
    x = sample(how, kernel=Exact(), seeds=range(3000)).x0.flatten()
    n = len(x)
    assert abs(float(x.mean()) - MEAN) < 4 * STD / n**0.5 + 0.01
    assert abs(float(x.var()) / STD**2 - 1) < 4 * (2 / n) ** 0.5 + 0.002


def test_walking_steps_again_follows_the_chain_of_its_steps():
    """DDPM's steps are not exact, so repeats change the law, and how is known: mean and variance step by step."""
    policy, repeats, steps = GaussianPolicy([MEAN] * DIM, [STD]), 2, 3
    levels = policy.levels(steps)
    law = gaussian_chain(levels.alpha, levels.sigma, MEAN, STD, ddim_coefficients(levels.alpha, levels.sigma, 1.0))
    mean, var = 0.0, 1.0
    for i in range(steps):
        for again in range(repeats + 1):
            mean = float(law.slope[i]) * mean + float(law.offset[i])
            var = float(law.slope[i]) ** 2 * var + float(law.noise[i])
            if again < repeats:
                keep = float(levels.alpha[i] / levels.alpha[i + 1])
                mean = keep * mean
                var = keep**2 * var + float(levels.sigma[i] ** 2 - keep**2 * levels.sigma[i + 1] ** 2)
    x = sample(TimeTravel(repeats), seeds=range(3000), steps=steps).x0.flatten()
    assert abs(float(x.mean()) - mean) < 4 * (var / len(x)) ** 0.5
    assert abs(float(x.var()) / var - 1) < 4 * (2 / len(x)) ** 0.5
    assert abs(float(law.var[-1]) / var - 1) > 5 * (2 / len(x)) ** 0.5


def test_steps_are_repeated_within_the_window_only():
    assert torch.equal(sample(TimeTravel(0)).x0, sample(FREE).x0)
    ended = sample(TimeTravel(3, start=0.4, stop=0.7))  # steps 3 and 4 of 6
    assert ended.ledger.counts["network"] == 4 * (T + 2 * 3)
    both = Compose(TimeTravel(1, stop=0.5), TimeTravel(2, start=0.5))
    assert sample(both).ledger.counts["network"] == 4 * (3 * 2 + 3 * 3)


def test_rows_are_selected_once_a_step():
    how = Compose(TimeTravel(2), CoDe(Linear(), block=2))
    ended = sample(how, seeds=range(8), particles=4)
    assert ended.selected_at == (2, 4)
    assert ended.ledger.counts["reward"] == 8 * 3


def test_time_travel_refuses_weights_records_and_training():
    with pytest.raises(ValueError, match="no density"):
        sample(Compose(TimeTravel(1), FeynmanKac(Linear(), 1.0)), particles=4)
    with pytest.raises(ValueError, match="no log-probability"):
        sample(TimeTravel(1), record="path")
    with pytest.raises(ValueError, match="no log-probability"):
        sample(TimeTravel(1), grad=always)
    sample(Compose(TimeTravel(1), BestOfN(Linear())), particles=4)


# The backward form


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.1), (7, 0.1), (60, 0.3)])
def test_ascent_follows_its_geometric_series(steps, rate):
    """On −a|x − b|² m ascents cover 1 − (1 − 2·a·rate)^m of the way from the estimate to b."""
    a, b, policy = 0.8, 1.5, GaussianPolicy([MEAN] * DIM, [STD])
    move = first_move(Backward(Quadratic(a, b), steps, rate), policy=policy)
    levels, x = levels_of(policy), SeededNoise(range(4), (DIM,), dtype=torch.float64)(0)
    x0 = policy.denoise(x, levels[0], policy.encode([""] * 4)).x0
    std = DDIM(1.0).stds(levels)[0]
    pull = levels[1].alpha - (levels[1].sigma ** 2 - std**2).sqrt() * levels[0].alpha / levels[0].sigma
    assert torch.allclose(move, pull * (1 - (1 - 2 * a * rate) ** steps) * (b - x0), atol=1e-6)


@pytest.mark.parametrize("kernel", [ODE(), DDIM(1.0)], ids=repr)
@pytest.mark.parametrize("forward", [None, Guided(Quadratic(0.8, 1.5), 0.7, form="score")])
def test_many_ascents_end_at_the_optimum(kernel, forward):
    backward = Backward(Quadratic(0.8, 1.5), 80, 0.3)
    ended = sample(backward if forward is None else Compose(forward, backward), kernel=kernel)
    assert torch.allclose(ended.x0, torch.full_like(ended.x0, 1.5), atol=1e-6)


def test_ascent_starts_where_forward_guidance_led():
    """One ascent from the forward estimate: Δ = δ + rate·∇r(x0 + δ)."""
    a, b, weight, rate = 0.8, 1.5, 0.7, 0.1
    forward = Guided(Quadratic(a, b), weight, form="score")
    led = first_move(forward)
    both = first_move(Compose(forward, Backward(Quadratic(a, b), 1, rate)))
    alone = first_move(Backward(Quadratic(a, b), 1, rate))
    assert torch.allclose(both, led * (1 - 2 * a * rate) + alone, atol=1e-6)


def test_ascent_costs_decodes_but_no_network():
    ended = sample(Backward(Linear(), 3, 0.1, start=0.5))
    assert ended.ledger.counts == {"network": 4 * T, "decode": 36, "reward": 36, "gradient": 0}


# What cannot work


def test_guidance_refuses_what_it_cannot_do():
    hard = Linear()
    hard.differentiable = False
    for steering in (Guided(hard), Backward(hard)):
        with pytest.raises(ValueError, match="Linear has none: choose by it instead"):
            sample(steering)
    with pytest.raises(ValueError, match="or guide deterministic steps with form='score'"):
        sample(Guided(Linear()), kernel=ODE())
    with pytest.raises(ValueError, match="tilts stochastic steps, and this kernel has none"):
        sample(Compose(Guided(Linear(), **SCORE), FeynmanKac(Linear(), 1.0, "terminal")), kernel=ODE())
    with pytest.raises(ValueError, match="needs a reward"):
        sample(Backward())
    policy = Table()
    for steering in (Guided(Linear()), Backward(Linear()), TimeTravel()):
        with pytest.raises(ValueError, match="this model makes tokens"):
            rollout(policy, DDIM(1.0), policy.encode([""]), policy.levels(3), lambda i: torch.full((1, 3), 3),
                    steering=steering)  # fmt: skip


@pytest.mark.parametrize("how", [Guided(scale=2.0, cap=0.3), Backward(steps=3), TimeTravel(4, 0.1, 0.5)])
def test_settings_are_written_and_read_back(how):
    again = build(describe(how))
    assert type(again) is type(how) and vars(again) == vars(how)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Guided(cap=0.0), "cap must be"),
        (lambda: Guided(full_at=0.0), "full_at"),
        (lambda: FeynmanKac(full_at=1.5), "full_at"),
        (lambda: Guided(start=0.5, stop=0.5), "fractions of the run"),
        (lambda: Backward(steps=0), "steps must be"),
        (lambda: Backward(start=-1), "fractions of the run"),
        (lambda: TimeTravel(-1), "repeats must be"),
        (lambda: TimeTravel(1, 0.7, 0.2), "fractions of the run"),
    ],
)
def test_arguments_out_of_range(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_score_guidance_says_nothing_without_signal():
    """A rectified flow starts at α = 0, where the estimate does not depend on the state."""
    policy = GaussianPolicy([MEAN] * DIM, [STD], frame="flow")
    noise, cond, levels = SeededNoise(range(4), (DIM,), dtype=torch.float64), policy.encode([""] * 4), policy.levels(T)
    free, guided = (
        rollout(policy, ODE(), cond, levels, noise, steering=how, record="path").latents
        for how in (FREE, Guided(Linear(), 1.0, **SCORE))
    )
    assert torch.equal(free[:, 1], guided[:, 1])
    assert guided.isfinite().all() and not torch.equal(free[:, 2], guided[:, 2])


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return StableDiffusion(build_pipeline(tmp_path_factory.mktemp("sd")))


def on_network(policy, steering, seeds=range(2)):
    cond = policy.encode(["a"]).with_guidance(2.0)
    noise = SeededNoise(seeds, policy.shape(policy.size))
    how = {"particles": len(seeds), "steering": steering, "prompts": ["a"]}
    return rollout(policy, DDIM(1.0), cond, policy.levels(3), noise, **how)


REAL = {
    "law": Guided(Brightness(), 300.0),
    "cap": Guided(Brightness(), 1e4, form="score", cap=0.3, through="x0"),
    "backward": Backward(Brightness(), 2, 100.0),
    "again": Compose(Guided(Brightness(), 0.3, form="score", normalise="unit"), TimeTravel(1)),
}


@pytest.mark.parametrize("way", REAL)
def test_guidance_on_a_real_network(network, way):
    """The rewarded quantity rises, rows are independent, nothing is left of the graphs."""
    free, guided = on_network(network, FREE), on_network(network, REAL[way])
    bright = [float(Brightness()(network.decode(run.x0)).mean()) for run in (free, guided)]
    assert bright[1] > bright[0]
    assert not guided.x0.requires_grad
    assert torch.allclose(on_network(network, REAL[way], [1]).x0, guided.x0[1:], rtol=1e-3, atol=1e-3)


def test_weighted_rewards_on_a_real_network(network):
    """A weighted sum, or a steering each: the same samples."""
    a, b = Brightness(), Sharpness()
    apart = on_network(network, Compose(Guided(a, 100.0), Guided(b, -50.0)))
    joined = on_network(network, Guided(Weighted([a, b], [1.0, -0.5]), 100.0))
    assert not torch.allclose(apart.x0, on_network(network, FREE).x0, atol=1e-2)
    assert torch.allclose(apart.x0, joined.x0, rtol=1e-3, atol=1e-3)
    assert apart.ledger.counts["decode"] == joined.ledger.counts["decode"]


def test_guidance_in_half_precision(tmp_path):
    policy = StableDiffusion(build_pipeline(tmp_path).to(torch.bfloat16))
    for way in ("law", "again"):
        ended = on_network(policy, REAL[way])
        assert ended.x0.dtype == torch.bfloat16 and ended.x0.isfinite().all() and not ended.failures
