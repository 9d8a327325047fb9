"""Laws of MaPO: its function by hand and in both limits, supervised fine-tuning at β = 0, ties and large errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.batches import Batch, Noised
from align.evidence import errors
from align.objectives.mapo import MaPO, likelihood
from tests.align.objectives.rows import F64, MEAN, assert_accumulates, gradient, noised, trainable

QUALITY = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 1], dtype=F64)


def batch_of(policy) -> Batch:
    return Batch(noised(policy, 4, 2), {"quality": QUALITY}, (), 2)


def test_the_function_by_hand():
    x = torch.tensor([0.05, 0.1, 1.0], dtype=F64)
    assert likelihood(x).tolist() == pytest.approx([0.9752083, 0.9508332, 1 / (math.e - 1)], abs=5e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_function_at_both_ends(dtype):
    """1 with slope −1/2 at 0, no step where the series takes over, and 0 where exp overflows."""
    x = torch.tensor([0.0, 1e-12, 1e-4 * (1 - 1e-6), 1e-4 * (1 + 1e-6), 1e3, 1e30], dtype=dtype, requires_grad=True)
    y = likelihood(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == pytest.approx([1, 1, 1 - 5e-5, 1 - 5e-5, 0, 0], abs=1e-7 if dtype == torch.float32 else 1e-9)
    assert slope[:4].tolist() == pytest.approx([-0.5, -0.5, -0.5, -0.5], abs=2e-3 if dtype == torch.float32 else 1e-4)
    assert slope[4:].tolist() == [0, 0]


def test_the_series_meets_the_formula():
    x = torch.logspace(-8, 1, 200, dtype=F64)
    torch.testing.assert_close(likelihood(x), x / torch.expm1(x), rtol=1e-12, atol=0)


def test_the_loss_by_hand():
    policy = trainable(0.3)
    loss, metrics = MaPO(beta=0.2, snr=0.4, steps=100).loss(policy, batch_of(policy))
    error = errors(policy, batch_of(policy).rows)
    won = QUALITY == 1
    f = [x / (torch.exp(x) - 1) for x in (0.4 * error[won], 0.4 * error[~won])]
    expected = error[won].mean() - 0.2 * logsigmoid(100 * (f[0] - f[1])).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))
    assert float(metrics["winner_error"]) == pytest.approx(float(error[won].mean().detach()))
    assert float(metrics["loser_error"]) == pytest.approx(float(error[~won].mean().detach()))
    assert float(metrics["accuracy"]) == float((error[won] < error[~won]).double().mean())


def test_without_a_margin_it_is_supervised_fine_tuning():
    policy = trainable(0.3)
    loss, _ = MaPO(beta=0.0).loss(policy, batch_of(policy))
    imitation = errors(policy, batch_of(policy).rows)[QUALITY == 1].mean()
    torch.testing.assert_close(loss, imitation)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, imitation))


def test_equal_errors():
    policy = trainable(0.3)
    rows = noised(policy, 4, 2)
    twice = rows[torch.arange(0, 8, 2).repeat_interleave(2)]
    loss, metrics = MaPO(beta=0.3).loss(policy, Batch(twice, {"quality": QUALITY}, (), 2))
    expected = errors(policy, rows)[::2].mean() + 0.3 * math.log(2)
    torch.testing.assert_close(loss, expected)
    assert float(metrics["accuracy"]) == 0.5


def test_small_errors_are_a_linear_margin():
    x = torch.tensor([1e-3, 3e-3], dtype=F64)
    delta = likelihood(0.5 * x[0]) - likelihood(0.5 * x[1])
    assert float(delta) == pytest.approx(-0.5 * float(x[0] - x[1]) / 2, rel=1e-3)


def test_swapping_a_pair_and_its_label_changes_nothing():
    policy = trainable(0.3)
    batch = batch_of(policy)
    other = batch[torch.arange(8).reshape(-1, 2).flip(1).flatten()]
    assert torch.equal(MaPO().loss(policy, batch)[0], MaPO().loss(policy, other)[0])


def test_ties_teach_nothing():
    policy = trainable(0.3)
    loss, _ = MaPO(beta=0.3).loss(policy, batch_of(policy).having(quality=torch.ones(8)))
    assert float(loss.detach()) == pytest.approx(0.3 * math.log(2), abs=1e-15)
    assert torch.equal(gradient(policy, loss), torch.zeros(1, 3, dtype=F64))


def test_it_needs_no_reference():
    policy = trainable(0.3)
    policy.voices.clear()
    MaPO().loss(policy, batch_of(policy))


def test_micro_batches_add_up():
    policy = trainable(0.3)
    assert_accumulates(MaPO(), policy, batch_of(policy), (1, 3))


def test_large_errors_stay_finite():
    policy = trainable(0.3, MEAN.float(), prediction="x0", dtype=torch.float32)
    rows = noised(policy, 4, 2)
    rows = Noised((1e3 * rows.x0).float(), rows.eps.float(), rows.at, rows.cond)
    loss, _ = MaPO().loss(policy, Batch(rows, {"quality": QUALITY}, (), 2))
    assert bool(loss.isfinite()) and bool(gradient(policy, loss).isfinite().all())


def test_mistakes_are_named():
    for options in ({"beta": -1.0}, {"snr": 0.0}, {"steps": 0}):
        with pytest.raises(ValueError, match="MaPO needs"):
            MaPO(**options)
    policy = trainable(0.3)
    with pytest.raises(ValueError, match="column 'quality'"):
        MaPO().loss(policy, Batch(noised(policy, 4, 2), {}, (), 2))
