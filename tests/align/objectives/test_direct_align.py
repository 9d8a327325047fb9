"""Laws of Direct-Align: exact recovery, opposite branches, and the semantic-relative reward written out."""

from __future__ import annotations

import pytest
import torch

from align.batches import Batch, Starts
from align.objectives.direct_align import DirectAlign, recovered
from rewards import Prompt
from samplers import DDIM, ODE, Clean, SeededNoise, diffuse, rollout
from samplers.families.gaussian import GaussianPolicy
from tests.conftest import Linear

F64 = torch.float64
B = 4
FRAMES = [("flow", "flow"), ("flow", "x0"), ("vp", "v"), ("vp", "eps")]


class Worded(Linear):
    """r(x, prompt) = a·Σx, a by the first word of the prompt."""

    needs_prompt = True
    slopes = {"good": 2.0, "bad": -1.0, "odd": 0.5}  # noqa: RUF012

    def measure(self, media, prompts):
        a = torch.tensor([self.slopes[p.text.split()[0]] for p in prompts], dtype=media.dtype)
        return a * media.flatten(1).sum(1)


def mixture(frame="flow", prediction="flow"):
    policy = GaussianPolicy([[1.0, -1.0], [0.0, 2.0]], [0.5, 0.7], [0.4, 0.6], frame=frame, prediction=prediction)
    policy.network.means.requires_grad_(True)
    return policy


def starts(policy, rows=B, draw=0):
    prompts = tuple(Prompt(f"cat {i}", "no dog") for i in range(rows))
    cond = policy.encode(prompts)
    return Batch(Starts(torch.arange(rows), cond, DDIM(1.0), policy.levels(5), (2,), draw), {}, prompts)


def objective(**given):
    return DirectAlign("good", "bad", **{"reward": Worded(), **given})


def gradient(policy, loss):
    return torch.autograd.grad(loss, policy.network.means)[0]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("frame", ["flow", "vp"])
@pytest.mark.parametrize("to", range(1, 9))
def test_an_exact_network_recovers_the_sample_at_every_level(frame, to):
    x0, eps = normal(B, 2), normal(B, 2, seed=1)
    level = mixture(frame, "x0").levels(10)[to]
    assert torch.equal(recovered(Clean(x0, eps), eps, level), x0)


@pytest.mark.parametrize(("at", "to"), [(7, 3), (3, 7), (9, 1)])
def test_on_a_flow_it_is_an_euler_step_less_the_known_noise(at, to):
    policy, x0, eps = mixture(), normal(B, 2), normal(B, 2, seed=1)
    grid = policy.levels(10)
    now, then = grid[10 - at], grid[10 - to]
    x, cond = diffuse(x0, eps, now), policy.encode([""] * B)
    moved = x + (then.t - now.t) * policy.predict(x, now, cond)
    want = (moved - then.t * eps) / (1 - then.t)
    torch.testing.assert_close(recovered(policy.denoise(x, now, cond), eps, then), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("frame", "prediction"), FRAMES)
@pytest.mark.parametrize("branch", ["denoise", "inversion"])
def test_the_loss_is_the_relative_reward_of_the_recovered_sample(frame, prediction, branch):
    policy = mixture(frame, prediction)
    one = objective(branch=branch, threshold=5.0, k=(0.2, 0.6), inversion_k=(0.4, 0.1), scale=0.5)
    batch = starts(policy, draw=8)
    noise = SeededNoise(range(B), (2,), dtype=F64)
    x0 = rollout(policy, DDIM(1.0), batch.rows.cond, batch.rows.levels, noise).x0
    hi, lo, place = one.drawn(policy, 8)
    now, then, (first, second), k = (hi, lo, (2, -1), 0.2 + 0.4 * place) if branch == "denoise" else (
        lo, hi, (-1, 2), 0.4 - 0.3 * place
    )  # fmt: skip
    eps = noise(0)
    clean = policy.denoise(diffuse(x0, eps, now), now, batch.rows.cond)
    guess = (then.alpha * clean.x0 + then.sigma * clean.eps - then.sigma * eps) / then.alpha
    relative = ((1 + k) * first - second) * guess.sum(1)
    want = 0.5 * (5.0 - relative).relu().mean()
    loss, metrics = one.loss(policy, batch)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, want), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(metrics["reward"].double(), relative.detach().mean(), rtol=1e-5, atol=1e-6)


def test_the_surplus_runs_over_the_levels_as_in_the_released_code():
    """There the m-th of N levels, counted from the cleanest, has the m-th of N numbers from 0.1 to 0.25, and from 0.3 to 0.01."""
    one, n = DirectAlign(), 1000
    for m in (0, 333, n - 1):
        place = 1 - m / (n - 1)  # 0 is the noisiest
        forward, back = (k[0] + place * (k[1] - k[0]) for k in (one.k, one.inversion_k))
        assert (forward, back) == pytest.approx(
            [float(torch.linspace(*ends, n)[m]) for ends in ((0.1, 0.25), (0.3, 0.01))]
        )


@pytest.mark.parametrize(("frame", "prediction"), FRAMES)
def test_the_branches_pull_in_opposite_directions(frame, prediction):
    """From one state and one reward: only the sign and size of the step differ."""
    policy, x, eps = mixture(frame, prediction), normal(B, 2), normal(B, 2, seed=1)
    grid = policy.levels(10)
    clean = policy.denoise(x, grid[5], policy.encode([""] * B))
    down, up = (recovered(clean, eps, grid[i]).sum() for i in (7, 3))
    down, up = (torch.autograd.grad(v, policy.network.means, retain_graph=True)[0] for v in (down, up))
    assert float((down * up).sum()) < 0
    torch.testing.assert_close(down / down.norm(), -up / up.norm(), rtol=1e-9, atol=1e-12)


def test_short_steps_have_small_gradients_in_proportion():
    policy = mixture()
    sizes = []
    for gap in (0.02, 0.04):
        one = objective(branch="denoise", low=0.6 - gap, high=0.6, gap=gap, k=(0.0, 0.0))
        sizes.append(gradient(policy, one.loss(policy, starts(policy))[0]).norm())
    assert abs(float(sizes[1] / sizes[0]) - 2) < 0.1


def test_both_is_the_mean_of_the_branches():
    policy = mixture()
    batch = starts(policy, draw=2)
    one, two, both = (
        gradient(policy, objective(branch=b).loss(policy, batch)[0]) for b in ("denoise", "inversion", "both")
    )
    torch.testing.assert_close(both, (one + two) / 2, rtol=1e-6, atol=1e-9)


def test_a_relative_reward_above_the_threshold_moves_nothing():
    policy = mixture()
    loss, _ = objective(threshold=-1e4).loss(policy, starts(policy))
    assert float(loss.detach()) == 0
    assert not gradient(policy, loss).any()


def test_levels_lie_in_the_range_and_agree_between_micro_batches():
    policy, one = mixture(), objective(low=0.5, high=0.9, gap=0.1)
    for draw in range(50):
        hi, lo, place = one.drawn(policy, draw)
        assert 0.5 - 2e-3 < float(lo.t) < float(hi.t) < 0.9 + 2e-3
        assert abs(float(hi.t - lo.t) - 0.1) < 2e-3
        assert 0 <= place < 1


def test_micro_batches_add_up():
    policy = mixture()
    batch = starts(policy, rows=8, draw=3)
    one = objective(threshold=2.0)
    parts = [gradient(policy, one.loss(policy, batch.take([i, i + 1]))[0]) for i in range(0, 8, 2)]
    whole = gradient(policy, one.loss(policy, batch)[0])
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-6, atol=1e-9)


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in ("none", "step"):
        policy = mixture()
        policy.checkpointing = checkpointing
        gradients.append(gradient(policy, objective().loss(policy, starts(policy))[0]))
    assert torch.equal(*gradients)


class Fickle(Worded):
    def measure(self, media, prompts):
        bad = torch.tensor([p.text.split()[0] == "bad" and p.text.endswith(("1", "2")) for p in prompts])
        return torch.where(bad, torch.nan, super().measure(media, prompts))


def test_rows_without_both_scores_contribute_nothing():
    policy = mixture()
    batch = starts(policy)
    loss, metrics = objective(reward=Fickle()).loss(policy, batch)
    assert float(metrics["reward_failed"]) == 0.5
    part, _ = objective().loss(policy, batch[[0, 3]])
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, part) / 2, rtol=1e-6, atol=1e-9)


def test_rows_that_are_not_finite_stay_out_of_the_graph():
    class Breaks(GaussianPolicy):
        def predict(self, x, at, cond):
            return super().predict(x, at, cond) + cond.positive["row"]

    policy = Breaks([[1.0, -1.0]], [0.5])
    policy.network.means.requires_grad_(True)
    batch = starts(policy)
    batch.rows.cond.positive["row"][1] = torch.nan
    loss, metrics = objective().loss(policy, batch)
    assert float(metrics["reward_failed"]) == 0.25
    part, _ = objective().loss(policy, batch[[0, 2, 3]])
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, 0.75 * part), rtol=1e-6, atol=1e-9)


class Detector(Worded):
    differentiable = False


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (None, "needs a reward"),
        (Detector(), "Detector is not differentiable"),
        (Linear(), "Linear does not read the prompt"),
    ],
)
def test_unfit_rewards_are_named(reward, message):
    with pytest.raises(ValueError, match=message):
        objective(reward=reward).check(mixture())


@pytest.mark.parametrize(
    "given", [{"low": 0.9, "high": 0.5}, {"gap": 0.0}, {"gap": 0.5}, {"high": 1.2}, {"branch": "up"}]
)
def test_settings_are_checked(given):
    with pytest.raises(ValueError, match=r"need 0 ≤ low|branch must be"):
        objective(**given)


def test_a_deterministic_run_starts_from_the_known_noise():
    """Under the ODE the sample and its noise lie on one path, so an exact network's flow is nearly straight between them."""
    policy = GaussianPolicy([[3.0, -2.0]], [1e-4], frame="flow", prediction="flow")
    noise = SeededNoise(range(B), (2,), dtype=F64)
    x0 = rollout(policy, ODE(), policy.encode([""] * B), policy.levels(4), noise).x0
    hi, lo, _ = objective().drawn(policy, 0)
    clean = policy.denoise(diffuse(x0, noise(0), hi), hi, policy.encode([""] * B))
    torch.testing.assert_close(recovered(clean, noise(0), lo), x0, rtol=0, atol=1e-3)
