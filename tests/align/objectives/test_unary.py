"""Laws of losses on single labels: the start, the baseline, the utilities one by one, and the paper's plane toy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from align.batches import Batch, Noised
from align.evidence import errors, evidence, reference_evidence
from align.objectives.unary import Unary, Utility, worth
from tests.align.objectives.rows import F64, MEAN, assert_accumulates, gradient, noised, trainable

LABELS = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])


def batch_of(policy, label=LABELS) -> Batch:
    return Batch(noised(policy, len(label)), {"label": label})


def gain(policy, batch: Batch) -> torch.Tensor:
    return evidence(policy, batch.rows) - reference_evidence(policy, batch.rows)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, F64])
def test_at_the_reference(dtype):
    """Half, with gradient −(β/4)·w·s·∇g."""
    policy = trainable(0.0)
    batch = batch_of(policy, LABELS.to(dtype))
    loss, metrics = Unary(beta=7.0, desirable=1.0, undesirable=1.0).loss(policy, batch)
    assert float(loss.detach()) == 0.5
    assert (float(metrics["gain"]), float(metrics["baseline"]), float(metrics["accuracy"])) == (0, 0, 0.5)
    weighted, _ = Unary(beta=7.0, desirable=1.5, undesirable=0.5).loss(policy, batch)
    sign, weight = 2 * LABELS - 1, torch.where(LABELS == 1, 1.5, 0.5)
    expected = -(7.0 / 4) * (weight * sign * evidence(policy, batch.rows)).mean()
    torch.testing.assert_close(gradient(policy, weighted), gradient(policy, expected), rtol=1e-10, atol=1e-13)


def test_kto_by_hand():
    policy = trainable(0.3)
    batch = batch_of(policy)
    with torch.no_grad(), policy.acting_as("reference"):
        before = errors(policy, batch.rows)
    g = before - errors(policy, batch.rows)
    z = g.detach().mean().clamp(min=0)
    u = (2 * LABELS - 1) * 2.0 * (g - z)
    expected = (1 - torch.sigmoid(u)).mean()
    loss, _ = Unary(beta=2.0).loss(policy, batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("x", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("kind", get_args(Utility))
def test_utilities_by_hand(kind, x, sign):
    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    by_hand = {
        "kto": sigmoid(sign * x),
        "loss_averse": math.log(sigmoid(sign * x)),
        "risk_seeking": -math.log(sigmoid(-sign * x)),
        "risk_seeking_signed": -sign * math.log(sigmoid(-x)),
        "risk_seeking_exponential": sign * math.exp(x / 100) - 1,
    }
    found = worth(kind, torch.tensor([x], dtype=F64), torch.tensor([sign], dtype=F64))
    assert float(found) == pytest.approx(by_hand[kind], abs=1e-12)


@pytest.mark.parametrize("kind", get_args(Utility))
def test_every_utility_wants_gains_for_good_and_losses_for_bad(kind):
    x = torch.linspace(-3, 3, 13, dtype=F64)
    for sign in (1.0, -1.0):
        steps = sign * worth(kind, x, torch.full_like(x, sign)).diff()
        assert bool((steps > 0).all())


@pytest.mark.parametrize(("kind", "bend"), [("loss_averse", -1), ("risk_seeking", 1)])
def test_utilities_are_concave_or_convex(kind, bend):
    u = torch.linspace(-3, 3, 13, dtype=F64)
    assert bool((bend * worth(kind, u, torch.ones_like(u)).diff().diff() > 0).all())


def test_sharp_preferences_count_mistakes():
    policy = trainable(0.3)
    batch = batch_of(policy)
    g = gain(policy, batch).detach()
    wrong = ((2 * LABELS - 1) * (g - g.mean().clamp(min=0)) < 0).double().mean()
    loss, metrics = Unary(beta=1e9).loss(policy, batch)
    assert float(loss.detach()) == pytest.approx(float(wrong), abs=1e-9)
    assert float(metrics["accuracy"]) == 1 - float(wrong)


# The baseline


def test_the_baseline_centres_a_batch_of_one_class():
    policy = trainable(0.3)
    rows = noised(policy, 40)
    rows = rows[gain(policy, Batch(rows)).detach() > -0.02]
    batch = Batch(rows, {"label": torch.ones(len(rows))})
    g = gain(policy, batch).detach()
    _, metrics = Unary().loss(policy, batch)
    assert float(g.mean()) > 0
    assert float((g - metrics["baseline"]).mean()) == pytest.approx(0, abs=1e-12)
    assert math.isfinite(float(metrics["gain"]))


def test_the_baseline_is_clamped_after_averaging():
    """Means −3 and 1 of two halves: together below 0, so z = 0; clamped first it would be 1/2."""
    policy = trainable(0.3)
    batch = replace(batch_of(policy), shared={"baseline": torch.tensor(-1.0, dtype=F64)})
    assert float(Unary().loss(policy, batch)[1]["baseline"]) == 0
    batch = replace(batch, shared={"baseline": torch.tensor(0.25, dtype=F64)})
    assert float(Unary().loss(policy, batch)[1]["baseline"]) == 0.25
    g = gain(policy, batch_of(policy)).detach()
    assert bool((g < 0).any())
    torch.testing.assert_close(Unary().shared(policy, batch)["baseline"], g)  # raw, not clamped
    assert not Unary().shared(policy, batch)["baseline"].requires_grad


def test_the_baseline_carries_no_gradient():
    policy = trainable(-0.4)
    rows = noised(policy, 30)
    rows = rows[gain(policy, Batch(rows)).detach() > -0.05]
    batch = Batch(rows, {"label": torch.arange(len(rows)) % 2})
    z = gain(policy, batch).detach().mean()
    assert z > 0
    alone, _ = Unary(beta=2.0).loss(policy, batch)
    given, _ = Unary(beta=2.0).loss(policy, replace(batch, shared={"baseline": z}))
    torch.testing.assert_close(gradient(policy, alone), gradient(policy, given))


@pytest.mark.parametrize("kind", get_args(Utility))
def test_micro_batches_add_up(kind):
    policy = trainable(0.3)
    assert_accumulates(Unary(kind, beta=3.0, desirable=1.2), policy, batch_of(policy), (1, 4, 3))


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_still_learns(label):
    policy = trainable(0.1)
    loss, _ = Unary(beta=3.0).loss(policy, batch_of(policy, torch.full((8,), label)))
    assert float(gradient(policy, loss).norm()) > 0


def test_a_beta_of_pairs_is_twice_as_strong_here():
    """For g far inside the linear range the score of a row is β·g here and β·g/2 in `Pairwise`."""
    policy = trainable(1e-4)
    batch = batch_of(policy, torch.ones(8))
    kto, _ = Unary(beta=1.0).loss(policy, replace(batch, shared={"baseline": torch.zeros((), dtype=F64)}))
    assert float(0.5 - kto.detach()) == pytest.approx(float(gain(policy, batch).mean().detach()) / 4, rel=1e-3)


def test_summing_instead_of_averaging_is_a_change_of_beta():
    policy = trainable(0.3)
    a, b = (
        Unary(beta=3.0).loss(policy, batch_of(policy)),
        Unary(beta=1.0, reduction="sum").loss(policy, batch_of(policy)),
    )
    torch.testing.assert_close(a[0], b[0])


def test_large_errors_stay_finite():
    policy = trainable(0.3, MEAN.float(), prediction="x0", dtype=torch.float32)
    rows = noised(policy, 8)
    rows = Noised((1e3 * rows.x0).float(), rows.eps.float(), rows.at, rows.cond)
    for kind in ("kto", "loss_averse", "risk_seeking", "risk_seeking_signed"):
        loss, _ = Unary(kind).loss(policy, Batch(rows, {"label": LABELS}))
        assert bool(loss.isfinite()) and bool(gradient(policy, loss).isfinite().all())


def test_the_papers_toy():
    """From N((.5, .8), .04), four good N((.3, .8), .01) to one bad N((.3, .6), .01): to the first, off the second."""
    policy = trainable(0.0, torch.tensor([[0.5, 0.8]], dtype=F64), stds=[0.2])
    optimiser = torch.optim.SGD([policy.network.means], lr=0.02)
    for update in range(150):
        rows, label = noised(policy, 60, seed=10 * update), (torch.arange(60) % 5 > 0).long()
        centre = torch.where(label[:, None] == 1, torch.tensor([0.3, 0.8]), torch.tensor([0.3, 0.6])).double()
        rows = replace(rows, x0=centre + 0.1 * rows.x0)
        optimiser.zero_grad()
        Unary(beta=20.0).loss(policy, Batch(rows, {"label": label}))[0].backward()
        optimiser.step()
    mean = policy.network.means.detach()[0]
    good, bad, start = (torch.tensor(v, dtype=F64) for v in ([0.3, 0.8], [0.3, 0.6], [0.5, 0.8]))
    assert (mean - good).norm() < 0.5 * (start - good).norm()
    assert (mean - bad).norm() > (good - bad).norm() + 0.03  # further off than imitating the good ones would be


def test_mistakes_are_named():
    policy = trainable(0.1)
    with pytest.raises(ValueError, match="utility must be one of kto"):
        Unary("other")  # pyright: ignore
    with pytest.raises(ValueError, match="beta must be > 0"):
        Unary(beta=0.0)
    with pytest.raises(ValueError, match=r"labels must be 1 \(good\) or 0 \(bad\)"):
        Unary().loss(policy, batch_of(policy, 2 * LABELS - 1))
    with pytest.raises(ValueError, match="column 'label'"):
        Unary().loss(policy, Batch(noised(policy, 2)))
