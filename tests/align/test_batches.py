"""Laws of batches: rows, columns and prompts stay together, and files give back what they were given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.batches import Batch, Noised, Starts, concat
from align.objectives import MaPO, Pairwise, Unary, Weighted
from align.objectives.seppo import SePPO
from rewards import Prompt
from samplers import DDIM, Cond
from samplers.families.gaussian import GaussianPolicy
from tests.align.objectives.rows import noised, normal, paths, trainable

POLICY = GaussianPolicy([[0.4, -0.3]])
KERNEL, LEVELS = DDIM(eta=1.0), POLICY.levels(3)
COUNT, MEMBERS = 6, 2


def cond(count: int) -> Cond:
    """Rows that can be told apart, with a negative branch."""
    row = torch.arange(float(count))
    more = row[:, None, None].expand(-1, 2, 3)
    return Cond({"row": row[:, None], "more": more}, {"row": -row[:, None], "more": 0 * more}, 2.5)


def rows_of(kind: str):
    if kind == "Starts":
        return Starts(torch.arange(COUNT) + 2**62, cond(COUNT), KERNEL, LEVELS, (2,), draw=7)
    if kind == "Noised":
        return replace(noised(POLICY, COUNT // MEMBERS, MEMBERS), cond=cond(COUNT))
    whole = replace(paths(POLICY, COUNT, kernel=KERNEL).rows, cond=cond(COUNT))
    return whole if kind == "Paths" else Batch(whole).steps(torch.arange(COUNT)[:, None] % 3).rows


def batch_of(kind: str) -> Batch:
    prompts = tuple(Prompt(f"p{i}", f"n{i}", {"i": i}) for i in range(COUNT))
    columns = {"reward": torch.arange(float(COUNT)), "keep": torch.arange(COUNT) != 3, "wide": normal(COUNT, 3)}
    return Batch(rows_of(kind), columns, prompts, MEMBERS)


def assert_same(one: Batch, other: Batch) -> None:
    assert type(one.rows) is type(other.rows)
    a, b = one.state(), other.state()
    torch.testing.assert_close(a["rows"], b["rows"], rtol=0, atol=0)
    torch.testing.assert_close(a["cond"], b["cond"], rtol=0, atol=0)
    torch.testing.assert_close(a["columns"], b["columns"], rtol=0, atol=0)
    assert (a["prompts"], a["members"], a["kind"]) == (b["prompts"], b["members"], b["kind"])


KINDS = ("Starts", "Paths", "Steps", "Noised")


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_picked_together(kind):
    batch = batch_of(kind)
    picked = batch.take([2, 0])
    assert picked.columns["reward"].tolist() == [4, 5, 0, 1]
    assert [p.text for p in picked.prompts] == ["p4", "p5", "p0", "p1"]
    for name in ("positive", "negative"):
        expected = getattr(batch.rows.cond, name)["row"][[4, 5, 0, 1]]
        assert torch.equal(getattr(picked.rows.cond, name)["row"], expected)
    for name, value in vars(batch.rows).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(picked.rows, name), value[[4, 5, 0, 1]])
    assert (len(picked), picked.items, picked.members) == (4, 2, 2)
    if kind == "Noised":
        torch.testing.assert_close(picked.rows.x, batch.rows.x[[4, 5, 0, 1]])
    assert_same(batch[torch.arange(COUNT)], batch)
    assert len(batch.take([])) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_parts_make_the_whole_again(kind):
    batch = batch_of(kind)
    assert_same(concat([batch.take([0]), batch.take([1, 2])]), batch)
    assert_same(concat([batch]), batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_back_what_it_was_given(kind, tmp_path):
    """Loading runs no code, so a batch is made of tensors, strings and numbers."""
    batch = batch_of(kind)
    torch.save(batch.state(), tmp_path / "batch.pt")
    state = torch.load(tmp_path / "batch.pt", weights_only=True)
    again = Batch.restored(state, KERNEL, LEVELS, (2,))
    assert_same(again, batch)
    assert again.rows.__class__ is batch.rows.__class__
    if kind != "Noised":
        assert again.rows.kernel is KERNEL and again.rows.levels is LEVELS
    moved = Batch.restored(state, KERNEL, LEVELS, (2,), "meta")
    assert moved.rows.cond.positive["row"].device.type == moved.rows.cond.negative["row"].device.type == "meta"
    for name in vars(moved.rows).keys() & {"latents", "x", "following", "x0", "eps"}:
        assert getattr(moved.rows, name).device.type == "meta"


def test_only_items_that_may_be_trained_are_kept():
    batch = batch_of("Noised")
    assert batch.kept().columns["reward"].tolist() == [0, 1, 4, 5], "one bad member spoils its item"
    assert batch.having(keep=torch.zeros(COUNT, dtype=torch.bool)).kept().items == 0
    bare = Batch(batch.rows, {}, (), MEMBERS)
    assert bare.kept() is bare


def test_steps_of_paths():
    """Each item's chosen steps, members side by side; columns with a value a step give that of the step."""
    batch = batch_of("Paths")
    chosen = torch.tensor([[0, 2], [1, 1], [2, 0]])
    unfolded = batch.steps(chosen)
    assert (len(unfolded), unfolded.items, unfolded.members) == (12, 6, 2)
    paths_, rows = batch.rows, unfolded.rows
    for place in range(12):
        item, step, member = place // 4, chosen[place // 4, place % 4 // 2], place % 2
        row = item * MEMBERS + member
        assert rows.step[place] == step
        assert torch.equal(rows.x[place], paths_.latents[row, step])
        assert torch.equal(rows.following[place], paths_.latents[row, step + 1])
        assert unfolded.columns["reward"][place] == row
        assert unfolded.columns["wide"][place] == batch.columns["wide"][row, step]
        assert unfolded.prompts[place].text == f"p{row}"
        assert rows.cond.positive["row"][place] == row


def test_parts_of_different_size_are_no_batch():
    rows = rows_of("Noised")
    with pytest.raises(ValueError, match=r"one entry a row everywhere; got \{'reward': 5, 'rows': 6\}"):
        Batch(rows, {"reward": torch.zeros(5)})
    with pytest.raises(ValueError, match="'prompts': 1"):
        Batch(rows, {}, (Prompt("x"),))
    with pytest.raises(ValueError, match="6 rows do not make whole items of 4"):
        Batch(rows, {}, (), 4)
    with pytest.raises(ValueError, match=r"needs the column 'label'; the source made \['reward'\]"):
        Batch(rows, {"reward": torch.zeros(6)}).column("label")


def test_noised_rows_lie_where_they_say():
    rows = rows_of("Noised")
    assert isinstance(rows, Noised)
    for i in range(COUNT):
        torch.testing.assert_close(rows.x[i], rows.at.alpha[i] * rows.x0[i] + rows.at.sigma[i] * rows.eps[i])


@pytest.mark.parametrize(
    "objective", [Pairwise(beta=9.0, sft=0.5), MaPO(), Unary(beta=5.0), Weighted("none"), SePPO(9.0)]
)
@pytest.mark.parametrize("members", [1, 2, 3])
def test_weights_multiply_the_losses_of_items(objective, members):
    """Those of a row of data: 0 leaves it out of the sum, 3 counts it three times, and 1 changes nothing."""
    if members not in {"Unary": (1,), "Weighted": (1,), "Pairwise": (2, 3)}.get(type(objective).__name__, (2,)):
        return
    policy = trainable(shift=0.3)
    policy.voices["old"] = policy.voices["reference"]
    columns = {"quality": torch.arange(4.0 * members) % members / 2, "label": torch.arange(4.0 * members) % 2}
    batch = Batch(noised(policy, 4, members), columns, members=members, shared={"baseline": torch.tensor(0.1)})
    alone = torch.stack([objective.loss(policy, batch.take([i]))[0] for i in range(4)])
    weights = torch.tensor([0.0, 1.0, 3.0, 0.5])
    weighted = batch.having(weight=weights.repeat_interleave(members))
    torch.testing.assert_close(objective.loss(policy, weighted)[0], (weights.double() * alone).mean())
    even = objective.loss(policy, batch.having(weight=torch.ones(len(batch))))[0]
    assert torch.equal(even, objective.loss(policy, batch)[0])
