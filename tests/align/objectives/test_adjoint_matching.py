"""Laws of adjoint matching: closed forms on Gaussian data, autograd on mixtures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from align.batches import Batch, Paths
from align.objectives.adjoint_matching import AdjointMatching, lean_adjoint
from rewards import Prompt
from samplers import CPS, DDIM, ODE, FlowSDE, SeededNoise, rollout
from samplers.families.gaussian import GaussianPolicy
from tests.conftest import Linear, Quadratic

F64 = torch.float64
T, B = 8, 5


class Shifted(GaussianPolicy):
    """N(0, 1) data whose clean estimate is shifted by a number a level."""

    def __init__(self, steps=T, frame="vp"):
        super().__init__([[0.0]], frame=frame)
        self.network.shifts = nn.Parameter(torch.zeros(steps, dtype=F64))
        self.table = self.levels(steps)

    def predict(self, x, at, cond):
        step = (at.t.reshape(-1, 1) == self.table.t).nonzero()[:, 1]
        shift = self.network.shifts[step]
        return super().predict(x, at, cond) + (shift[0] if at.t.ndim == 0 else shift[:, None])

    def shift_means(self, kernel, by):
        """Shifts the mean of every stochastic step by a number."""
        now, to, std = self.table[:-1], self.table[1:], kernel.stds(self.table)
        weight = to.alpha - kernel.noise_weight(now, to, std) * now.alpha / now.sigma
        self.network.shifts.data = torch.where(std > 0, by / weight, 0)


def paths(policy, kernel, rows=B, steps=T, shape=(1,)) -> Batch:
    cond = policy.encode([""] * rows)
    noise = SeededNoise(range(rows), shape, dtype=F64)
    run = rollout(policy, kernel, cond, policy.levels(steps), noise, record="path")
    return Batch(Paths(run.latents, cond, kernel, run.levels), {}, tuple(Prompt("") for _ in range(rows)))


def unfolded(batch, steps=None) -> Batch:
    noisy = (batch.rows.kernel.stds(batch.rows.levels) > 0).nonzero().flatten() if steps is None else steps
    return batch.steps(noisy.expand(len(batch), -1))


def coefficients(policy, kernel):
    """Slopes c_k of the base's step means, and their stds."""
    levels, std = policy.levels(T), kernel.stds(policy.levels(T))
    now, to = levels[:-1], levels[1:]
    estimate = now.alpha / (now.alpha**2 + now.sigma**2)
    eps = (1 - now.alpha * estimate) / now.sigma
    return to.alpha * estimate + kernel.noise_weight(now, to, std) * eps, std


def tilted_gain(slopes, std):
    """Var x_T − Π c_k²: what a unit of tilt moves the final mean by, from x_0 of variance 1 that cannot move."""
    variance = torch.ones((), dtype=F64)
    for c, s in zip(slopes, std, strict=True):
        variance = c**2 * variance + s**2
    return variance - slopes.square().prod()


@pytest.mark.parametrize(("frame", "kernel"), [("vp", DDIM(1.0)), ("flow", DDIM(1.0)), ("flow", FlowSDE(math.sqrt(2)))])
def test_a_linear_reward_on_gaussian_data_in_closed_form(frame, kernel):
    policy, c, scale = Shifted(frame=frame), 0.7, 3.0
    policy.remember("reference")
    slopes, std = coefficients(policy, kernel)
    objective = AdjointMatching(scale, reward=Linear(c))
    batch = objective.annotate(policy, paths(policy, kernel), 0)
    after = torch.stack([slopes[k + 1 :].prod() for k in range(T)])
    want = -scale * c * after  # a_{k+1} = −λ·c·Π_{j>k} c_j, whatever the path
    torch.testing.assert_close(batch.columns["adjoint"][..., 0], want.expand(B, T), rtol=1e-6, atol=1e-9)

    plain = paths(policy, kernel).rows.latents[:, -1]
    policy.shift_means(kernel, -(std**2) * want)
    shifted = paths(policy, kernel).rows.latents[:, -1]
    gain = (scale * c * tilted_gain(slopes, std)).expand_as(plain)
    torch.testing.assert_close(shifted - plain, gain, rtol=1e-6, atol=1e-9)
    batch = unfolded(objective.annotate(policy, paths(policy, kernel), 0))
    loss, metrics = objective.loss(policy, batch)
    assert float(loss.detach()) < 1e-10 * float(metrics["wanted"])
    torch.testing.assert_close(metrics["control"], metrics["wanted"])
    (gradient,) = torch.autograd.grad(loss, policy.network.shifts)
    assert float(gradient.abs().max()) < 1e-5


def test_pairing_a_step_with_its_own_adjoint_would_miss_the_tilted_mean():
    policy, kernel = Shifted(), DDIM(1.0)
    slopes, std = coefficients(policy, kernel)
    after = torch.stack([slopes[k + 1 :].prod() for k in range(T)])
    exact, early = ((std**2 * after * pair).sum() for pair in (after, after * slopes))
    torch.testing.assert_close(exact, tilted_gain(slopes, std), rtol=1e-9, atol=0)
    assert float(early) < float(exact) - 0.02


def test_the_loss_is_the_squared_distance_to_the_control():
    policy, kernel = Shifted(), DDIM(1.0)
    policy.remember("reference")
    objective = AdjointMatching(2.0, reward=Quadratic(0.5, 1.0))
    batch = unfolded(objective.annotate(policy, paths(policy, kernel), 0))
    policy.network.shifts.data += 0.1
    now, std = policy.table[:-1], kernel.stds(policy.table)
    weight = policy.table[1:].alpha - kernel.noise_weight(now, policy.table[1:], std) * now.alpha / now.sigma
    step = batch.rows.step
    gap = 0.1 * weight[step] / std[step] + std[step] * batch.columns["adjoint"][:, 0]
    torch.testing.assert_close(objective.loss(policy, batch)[0].detach(), gap.square().mean(), rtol=1e-6, atol=1e-10)


def mixture(frame="vp"):
    policy = GaussianPolicy([[1.0, -1.0], [0.0, 2.0]], [0.5, 0.7], [0.4, 0.6], frame=frame)
    policy.network.means.requires_grad_(True)
    policy.remember("reference")
    return policy


@pytest.mark.parametrize(("frame", "kernel"), [("vp", DDIM(1.0)), ("flow", FlowSDE(math.sqrt(2)))])
def test_on_a_path_of_the_base_adjoints_are_gradients_along_it(frame, kernel):
    """x_T as a function of x_k, its noise held: that gradient is what the products of Jacobians make."""
    policy, reward = mixture(frame), Quadratic(0.5, 3.0)
    batch = paths(policy, kernel, shape=(2,))
    noise = SeededNoise(range(B), (2,), dtype=F64)
    got = AdjointMatching(1.5, reward=reward).annotate(policy, batch, 0).columns["adjoint"]
    for k in range(1, T + 1):
        x = start = batch.rows.latents[:, k].clone().requires_grad_()
        for i in range(k, T):
            clean = policy.denoise(x, batch.rows.levels[i], batch.rows.cond)
            x = kernel(clean, x, batch.rows.levels, i).sample(noise(i + 1))
        (want,) = torch.autograd.grad(-1.5 * reward.measure(x, []).sum(), start)
        torch.testing.assert_close(got[:, k - 1], want, rtol=1e-6, atol=1e-9)


def test_on_a_path_of_the_policy_the_jacobians_are_the_references():
    policy = mixture()
    policy.network.means.data += 0.5
    batch = paths(policy, DDIM(1.0), shape=(2,))
    last = torch.ones(B, 2, dtype=F64)
    got = lean_adjoint(policy, batch.rows, last)
    base, levels = mixture(), batch.rows.levels
    a = last
    for k in reversed(range(1, T)):
        x = batch.rows.latents[:, k].clone().requires_grad_()
        step = DDIM(1.0)(base.denoise(x, levels[k], batch.rows.cond), x, levels, k).mean
        (a,) = torch.autograd.grad((step * a).sum(), x)
        torch.testing.assert_close(got[:, k - 1], a, rtol=1e-10, atol=1e-12)


def test_the_adjoint_follows_its_step():
    policy = mixture()
    batch = AdjointMatching(reward=Linear()).annotate(policy, paths(policy, DDIM(1.0), shape=(2,)), 0)
    chosen = torch.tensor([[1, 4]]).repeat(B, 1)
    steps = batch.steps(chosen)
    assert steps.columns["adjoint"].shape == (2 * B, 2)
    assert torch.equal(steps.columns["adjoint"].reshape(B, 2, 2), batch.columns["adjoint"][:, [1, 4]])


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_the_chunk_changes_nothing(rows):
    policy = mixture()
    batch = paths(policy, DDIM(1.0), shape=(2,))
    one, two = (AdjointMatching(rows=n, reward=Quadratic(1, 0)).annotate(policy, batch, 0) for n in (rows, 3))
    torch.testing.assert_close(one.columns["adjoint"], two.columns["adjoint"], rtol=1e-12, atol=1e-12)


def test_micro_batches_add_up():
    policy = mixture()
    objective = AdjointMatching(2.0, reward=Quadratic(1, 0))
    batch = unfolded(objective.annotate(policy, paths(policy, DDIM(1.0), shape=(2,)), 0), torch.tensor([2, 5]))
    policy.network.means.data += 0.3

    def gradient(part):
        return torch.autograd.grad(objective.loss(policy, part)[0], policy.network.means)[0]

    parts = [gradient(batch.take(torch.tensor(p))) * len(p) / 10 for p in ([0, 1, 2], [3, 4, 5, 6], [7, 8, 9])]
    torch.testing.assert_close(sum(parts), gradient(batch), rtol=1e-10, atol=1e-12)


def test_training_the_shifts_reaches_the_tilted_mean():
    """Gradient steps on given trajectories, none of the closed form told."""
    policy, kernel, c = Shifted(), DDIM(1.0), 0.8
    policy.remember("reference")
    objective = AdjointMatching(1.0, reward=Linear(c))
    optimiser = torch.optim.LBFGS([policy.network.shifts], max_iter=100)
    batch = unfolded(objective.annotate(policy, paths(policy, kernel), 0))

    def closure():
        optimiser.zero_grad()
        loss, _ = objective.loss(policy, batch)
        loss.backward()
        return loss

    before = paths(policy, kernel).rows.latents[:, -1].mean()
    optimiser.step(closure)
    gain = paths(policy, kernel).rows.latents[:, -1].mean() - before
    torch.testing.assert_close(gain, c * tilted_gain(*coefficients(policy, kernel)), rtol=1e-3, atol=0)


class Fickle(Linear):
    def measure(self, media, prompts):
        return torch.where(media[:, 0] > 0, torch.nan, media.sum(1) * (-media[:, 0]).sqrt())


def test_rows_without_a_score_are_left_out():
    policy = mixture()
    batch = paths(policy, DDIM(1.0), rows=8, shape=(2,)).having(keep=torch.arange(8) > 0)
    got = AdjointMatching(reward=Fickle()).annotate(policy, batch, 0)
    judged = batch.rows.latents[:, -1, 0] <= 0
    assert 1 < int(judged.sum()) < 8
    assert torch.equal(got.columns["keep"], judged & (torch.arange(8) > 0))
    assert bool(got.columns["adjoint"][got.columns["keep"]].isfinite().all())


@pytest.mark.parametrize(
    "kernel", [ODE(), DDIM(0.5), CPS(1.0), FlowSDE(0.7), DDIM(1.0, noisy_steps=[False] + [True] * (T - 1))], ids=repr
)
def test_kernels_with_memory_are_refused(kernel):
    policy = mixture("flow")
    with pytest.raises(ValueError, match="needs a memoryless kernel"):
        AdjointMatching(reward=Linear()).annotate(policy, paths(policy, kernel, shape=(2,)), 0)


class Detector(Linear):
    differentiable = False


def test_unfit_rewards_are_named():
    with pytest.raises(ValueError, match="Detector is not differentiable, and AdjointMatching"):
        AdjointMatching(reward=Detector()).check(mixture())
    with pytest.raises(ValueError, match="needs a reward"):
        AdjointMatching().check(mixture())


@pytest.mark.parametrize("given", [{"scale": 0}, {"rows": 0}])
def test_settings_are_checked(given):
    with pytest.raises(ValueError, match="must be"):
        AdjointMatching(**given)
