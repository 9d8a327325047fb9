"""Sequential Monte Carlo against the exact law of the discretised chain."""

import itertools
import math

import pytest
import torch

from samplers import (
    DDIM,
    FREE,
    ODE,
    SVDD,
    BestOfN,
    CoDe,
    Compose,
    FeynmanKac,
    Guided,
    Interrupted,
    Levels,
    NoiseBank,
    RewardFailed,
    SeededNoise,
    Unmask,
    rollout,
)
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from samplers.resampling import UNBIASED
from tests.conftest import Linear, Quadratic, Table, TokenReward, build_pipeline, z_score
from tests.oracles import (
    cosine_levels,
    ddim_coefficients,
    gaussian_chain,
    tilted_law,
    tilted_linear,
    tilted_quadratic,
    unmasking_law,
)

STEPS, MEAN, STD = 10, 0.5, 0.8
POTENTIALS = ("difference", "max", "sum", "terminal")


def chain(final_alpha_bar=1.0):
    """The policy of spec 8.1, its levels, and the exact mean and variance its sampler ends with."""
    alpha, sigma = cosine_levels(STEPS, final_alpha_bar)
    exact = gaussian_chain(alpha, sigma, MEAN, STD, ddim_coefficients(alpha, sigma, 1.0))
    levels = Levels(torch.linspace(1, 0, STEPS + 1), alpha, sigma)
    return GaussianPolicy([MEAN], [STD]), levels, float(exact.mean[-1]), float(exact.var[-1])


def run(steering, groups, particles, *, seed=0, policy=None, levels=None, kernel=None, noise=None, **options):
    if policy is None:
        policy, levels, _, _ = chain()
    g = torch.Generator().manual_seed(seed)
    noise = noise or NoiseBank(
        [torch.randn(groups * particles, 1, generator=g, dtype=torch.float64) for _ in range(STEPS + 1)]
    )
    return rollout(
        policy,
        kernel or DDIM(1.0),
        policy.encode([""] * groups),
        levels,
        noise,
        particles=particles,
        steering=steering,
        **options,
    )


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("threshold", [0.5, 1.0], ids=["adaptive", "always"])
@pytest.mark.parametrize("resampler", sorted(UNBIASED | {"none"}))
@pytest.mark.parametrize("potential", POTENTIALS)
def test_evidence_is_unbiased(potential, resampler, threshold, guided):
    reward, beta = (
        Linear(),
        3.0 if potential == "sum" else 1.0,
    )  # a running sum over-tilts: heavy tails at low temperature
    policy, levels, mean, var = chain()
    steering = FeynmanKac(reward, beta, potential, resampler, threshold, every=2, start=0.2)
    if guided:
        steering = Compose(Guided(reward, 0.7), steering)
    ended = run(steering, 3000, 8, policy=policy, levels=levels)
    log_z, tilted_mean, _ = tilted_linear(mean, var, 1 / beta)
    assert abs(z_score((ended.log_z - log_z).exp(), 1.0)) < 3
    # so is Ẑ times the weighted mean: the numerator of every self-normalised estimate
    steered = ended.log_z.exp() * (ended.weights * ended.x0.view(3000, 8)).sum(1)
    assert abs(z_score(steered, math.exp(log_z) * tilted_mean)) < 3


@pytest.mark.parametrize("particles", [1, 2, 8])
@pytest.mark.parametrize("tempering", ["constant", "linear", "adaptive"])
def test_evidence_is_unbiased_at_any_population_and_tempering(particles, tempering):
    policy, levels, mean, var = chain()
    steering = FeynmanKac(Linear(), 0.5, tempering=tempering)
    ended = run(steering, 24000 // particles, particles, policy=policy, levels=levels)
    assert abs(z_score((ended.log_z - tilted_linear(mean, var, 2.0)[0]).exp(), 1.0)) < 3


@pytest.mark.parametrize("potential", ["difference", "max", "terminal"])
def test_large_populations_reach_the_tilted_mean_and_variance(potential):
    policy, levels, mean, var = chain()
    ended = run(
        FeynmanKac(Linear(), 0.5, potential, every=2, start=0.2), 40, 2000, policy=policy, levels=levels, seed=1
    )
    x = ended.x0.view(40, 2000)
    first = (ended.weights * x).sum(1)
    second = (ended.weights * x.square()).sum(1) - first.square()
    _, tilted_mean, tilted_var = tilted_linear(mean, var, 2.0)
    assert abs(z_score(first, tilted_mean)) < 4
    assert abs(z_score(second, tilted_var)) < 4


def test_twisted_sampler_is_exact_and_needs_fewer_particles():
    reward = Quadratic(4.0, 1.6)
    policy, levels, mean, var = chain(0.999)
    log_z, tilted_mean, tilted_var = tilted_quadratic(mean, var, 4.0, 1.6)
    assert math.isclose(log_z, -1.8377841, abs_tol=1e-6)
    plain = run(FeynmanKac(reward, 1.0, tempering="linear"), 6000, 8, policy=policy, levels=levels)
    twisted = Compose(Guided(reward, 0.5), FeynmanKac(reward, 1.0, tempering="linear"))
    guided = run(twisted, 6000, 8, policy=policy, levels=levels)
    ratios = [(t.log_z - log_z).exp() for t in (plain, guided)]
    assert abs(z_score(ratios[0], 1)) < 3
    assert abs(z_score(ratios[1], 1)) < 3
    assert ratios[1].var() < 0.6 * ratios[0].var()
    many = run(twisted, 30, 2000, policy=policy, levels=levels)
    means = (many.weights * many.x0.view(30, 2000)).sum(1)
    assert abs(z_score(means, tilted_mean)) < 4
    assert abs((many.weights * (many.x0.view(30, 2000) - means[:, None]).square()).sum(1).mean() - tilted_var) < 0.01


def test_guidance_alone_is_biased_and_smc_repairs_it():
    """The correction must matter: without log p/q the guided mean misses the target."""
    reward = Quadratic(4.0, 1.6)
    policy, levels, mean, var = chain(0.999)
    guided = run(Guided(reward, 1.0), 20000, 1, policy=policy, levels=levels)
    assert abs(z_score(guided.x0.flatten(), tilted_quadratic(mean, var, 4.0, 1.6)[1])) > 10


class DropsWeights(FeynmanKac):
    """The published adaptive mode (spec 1d): an event that does not resample forgets its weights."""

    def select(self, ctx):
        chosen = super().select(ctx)
        if chosen is None and not ctx.final:
            ctx.log_w = torch.zeros_like(ctx.log_w)
        return chosen


class KeepsMaximum(FeynmanKac):
    """The published last potential of max: exp of the maximum along the path, not of r(x0)."""

    def _potential(self, ctx, value, judged, proposals):
        if not ctx.final:
            return super()._potential(ctx, value, judged, proposals)
        return torch.maximum(value, ctx.rows["max"]) - ctx.rows["spent"]


def test_published_mistakes_would_miss_the_target():
    """The toy of spec 8.1: 1.354 is exact, 0.500 unsteered; the published rules give about 0.54 and 1.17."""
    exact = 1.3536215

    def steered(kind, potential):
        how = kind(Linear(), 0.5, potential, "multinomial", every=2, start=0.2)
        ended = run(how, 40, 2000, seed=2)
        return float((ended.weights * ended.x0.view(40, 2000)).sum(1).mean())

    assert abs(steered(FeynmanKac, "difference") - exact) < 0.02
    assert abs(steered(FeynmanKac, "max") - exact) < 0.04
    assert steered(DropsWeights, "difference") < 0.9
    assert abs(steered(KeepsMaximum, "max") - 1.17) < 0.06


def test_weights_never_overflow():
    ended = run(FeynmanKac(Linear(1e4), 1e-3, "sum"), 2, 8)
    assert ended.log_w.isfinite().any()
    assert not ended.log_w.isnan().any()
    assert ended.weights.sum(1).allclose(torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("tempering", ["constant", "linear", "exp", "adaptive"])
def test_potentials_telescope(potential, tempering):
    """Without resampling every potential ends at r(x0)/beta, lineage by lineage."""
    reward, beta = Linear(1.7), 0.3
    ended = run(FeynmanKac(reward, beta, potential, resampler="none", tempering=tempering), 5, 4)
    assert torch.allclose(
        ended.log_w, (reward.a / beta) * ended.x0.view(5, 4), rtol=1e-6, atol=1e-6
    )  # scores are float32


@pytest.mark.parametrize("threshold", [0.5, 1.0])
@pytest.mark.parametrize("resampler", sorted(UNBIASED - {"multinomial", "single"}))
def test_no_reward_is_plain_sampling_bit_for_bit(resampler, threshold):
    free = run(FREE, 3, 8)
    steered = run(FeynmanKac(Linear(), math.inf, resampler=resampler, ess_threshold=threshold), 3, 8)
    assert torch.equal(free.x0, steered.x0)
    assert torch.allclose(steered.log_z, torch.zeros(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("steering", [FeynmanKac, SVDD, BestOfN, CoDe])
def test_one_particle_is_plain_sampling_bit_for_bit(steering):
    free, steered = run(FREE, 3, 1), run(steering(Linear()), 3, 1)
    assert torch.equal(free.x0, steered.x0)
    if steering is FeynmanKac:
        assert torch.allclose(steered.log_z, steered.x0.flatten() / FeynmanKac().beta, rtol=1e-6)  # scores are float32


def test_one_terminal_event_is_best_of_n():
    free = run(FREE, 6, 8).x0.view(6, 8)
    for steering in (BestOfN(Linear()), FeynmanKac(Linear(), 0.5, "terminal"), CoDe(Linear(), block=STEPS)):
        ended = run(steering, 6, 8)
        assert torch.equal(ended.x0.view(6, 8), free)
        assert torch.equal(ended.best, free.argmax(1))
    one_hot = run(BestOfN(Linear()), 6, 8).weights
    assert torch.equal(one_hot.argmax(1), free.argmax(1))
    assert torch.equal(one_hot.amax(1), torch.ones(6, dtype=torch.float64))


def test_code_keeps_the_best_at_every_block():
    """CoDe at block 1 is SVDD's argmax from the second step on; copies share one ancestor at once."""
    code, svdd = run(CoDe(Linear(), block=1), 4, 8), run(SVDD(Linear(), beta=0.0, start=0.1), 4, 8)
    assert torch.equal(code.x0, svdd.x0)
    assert code.selected_at == tuple(range(1, STEPS - 1))  # the last step is deterministic: no event before it
    assert (code.ancestors == code.ancestors[..., :1]).all()
    assert run(CoDe(Linear(), block=4), 4, 8).selected_at == (4, 8)


@pytest.mark.parametrize("children", [None, 1, 4])
def test_svdd_is_unbiased(children):
    policy, levels, mean, var = chain()
    ended = run(SVDD(Linear(), 1.0, children), 6000, 8, policy=policy, levels=levels)
    assert abs(z_score((ended.log_z - tilted_linear(mean, var, 1.0)[0]).exp(), 1.0)) < 3
    if children == 1:  # independent chains with weights: importance sampling
        assert torch.allclose(ended.log_w, run(FeynmanKac(Linear(), 1.0, "terminal"), 6000, 8).log_w)


def test_looking_ahead_stays_unbiased_and_costs_network_calls():
    policy, levels, mean, var = chain()
    one, many = FeynmanKac(Linear(), 0.5, every=3, start=0.3), FeynmanKac(Linear(), 0.5, every=3, start=0.3, draws=4)
    ended = {how.draws: run(how, 400, 8, policy=policy, levels=levels) for how in (one, many)}
    assert abs(z_score((ended[4].log_z - tilted_linear(mean, var, 2.0)[0]).exp(), 1.0)) < 3
    events = [i for i in many.events(STEPS) if (i + STEPS + 1) // 2 < STEPS]
    extra = ended[4].ledger.counts["network"] - ended[1].ledger.counts["network"]
    assert extra == 4 * len(events) * 3200


def test_groups_are_isolated():
    """Two prompts in one batch equal two runs, resampling included."""
    policy, levels, _, _ = chain()
    steering = FeynmanKac(Linear(), 0.3, resampler="multinomial")
    together = run(steering, 2, 8, noise=SeededNoise(range(16), (1,), dtype=torch.float64))
    for group in range(2):
        alone = run(steering, 1, 8, noise=SeededNoise(range(8 * group, 8 * group + 8), (1,), dtype=torch.float64))
        assert torch.equal(alone.x0, together.x0[8 * group : 8 * group + 8])
        assert torch.equal(alone.lineage[0], together.lineage[group])
        assert torch.equal(alone.log_z, together.log_z[group : group + 1])


def test_every_per_row_quantity_follows_its_lineage():
    policy, levels, _, _ = chain()
    noise = SeededNoise(range(16), (1,), dtype=torch.float64)
    steering = Compose(Guided(Linear(), 1.0), FeynmanKac(Linear(), 0.3))
    ended = run(steering, 2, 8, noise=noise, record="path")
    assert ended.ancestors.shape[1] >= 2, "the toy must resample for this test to mean anything"
    origin = (ended.lineage + torch.tensor([[0], [8]])).flatten()
    assert torch.equal(ended.latents[:, 0], noise(0)[origin])
    assert torch.equal(ended.latents[:, -1], ended.x0)
    for i in range(STEPS - 1):  # each recorded step is a plausible step of its own recorded parent
        law = DDIM(1.0)(policy.denoise(ended.latents[:, i], levels[i], ended.cond), ended.latents[:, i], levels, i)
        guided = law.shift(torch.full_like(law.mean, float(policy_gain(policy, levels, i))), 1.0)
        assert torch.allclose(guided.log_prob(ended.latents[:, i + 1]), ended.log_prob[:, i], atol=1e-9)


def policy_gain(policy, levels, i):
    """dE[x0 | x_t]/dx_t on Gaussian data."""
    alpha, sigma = levels[i].alpha, levels[i].sigma
    return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)


class Sometimes(Linear):
    """Judges only positive states."""

    def measure(self, media, prompts):
        value = super().measure(media, prompts)
        return value.masked_fill(value < self.a * -0.2, torch.nan)


class Flaky(Linear):
    """Like a judge behind a network: fails by chance at intermediate events, never in its last call."""

    def __init__(self, a, calls, failing=0.4):
        super().__init__(a)
        self.left, self.failing, self.generator = calls, failing, torch.Generator().manual_seed(0)

    def measure(self, media, prompts):
        self.left -= 1
        lost = torch.rand(len(media), generator=self.generator) < self.failing * (self.left > 0)
        return super().measure(media, prompts).masked_fill(lost, torch.nan)


def calls(steering):
    return len([i for i in steering.events(STEPS) if DDIM(1.0).diversifies(chain()[1], i)]) + 1


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("tempering", ["constant", "linear", "adaptive"])
def test_a_judge_that_fails_now_and_then_changes_no_final_weight(potential, tempering):
    def steering(reward):
        return FeynmanKac(reward, 0.3, potential, resampler="none", tempering=tempering)

    ended = run(steering(Flaky(1.7, calls(steering(None)))), 5, 4)
    assert potential == "terminal" or ended.failures["Flaky"] > 10
    assert torch.allclose(ended.log_w, (1.7 / 0.3) * ended.x0.view(5, 4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("potential", ["difference", "max"])
def test_evidence_stays_unbiased_when_the_judge_fails_now_and_then(potential):
    policy, levels, mean, var = chain()
    steering = FeynmanKac(Linear(), 1.0, potential, every=2)
    steering.reward = Flaky(Linear().a, calls(steering))
    ended = run(steering, 3000, 8, policy=policy, levels=levels)
    assert steering.reward.left == 0 and ended.failures["Flaky"] > 3000
    assert abs(z_score((ended.log_z - tilted_linear(mean, var, 1.0)[0]).exp(), 1.0)) < 3


def test_the_best_of_those_judged_is_kept():
    ended = run(CoDe(Flaky(1.0, calls(CoDe(block=2)), 0.6), block=2), 50, 3)
    assert ended.failures["Flaky"] > 50
    assert ended.x0.isfinite().all()


class Never(Linear):
    def measure(self, media, prompts):
        return torch.full((len(media),), torch.nan)


def test_samples_that_cannot_be_judged_are_dropped_and_counted():
    ended = run(FeynmanKac(Sometimes(), 0.5), 4, 16, seed=3)
    assert ended.failures["Sometimes"] > 0
    assert not ended.log_w.isnan().any()
    judged = ended.x0.view(4, 16) > -0.2
    assert torch.equal(ended.weights > 0, judged)


def test_a_reward_that_judges_nothing_stops_the_run_and_keeps_estimates():
    with pytest.raises(Interrupted, match="Never could judge no sample") as caught:
        run(FeynmanKac(Never(), 0.5, start=0.5), 2, 4)
    assert isinstance(caught.value.__cause__, RewardFailed)
    assert caught.value.trajectory.stopped_at == 5
    assert caught.value.trajectory.x0.shape == (8, 1)
    assert caught.value.trajectory.x0.isfinite().all()


@pytest.mark.parametrize("kernel", [ODE(), DDIM(0.0), DDIM(1.0, noisy_steps=[False] * STEPS)])
def test_resampling_needs_a_stochastic_kernel(kernel):
    with pytest.raises(ValueError, match="deterministic"):
        run(FeynmanKac(Linear(), 0.5), 1, 4, kernel=kernel)
    run(BestOfN(Linear()), 1, 4, kernel=kernel)
    run(FeynmanKac(Linear(), 0.5), 1, 1, kernel=kernel)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"beta": -1.0}, "beta"),
        ({"ess_threshold": 1.5}, "ess_threshold"),
        ({"every": 0}, "every"),
        ({"draws": 0}, "draws"),
        ({"start": 0.8, "stop": 0.2}, "start"),
    ],
)
def test_arguments_out_of_range(arguments, named):
    with pytest.raises(ValueError, match=named):
        FeynmanKac(Linear(), **arguments)


def test_missing_reward_and_indivisible_children():
    with pytest.raises(ValueError, match="needs a reward"):
        run(FeynmanKac(), 1, 4)
    with pytest.raises(ValueError, match="children"):
        run(SVDD(Linear(), children=3), 1, 4)


@pytest.mark.parametrize("resampler", ["systematic", "multinomial"])
def test_tokens_follow_the_enumerated_tilted_law(resampler):
    policy, groups, particles, steps = Table(), 1500, 8, 3
    g = torch.Generator().manual_seed(0)
    table = torch.randn(3, 3, 3, generator=g, dtype=torch.float64)
    values = {state: table[state].item() for state in itertools.product(range(3), repeat=3)}
    levels = policy.levels(steps)
    log_z, tilted = tilted_law(unmasking_law(policy.table, levels.alpha), table, 1.0)
    normals = [torch.randn(groups * particles, 3, 4, generator=g) for _ in range(steps)]

    def noise(i):
        return torch.full((groups * particles, 3), 3) if i == 0 else normals[i - 1]

    ended = rollout(
        policy, Unmask(), policy.encode([""] * groups), levels, noise, particles=particles,
        steering=FeynmanKac(TokenReward(values), 1.0, resampler=resampler),
    )  # fmt: skip
    assert abs(z_score((ended.log_z - log_z).exp(), 1.0)) < 3
    index = (ended.x0 * torch.tensor([9, 3, 1])).sum(1).reshape(groups, particles)
    z_hat = ended.log_z.exp()[:, None] * ended.weights  # unbiased for Z · tilted law, group by group
    for outcome in range(27):
        mass = torch.where(index == outcome, z_hat, 0.0).sum(1) / math.exp(log_z)
        assert abs(z_score(mass, float(tilted.flatten()[outcome]))) < 4.5


def test_steering_a_real_network_is_deterministic_and_sound(tmp_path):
    """On real classes: no reward equals plain bit for bit; the seed decides everything."""
    from rewards import Brightness

    policy = StableDiffusion(build_pipeline(tmp_path))
    cond, levels = policy.encode(["a", "b"]).with_guidance(3.0), policy.levels(4)
    noise = SeededNoise(range(8), policy.shape(policy.size))
    runs = {}
    for name, steering in {
        "free": FREE,
        "none": FeynmanKac(Brightness(), math.inf, ess_threshold=1.0),
        "fk": FeynmanKac(Brightness(), 1e-3),
        "again": FeynmanKac(Brightness(), 1e-3),
    }.items():
        runs[name] = rollout(policy, DDIM(1.0), cond, levels, noise, particles=4, steering=steering, prompts=["a", "b"])
    native = rollout(policy, DDIM(1.0), cond, levels, SeededNoise(range(8)), particles=4)
    assert torch.equal(runs["free"].x0, runs["none"].x0)
    assert torch.equal(runs["free"].x0, native.x0)
    assert torch.equal(runs["fk"].x0, runs["again"].x0)
    assert not torch.equal(runs["fk"].x0, runs["free"].x0)
    assert runs["fk"].ledger.counts == {"network": 64, "decode": 40, "reward": 40, "gradient": 0}
