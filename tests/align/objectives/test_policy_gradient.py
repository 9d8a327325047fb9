"""Laws of policy gradients: the first pass is REINFORCE, clipping by hand, the divergence, dE[r]/dθ in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from align.batches import Batch, Noised, Paths
from align.evidence import evidence, law
from align.objectives.policy_gradient import CHUNK, PolicyGradient, clipped
from align.sources import Rollouts
from samplers import DDIM, ODE, Consistency, DanceSDE, FlowSDE, NoiseBank, SeededNoise, rollout
from samplers.rollout import always
from tests.align.objectives.rows import F64, MEAN, assert_accumulates, gradient, noised, normal, paths, steps, trainable
from tests.align.objectives.rows import shapes_of as elements
from tests.align.runs import Near


def advantaged(batch: Batch, seed: int = 5) -> Batch:
    return batch.having(advantage=normal(len(batch), seed=seed))


FLOW = {"frame": "flow", "prediction": "flow"}


def batch_of(kind: str, policy, count: int = 15) -> Batch:
    """Rows as the policy's own weights collected them."""
    if kind == "steps":
        return advantaged(steps(policy, count // 3))
    return advantaged(PolicyGradient().annotate(policy, Batch(noised(policy, count)), 0))


# Clipping


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # inside the band: −A·ρ, slope −A
        (1.05, 2.0, -2.1, -2.0),
        (1.3, 2.0, -2.4, 0.0),  # good and already likelier: held at 1.2
        (0.5, 2.0, -1.0, -2.0),  # good but less likely: pulled back without limit
        (0.5, -2.0, 1.8, 0.0),  # bad and already less likely: held at 0.9
        (1.3, -2.0, 2.6, 2.0),  # bad but likelier: pushed down without limit
        (1.0, -2.0, 2.0, 2.0),
        (7.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, slope):
    log_ratio = torch.tensor([math.log(ratio)], dtype=F64, requires_grad=True)
    found = clipped(log_ratio, torch.tensor([advantage], dtype=F64), 0.1, 0.2)
    assert float(found.detach()) == pytest.approx(loss, abs=1e-12)
    (grad,) = torch.autograd.grad(found.sum(), log_ratio)
    assert float(grad) == pytest.approx(slope * ratio, abs=1e-12)  # d/dlogρ = ρ·d/dρ


def test_clipping_is_ppos_formula():
    log_ratio, advantage = 0.3 * normal(200), normal(200, seed=1)
    ratio = log_ratio.exp()
    published = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.9, 1.2))
    torch.testing.assert_close(clipped(log_ratio, advantage, 0.1, 0.2), published)


@pytest.mark.parametrize("low", [0.1, math.inf])
def test_ratios_that_overflow_on_the_clipped_side_leave_no_nan(low):
    log_ratio = torch.tensor([1e4, -1e4, 1e4], dtype=torch.float32, requires_grad=True)
    loss = clipped(log_ratio, torch.tensor([1.0, -1.0, 0.0]), low, 0.1).sum()
    assert bool(loss.isfinite())
    assert torch.equal(torch.autograd.grad(loss, log_ratio)[0], torch.zeros(3))


# The first pass


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["steps", "noised"])
def test_the_first_pass_is_reinforce(kind, reduction):
    """ρ is 1 to the last bit, and the gradient −A·∇log p."""
    policy = trainable(0.3, **FLOW)
    objective = PolicyGradient(reduction=reduction)
    batch = batch_of(kind, policy)
    if kind == "noised":
        columns = {"advantage": batch.columns["advantage"]}
        batch = objective.annotate(policy, Batch(batch.rows, columns), 0)
        torch.testing.assert_close(batch.columns["old"], evidence(policy, batch.rows, reduction).detach())
    loss, metrics = objective.loss(policy, batch)
    assert {n: float(metrics[n]) for n in metrics} == {
        "ratio": 1.0, "ratio_deviation": 0.0, "ratio_max_deviation": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0,
    }  # fmt: skip
    reinforce = -(batch.columns["advantage"] * evidence(policy, batch.rows, reduction)).mean()
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, reinforce), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss.detach(), -batch.columns["advantage"].mean())


def test_the_first_pass_in_single_precision():
    policy = trainable(0.3, MEAN.float(), **FLOW, dtype=torch.float32)
    run = rollout(
        policy, FlowSDE(), policy.encode(["a"] * 16), policy.levels(8), SeededNoise(range(16), (3,)), record="path"
    )
    batch = Batch(Paths(run.latents, run.cond, FlowSDE(), run.levels), {"old": run.log_prob})
    batch = advantaged(batch.steps(torch.arange(8).expand(16, -1)))
    _, metrics = PolicyGradient().loss(policy, batch)
    assert float(metrics["ratio_max_deviation"]) <= 1e-6


def test_equal_rewards_teach_nothing():
    policy = trainable(0.3, **FLOW)
    batch = steps(policy, 4)
    loss, _ = PolicyGradient().loss(policy, batch.having(advantage=torch.zeros(len(batch), dtype=F64)))
    assert float(loss.detach()) == 0
    assert torch.equal(gradient(policy, loss), torch.zeros(1, 3, dtype=F64))


def test_old_evidence_is_kept_and_computed_in_chunks():
    policy = trainable(0.3)
    rows = noised(policy, 2 * CHUNK + 3)
    objective = PolicyGradient()
    old = objective.annotate(policy, Batch(rows), 0).columns["old"]
    assert not old.requires_grad
    torch.testing.assert_close(old, evidence(policy, rows).detach())
    kept = Batch(rows, {"old": torch.zeros(len(rows))})
    assert objective.annotate(policy, kept, 0) is kept
    trajectories = paths(trainable(**FLOW), 2)
    assert objective.annotate(policy, trajectories, 0) is trajectories


@pytest.mark.parametrize("kind", ["steps", "noised"])
def test_a_step_against_a_moved_policy_by_hand(kind):
    policy = trainable(0.0, **FLOW)
    batch = batch_of(kind, policy)
    with torch.no_grad():
        policy.network.means += 0.01
    objective = PolicyGradient(clip=1e-3, clip_high=2e-3)
    loss, metrics = objective.loss(policy, batch)
    old = batch.columns["old"] / (3 if kind == "steps" else 1)
    ratio = (evidence(policy, batch.rows) - old).exp()
    advantage = batch.columns["advantage"]
    expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-3, 1 + 2e-3)).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected))
    outside = (ratio > 1 + 2e-3) | (ratio < 1 - 1e-3)
    assert 0 < float(outside.double().mean()) < 1
    assert float(metrics["clip_fraction"]) == float(outside.double().mean())
    torch.testing.assert_close(metrics["approx_kl"], 0.5 * ratio.log().square().mean().detach())


@pytest.mark.parametrize("kind", ["steps", "noised"])
def test_summing_instead_of_averaging_is_a_change_of_clip_and_weight(kind):
    """To first order in the ratio: with clip·D and weight/D the same rows are cut and ∇ grows by D."""
    policy = trainable(0.0, **FLOW)
    rows = batch_of(kind, policy)
    d = elements(rows.rows)
    rows = rows.having(old=rows.columns["old"] * d) if kind == "noised" else rows
    averaged = rows.having(old=rows.columns["old"] / d) if kind == "noised" else rows
    with torch.no_grad():
        policy.network.means += 1e-4
    mean = PolicyGradient(clip=1e-5, kl_weight=0.6, reduction="mean")
    total = PolicyGradient(clip=1e-5 * d, kl_weight=0.6, reduction="sum")
    (a, seen), (b, seen_too) = mean.loss(policy, averaged), total.loss(policy, rows)
    assert 0 < float(seen["clip_fraction"]) < 1
    assert float(seen["clip_fraction"]) == float(seen_too["clip_fraction"])
    torch.testing.assert_close(d * gradient(policy, a), gradient(policy, b), rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(d * seen["kl"], seen_too["kl"])


# The divergence


@pytest.mark.parametrize("kl", ["exact", "published"])
def test_the_divergence_begins_at_zero_without_a_gradient(kl):
    policy = trainable(0.0, **FLOW)
    batch = batch_of("steps", policy).having(advantage=torch.zeros(15, dtype=F64))
    loss, metrics = PolicyGradient(kl_weight=1.0, kl=kl).loss(policy, batch)
    assert float(metrics["kl"]) == 0
    assert torch.equal(gradient(policy, loss), torch.zeros(1, 3, dtype=F64))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_published_divergence_is_a_share_of_the_exact_one(reduction):
    """mean_d (μ − μ')²/2g² with s² = g²·|dt|: |dt|/D of the sum the Gaussians have."""
    policy = trainable(0.3, **FLOW)
    for step in range(3):
        batch = advantaged(paths(policy, 4, kernel=FlowSDE()).steps(torch.full((4, 1), step)))
        rows = batch.rows
        with torch.no_grad():
            mine = law(policy, rows)
            with policy.acting_as("reference"):
                theirs = law(policy, rows)
        dt = float(rows.levels.sigma[step] - rows.levels.sigma[step + 1])
        g = FlowSDE().stds(rows.levels)[step] / math.sqrt(dt)
        by_hand = ((mine.mean - theirs.mean).square() / (2 * g**2)).mean(1).mean()
        exact = ((mine.mean - theirs.mean).square() / (2 * mine.std**2)).sum(1).mean()
        found = {
            kl: PolicyGradient(kl_weight=0.1, kl=kl, reduction=reduction).loss(policy, batch)[1]["kl"]
            for kl in ("exact", "published")
        }
        d = 3 if reduction == "mean" else 1
        torch.testing.assert_close(found["exact"], exact / d)
        torch.testing.assert_close(found["published"], by_hand * 3 / d)
        torch.testing.assert_close(found["published"] / found["exact"], torch.tensor(dt, dtype=F64))


def test_the_divergence_of_noised_rows_is_that_of_the_law_their_evidence_implies():
    policy = trainable(0.3)
    batch = batch_of("noised", policy)
    rows = batch.rows
    with torch.no_grad():
        mine = policy.output(rows.x, rows.at, rows.cond)
        with policy.acting_as("reference"):
            theirs = policy.output(rows.x, rows.at, rows.cond)
    _, metrics = PolicyGradient(kl_weight=1.0).loss(policy, batch)
    torch.testing.assert_close(metrics["kl"], (mine - theirs).square().mean())


def test_the_divergence_pulls_toward_the_reference():
    policy = trainable(0.3, **FLOW)
    batch = batch_of("steps", policy).having(advantage=torch.zeros(15, dtype=F64))
    loss, _ = PolicyGradient(kl_weight=1.0).loss(policy, batch)
    away = policy.network.means.detach() - MEAN
    assert float((gradient(policy, loss) * away).sum()) > 0


def test_the_reference_is_not_asked_without_need():
    policy = trainable(0.3, **FLOW)
    policy.voices.clear()
    batch = batch_of("steps", policy)
    PolicyGradient().loss(policy, batch)
    with pytest.raises(ValueError, match="remember"):
        PolicyGradient(kl_weight=0.1).loss(policy, batch)


# Closed forms


def test_the_gradient_is_that_of_the_expected_reward():
    """r = c·x_0 on a linear chain: E[r] is the reward of the noiseless run, and its slope the mean of the estimates."""
    policy = trainable(0.0, **FLOW)
    c, count, length = torch.tensor([1.0, -2.0, 0.5], dtype=F64), 4000, 3
    kernel, levels = DanceSDE(eta=0.7), policy.levels(length)
    quiet = rollout(policy, kernel, policy.encode(["a"]), levels, lambda i: torch.zeros(1, 3, dtype=F64), grad=always)
    exact = gradient(policy, (quiet.x0 @ c).sum())[0]
    runs = paths(policy, count, length, kernel)
    reward = runs.rows.latents[:, -1] @ c
    middle = float((quiet.x0.detach() @ c).sum())
    assert float(reward.mean()) == pytest.approx(middle, abs=4 * float(reward.std()) / count**0.5)
    batch = runs.having(advantage=reward - reward.mean()).steps(torch.arange(length).expand(count, -1))
    estimates = []
    for part in torch.arange(len(batch)).split(length * count // 20):
        loss, _ = PolicyGradient(reduction="sum").loss(policy, batch[part])
        estimates.append(-length * gradient(policy, loss)[0])  # the loss averages the steps a trajectory sums
    found = torch.stack(estimates)
    error = found.std(0) / len(found) ** 0.5
    assert bool((error < 0.2 * exact.abs().max()).all())
    assert bool(((found.mean(0) - exact).abs() < 3 * error).all())


def test_one_step_converges_to_the_rewarded_mean():
    """r = −|x − m|² on a one-step policy N(θ + b, s²): θ + b reaches m."""
    policy = trainable(0.0, torch.zeros(1, 1, dtype=F64), **FLOW)
    optimiser = torch.optim.SGD([policy.network.means], lr=0.2)
    for update in range(60):
        batch = paths(policy, 256, 1, DanceSDE(eta=0.5), seed=1000 * update)
        reward = -(batch.rows.latents[:, -1] - 1.5).square().sum(1)
        batch = batch.having(advantage=reward - reward.mean()).steps(torch.zeros(256, 1, dtype=torch.long))
        optimiser.zero_grad()
        PolicyGradient(reduction="sum").loss(policy, batch)[0].backward()
        optimiser.step()
    assert float(policy.network.means.detach()) == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("quadratic", [0.0, 0.7])
@pytest.mark.parametrize("length", [2, 3])
def test_multistep_consistency_in_closed_form(length, quadratic):
    """RLCM with 1 and 2 trained steps: f(x_t) = K_t·x_t + (1 − α_t·K_t)·m is linear, so E[r] is known, and so is its slope.

    The last, deterministic step is not trained: its own m is held. Expectations over the noise are sums over Gauss–Hermite nodes,
    exact for these polynomials.
    """
    policy, kernel = trainable(0.0, torch.tensor([[0.4]], dtype=F64), stds=[0.8]), Consistency()
    levels, r = policy.levels(length), lambda x: x - quadratic * (x - 1.0).square()
    z, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(4))
    nodes = torch.cartesian_prod(*[z] * length)[:, :, None]  # of the start and the noisy steps
    weight = torch.cartesian_prod(*[w / w.sum()] * length).prod(1)
    noises = [*nodes.unbind(1), torch.zeros_like(nodes[:, 0])]
    cond = policy.encode(["a"] * len(nodes))
    run = rollout(policy, kernel, cond, levels, NoiseBank(noises), record="path")
    advantage = r(run.x0[:, 0]) * weight * len(weight) * (length - 1)
    batch = Batch(Paths(run.latents, run.cond, kernel, levels), {"old": run.log_prob, "advantage": advantage})
    source = Rollouts(["a"], group=2, reward=Near())
    batch = source.choose(batch.having(item=torch.arange(len(batch))), seed=0)
    assert len(batch) == len(nodes) * (length - 1)
    loss, _ = PolicyGradient(reduction="sum").loss(policy, batch)

    m = torch.tensor(0.4, dtype=F64, requires_grad=True)
    mean, var = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)
    for i in range(length):
        gain = levels.alpha[i] * 0.64 / (0.64 * levels.alpha[i] ** 2 + levels.sigma[i] ** 2)
        shift = (1 - levels.alpha[i] * gain) * (m if i < length - 1 else m.detach())
        mean, var = levels.alpha[i + 1] * (gain * mean + shift), (levels.alpha[i + 1] * gain) ** 2 * var
        var = var + levels.sigma[i + 1] ** 2
    expected = mean - quadratic * ((mean - 1.0).square() + var)
    torch.testing.assert_close((weight * r(run.x0[:, 0])).sum(), expected.detach(), rtol=1e-10, atol=1e-12)
    (slope,) = torch.autograd.grad(expected, m)
    torch.testing.assert_close(-gradient(policy, loss)[0, 0], slope, rtol=1e-9, atol=1e-12)


# Batches and mistakes


@pytest.mark.parametrize("kind", ["steps", "noised"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_micro_batches_add_up(kind, kl_weight):
    policy = trainable(0.02, **FLOW)
    batch = batch_of(kind, trainable(0.0, **FLOW))
    assert_accumulates(PolicyGradient(clip=1e-3, kl_weight=kl_weight), policy, batch, (4, 1, 10))


@pytest.mark.parametrize("kind", ["steps", "noised"])
def test_order_does_not_matter(kind):
    policy = trainable(0.02, **FLOW)
    batch = batch_of(kind, trainable(0.0, **FLOW))
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    objective = PolicyGradient(clip=1e-3)
    torch.testing.assert_close(objective.loss(policy, batch)[0], objective.loss(policy, batch[order])[0])


@pytest.mark.parametrize("kernel", [ODE(), DDIM(eta=1.0)])
def test_deterministic_steps_raise(kernel):
    """DDIM's last step ends on clean data: no density."""
    policy = trainable(0.0)
    batch = advantaged(steps(policy, 2, kernel=kernel))
    with pytest.raises(ValueError, match="deterministic"):
        PolicyGradient().loss(policy, batch)


def test_large_errors_stay_finite():
    policy = trainable(0.0)
    rows = noised(policy, 4)
    rows = Noised(rows.x0 * 1e3, rows.eps, rows.at, rows.cond)
    batch = advantaged(PolicyGradient().annotate(policy, Batch(rows), 0))
    loss, _ = PolicyGradient(kl_weight=1.0).loss(policy, batch)
    assert bool(loss.isfinite())
    assert bool(gradient(policy, loss).isfinite().all())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="must be ≥ 0"):
        PolicyGradient(clip=-1.0)
    with pytest.raises(ValueError, match="'exact' or 'published'"):
        PolicyGradient(kl="other")  # pyright: ignore
    vp = trainable(0.1)
    for batch in (advantaged(steps(vp, 2, kernel=DDIM(1.0, [True, True, False])))[[0, 1]], batch_of("noised", trainable(
        0.1, **FLOW))):  # fmt: skip
        with pytest.raises(ValueError, match="rectified flows only"):
            PolicyGradient(kl_weight=1.0, kl="published").loss(vp, batch)
    with pytest.raises(ValueError, match="column 'advantage'"):
        PolicyGradient().loss(vp, Batch(noised(vp, 2), {"old": torch.zeros(2)}))
