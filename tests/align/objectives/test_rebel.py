"""Laws of REBEL: its value and gradient at the weights that sampled, pair by pair; its optimum; the exponential tilt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.batches import Batch
from align.evidence import evidence
from align.objectives import Rebel
from align.sources import Rollouts
from samplers import DDIM, Consistency, DanceSDE
from tests.align.objectives.rows import F64, assert_accumulates, gradient, normal, paths, trainable
from tests.align.runs import Near

FLOW = {"frame": "flow", "prediction": "flow"}
KERNELS = [DanceSDE(eta=0.8), Consistency(), DDIM(1.0, noisy_steps=[True, False, True])]


def pairs(policy, items=3, kernel=KERNELS[0], seed=5) -> Batch:
    """Pairs of trajectories with advantages, as a source collects them."""
    batch = replace(paths(policy, 2 * items, kernel=kernel), members=2)
    return batch.having(advantage=normal(2 * items, seed=seed))


def noisy_steps(batch: Batch) -> list[int]:
    return (batch.rows.kernel.stds(batch.rows.levels) > 0).nonzero().flatten().tolist()


def log_density(policy, batch: Batch, reduction="mean"):
    """(B,) Σ over the stochastic steps, one step after another."""
    parts = [batch.steps(torch.full((batch.items, 1), i)).rows for i in noisy_steps(batch)]
    return sum(evidence(policy, part, reduction) for part in parts)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_where_it_sampled_the_loss_is_the_squared_difference_and_the_gradient_a_policy_gradient(kernel, reduction):
    policy, eta = trainable(0.3, **FLOW), 0.7
    batch = pairs(policy, kernel=kernel)
    loss, metrics = Rebel(eta, reduction).loss(policy, batch)
    a = batch.columns["advantage"].reshape(-1, 2)
    apart = a[:, 0] - a[:, 1]
    torch.testing.assert_close(loss.detach(), apart.square().mean(), rtol=1e-12, atol=1e-12)
    assert float(metrics["found"]) < 1e-12
    lp = log_density(policy, batch, reduction).reshape(-1, 2)
    by_hand = (-2 * eta * apart * (lp[:, 0] - lp[:, 1])).mean()
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, by_hand), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_a_moved_policy_by_hand(kernel):
    policy, eta = trainable(0.0, **FLOW), 1.3
    batch = pairs(policy, kernel=kernel)
    before = log_density(policy, batch).detach()
    with torch.no_grad():
        policy.network.means += 0.2
    gain = (log_density(policy, batch) - before).reshape(-1, 2)
    a = batch.columns["advantage"].reshape(-1, 2)
    want = (eta * (gain[:, 0] - gain[:, 1]) - (a[:, 0] - a[:, 1])).square().mean()
    loss, _ = Rebel(eta).loss(policy, batch)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, want), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("moved", [0.0, 0.4])
def test_a_batch_of_two_pairs_is_the_mean_of_two_batches_of_one(moved):
    """No sample's density may enter another's: the released code sums the densities of the whole batch."""
    policy = trainable(0.0, **FLOW)
    batch = pairs(policy, items=2)
    with torch.no_grad():
        policy.network.means += moved
    objective = Rebel()
    whole = objective.loss(policy, batch)[0].detach()
    alone = [objective.loss(policy, batch.take([i]))[0].detach() for i in range(2)]
    torch.testing.assert_close(whole, sum(alone) / 2, rtol=1e-12, atol=1e-12)
    old = batch.columns["old"][:, noisy_steps(batch)].sum(1) / 3
    summed = log_density(policy, batch).detach().reshape(-1, 2).sum(0) - old.reshape(-1, 2)  # as released
    a = batch.columns["advantage"].reshape(-1, 2)
    released = (summed[:, 0] - summed[:, 1] - a[:, 0] + a[:, 1]).square().mean()
    assert abs(float(released - whole)) > 0.1


@pytest.mark.parametrize("sizes", [(1, 2), (1, 1, 1)])
def test_micro_batches_add_up(sizes):
    policy = trainable(0.0, **FLOW)
    batch = pairs(policy)
    with torch.no_grad():
        policy.network.means += 0.2
    assert_accumulates(Rebel(), policy, batch, sizes)


def test_the_order_of_a_pair_and_of_the_pairs_does_not_matter():
    policy = trainable(0.0, **FLOW)
    batch = pairs(policy)
    with torch.no_grad():
        policy.network.means += 0.2
    loss, _ = Rebel().loss(policy, batch)
    for order in ([1, 0, 3, 2, 5, 4], [4, 5, 0, 1, 2, 3]):
        torch.testing.assert_close(Rebel().loss(policy, batch[order])[0], loss, rtol=1e-12, atol=1e-12)


def test_the_optimum_is_the_exponential_tilt():
    """One stochastic step N(m, s²) whose mean is free: where A = c·(x − m), zero loss over all pairs moves m by s²·c/η."""
    policy, eta, c = trainable(0.0, **FLOW), 2.0, torch.tensor([0.3, -0.5, 0.2], dtype=F64)
    kernel = DanceSDE(eta=0.8, noisy_steps=[True, False])
    batch = replace(paths(policy, 40, steps=2, kernel=kernel), members=2)
    first, levels = batch.rows.latents[:, 0], batch.rows.levels

    def step():
        with torch.no_grad():
            return kernel(policy.denoise(first, levels[0], batch.rows.cond), first, levels, 0)

    before = step()
    batch = batch.having(advantage=(batch.rows.latents[:, 1] - before.mean) @ c)
    optimiser = torch.optim.LBFGS([policy.network.means], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimiser.zero_grad()
        loss, _ = Rebel(eta, "sum").loss(policy, batch)
        loss.backward()
        return loss.detach()

    optimiser.step(closure)
    assert float(closure()) < 1e-12
    want = (before.std**2 * c / eta).expand_as(first)
    torch.testing.assert_close(step().mean - before.mean, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, -1.0])
def test_settings_are_checked(eta):
    with pytest.raises(ValueError, match="eta must be > 0"):
        Rebel(eta)


@pytest.mark.parametrize("given", [{"timestep_fraction": 0.5}, {"skip_last": 1}, {"draws": 2}, {"guided": True}])
def test_whole_paths_have_no_steps_to_choose_from(given):
    with pytest.raises(ValueError, match=r"are for evidence="):
        Rollouts(["a"], evidence="paths", reward=Near(), **given)
