"""Every objective on a rectified flow: what the papers write in velocities, and that each of them trains one."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.batches import Batch
from align.objectives import MaPO, Pairwise, Unary, Weighted
from align.objectives.seppo import SePPO
from samplers import FlowSDE
from samplers.families.gaussian import GaussianPolicy
from tests.align.objectives.rows import F64, noised, normal, trainable
from tests.align.runs import CASES, MEANS, trainer_of

FLOW = {"frame": "flow", "prediction": "flow"}
PAIRS = 6


def velocity_errors(policy: GaussianPolicy, rows) -> torch.Tensor:
    """(B,) mean |v_θ(x_t) − (ε − x0)|² with x_t = (1 − t)·x0 + t·ε, as papers on flows write it."""
    t = rows.at.t[:, None]
    x = (1 - t) * rows.x0 + t * rows.eps
    return (policy.predict(x, rows.at, rows.cond) - (rows.eps - rows.x0)).square().mean(1)


def both(policy: GaussianPolicy, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) the errors of the policy and of its reference."""
    with torch.no_grad(), policy.acting_as("reference"):
        before = velocity_errors(policy, rows)
    return velocity_errors(policy, rows), before


@pytest.mark.parametrize("schedule", ["constant", "one_minus_t_sq"])
def test_flow_dpo(schedule):
    """−log σ(−β_t/2·[(e_w − e_w') − (e_l − e_l')]) with β_t = β, which its authors prefer, or β·(1 − t)²."""
    policy, beta = trainable(0.4, **FLOW), 100.0
    rows = noised(policy, PAIRS, 2)
    batch = Batch(rows, {"quality": torch.tensor([1.0, 0.0] * PAIRS)}, members=2)
    mine, before = both(policy, rows)
    gap = (mine - before).reshape(-1, 2)
    sharp = beta * (1 - rows.at.t[::2]) ** 2 if schedule == "one_minus_t_sq" else beta
    expected = -logsigmoid(-sharp / 2 * (gap[:, 0] - gap[:, 1])).mean()
    found, _ = Pairwise(beta=beta, schedule=schedule).loss(policy, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    at_once, _ = Pairwise(beta=beta, schedule=schedule).loss(trainable(0.0, **FLOW), batch)
    assert float(at_once.detach()) == pytest.approx(math.log(2), abs=1e-15)


def test_flow_rwr():
    """E[exp(r)·e] over E[exp(r)], every sample alike at equal rewards."""
    policy, reward = trainable(0.4, **FLOW), normal(8, seed=3)
    rows = noised(policy, 8)
    weight, error = reward.exp(), velocity_errors(policy, rows)
    found, _ = Weighted(cap=None).loss(policy, Batch(rows, {"reward": reward}))
    torch.testing.assert_close(found, (weight * error).sum() / weight.sum(), rtol=1e-12, atol=1e-12)
    flat, _ = Weighted(cap=None).loss(policy, Batch(rows, {"reward": torch.full((8,), 3.0)}))
    torch.testing.assert_close(flat, error.mean(), rtol=1e-12, atol=1e-12)


def test_kto_mapo_and_seppo_read_the_errors_of_velocities():
    policy = trainable(0.4, **FLOW)
    rows = noised(policy, PAIRS, 2)
    mine, before = both(policy, rows)
    gain = before - mine
    label = torch.tensor([1, 0] * PAIRS)
    x = 5.0 * (gain - gain.mean().clamp(min=0))
    found, _ = Unary(beta=5.0).loss(policy, Batch(rows, {"label": label}))
    torch.testing.assert_close(found, (1 - torch.sigmoid((2 * label - 1) * x)).mean(), rtol=1e-12, atol=1e-12)

    winner, loser = mine.reshape(-1, 2).unbind(1)
    delta = 0.5 * winner / (0.5 * winner).expm1() - 0.5 * loser / (0.5 * loser).expm1()
    found, _ = MaPO().loss(policy, Batch(rows, {"quality": 1.0 - (torch.arange(2 * PAIRS) % 2).to(F64)}, members=2))
    torch.testing.assert_close(found, (winner - 0.1 * logsigmoid(1000 * delta)).mean(), rtol=1e-9, atol=1e-12)

    policy.voices["old"] = policy.voices["reference"]
    gap = (mine - before).reshape(-1, 2)
    found, _ = SePPO(beta=30.0, anchor="none").loss(policy, Batch(rows, members=2))
    torch.testing.assert_close(found, -logsigmoid(-15.0 * (gap[:, 0] - gap[:, 1])).mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_every_objective_trains_a_flow(name, data, plain, tmp_path):
    """Sampled by the memoryless Flow-SDE: losses are finite, weights move, and the ratio of a first pass is 1."""
    policy = GaussianPolicy(MEANS, [0.6, 0.8], [0.5, 0.5], **FLOW)
    before = policy.network.means.detach().clone()
    how = {"kernel": FlowSDE(math.sqrt(2)), "schedule": "constant", "ema": 0.0, "updates": 4, "eval_every": 0}
    log = trainer_of(name, tmp_path / "run", data, policy=policy, **how).fit().log
    assert all(math.isfinite(row["loss"]) and not row["skipped"] for row in log)
    assert float((policy.network.means - before).abs().max()) > 1e-3
    if "ratio_max_deviation" in log[0]:
        assert log[0]["ratio_max_deviation"] == 0.0
