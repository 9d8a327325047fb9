"""Laws of pairwise preferences: DPO in closed form on both evidences, its symmetries, and each refinement's limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.batches import Batch, Noised
from align.evidence import errors, evidence, reference_evidence
from align.objectives.pairwise import Pairwise, compared, lambda_weights, safe_share
from samplers import ODE, DanceSDE
from samplers.families.gaussian import GaussianPolicy
from tests.align.objectives.rows import F64, MEAN, assert_accumulates, gradient, noised, normal, steps, trainable

FLOW = {"frame": "flow", "prediction": "flow"}
KINDS = ("steps", "noised")


def quality(items: int, members: int = 2, seed: int = 3) -> torch.Tensor:
    """(items·members,) a permutation of evenly spread qualities in each item."""
    order = torch.rand(items, members, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return (order.to(F64) / (members - 1)).flatten()


def batch_of(kind: str, policy, items: int = 6, members: int = 2) -> Batch:
    """Items with qualities, rewards that agree with them, and margins."""
    batch = steps(policy, items, members) if kind == "steps" else Batch(noised(policy, items, members), {}, (), members)
    psi = quality(batch.items, members)
    return batch.having(quality=psi, reward=3 * psi + 1, margin=normal(len(batch), seed=8))


def swapped(batch: Batch) -> Batch:
    """Every pair the other way round, columns and all."""
    return batch[torch.arange(len(batch)).reshape(-1, 2).flip(1).flatten()]


def value(objective: Pairwise, policy, batch: Batch) -> torch.Tensor:
    return objective.loss(policy, batch)[0]


# The loss itself


@pytest.mark.parametrize("clean", [0.0, 0.1])
def test_losses_by_hand(clean):
    h = torch.tensor([-3.0, 0.0, 0.4, 2.0], dtype=F64)
    by_hand = [-(1 - clean) * math.log(1 / (1 + math.exp(-v))) - clean * math.log(1 / (1 + math.exp(v))) for v in h]
    torch.testing.assert_close(compared("logistic", h, 1.0, clean), torch.tensor(by_hand, dtype=F64))
    assert compared("hinge", h, 1.0).tolist() == pytest.approx([4, 1, 0.6, 0])
    assert compared("ipo", h, 2.0).tolist() == pytest.approx([((v / 2) - 1 / 4) ** 2 for v in h.tolist()])


def test_d3po_on_one_step_is_dpo():
    """Sum of one step's log-densities, no band: DPO on the one-step Gaussian policies, from their means alone."""
    policy = trainable(0.4, **FLOW)
    kernel, beta = DanceSDE(eta=0.9), 0.7
    batch = steps(policy, 5, 2, steps=1, kernel=kernel)
    psi = quality(5)
    found = value(Pairwise(beta=beta, reduction="sum"), policy, batch.having(quality=psi))
    x, y = batch.rows.x, batch.rows.following
    log_ratios = []
    for means in (policy.network.means, MEAN):
        mean = means - 0.9**2 / 2 * x  # x0 = mean at t = 1; eps = x there; b = −s²/2
        log_ratios.append(torch.distributions.Normal(mean, 0.9).log_prob(y).sum(1))
    score = beta * (log_ratios[0] - log_ratios[1]).reshape(5, 2)
    won = psi.reshape(5, 2)[:, 0] > psi.reshape(5, 2)[:, 1]
    h = torch.where(won, score[:, 0] - score[:, 1], score[:, 1] - score[:, 0])
    torch.testing.assert_close(found, -torch.log(torch.sigmoid(h)).mean(), rtol=1e-10, atol=1e-12)


def test_diffusion_dpo_by_hand():
    """−log σ(−(β/2)·[(e_w − e_l) − (e_w' − e_l')]) with mean squared errors."""
    policy = trainable(0.4, prediction="eps")
    batch = batch_of("noised", policy)
    rows = batch.rows
    found = value(Pairwise(beta=50.0), policy, batch)
    mine = errors(policy, rows).reshape(-1, 2)
    with torch.no_grad(), policy.acting_as("reference"):
        theirs = errors(policy, rows).reshape(-1, 2)
    won = batch.columns["quality"].reshape(-1, 2).argmax(1)
    item = torch.arange(len(won))
    inside = (mine[item, won] - mine[item, 1 - won]) - (theirs[item, won] - theirs[item, 1 - won])
    torch.testing.assert_close(found, -logsigmoid(-25.0 * inside).mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "beta"), [("steps", 0.1), ("noised", 5000.0)])
def test_published_beta_is_the_default(kind, beta):
    policy = trainable(0.01, **FLOW)
    batch = batch_of(kind, policy)
    torch.testing.assert_close(value(Pairwise(), policy, batch), value(Pairwise(beta=beta), policy, batch))
    with pytest.raises(ValueError, match="divided by D"):
        Pairwise(reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_reference(kind):
    """log 2, accuracy exactly one half, and half of β times the difference of gradients."""
    policy = trainable(0.0, **FLOW)
    batch, beta = batch_of(kind, policy), 0.3
    loss, metrics = Pairwise(beta=beta).loss(policy, batch)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-15)
    assert float(metrics["accuracy"]) == 0.5
    assert float(metrics["margin"]) == 0.0
    sign = torch.where(batch.columns["quality"] == 1, 1.0, -1.0)
    told = evidence(policy, batch.rows)  # −e on noised rows
    expected = -(beta / 2 if kind == "steps" else beta / 4) * (sign * told).sum() / batch.items
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, expected), rtol=1e-10, atol=1e-13)


OPTIONS = (
    {},
    {"kind": "hinge"},
    {"kind": "ipo"},
    {"label_smoothing": 0.1},
    {"sft": 0.5},
    {"clamp": 0.1},
    {"margin_weight": 0.5},
    {"dynamic": (0.5, 0.5)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_swapping_a_pair_and_its_label_changes_nothing(kind, options):
    policy = trainable(0.3, **FLOW)
    batch, objective = batch_of(kind, policy), Pairwise(beta=0.8, **options)
    a, b = value(objective, policy, batch), value(objective, policy, swapped(batch))
    assert torch.equal(a, b)
    other = value(objective, policy, batch.having(quality=1 - batch.columns["quality"]))
    assert float((a - other).detach().abs()) > 1e-9
    torch.testing.assert_close(gradient(policy, a), gradient(policy, b), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_ties_teach_nothing(kind):
    policy = trainable(0.3, **FLOW)
    batch = batch_of(kind, policy).having(quality=torch.full((36 if kind == "steps" else 12,), 0.5, dtype=F64))
    for name, constant in (("logistic", math.log(2)), ("hinge", 1.0), ("ipo", 1 / (2 * 0.8) ** 2)):
        loss, metrics = Pairwise(name, beta=0.8, sft=1.0, margin_weight=0.5, dynamic=(0.5, 0.5)).loss(policy, batch)
        assert float(loss.detach()) == pytest.approx(constant, abs=1e-15)
        assert float(metrics["accuracy"]) == 0.5
        assert torch.equal(gradient(policy, loss), torch.zeros(1, 3, dtype=F64))


def test_better_pairs_lose_less_and_metrics_say_so():
    policy = trainable(0.3, **FLOW)
    batch = batch_of("noised", policy, items=40)
    mine, theirs = evidence(policy, batch.rows).detach(), reference_evidence(policy, batch.rows)
    right = batch.having(quality=((mine - theirs).reshape(-1, 2).argsort(1).argsort(1)).flatten().to(F64))
    loss, metrics = Pairwise(beta=1.0).loss(policy, right)
    assert float(metrics["accuracy"]) == 1.0
    assert float(loss.detach()) < math.log(2)
    won = right.columns["quality"] == 1
    assert float(metrics["winner_error"]) == pytest.approx(float(-mine[won].mean()))
    assert float(metrics["loser_error"]) == pytest.approx(float(-mine[~won].mean()))
    assert float(metrics["winner_drift"]) == pytest.approx(float((mine / theirs)[won].mean()))
    assert float(metrics["margin"]) == pytest.approx(
        float((mine - theirs)[won].mean() - (mine - theirs)[~won].mean()) / 2
    )
    walks = batch_of("steps", policy)
    _, metrics = Pairwise().loss(policy, walks)
    ratio = (evidence(policy, walks.rows) - reference_evidence(policy, walks.rows)).detach()
    won = walks.columns["quality"] == 1
    assert float(metrics["winner_log_ratio"]) == pytest.approx(float(ratio[won].mean()))
    assert float(metrics["loser_log_ratio"]) == pytest.approx(float(ratio[~won].mean()))


@pytest.mark.parametrize("kind", KINDS)
def test_summing_instead_of_averaging_is_a_change_of_beta(kind):
    policy = trainable(0.3, **FLOW)
    batch = batch_of(kind, policy)
    mean, total = Pairwise(beta=0.9, sft=0.6), Pairwise(beta=0.3, sft=0.2, reduction="sum")
    torch.testing.assert_close(value(mean, policy, batch), value(total, policy, batch))


def test_small_beta_forgets_the_pair():
    policy = trainable(0.3)
    assert float(value(Pairwise(beta=1e-12), policy, batch_of("noised", policy)).detach()) == pytest.approx(math.log(2))


def test_the_error_is_the_expected_log_ratio_of_a_step():
    """For DDPM steps −(e_θ − e_ref) is KL(q ‖ ref) − KL(q ‖ θ) up to one factor a level, whatever θ is."""
    from samplers import DDIM, Levels
    from samplers.levels import Clean, diffuse

    ratios = []
    for shift in (0.1, 0.2, 0.5):
        policy = trainable(shift, prediction="eps")
        levels = Levels([0.8, 0.5], [0.6, 0.8], [0.8, 0.6])
        x0, eps, cond = normal(4, 3), normal(4, 3, seed=1), policy.encode(["a"] * 4)
        at = Levels(*(v[0].expand(4) for v in (levels.t, levels.alpha, levels.sigma)))
        rows = Noised(x0, eps, at, cond)
        x, kernel = diffuse(x0, eps, at), DDIM(eta=1.0)
        with torch.no_grad():
            posterior = kernel(Clean(x0, eps), x, levels, 0)
            kls, told = [], []
            for who in ("policy", "reference"):
                with policy.acting_as(who):
                    kls.append(posterior.kl(kernel(policy.denoise(x, levels[0], cond), x, levels, 0)))
                    told.append(errors(policy, rows, "sum"))
        ratios.append((kls[1] - kls[0]) / (told[1] - told[0]))
    torch.testing.assert_close(torch.stack(ratios), ratios[0][0].expand(3, 4), rtol=1e-9, atol=0)


# Refinements


def test_the_band_by_hand():
    policy = trainable(0.3, **FLOW)
    batch = batch_of("steps", policy)
    ratio = (evidence(policy, batch.rows) - reference_evidence(policy, batch.rows)).exp()
    assert bool((ratio > 1.1).any()) and bool((ratio < 0.9).any()) and bool(((ratio - 1).abs() < 0.1).any())
    inside = ratio.clamp(0.9, 1.1).log().reshape(-1, 2)
    h = torch.where(batch.columns["quality"].reshape(-1, 2) == 1, 1, -1)
    expected = -logsigmoid(0.1 * (h * inside).sum(1)).mean()
    found = value(Pairwise(clamp=0.1), policy, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(policy, found), gradient(policy, expected), rtol=1e-9, atol=1e-13)


def test_a_band_of_no_width_stops_learning_after_the_first_update():
    policy = trainable(1e-6, **FLOW)
    loss = value(Pairwise(clamp=0.0), policy, batch_of("steps", policy))
    assert torch.equal(gradient(policy, loss), torch.zeros(1, 3, dtype=F64))


def test_flow_dpo_with_the_schedule_is_diffusion_dpo_on_noise():
    """ε-error = (1 − t)²·v-error on rectified flows."""
    flow = trainable(0.4, **FLOW)
    noise = trainable(0.4, frame="flow", prediction="eps")
    batch = batch_of("noised", flow)
    a = value(Pairwise(beta=30.0, schedule="one_minus_t_sq"), flow, batch)
    b = value(Pairwise(beta=30.0), noise, batch)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(flow, a), gradient(noise, b), rtol=1e-6, atol=1e-9)
    assert float((a - value(Pairwise(beta=30.0), flow, batch)).detach().abs()) > 1e-3


def test_rpo_between_preference_and_imitation():
    policy = trainable(0.3, **FLOW)
    for kind in KINDS:
        batch = batch_of(kind, policy)
        won = batch.columns["quality"] == 1
        imitation = -evidence(policy, batch.rows)[won].mean()
        plain, much = (value(Pairwise(beta=2.0, sft=eta), policy, batch) for eta in (0.0, 1e9))
        mixed = value(Pairwise(beta=2.0, sft=0.3), policy, batch)
        torch.testing.assert_close(mixed, plain + 0.3 * imitation)
        torch.testing.assert_close(gradient(policy, much) / 1e9, gradient(policy, imitation), rtol=1e-6, atol=1e-9)


def test_modpo_with_all_weight_on_one_preference_is_dpo():
    policy = trainable(0.3, **FLOW)
    batch = batch_of("steps", policy)
    alone = batch.having(margin=torch.zeros(len(batch), dtype=F64))
    dpo = value(Pairwise(beta=0.8), policy, batch)
    torch.testing.assert_close(value(Pairwise(beta=0.8, margin_weight=1.0), policy, alone), dpo)
    margin = batch.columns["margin"].reshape(-1, 2)
    sign = torch.where(batch.columns["quality"].reshape(-1, 2)[:, 0] == 1, 1, -1)
    log_ratio = (evidence(policy, batch.rows) - reference_evidence(policy, batch.rows)).reshape(-1, 2)
    h = (0.8 * sign * -log_ratio.diff(dim=1)[:, 0] - sign * -margin.diff(dim=1)[:, 0]) / 0.25
    torch.testing.assert_close(value(Pairwise(beta=0.8, margin_weight=0.25), policy, batch), -logsigmoid(h).mean())


def test_modpo_ends_at_the_tilted_law():
    """On a bandit: when log-ratios are Σ w_j·r_j/β plus a constant, the expected loss is stationary."""
    beta, w = 0.5, (0.4, 0.6)
    r = normal(2, 3)  # two rewards of three outcomes
    score = (w[0] * r[0] + w[1] * r[1]).clone().requires_grad_(True)  # β·log-ratio
    loss = torch.zeros((), dtype=F64)
    for i in range(3):
        for j in range(3):
            chance = torch.sigmoid(r[0, i] - r[0, j])  # Bradley-Terry preferences of the first reward
            h = (score[i] - score[j] - w[1] * (r[1, i] - r[1, j])) / w[0]
            loss = loss + chance * compared("logistic", h, beta)
    (grad,) = torch.autograd.grad(loss, score)
    torch.testing.assert_close(grad, torch.zeros(3, dtype=F64))


def test_dynamic_scaling_between_its_limits():
    policy = trainable(0.3, **FLOW)
    batch = batch_of("noised", policy)

    def at(gap: float, dynamic=(0.5, 0.7), beta: float = 2.0) -> torch.Tensor:
        scored = batch.having(reward=gap * batch.columns["quality"])
        return Pairwise(beta=beta, dynamic=dynamic).loss(policy, scored)[0].detach()

    plain = value(Pairwise(beta=2.0), policy, batch).detach()
    torch.testing.assert_close(at(3.0, (0.0, 0.7)), plain)
    torch.testing.assert_close(at(0.0), plain)
    torch.testing.assert_close(at(-2.0), plain)  # a reward that contradicts the label scales nothing
    torch.testing.assert_close(at(1e6), value(Pairwise(beta=3.0), policy, batch).detach())
    factor = 1 + 0.5 * (1 - math.exp(-0.7 * 1.2))
    torch.testing.assert_close(at(1.2), value(Pairwise(beta=2.0 * factor), policy, batch).detach())


def test_the_safe_share_by_hand():
    winner = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=F64)
    loser = torch.tensor([[4.0, 3.0], [0.5, 9.0], [-4.0, 1.0], [1.0, 1.0]], dtype=F64)
    assert safe_share(winner, loser).tolist() == [0.25, 1.0, 1.0, 1.0]
    w, v = normal(50, 4), normal(50, 4, seed=1)
    share = safe_share(w, v)
    assert bool(((w * (-w + share[:, None] * v)).sum(1) <= 1e-12).all())


def test_the_safeguard_scales_the_losers_gradient_and_nothing_else():
    policy = trainable(0.4, **FLOW)
    batch = batch_of("noised", policy)
    safe, plain = (Pairwise(beta=3.0, sft=0.2, safeguard=on).loss(policy, batch) for on in (True, False))
    torch.testing.assert_close(safe[0], plain[0], rtol=1e-12, atol=1e-12)
    rows, won = batch.rows, batch.columns["quality"] == 1
    gap = (policy.output(rows.x, rows.at, rows.cond) - (rows.eps - rows.x0)).detach()
    share = torch.ones(len(batch), dtype=F64)
    share[~won] = safe_share(gap[won], gap[~won])
    assert 0 < float(share[~won].mean()) < 1
    error = errors(policy, rows)
    h = 1.5 * (-error + error.detach() - 0)  # slopes only
    margin = (evidence(policy, rows) - reference_evidence(policy, rows)).detach()
    inside = 1.5 * (margin[won] - margin[~won])
    slope = -torch.sigmoid(-inside)
    expected = (slope * (h[won] - (share * h)[~won])).mean() + 0.2 * error[won].mean()
    torch.testing.assert_close(gradient(policy, safe[0]), gradient(policy, expected), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="not steps"):
        Pairwise(safeguard=True).loss(policy, batch_of("steps", policy))
    with pytest.raises(ValueError, match="of a pair"):
        Pairwise(safeguard=True).loss(policy, batch_of("noised", policy, members=3))


# Lists

SCORES = torch.tensor([[0.2, 0.9, -0.4]], dtype=F64)
PSI = torch.tensor([[1.0, 0.5, 0.0]], dtype=F64)


def test_lipo_by_hand():
    weight = lambda_weights(SCORES, PSI)[0]
    found = [weight[0, 1], weight[0, 2], weight[1, 2]]
    assert [float(v) for v in found] == pytest.approx([0.311905, 0.188892, 0.298792], abs=1e-6)
    assert float(weight.sum()) == pytest.approx(sum(map(float, found)))
    gaps = SCORES[0][:, None] - SCORES[0]
    assert float((weight * compared("logistic", gaps, 1.0)).sum()) == pytest.approx(0.498739, abs=1e-6)


def test_tied_scores_rank_the_worse_member_first():
    weight = lambda_weights(torch.zeros(1, 3, dtype=F64), PSI)[0]
    torch.testing.assert_close(weight, lambda_weights(-PSI, PSI)[0])
    assert float(weight[0, 1]) == pytest.approx((2 - 2**0.5) * (1 / math.log(3) - 1 / math.log(4)))  # ranks 3 and 2


def test_lipo_on_pairs_is_a_constant_times_dpo():
    score, psi = normal(20, 2), torch.tensor([[1.0, 0.0]], dtype=F64).expand(20, 2)
    weight = lambda_weights(score, psi)
    constant = (2**1 - 2**0) * (1 / math.log(2) - 1 / math.log(3))
    torch.testing.assert_close(weight[:, 0, 1], torch.full((20,), constant, dtype=F64))
    assert float(weight.sum()) == pytest.approx(20 * constant)


def test_lists_by_hand_and_in_any_order():
    policy = trainable(0.3, **FLOW)
    for kind in KINDS:
        batch, beta = batch_of(kind, policy, 3, 4), 1.7
        scale = beta if kind == "steps" else beta / 2
        score = scale * (evidence(policy, batch.rows) - reference_evidence(policy, batch.rows)).reshape(-1, 4)
        psi = batch.columns["quality"].reshape(-1, 4)
        rank = (-score).argsort(1).argsort(1) + 1
        total = torch.zeros((), dtype=F64)
        for n in range(len(score)):
            for i in range(4):
                for j in range(4):
                    if psi[n, i] > psi[n, j]:
                        gain = float(2 ** psi[n, i] - 2 ** psi[n, j])
                        discount = abs(1 / math.log(1 + rank[n, i]) - 1 / math.log(1 + rank[n, j]))
                        total = total + gain * discount * torch.log1p(torch.exp(-(score[n, i] - score[n, j])))
        objective = Pairwise(beta=beta)
        found = value(objective, policy, batch)
        torch.testing.assert_close(found, total / len(score))
        torch.testing.assert_close(gradient(policy, found), gradient(policy, total / len(score)))
        order = torch.arange(len(batch)).reshape(-1, 4)[:, [2, 0, 3, 1]].flatten()
        torch.testing.assert_close(value(objective, policy, batch[order]), found)


def test_lists_learn_from_the_first_update_whatever_their_order():
    """At the reference all scores tie: nothing to rank by, yet a gradient, and the same one for every arrangement."""
    policy = trainable(0.0, **FLOW)
    batch = batch_of("noised", policy, 2, 4)
    objective = Pairwise(beta=1.0)
    first = gradient(policy, value(objective, policy, batch))
    assert float(first.norm()) > 1e-3
    order = torch.arange(8).reshape(-1, 4)[:, [3, 1, 0, 2]].flatten()
    torch.testing.assert_close(gradient(policy, value(objective, policy, batch[order])), first)


def test_lists_leave_out_what_was_not_judged():
    psi = torch.tensor([[1.0, torch.nan, 0.0]], dtype=F64)
    weight = lambda_weights(SCORES, psi)[0]
    assert (weight > 0).nonzero().tolist() == [[0, 2]]
    policy = trainable(0.3, **FLOW)
    batch = batch_of("noised", policy, 2, 3)
    psi = torch.tensor([1, torch.nan, 0, 0.5, 0, 1], dtype=F64)
    batch = batch.having(quality=psi, reward=3 * psi, margin=psi)
    loss, metrics = Pairwise(beta=1.0, sft=0.5, dynamic=(0.5, 0.5), margin_weight=0.5).loss(policy, batch)
    assert bool(loss.isfinite()) and bool(gradient(policy, loss).isfinite().all())
    assert float(metrics["winner_error"]) == pytest.approx(float(errors(policy, batch.rows)[[0, 5]].mean().detach()))
    assert float(metrics["loser_error"]) == pytest.approx(float(errors(policy, batch.rows)[[2, 4]].mean().detach()))


# Batches and mistakes


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up(kind, members):
    policy = trainable(0.2, **FLOW)
    batch = batch_of(kind, policy, 6, members)
    sizes = (1, 2, 3) if kind == "noised" else (3, 7, 8)
    objective = Pairwise(beta=2.0, sft=0.1, margin_weight=0.5, dynamic=(0.5, 0.5), clamp=0.2)
    assert_accumulates(objective, policy, batch, sizes)


def test_a_constant_added_to_all_rewards_changes_nothing():
    policy = trainable(0.3, **FLOW)
    batch = batch_of("noised", policy)
    objective = Pairwise(beta=2.0, dynamic=(0.5, 0.5), margin_weight=0.5)
    moved = batch.having(**{name: batch.columns[name] + 4 for name in ("quality", "reward", "margin")})
    torch.testing.assert_close(value(objective, policy, batch), value(objective, policy, moved))


def test_online_preferences_move_the_mean_toward_the_reward():
    """Pairs of one-step samples ordered by r = x: DPO's optimum has the higher mean."""
    policy = trainable(0.0, torch.zeros(1, 1, dtype=F64), **FLOW)
    optimiser = torch.optim.SGD([policy.network.means], lr=0.2)
    for update in range(20):
        batch = steps(policy, 64, 2, steps=1, kernel=DanceSDE(eta=0.5), seed=1000 * update)
        optimiser.zero_grad()
        Pairwise(reduction="sum", beta=0.5).loss(policy, batch.having(quality=batch.rows.following[:, 0]))[0].backward()
        optimiser.step()
    assert float(policy.network.means.detach()) > 0.3


@pytest.mark.parametrize("options", [{}, {"kind": "hinge"}, {"kind": "ipo"}, {"safeguard": True}], ids=str)
def test_large_errors_stay_finite(options):
    policy = trainable(0.3, MEAN.float(), prediction="x0", dtype=torch.float32)
    rows = noised(policy, 3, 2)
    rows = Noised((1e3 * rows.x0).float(), rows.eps.float(), rows.at, rows.cond)
    loss, metrics = Pairwise(**options).loss(policy, Batch(rows, {"quality": quality(3)}, (), 2))
    assert bool(loss.isfinite())
    assert bool(gradient(policy, loss).isfinite().all())
    assert all(bool(v.isfinite()) for v in metrics.values())


def test_mistakes_are_named():
    policy = trainable(0.1, **FLOW)
    for options in (
        {"beta": 0.0}, {"clamp": 1.0}, {"sft": -1.0}, {"margin_weight": 0.01}, {"dynamic": (-1.0, 0.5)},
        {"label_smoothing": 0.5}, {"kind": "hinge", "label_smoothing": 0.1}, {"kind": "x"}, {"schedule": "x"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"Pairwise needs|must be one of"):
            Pairwise(**options)
    for kind, other in (("steps", policy), ("noised", trainable(0.1, frame="flow", prediction="eps"))):
        with pytest.raises(ValueError, match="predicts velocities"):
            Pairwise(schedule="one_minus_t_sq").loss(other, batch_of(kind, other))
    batch = batch_of("noised", policy)
    with pytest.raises(ValueError, match="at least 2"):
        Pairwise().loss(policy, replace(batch, members=1))
    lists = batch_of("noised", policy, members=3)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        Pairwise().loss(policy, lists.having(quality=3 * lists.columns["quality"]))
    with pytest.raises(ValueError, match="deterministic"):
        Pairwise().loss(policy, steps(policy, 2, 2, kernel=ODE()).having(quality=quality(6)))
    untouched = GaussianPolicy(MEAN, frame="flow", prediction="flow")
    untouched.network.means.requires_grad_(True)
    with pytest.raises(ValueError, match="remember"):
        Pairwise().loss(untouched, batch)
    assert Pairwise(margin_weight=0.5, dynamic=(0.5, 0.5)).needs == ("quality", "margin", "reward")
