"""Laws of weighted denoising: its limits, the tilt it ends at, and weights that do not depend on how an update is cut."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from align.batches import Batch, Noised
from align.evidence import errors
from align.objectives.weighted import Weighted
from samplers.families.gaussian import GaussianPolicy
from tests.align.objectives.rows import F64, MEAN, assert_accumulates, gradient, noised, trainable

REWARD = torch.tensor([0.3, -1.2, 2.0, 0.7, 0.0, -0.4, 1.1, 0.9], dtype=torch.float32)
QUALITY = torch.tensor([0.2, 1.0, 0.0, 0.5, 1.0, 1.0, 0.3, 0.0], dtype=F64)  # two groups of four, the second with a tie


def batch_of(policy) -> Batch:
    return Batch(noised(policy, 8), {"reward": REWARD, "quality": QUALITY})


def test_softmax_by_hand():
    policy = trainable(0.3)
    loss, metrics = Weighted(temperature=0.5, cap=None).loss(policy, batch_of(policy))
    weight = (REWARD.double() / 0.5).softmax(0)
    expected = (weight * errors(policy, batch_of(policy).rows)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))
    assert float(metrics["weight"]) == pytest.approx(1, abs=1e-12)
    assert float(metrics["weight_squared"]) == pytest.approx(8 * float(weight.square().sum()))


def test_without_weights_it_is_supervised_fine_tuning():
    policy = trainable(0.3)
    rows = noised(policy, 8)
    loss, metrics = Weighted("none").loss(policy, Batch(rows))  # no column at all
    torch.testing.assert_close(loss, errors(policy, rows).mean())
    assert float(metrics["error"]) == pytest.approx(float(loss.detach()))
    assert Weighted("none").shared(policy, Batch(rows)) == {}
    assert (Weighted("none").source, Weighted().source) == ("data", "rollouts")


def test_a_hot_temperature_is_supervised_fine_tuning():
    policy = trainable(0.3)
    batch = batch_of(policy)
    sft = Weighted("none").loss(policy, batch)[0]
    torch.testing.assert_close(Weighted(temperature=math.inf).loss(policy, batch)[0], sft, rtol=1e-14, atol=0)
    torch.testing.assert_close(Weighted(temperature=1e9).loss(policy, batch)[0], sft, rtol=1e-8, atol=0)


def test_a_cold_temperature_is_the_best_sample():
    policy = trainable(0.3)
    loss, _ = Weighted(temperature=1e-2, cap=None).loss(policy, batch_of(policy))
    torch.testing.assert_close(loss, errors(policy, batch_of(policy).rows)[2])


def test_the_best_of_each_group():
    policy = trainable(0.3)
    loss, metrics = Weighted("top").loss(policy, batch_of(policy))
    torch.testing.assert_close(loss, errors(policy, batch_of(policy).rows)[[1, 4, 5]].mean())
    assert float(metrics["weight"]) == pytest.approx(1)


def test_groups_without_a_best_teach_nothing():
    policy = trainable(0.3)
    loss, _ = Weighted("top").loss(policy, batch_of(policy).having(quality=torch.full((8,), 0.5)))
    assert float(loss.detach()) == 0
    assert torch.equal(gradient(policy, loss), torch.zeros(1, 3, dtype=F64))


def test_the_cap():
    policy = trainable(0.3)
    weight = 8 * (REWARD.double() / 0.2).softmax(0)
    assert float(weight.max()) > 3
    loss, _ = Weighted(temperature=0.2, cap=3.0).loss(policy, batch_of(policy))
    torch.testing.assert_close(loss, (weight.clamp(max=3) * errors(policy, batch_of(policy).rows)).mean())


def test_a_shift_of_rewards_or_reference_changes_nothing():
    policy = trainable(0.3)
    batch = batch_of(policy)
    plain = Weighted(temperature=0.3).loss(policy, batch)[0]
    torch.testing.assert_close(Weighted(temperature=0.3, reference=7.0).loss(policy, batch)[0], plain)
    moved = batch.having(reward=batch.columns["reward"].double() + 30)
    torch.testing.assert_close(Weighted(temperature=0.3).loss(policy, moved)[0], plain, rtol=1e-6, atol=0)


def test_rewards_out_of_range_name_the_remedy():
    policy = trainable(0.3)
    for shift, told in ((10.0, "temperatures above"), (-10.0, "temperatures below")):
        batch = batch_of(policy).having(reward=REWARD + shift)
        with pytest.raises(ValueError, match=told):
            Weighted(temperature=0.01).loss(policy, batch)
        near = Weighted(temperature=0.01, reference=shift).loss(policy, batch)[0]
        torch.testing.assert_close(
            near, Weighted(temperature=0.01).loss(policy, batch_of(policy))[0], rtol=1e-3, atol=0
        )
    with pytest.raises(ValueError, match="expected finite rewards"):
        Weighted().loss(policy, batch_of(policy).having(reward=REWARD * torch.nan))


CUTS = (
    Weighted(temperature=0.3),
    Weighted(temperature=0.2, cap=2.0),
    Weighted(temperature=0.3, reduction="sum"),
    Weighted("top"),
    Weighted("none"),
)


@pytest.mark.parametrize("objective", CUTS, ids=repr)
def test_micro_batches_add_up(objective):
    policy = trainable(0.3)
    batch = batch_of(policy)
    if objective.kind == "softmax":
        batch = batch.having(reward=batch.columns["reward"].double() * 60)  # far beyond what float32 exponents hold
    assert_accumulates(objective, policy, batch, (1, 5, 2))


def grid(mean: float, std: float, policy: GaussianPolicy, count: int = 400) -> Noised:
    """Evenly spaced quantiles of data and noise at one middle level: sums that stand in for expectations."""

    def quantiles(n: int) -> torch.Tensor:
        return torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)

    x0, eps = torch.meshgrid(mean + std * quantiles(count), quantiles(300), indexing="ij")
    at = policy.training_levels(torch.full((x0.numel(),), 0.5, dtype=F64))
    return Noised(x0.reshape(-1, 1), eps.reshape(-1, 1), at, policy.encode(["a"] * x0.numel()))


@pytest.mark.parametrize(("c", "temperature"), [(1.0, 1.0), (1.5, 2.0), (-0.6, 0.5)])
def test_regression_ends_at_the_tilted_gaussian(c, temperature):
    """r = c·x on N(m, s²): the best model has mean m + c·s²/τ and the same variance."""
    m, s = 0.4, 0.5
    target = m + c * s**2 / temperature
    objective = Weighted(temperature=temperature, cap=None)

    def at(mean: float, std: float) -> tuple[float, float]:
        policy = GaussianPolicy([[mean]], [std], prediction="x0")
        policy.network.means.requires_grad_(True)
        rows = grid(m, s, policy)
        loss, _ = objective.loss(policy, Batch(rows, {"reward": c * rows.x0[:, 0]}))
        return float(loss.detach()), float(gradient(policy, loss))

    slopes = [at(mean, s)[1] for mean in (0.0, 1.0)]  # the loss is quadratic in the mean: two slopes give its minimum
    assert slopes[0] / (slopes[0] - slopes[1]) == pytest.approx(target, abs=0.01)
    stds = [0.98 * s, s, 1.02 * s]
    losses = [at(target, std)[0] for std in stds]
    bend = losses[0] - 2 * losses[1] + losses[2]
    assert bend > 0
    vertex = s + 0.02 * s * (losses[0] - losses[2]) / (2 * bend)  # of the parabola through the three
    assert vertex == pytest.approx(s, rel=0.01)


def test_training_raises_the_reward():
    policy = trainable(0.0, torch.zeros(1, 1, dtype=F64), prediction="x0")
    optimiser = torch.optim.SGD([policy.network.means], lr=0.2)
    for update in range(60):
        rows = noised(policy, 256, seed=10 * update)
        optimiser.zero_grad()
        Weighted().loss(policy, Batch(rows, {"reward": rows.x0[:, 0]}))[0].backward()
        optimiser.step()
    assert float(policy.network.means.detach()) == pytest.approx(1.0, abs=0.25)  # the tilt of N(0, 1) by exp(x)


def test_large_errors_stay_finite():
    policy = trainable(0.3, MEAN.float(), prediction="x0", dtype=torch.float32)
    rows = noised(policy, 8)
    rows = Noised((1e3 * rows.x0).float(), rows.eps.float(), rows.at, rows.cond)
    loss, _ = Weighted().loss(policy, Batch(rows, {"reward": REWARD}))
    assert bool(loss.isfinite()) and bool(gradient(policy, loss).isfinite().all())


def test_order_does_not_matter():
    policy = trainable(0.3)
    batch, order = batch_of(policy), torch.tensor([3, 1, 0, 7, 6, 2, 5, 4])
    torch.testing.assert_close(Weighted().loss(policy, batch)[0], Weighted().loss(policy, batch[order])[0])


def test_mistakes_are_named():
    policy = trainable(0.3)
    with pytest.raises(ValueError, match="kind must be one of softmax, top, none"):
        Weighted("best")  # pyright: ignore
    for options in ({"temperature": 0.0}, {"cap": 0.5}):
        with pytest.raises(ValueError, match="temperature must be > 0 and cap ≥ 1"):
            Weighted(**options)
    for kind, column in (("softmax", "reward"), ("top", "quality")):
        with pytest.raises(ValueError, match=f"column '{column}'"):
            Weighted(kind).loss(policy, Batch(noised(policy, 2)))
    empty = replace(batch_of(policy), shared={"weight": torch.zeros((), dtype=F64)})
    with pytest.raises(ValueError, match="below reference"):
        Weighted().loss(policy, empty)
