"""Laws of SePPO: Diffusion-DPO on one side of the anchor, fine-tuning on the other; a ring of checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.batches import Batch, Noised
from align.evidence import errors
from align.objectives.seppo import SePPO
from align.sampling import Sampling
from rewards import Prompt
from samplers import DDIM, ODE, SeededNoise, rollout
from samplers.families.gaussian import GaussianPolicy
from samplers.noise import mix

F64 = torch.float64
B = 6


def mixture(prediction="eps"):
    policy = GaussianPolicy([[1.0, -1.0], [0.0, 2.0]], [0.5, 0.7], [0.4, 0.6], prediction=prediction)
    policy.network.means.requires_grad_(True)
    policy.steps = 4
    return policy


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def winners(policy) -> Batch:
    at = policy.levels(B + 2)[torch.arange(1, B + 1)]
    rows = Noised(normal(B, 2) + 1, normal(B, 2, seed=1), at, policy.encode([""] * B))
    return Batch(rows, {"item": torch.arange(B) + 10}, tuple(Prompt(str(i)) for i in range(B)))


def started(objective, seed=3):
    policy = mixture()
    objective.begin(policy)
    return policy, objective.annotate(policy, winners(policy), seed)


def gradient(policy, loss):
    return torch.autograd.grad(loss, policy.network.means)[0]


def test_items_are_winner_and_sample_noised_alike():
    objective = SePPO(kernel=DDIM(0.5), steps=3)
    policy, batch = started(objective)
    assert (batch.members, batch.items) == (2, B)
    given, rows = winners(policy), batch.rows
    assert torch.equal(rows.x0[::2], given.rows.x0)
    for part in (rows.eps, rows.at.t, rows.cond.positive["row"]):
        assert torch.equal(part[::2], part[1::2])
    assert torch.equal(rows.eps[::2], given.rows.eps)
    assert batch.columns["item"].tolist() == [i for i in range(10, 10 + B) for _ in range(2)]
    noise = SeededNoise([mix(3, i) for i in range(10, 10 + B)], (2,), dtype=F64)
    want = rollout(policy, DDIM(0.5), given.rows.cond, policy.levels(3), noise).x0
    assert torch.equal(rows.x0[1::2], want)


def test_samples_do_not_depend_on_the_company_they_are_made_in():
    policy, batch = started(SePPO(rows=16))
    some = SePPO(rows=2).annotate(policy, winners(policy)[[4, 1, 3]], 3)
    assert torch.equal(some.rows.x0[1::2], batch.rows.x0[1::2][[4, 1, 3]])


def test_the_checkpoint_samples_and_not_the_policy():
    policy = mixture()
    SePPO().begin(policy)
    before = SePPO().annotate(policy, winners(policy), 3).rows.x0
    policy.network.means.data += 1
    assert torch.equal(SePPO().annotate(policy, winners(policy), 3).rows.x0, before)


def test_without_anchor_it_is_diffusion_dpo_on_the_samples():
    objective = SePPO(beta=3.0, anchor="none")
    policy, batch = started(objective)
    reference = mixture()
    policy.network.means.data += torch.tensor([[0.3, 0.0], [-0.2, 0.1]], dtype=F64)
    now, then = (errors(p, batch.rows).reshape(-1, 2) for p in (policy, reference))
    inside = (now[:, 0] - now[:, 1]) - (then[:, 0] - then[:, 1]).detach()
    want = -logsigmoid(-3.0 / 2 * inside).mean()
    loss, _ = objective.loss(policy, batch)
    assert torch.equal(loss, want) or torch.allclose(loss, want, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, want), rtol=1e-10, atol=1e-14)


def test_the_anchor_decides_the_sign_row_by_row():
    objective = SePPO(beta=3.0)
    policy, batch = started(objective)
    reference = mixture()
    policy.network.means.data += torch.tensor([[0.3, 0.0], [-0.2, 0.1]], dtype=F64)
    now = errors(policy, batch.rows).reshape(-1, 2)
    gap = now - errors(reference, batch.rows).reshape(-1, 2).detach()
    better = gap[:, 0] <= 0
    assert 0 < int(better.sum()) < B
    loss, metrics = objective.loss(policy, batch)
    assert float(metrics["preferring"]) == float(better.double().mean())
    want = torch.zeros_like(policy.network.means)
    for i in range(B):  # a preference, or the two errors lowered together, each weighed by the same sigmoid
        sign = 1 if better[i] else -1
        weight = torch.sigmoid(1.5 * (gap[i, 0] - sign * gap[i, 1])).detach()
        direction = gradient(policy, errors(policy, batch.rows).reshape(-1, 2)[i] @ torch.tensor([1.0, -sign]).double())
        want += 1.5 * weight * direction / B
    torch.testing.assert_close(gradient(policy, loss), want, rtol=1e-9, atol=1e-13)


def test_at_the_checkpoint_ties_count_as_preferences():
    policy, batch = started(SePPO())
    loss, metrics = SePPO().loss(policy, batch)
    torch.testing.assert_close(loss, torch.tensor(2.0, dtype=F64).log())
    assert float(metrics["preferring"]) == float(metrics["winner_drift"]) == 1


def test_swapping_equal_rows_of_an_item_changes_nothing_at_first_order():
    """A sample equal to its winner leaves no preference: with s = +1 the gradient is zero."""
    objective = SePPO(anchor="none")
    policy, batch = started(objective)
    same = replace(batch.rows, x0=batch.rows.x0[torch.arange(B).repeat_interleave(2) * 2])
    policy.network.means.data += 0.3
    assert float(gradient(policy, objective.loss(policy, replace(batch, rows=same))[0]).abs().max()) < 1e-12


def run(objective, updates):
    policy = mixture()
    objective.begin(policy)
    for update in range(1, updates + 1):
        policy.network.means.data += 1
        objective.updated(policy, update)
    return policy


def past(policy):
    return {n: round(float(w["means"][0, 0])) - 1 for n, w in policy.voices.items() if n.startswith("past-")}


def test_the_ring_keeps_the_initial_and_the_newest_checkpoints():
    assert past(run(SePPO(ring=3, every=10), 9)) == {"past-0": 0}
    assert past(run(SePPO(ring=3, every=10), 25)) == {"past-0": 0, "past-1": 10, "past-2": 20}
    assert past(run(SePPO(ring=3, every=10), 110)) == {"past-0": 0, "past-10": 100, "past-11": 110}


@pytest.mark.parametrize(("selection", "wanted"), [("initial", {0}), ("latest", {40}), ("random", {0, 30, 40})])
def test_selection(selection, wanted):
    policy = run(SePPO(ring=3, every=10), 40)
    drawn = set()
    for seed in range(20):
        SePPO(selection=selection, steps=1).annotate(policy, winners(policy), seed)
        drawn.add(round(float(policy.voices["old"]["means"][0, 0])) - 1)
    assert drawn == wanted


def test_a_ring_of_one_is_the_initial_checkpoint():
    policy = run(SePPO(ring=1, every=1), 5)
    assert past(policy) == {"past-0": 0}
    one = SePPO(ring=1, steps=2).annotate(policy, winners(policy), 1)
    two = SePPO(selection="initial", steps=2).annotate(policy, winners(policy), 1)
    assert torch.equal(one.rows.x0, two.rows.x0)


def test_micro_batches_add_up():
    objective = SePPO(beta=3.0)
    policy, batch = started(objective)
    policy.network.means.data += torch.tensor([[0.3, 0.0], [-0.2, 0.1]], dtype=F64)
    parts = [gradient(policy, objective.loss(policy, batch.take([i, i + 1]))[0]) for i in range(0, B, 2)]
    whole = gradient(policy, objective.loss(policy, batch)[0])
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-10, atol=1e-13)


def test_samples_that_are_not_finite_leave_their_item_out():
    class Breaks(GaussianPolicy):
        def predict(self, x, at, cond):
            return super().predict(x, at, cond) + cond.positive["row"]

    policy = Breaks([[0.0, 0.0]])
    policy.network.means.requires_grad_(True)
    SePPO().begin(policy)
    batch = winners(policy)
    batch.rows.cond.positive["row"][2] = torch.nan
    batch = batch.having(keep=torch.arange(B) > 0)
    keep = SePPO(kernel=ODE(), steps=2).annotate(policy, batch, 0).columns["keep"]
    assert keep.tolist() == [k for i in range(B) for k in [i not in (0, 2)] * 2]


def test_data_of_another_size_are_refused():
    policy = mixture()
    SePPO().begin(policy)
    with pytest.raises(ValueError, match="pass the data's size"):
        SePPO(size=(3,)).annotate(policy, winners(policy), 0)


def test_sampling_takes_the_policys_own_settings():
    policy, batch = started(SePPO())
    sampling = Sampling.of(policy)
    noise = sampling.noise(policy, [mix(3, i) for i in range(10, 10 + B)])
    want = rollout(policy, sampling.kernel, winners(policy).rows.cond, sampling.levels, noise).x0
    assert torch.equal(batch.rows.x0[1::2], want)


@pytest.mark.parametrize(
    "given", [{"beta": 0.0}, {"ring": 0}, {"every": 0}, {"rows": 0}, {"selection": "oldest"}, {"anchor": "loser"}]
)
def test_settings_are_checked(given):
    with pytest.raises(ValueError, match="must be"):
        SePPO(**given)
