"""Laws of sources: what is collected is a function of seed and iteration, in whole groups, and says what is known of it."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from align.advantages import advantages, normalised
from align.batches import Batch, Noised, Paths, Steps, concat
from align.evidence import law
from align.sampling import Sampling
from align.sources import Prompts, Rollouts, Run, noised, pick
from align.world import World
from samplers import DDIM, Ledger, RewardFailed
from samplers.families.gaussian import GaussianPolicy
from tests.align.runs import PROMPTS, Near, Worded, world_of

WORLD = World(cpu=True)


def run_of(batch: int = 8, world: World = WORLD, policy=None, steps: int = 4, **how) -> Run:
    policy = policy or GaussianPolicy([[0.4, -0.3], [-0.5, 0.6]], [0.6, 0.8], [0.5, 0.5])
    sampling = Sampling.of(policy, DDIM(eta=1.0), steps, **how)
    return Run(policy, sampling, world, 3, batch, Ledger())


def collected(run: Run | None = None, iteration: int = 0, reward=None, **how) -> tuple[Rollouts, Batch]:
    source = Rollouts(PROMPTS, **how).bind(reward or Near())
    run = run or run_of()
    source.check(run)
    batch = source.collect(run, iteration)
    return source, batch.having(item=torch.arange(batch.items).repeat_interleave(batch.members))


# The order of things


def test_every_pass_sees_each_once_in_a_new_order():
    order = pick(30, 0, 10, seed=1)
    passes = [order[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert pick(7, 13, 10, 1) == order[13:20], "from any place"
    assert pick(30, 0, 10, 2) != order


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shares_of_prompts_make_the_whole(processes):
    whole = Prompts(PROMPTS).collect(run_of(), 5)
    parts = concat([Prompts(PROMPTS).collect(run_of(world=world_of(rank, processes)), 5) for rank in range(processes)])
    assert torch.equal(parts.rows.seeds, whole.rows.seeds)
    assert (parts.prompts, parts.rows.draw) == (whole.prompts, whole.rows.draw)
    assert len(set(whole.rows.seeds.tolist())) == 8
    later = Prompts(PROMPTS).collect(run_of(), 6)
    assert not set(later.rows.seeds.tolist()) & set(whole.rows.seeds.tolist())
    assert later.rows.draw != whole.rows.draw


def test_collections_repeat_and_differ_by_iteration():
    one, again, later = (collected(iteration=i)[1] for i in (4, 4, 5))
    for name in ("rows", "cond", "columns"):
        torch.testing.assert_close(one.state()[name], again.state()[name], rtol=0, atol=0)
    assert not (one.rows.latents == later.rows.latents).any()


# Rollouts


@pytest.mark.parametrize("shared", [True, False])
def test_groups_of_a_prompt(shared):
    """`group` consecutive samples of one prompt, all different; with a shared start they begin alike."""
    _, batch = collected(group=4, shared_start=shared)
    assert isinstance(batch.rows, Paths)
    assert batch.columns["group"].tolist() == [0] * 4 + [1] * 4
    assert [len({p.text for p in batch.prompts[i : i + 4]}) for i in (0, 4)] == [1, 1]
    start = batch.rows.latents[:, 0]
    assert (torch.equal(start[0].expand(4, -1), start[:4])) == shared
    assert not torch.equal(start[0], start[4])
    assert len({tuple(row) for row in batch.rows.latents[:, -1].tolist()}) == 8


def test_prompts_take_turns():
    texts = Counter(p.text for i in range(4) for p in collected(iteration=i, group=4)[1].prompts)
    assert texts == Counter(dict.fromkeys(PROMPTS, 8))


@pytest.mark.parametrize("kind", ["group", "group_global_std", "global", "centre", "rank", "none"])
def test_columns_are_what_they_say(kind):
    run = run_of(policy=(policy := GaussianPolicy([[0.4, -0.3]])))
    _, batch = collected(run, reward=Worded(), group=4, advantage=kind)
    reward = Worded()(batch.rows.latents[:, -1], batch.prompts)
    torch.testing.assert_close(batch.columns["reward"], reward)
    groups = batch.columns["group"]
    torch.testing.assert_close(batch.columns["advantage"], advantages(kind, reward, groups))
    torch.testing.assert_close(batch.columns["quality"], normalised(reward, groups))
    steps = batch.steps(torch.arange(3).expand(8, -1))
    with torch.no_grad():
        now = law(policy, steps.rows).log_prob(steps.rows.following)
    torch.testing.assert_close(steps.columns["old"], now, rtol=1e-12, atol=1e-12)


def test_the_speaker_samples():
    """With earlier weights, where a method rolls out with those."""
    run = run_of(policy=(policy := GaussianPolicy([[0.4, -0.3]])))
    policy.network.means.requires_grad_(True)
    policy.remember("old")
    before = collected(run)[1].rows.latents
    with torch.no_grad():
        policy.network.means += 1
    assert torch.equal(collected(run, speaker="old")[1].rows.latents, before)
    assert not torch.equal(collected(run)[1].rows.latents, before)


def test_what_cannot_be_judged_is_not_kept():
    _, batch = collected(run_of(64), reward=Near(fails=0.4), group=8)
    failed = batch.columns["reward"].isnan()
    assert 0 < failed.sum() < 64
    assert torch.equal(batch.columns["keep"], ~failed)
    assert (batch.columns["advantage"][failed] == 0).all()
    assert batch.kept().items == int((~failed).sum())
    source, _ = collected(run_of(64), reward=Near(fails=0.4), group=8)
    assert source.metrics()["reward_failed"] == pytest.approx(failed.float().mean().item())
    assert source.metrics()["reward"] == pytest.approx(batch.columns["reward"].nanmean().item())
    with pytest.raises(RewardFailed, match="Near could judge none of 8 samples"):
        collected(reward=Near(fails=1.0))


@pytest.mark.parametrize("drop", [True, False])
def test_samples_that_teach_nothing(drop):
    """An advantage of 0 counts in the mean unless it is dropped."""
    reward = Near()
    reward.measure = lambda media, prompts: torch.where(torch.arange(len(media)) < 4, 1.0, media.flatten(1).sum(1))
    _, batch = collected(reward=reward, group=4, drop_zero=drop)
    assert batch.columns["advantage"][:4].tolist() == [0.0] * 4
    assert batch.kept().items == (4 if drop else 8)


def test_pairs():
    """The best against the worst of each group; every two; the whole group in a list. Ties, and what failed, are not trained on."""
    _, plain = collected(run_of(12), group=3)
    reward = plain.columns["reward"].reshape(4, 3)
    _, pairs = collected(run_of(4), group=3, pairs="best_worst")
    assert pairs.members == 2 and pairs.items == 4
    torch.testing.assert_close(pairs.columns["reward"].reshape(4, 2), torch.stack([reward.amax(1), reward.amin(1)], 1))
    assert pairs.columns["quality"].reshape(4, 2).tolist() == [[1.0, 0.0]] * 4
    _, every = collected(run_of(12), group=3, pairs="all")
    two = [[(r[0], r[1]), (r[0], r[2]), (r[1], r[2])] for r in reward.tolist()]
    assert every.columns["reward"].reshape(-1, 2).tolist() == [pytest.approx(pair) for group in two for pair in group]
    _, lists = collected(run_of(4), group=3, pairs="list")
    assert lists.members == 3 and torch.equal(lists.columns["reward"], plain.columns["reward"])
    _, some = collected(run_of(16), reward=Near(fails=0.5), group=4, pairs="best_worst")
    kept = some.kept()
    assert 0 < kept.items < 16
    assert kept.columns["reward"].isfinite().all()
    assert (kept.columns["reward"].reshape(-1, 2).diff() < 0).all()


@pytest.mark.parametrize(("how", "batch", "groups"), [
    ({"group": 4}, 8, 2), ({"group": 4, "updates": 3}, 4, 3), ({"group": 4, "pairs": "best_worst"}, 8, 8),
    ({"group": 4, "pairs": "all"}, 12, 2), ({"group": 4, "pairs": "list"}, 8, 8),
    ({"group": 4, "evidence": "clean", "draws": 2}, 8, 1), ({"group": 2, "evidence": "clean", "draws": 2, "pairs": "list"}, 8, 4),
])  # fmt: skip
def test_a_collection_makes_exactly_the_items_of_its_updates(how, batch, groups):
    source, found = collected(run_of(batch), **how)
    assert source.groups(batch) == groups
    assert found.items == batch * source.updates
    assert len(found.columns["group"].unique()) == groups


@pytest.mark.parametrize(
    ("fraction", "skip", "count"), [(1.0, 0, 3), (0.5, 0, 2), (0.34, 0, 1), (1.0, 2, 2), (0.01, 0, 1)]
)
def test_which_steps_are_trained(fraction, skip, count):
    """The last step of DDIM is deterministic, so three of four can be; a share of them, drawn for each item and epoch."""
    source, batch = collected(run_of(16), group=2, timestep_fraction=fraction, skip_last=skip)
    chosen = [source.choose(batch, seed) for seed in (1, 1, 2)]
    assert isinstance(chosen[0].rows, Steps)
    assert len(chosen[0]) == 16 * count
    steps = chosen[0].rows.step.reshape(16, count)
    assert (steps.diff(dim=1) > 0).all(), "no step twice"
    assert int(steps.max()) < 4 - max(skip, 1)
    assert torch.equal(chosen[0].rows.step, chosen[1].rows.step)
    if fraction < 1:
        assert not torch.equal(chosen[0].rows.step, chosen[2].rows.step)
        assert len({tuple(row) for row in steps.tolist()}) > 1
    alone = source.choose(batch.take([5]), 1)
    assert torch.equal(alone.rows.step, steps[5]), "an item's steps do not depend on its company"


# Noised rows


def test_noise_is_shared_by_members_and_not_by_draws():
    policy = GaussianPolicy([[0.0, 0.0, 0.0]])
    x0 = torch.arange(18.0).reshape(6, 3)
    rows, origin = noised(policy, x0, policy.encode(["a"] * 6), [5, 6, 7], members=2, draws=4)
    assert origin.tolist() == [item * 2 + member for item in range(3) for _ in range(4) for member in range(2)]
    assert torch.equal(rows.x0, x0[origin])
    eps, t = rows.eps.reshape(3, 4, 2, 3), rows.at.t.reshape(3, 4, 2)
    assert torch.equal(eps[:, :, 0], eps[:, :, 1]) and torch.equal(t[:, :, 0], t[:, :, 1])
    assert len(eps[:, :, 0].reshape(12, 3).unique(dim=0)) == 12
    alone, _ = noised(policy, x0[2:4], policy.encode(["a"] * 2), [6], 2, 4)
    assert torch.equal(alone.eps, rows.eps[8:16]) and torch.equal(alone.at.t, rows.at.t[8:16])


@pytest.mark.parametrize(("kind", "spread"), [("uniform", 1 / 12**0.5), ("logit_normal", 0.208)])
def test_levels_of_noise(kind, spread):
    policy = GaussianPolicy([[0.0]], frame="flow", prediction="flow")
    rows, _ = noised(policy, torch.zeros(4000, 1), policy.encode(["a"] * 4000), range(4000), 1, 1, kind)
    assert float(rows.at.sigma.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(rows.at.sigma.std()) == pytest.approx(spread, abs=0.01)
    assert float(rows.eps.mean()) == pytest.approx(0, abs=0.05)
    assert float(rows.eps.std()) == pytest.approx(1, abs=0.05)


def test_sampled_levels_are_those_of_the_run_and_come_in_turn():
    """Each item sees every step once before any comes again, in an order of its own."""
    policy = GaussianPolicy([[0.0]], frame="flow", prediction="flow")
    levels = policy.levels(5)
    rows, _ = noised(policy, torch.zeros(8, 1), policy.encode(["a"] * 8), range(4), 2, 7, "sampled", levels)
    sigma = rows.at.sigma.reshape(4, 7, 2)
    assert torch.equal(sigma[..., 0], sigma[..., 1])
    assert torch.equal(sigma[:, :5, 0].sort(descending=True).values, levels.sigma[:-1].expand(4, -1))
    assert torch.equal(sigma[:, 5:], sigma[:, :2])
    assert len({tuple(row) for row in sigma[:, :5, 0].tolist()}) > 1


@pytest.mark.parametrize("guided", [True, False])
def test_clean_evidence_is_final_samples(guided):
    run = run_of(8, guidance=3.0)
    _, paths = collected(run)
    _, clean = collected(run, evidence="clean", guided=guided)
    assert isinstance(clean.rows, Noised)
    torch.testing.assert_close(clean.rows.x0, paths.rows.latents[:, -1])
    assert clean.rows.cond.guidance == (3.0 if guided else 1.0)
    torch.testing.assert_close(clean.columns["advantage"], paths.columns["advantage"])
    assert "old" not in clean.columns


def test_running_statistics_outlive_a_collection():
    source = Rollouts(PROMPTS, group=4, advantage="running", least=2).bind(Near())
    run = run_of()
    for iteration in range(2):
        source.collect(run, iteration)
    again = Rollouts(PROMPTS, group=4, advantage="running", least=2).bind(Near())
    again.restore(source.state())
    one, other = (s.collect(run, 2).columns["advantage"] for s in (source, again))
    assert torch.equal(one, other)
    fresh = Rollouts(PROMPTS, group=4, advantage="running", least=2).bind(Near())
    assert not torch.equal(fresh.collect(run, 2).columns["advantage"], one)
    assert math.isfinite(float(one.sum()))


@pytest.mark.parametrize(("how", "said"), [
    ({"updates": 0}, "updates must be ≥ 1; got 0"),
    ({"draws": 0}, "draws must be ≥ 1"),
    ({"timestep_fraction": 0.0}, r"timestep_fraction must lie in \(0, 1\]; got 0.0"),
    ({"group": 1}, "group must be ≥ 2"),
])  # fmt: skip
def test_values_out_of_range(how, said):
    with pytest.raises(ValueError, match=said):
        Rollouts(PROMPTS, **how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"evidence": "step"}, r"evidence must be one of steps, paths, clean; got 'step'"),
        ({"advantage": "groups"}, r"advantage must be one of group, .*; got 'groups'"),
        ({"pairs": "best"}, r"pairs must be one of None, best_worst, all, list; got 'best'"),
        ({"t": "normal", "evidence": "clean"}, r"t must be one of uniform, logit_normal, sampled; got 'normal'"),
        ({"skip_last": -1}, r"skip_last must be ≥ 0"),
        ({"buffer": 0}, r"buffer must be ≥ 1; got 0"),
        ({"clip": 0.0}, r"clip > 0"),
        ({"draws": 2}, r"draws, t and guided are for evidence=.clean."),
        ({"guided": True}, r"draws, t and guided are for evidence=.clean."),
        ({"evidence": "clean", "skip_last": 1}, r"skip_last are for evidence=.steps."),
        ({"evidence": "clean", "timestep_fraction": 0.5}, r"timestep_fraction and skip_last are for"),
    ],
)
def test_words_and_numbers_that_would_be_guessed_at_or_ignored(how, said):
    with pytest.raises(ValueError, match=said):
        Rollouts(PROMPTS, **how)
