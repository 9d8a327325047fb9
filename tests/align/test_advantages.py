"""Laws of advantages: closed forms, invariances, and samples that could not be judged."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.advantages import PromptStatistics, advantages, best_and_worst, group_mean, normalised

GROUPED = ("group", "group_global_std", "centre", "rank")
KINDS = (*GROUPED, "global", "none")
NAN = math.nan
rewards_of = st.lists(st.integers(-800, 800), min_size=12, max_size=12).map(lambda r: torch.tensor(r).double() / 8)
GROUPS = torch.arange(4).repeat_interleave(3)


def test_by_hand():
    r, g = torch.tensor([1.0, 3.0, 10.0, 20.0]), torch.tensor([0, 0, 1, 1])
    std = float(r.std(correction=0))
    expected = {
        "group": [-1, 1, -1, 1],
        "group_global_std": [-1 / std, 1 / std, -5 / std, 5 / std],
        "global": ((r - 8.5) / std).tolist(),
        "centre": [-1, 1, -5, 5],
        "rank": [-1, 1, -1, 1],
        "none": [1, 3, 10, 20],
    }
    for kind in KINDS:
        assert advantages(kind, r, g, eps=0.0, clip=100.0).tolist() == pytest.approx(expected[kind]), kind


@settings(max_examples=30, deadline=None)
@given(rewards_of)
@pytest.mark.parametrize("kind", GROUPED)
def test_groups_are_centred_and_bounded(kind, r):
    a = advantages(kind, r, GROUPS, clip=1e9)
    torch.testing.assert_close(
        group_mean(a, GROUPS), torch.zeros_like(a), rtol=0, atol=1e-6 * max(1.0, float(a.abs().max()))
    )
    assert advantages(kind, r, GROUPS, clip=0.5).abs().max() <= 0.5
    if kind in ("group", "rank"):  # the largest |z| of n numbers is √(n − 1)
        assert a.abs().max() <= 2**0.5 + 1e-9


@settings(max_examples=30, deadline=None)
@given(rewards_of, st.floats(0.1, 10), st.floats(-50, 50))
@pytest.mark.parametrize("kind", KINDS)
def test_neither_scale_nor_shift_nor_order_matters(kind, r, scale, shift):
    """Of the rewards' scale and shift what the kind promises, and of the order of samples nothing."""
    a = advantages(kind, r, GROUPS, eps=0.0, clip=1e9)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(advantages(kind, r[order], GROUPS[order], eps=0.0, clip=1e9), a[order])
    spread = float((r - group_mean(r, GROUPS)).abs().max())
    if kind != "none" and (kind == "centre" or spread > 1e-3) and all(r[i == GROUPS].std() > 1e-3 for i in range(4)):
        moved = advantages(kind, scale * r + shift, GROUPS, eps=0.0, clip=1e9)
        torch.testing.assert_close(moved, a * (scale if kind == "centre" else 1), rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(rewards_of, st.sets(st.integers(0, 11), max_size=8))
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_that_was_not_judged_takes_no_part(kind, r, failed):
    """The others have the advantages they would have without it; its own is 0."""
    lost = torch.tensor([i in failed for i in range(12)])
    if kind in GROUPED and max((~lost)[i == GROUPS].sum() for i in range(4)) < 2:
        return
    a = advantages(kind, r.masked_fill(lost, NAN), GROUPS)
    assert (a[lost] == 0).all()
    torch.testing.assert_close(a[~lost], advantages(kind, r[~lost], GROUPS[~lost]))


def test_a_group_of_equals_teaches_nothing():
    for kind in (*GROUPED, "global"):
        assert advantages(kind, torch.full((6,), 0.7), torch.arange(2).repeat_interleave(3)).tolist() == [0.0] * 6


def test_ranks_share_ties():
    r = torch.tensor([5.0, 5.0, 1.0, 9.0])
    assert advantages("rank", r, torch.zeros(4)).tolist() == pytest.approx([0, 0, -1, 1])


def test_groups_of_one_and_unknown_kinds():
    for kind in GROUPED:
        with pytest.raises(ValueError, match="take at least two a prompt, got one each"):
            advantages(kind, torch.rand(3), torch.arange(3))
    for kind in ("running", "z-score"):
        with pytest.raises(ValueError, match=f"must be one of group, .*; got '{kind}'"):
            advantages(kind, torch.rand(4), torch.zeros(4))


@settings(max_examples=30, deadline=None)
@given(rewards_of)
def test_normalised_qualities(r):
    q = normalised(r, GROUPS)
    for g in range(4):
        mine, theirs = r[g == GROUPS], q[g == GROUPS]
        if mine.max() > mine.min():
            assert (theirs.min(), theirs.max()) == (0, 1)
            assert torch.equal(theirs.argsort(stable=True), mine.argsort(stable=True)) or len(mine.unique()) < 3
        else:
            assert theirs.tolist() == [0.5] * 3
    assert normalised(torch.tensor([NAN, NAN, 1.0, 3.0]), torch.tensor([0, 0, 1, 1])).isnan().tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_best_and_worst():
    high, low = best_and_worst(torch.tensor([1.0, 3.0, 2.0, NAN, 5.0, 4.0, 7.0, 7.0, 7.0]), 3)
    assert high.tolist()[:2] == [1, 4]
    assert low.tolist()[:2] == [0, 5]
    assert high[2] == low[2], "equals are the same sample twice: a tie"


# DDPO's memory


def test_running_statistics_are_those_of_each_prompts_last_rewards():
    memory = PromptStatistics(buffer=4, least=2)
    first = memory(torch.tensor([1.0, 3.0, 10.0]), ["a", "a", "b"])
    assert first[:2].tolist() == pytest.approx([-1, 1], rel=1e-5)
    whole = torch.tensor([1.0, 3.0, 10.0])
    assert first[2] == pytest.approx(float((10 - whole.mean()) / whole.std(correction=0)), rel=1e-5), (
        "b is seen too rarely"
    )
    then = memory(torch.tensor([5.0, 7.0, 9.0, NAN]), ["a", "a", "a", "b"])
    last = torch.tensor([3.0, 5.0, 7.0, 9.0])
    assert then[:3].tolist() == pytest.approx(((last[1:] - 6) / last.std(correction=0)).tolist(), rel=1e-5)
    assert then[3] == 0
    assert list(memory.seen["b"]) == [10.0]


def test_a_memory_goes_on_from_its_state():
    one, other = PromptStatistics(8, 2), PromptStatistics(8, 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        one(torch.rand(4, generator=generator), ["a", "a", "b", "c"])
    other.restore(one.state())
    r = torch.rand(4, generator=generator)
    assert torch.equal(one(r, ["c", "a", "b", "d"]), other(r, ["c", "a", "b", "d"]))
    state = one.state()
    one(r, ["a"] * 4)
    assert state != one.state(), "a state does not change with the memory"
