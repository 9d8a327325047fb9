"""What a steering sees and does at a step."""

import pytest
import torch

from samplers import (
    DDIM,
    FREE,
    ODE,
    Backward,
    BestOfN,
    CoDe,
    Compose,
    FeynmanKac,
    Gaussian,
    Guided,
    NoiseBank,
    SeededNoise,
    Steering,
    always,
    rollout,
)
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from samplers.steering import Tilt
from samplers.values import Value, features
from tests.conftest import Faint, Linear, Quadratic, build_pipeline

STEPS, DIM = 6, 3


class Wave(Linear):
    """A reward with curvature: sum of sines."""

    def measure(self, media, prompts):
        return torch.sin(self.a * media).flatten(1).sum(1)


def setting(rows=4):
    policy = GaussianPolicy([[0.5] * DIM, [-1.0] * DIM], [0.8, 0.3], [0.6, 0.4])
    return policy, policy.levels(STEPS), SeededNoise(range(rows), (DIM,), dtype=torch.float64)


def run(steering, rows=4, kernel=None, **options):
    policy, levels, noise = setting(rows)
    cond = policy.encode([""] * rows)
    return rollout(policy, kernel or DDIM(1.0), cond, levels, noise, particles=rows, steering=steering, **options)


class Spy(Steering):
    """Keeps the gradient, the state and the base law of every step."""

    def __init__(self, reward):
        self.reward, self.seen = reward, []

    def tilting(self, progress):
        return [Tilt(self.reward)]

    def propose(self, ctx, base):
        self.seen.append((ctx.step, ctx.x.detach().clone(), ctx.gradient(self.reward).clone(), ctx.score(self.reward)))
        return base


def test_the_gradient_is_that_of_the_reward_of_the_estimate():
    """Finite differences through network and decoder, at every step."""
    spy = Spy(Wave(1.3))
    run(spy)
    policy, levels, _ = setting()
    cond = policy.encode([""] * 4)
    assert [step for step, *_ in spy.seen] == list(range(STEPS))
    for step, x, gradient, score in spy.seen:

        def value(x, step=step):
            return torch.sin(1.3 * policy.decode(policy.denoise(x, levels[step], cond).x0)).sum(1)

        assert torch.allclose(score.double(), value(x), atol=1e-6)
        for axis in range(DIM):
            nudge = torch.zeros(DIM, dtype=torch.float64)
            nudge[axis] = 1e-5
            slope = (value(x + nudge) - value(x - nudge)) / 2e-5
            assert torch.allclose(gradient[:, axis], slope, atol=1e-6)


def test_guided_moves_the_mean_by_scale_variance_gradient():
    """The first guided step against the formula; later steps follow from it."""
    reward, scale = Quadratic(0.7, 1.0), 1.9
    policy, levels, noise = setting()
    ended = run(Guided(reward, scale), record="path")
    x, cond = noise(0), policy.encode([""] * 4)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(policy.denoise(leaf, levels[0], cond).x0).sum(), leaf)
    base = DDIM(1.0)(policy.denoise(x, levels[0], cond), x, levels, 0)
    expected = base.mean + scale * base.std**2 * gradient + base.std * noise(1)
    assert torch.allclose(ended.latents[:, 1], expected, atol=1e-6)


def test_guidance_costs_no_further_network_evaluation_and_leaves_no_graph():
    plain, guided = run(FREE), run(Guided(Linear(), 1.0))
    assert guided.ledger.counts["network"] == plain.ledger.counts["network"] == 4 * STEPS
    assert guided.ledger.counts["gradient"] == 4 * (STEPS - 1)  # the last step is deterministic
    assert not guided.x0.requires_grad
    assert not torch.equal(guided.x0, plain.x0)


def test_a_reward_that_both_guides_and_weighs_is_computed_once_a_step():
    reward = Linear()
    ended = run(Compose(Guided(reward, 1.0), FeynmanKac(reward, 1.0)))
    assert ended.ledger.counts["reward"] == 4 * STEPS  # every step but the last, which has no noise, and the end
    assert ended.ledger.counts["decode"] == 4 * STEPS


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("same", [True, False])
def test_gradients_follow_their_rows_through_a_selection(same, draws):
    """Resampled rows are guided by their own gradient, also when it is computed after the selection."""
    guide = Wave(1.3)
    weigh = guide if same else Quadratic(3.0, 1.0)
    policy, levels, _ = setting(8)

    class Checked(Guided):
        worst, selections = 0.0, 0

        def propose(self, ctx, base):
            leaf = ctx.x.detach().clone().requires_grad_()
            with torch.enable_grad():
                value = guide(policy.denoise(leaf, levels[ctx.step], ctx.cond).x0).sum()
            (true,) = torch.autograd.grad(value, leaf)
            Checked.worst = max(Checked.worst, float((ctx.gradient(guide) - true).abs().max()))
            Checked.selections += bool(ctx.ancestors and ctx.ancestors[-1][0] == ctx.step)
            return super().propose(ctx, base)

    run(Compose(Checked(guide, 0.5), FeynmanKac(weigh, 0.2, ess_threshold=1.0, draws=draws)), rows=8)
    assert Checked.selections >= 3
    assert Checked.worst < 1e-9


def test_tempered_guidance_grows_with_the_steps():
    """The first of T steps is guided at a T-th of the scale."""
    plain = run(FREE, record="path").latents[:, 1]
    constant = run(Guided(Linear(), 2.0), record="path").latents[:, 1]
    linear = run(Guided(Linear(), 2.0, tempering="linear"), record="path").latents[:, 1]
    assert torch.allclose((linear - plain) * STEPS, constant - plain)


def test_no_gradient_is_computed_outside_the_window():
    reward = Linear()
    ended = run(Compose(Guided(reward, 1.0, stop=0.5), FeynmanKac(reward, 1.0)))
    assert ended.ledger.counts["gradient"] == 4 * (STEPS // 2)


def test_guidance_outside_its_window_is_plain_sampling():
    assert torch.equal(run(Guided(Linear(), 5.0, start=0.99, stop=1.0)).x0, run(FREE).x0)
    early = run(Guided(Linear(), 5.0, stop=0.5), record="path").latents
    assert not torch.equal(early[:, 1], run(FREE, record="path").latents[:, 1])
    zero = run(Guided(Linear(), 0.0))
    assert torch.allclose(zero.x0, run(FREE).x0)


def test_composed_guidance_adds_up():
    """Two linear tilts by a and b equal one by a + b."""
    a, b = Linear(0.5), Linear(-0.2)
    both = run(Compose(Guided(a, 1.0), Guided(b, 1.0)))
    one = run(Guided(Linear(0.3), 1.0))
    assert torch.allclose(both.x0, one.x0, atol=1e-6)


def test_only_one_part_of_a_composition_may_select():
    """Also where neither would resample: weights of two targets would be one."""
    for first, second in ((CoDe(Linear(), 2), CoDe(Linear(), 2)), (FeynmanKac(Linear()), BestOfN(Linear()))):
        with pytest.raises(ValueError, match="both steerings"):
            Compose(first, second)
        with pytest.raises(ValueError, match="both steerings"):
            Compose(Compose(Guided(Linear()), first), second)


@pytest.mark.parametrize("steering", [Guided, Backward])
def test_where_nothing_is_judged_nothing_moves(steering):
    """Then there is no graph at all, as where no sample is finite."""

    class Silent(Linear):
        def measure(self, media, prompts):
            return torch.full((len(media),), torch.nan)

    ended = run(steering(Silent(), stop=0.1))
    assert torch.equal(ended.x0, run(FREE).x0)
    assert ended.failures["gradient of Silent"] >= 4


@pytest.mark.parametrize("through", ["network", "x0"])
def test_small_gradients_survive_half_precision(through, tmp_path):
    """Of pixels they are some 1e-7, of which float16 keeps nothing on its way through decoder and network."""
    found = []
    for dtype in (torch.float32, torch.float16):
        policy = StableDiffusion(build_pipeline(tmp_path).to(dtype))

        class Seen(Guided):
            def propose(self, ctx, base):
                found.append(ctx.gradient(self.reward, self.through))
                return base

        noise, levels = SeededNoise([0, 1], policy.shape((16, 16))), policy.levels(1, (16, 16))
        rollout(policy, DDIM(1.0), policy.encode(["a", "b"]), levels, noise, steering=Seen(Faint(), through=through))
    assert found[1].dtype == torch.float32
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()


class Quiet(Value):
    """What a middle layer says, in units so large that its gradient is tiny."""

    def forward(self, x, at, cond, prompts):
        said = features(self.policy, ["mid_block"], x, at, cond)[:, x.shape[1] :]
        return 1e-4 * said.sum(1)


def test_small_gradients_of_values_survive_half_precision(tmp_path):
    found = []
    for dtype in (torch.float32, torch.float16):
        policy, value = StableDiffusion(build_pipeline(tmp_path).to(dtype)), Quiet()
        object.__setattr__(value, "policy", policy)

        class Seen(Guided):
            def propose(self, ctx, base):
                found.append(ctx.gradient(self.value))
                return base

        noise, levels = SeededNoise([0, 1], policy.shape((16, 16))), policy.levels(1, (16, 16))
        rollout(policy, DDIM(1.0), policy.encode(["a", "b"]), levels, noise, steering=Seen(value=value))
    assert found[1].dtype == torch.float32
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()


def test_binding_fills_in_missing_rewards_only():
    mine, given = Linear(1.0), Linear(2.0)
    bound = Compose(Guided(mine), Compose(Guided(), FeynmanKac())).bind(given)
    assert [r.a for r in bound.rewards()] == [1.0, 2.0]
    assert bound.b.b.reward is given
    unbound = FeynmanKac()
    assert unbound.bind(given) is not unbound
    assert unbound.reward is None


@pytest.mark.parametrize("steering", [Guided, FeynmanKac, BestOfN, CoDe])
def test_a_steering_without_a_reward_says_so(steering):
    with pytest.raises(ValueError, match=f"{steering.__name__} needs a reward"):
        run(steering())


def test_guided_refuses_what_it_cannot_do():
    hard = Linear()
    hard.differentiable = False
    with pytest.raises(ValueError, match="needs the gradient of its reward, and Linear has none"):
        run(Guided(hard))
    with pytest.raises(ValueError, match="tilts stochastic steps"):
        run(Guided(Linear()), kernel=ODE())
    with pytest.raises(ValueError, match="cannot steer a rollout that builds a training graph"):
        run(Guided(Linear()), grad=always)
    with pytest.raises(ValueError, match="fractions of the run"):
        Guided(Linear(), start=0.5, stop=0.2)


def test_a_third_party_steering_needs_only_the_two_hooks():
    """Mirror the population and freeze the noise: both hooks reach the loop."""

    class Mirror(Steering):
        def select(self, ctx):
            return torch.arange(ctx.particles).flip(0).expand(ctx.groups, -1) if ctx.step == 1 else None

        def propose(self, ctx, base):
            return Gaussian(base.mean, base.std * 0.5) if base.stochastic else base

    policy, levels, noise = setting()
    bank = NoiseBank([noise(i) for i in range(STEPS + 1)])
    ended = rollout(
        policy, DDIM(1.0), policy.encode([""] * 4), levels, bank, particles=4, steering=Mirror(), record="path"
    )
    assert torch.equal(ended.latents[:, 0], noise(0).flip(0))
    assert ended.selected_at == (1,)
    assert torch.equal(ended.lineage, torch.tensor([[3, 2, 1, 0]]))
