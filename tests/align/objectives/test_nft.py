"""Laws of DiffusionNFT: what its gradient is at the sampling weights, and where its optimum lies."""

from __future__ import annotations

import math

import pytest
import torch

from align.batches import Batch, Noised
from align.objectives.nft import DiffusionNFT, contrast, decayed
from samplers.families.gaussian import GaussianPolicy

F64 = torch.float64
B = 6
FRAMES = [("flow", "flow"), ("flow", "x0"), ("vp", "eps"), ("vp", "v"), ("vp", "x0")]


def mixture(frame="flow", prediction="flow"):
    policy = GaussianPolicy([[1.0, -1.0], [0.0, 2.0]], [0.5, 0.7], [0.4, 0.6], frame=frame, prediction=prediction)
    policy.network.means.requires_grad_(True)
    policy.remember("reference")
    return policy


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def batch_of(policy, advantage) -> Batch:
    advantage = torch.as_tensor(advantage, dtype=F64).expand(B)
    at = policy.levels(B + 2)[torch.arange(1, B + 1)]
    rows = Noised(normal(B, 2), normal(B, 2, seed=1), at, policy.encode([""] * B))
    return Batch(rows, {"advantage": advantage})


def gradient(policy, loss):
    return torch.autograd.grad(loss, policy.network.means)[0]


def estimate(policy, rows):
    return policy.denoise(rows.x, rows.at, rows.cond).x0


@pytest.mark.parametrize(("frame", "prediction"), FRAMES)
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("r", [0.0, 0.25, 0.5, 1.0])
def test_at_old_the_gradient_is_that_of_the_weighted_error(frame, prediction, beta, r):
    policy = mixture(frame, prediction)
    objective = DiffusionNFT(beta, kl_weight=0.0)
    objective.begin(policy)
    batch = batch_of(policy, 5.0 * (2 * r - 1))
    gap = estimate(policy, batch.rows) - batch.rows.x0
    size = gap.detach().abs().mean(1).clamp(min=1e-5)
    want = gradient(policy, 5.0 * (2 * r - 1) * (gap.square().mean(1) / size).mean())
    got = gradient(policy, objective.loss(policy, batch)[0])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert bool(got.any()) == (r != 0.5)


def test_at_old_the_loss_says_nothing_about_the_advantage():
    policy = mixture()
    objective = DiffusionNFT(kl_weight=0.0)
    objective.begin(policy)
    one, two = (objective.loss(policy, batch_of(policy, a))[0] for a in (5.0, -2.0))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_mixed_advantages_weigh_the_rows_of_the_matching_gradient():
    policy, advantage = mixture(), torch.linspace(-3, 3, B, dtype=F64)
    objective = DiffusionNFT(kl_weight=0.0, clip=5.0)
    objective.begin(policy)
    batch = batch_of(policy, advantage)
    gap = estimate(policy, batch.rows) - batch.rows.x0
    want = gradient(policy, (advantage * gap.square().mean(1) / gap.detach().abs().mean(1)).mean())
    torch.testing.assert_close(gradient(policy, objective.loss(policy, batch)[0]), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 3.0, 5.0])
def test_with_fixed_weights_the_optimum_is_closed_form(beta, advantage):
    """x0_θ − x0_old = −(A/cβ)·(x0_old − x0): the exact minimum of a quadratic, whose level is off by no row."""
    x0, old, clip = normal(B, 3), normal(B, 3, seed=1), 5.0
    good = torch.full((B,), advantage / (2 * clip) + 0.5, dtype=F64)
    best = (old - advantage / (clip * beta) * (old - x0)).requires_grad_()
    loss = contrast(best, old, x0, good, beta, floor=1e6)
    (slope,) = torch.autograd.grad(loss.sum(), best)
    assert float(slope.abs().max()) < 1e-18
    worse = contrast(best.detach() + 0.1, old, x0, good, beta, floor=1e6)
    assert bool((worse > loss.detach()).all())


def test_in_velocities_it_is_the_published_formula():
    policy = mixture("flow", "flow")
    objective = DiffusionNFT(0.7, clip=3.0, kl_weight=0.2)
    objective.begin(policy)
    old, batch = mixture("flow", "flow"), batch_of(policy, torch.linspace(-4, 4, B, dtype=F64))
    policy.network.means.data += 0.2
    rows, a = batch.rows, batch.columns["advantage"]
    v, v_old = (p.output(rows.x, rows.at, rows.cond) for p in (policy, old))
    t = rows.at.t[:, None]
    parts = []
    for velocity in (0.7 * v + 0.3 * v_old, 1.7 * v_old - 0.7 * v):
        gap = rows.x - t * velocity - rows.x0
        parts.append(gap.square().mean(1) / gap.detach().abs().mean(1))
    r = (a.clamp(-3, 3) / 6 + 0.5).clamp(0, 1)
    want = 3.0 * ((r * parts[0] + (1 - r) * parts[1]) / 0.7).mean() + 0.2 * (v - v_old).square().mean()
    loss, metrics = objective.loss(policy, batch)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, want), rtol=1e-9, atol=1e-12)
    assert float(metrics["reference_distance"]) > 0


def test_at_the_reference_the_distance_and_its_gradient_are_zero():
    policy = mixture()
    objective = DiffusionNFT(kl_weight=100.0)
    objective.begin(policy)
    loss, metrics = objective.loss(policy, batch_of(policy, 0.0))
    assert float(metrics["reference_distance"]) == float(metrics["old_distance"]) == 0
    assert not gradient(policy, loss).any()


def test_an_exact_estimate_meets_the_floor_not_infinity():
    x0 = normal(B, 3)
    loss = contrast(x0.clone().requires_grad_(), x0, x0, torch.ones(B, dtype=F64), 1.0, 1e-5)
    assert not loss.any()


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_old_follows_by_its_schedule_after_each_collection(kind):
    policy = mixture()
    objective = DiffusionNFT(decay=kind, every=20)
    objective.begin(policy)
    old = policy.voices["old"]["means"].clone()
    for update in range(1, 201):
        policy.network.means.data += 0.01
        objective.updated(policy, update)
        if update % 20 == 0:
            d = {0: 0.0, 1: min(0.001 * update, 0.5), 2: 0.0 if update < 75 else min(0.0075 * (update - 75), 0.999)}[
                kind
            ]
            old = d * old + (1 - d) * policy.network.means.detach()
        torch.testing.assert_close(policy.voices["old"]["means"], old, rtol=1e-12, atol=1e-12)


def test_published_schedules_at_their_ends():
    assert [decayed(1, n) for n in (0, 100, 5000)] == [0, 0.1, 0.5]
    assert [decayed(2, n) for n in (0, 75, 5000)] == [0, 0, 0.999]
    assert math.isclose(decayed(2, 175), 0.75)


def test_micro_batches_add_up():
    policy = mixture()
    objective = DiffusionNFT(kl_weight=0.3)
    objective.begin(policy)
    batch = batch_of(policy, torch.linspace(-4, 4, B, dtype=F64))
    policy.network.means.data += 0.2
    parts = [gradient(policy, objective.loss(policy, batch.take([i, i + 1]))[0]) for i in range(0, B, 2)]
    whole = gradient(policy, objective.loss(policy, batch)[0])
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("given", [{"beta": 0.0}, {"clip": -1.0}, {"every": 0}, {"decay": 3}, {"kl_weight": -1}])
def test_settings_are_checked(given):
    with pytest.raises(ValueError, match="must be"):
        DiffusionNFT(**given)
