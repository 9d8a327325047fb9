"""Losses against published numbers and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from align.learning.data import Comparisons
from align.learning.losses import BradleyTerry, Distributional, PlackettLuce, RaoKupper
from rewards.heads import Raw


def ranked(*records: list[int], margin: float = 0.0) -> Comparisons:
    """Records given by the places of their rows, 0 the best; pairs of all rows, the better first."""
    rows = [(r, place) for r, places in enumerate(records) for place in places]
    pairs, start = [], 0
    for r, places in enumerate(records):
        for i, j in itertools.combinations(range(len(places)), 2):
            i, j = (i, j) if places[i] <= places[j] else (j, i)
            pairs.append((start + i, start + j, places[i] == places[j], margin, r))
        start += len(places)
    record, place = map(torch.tensor, zip(*rows, strict=True))
    first, second, tied, lead, pair = map(torch.tensor, zip(*pairs, strict=True))
    last = torch.tensor([max(places) for places in records])
    alike = torch.zeros(len(records), dtype=torch.long)
    return Comparisons(
        [], ["one"], torch.arange(len(rows)), record, place, place < last[record], first, second, tied, lead, pair,
        torch.ones(len(records)), alike, alike,
    )  # fmt: skip


def raw(*scores: float, variance: Tensor | None = None) -> Raw:
    return Raw(torch.tensor([scores], dtype=torch.float64), variance)


def test_rao_kupper_matches_the_published_numbers():
    loss = RaoKupper(theta=5)
    for lead, win, tie in ((1.0, 1.0435918, 0.5459709), (0.0, 1.7917595, 0.4054651)):
        assert loss.terms(ranked([0, 1]), raw(lead, 0))[0].item() == pytest.approx(win, abs=1e-6)
        assert loss.terms(ranked([0, 0]), raw(lead, 0))[0].item() == pytest.approx(tie, abs=1e-6)
    won, lost, tied = (
        math.exp(-loss.terms(ranked(places), raw(1.0, 0))[0].item()) for places in ([0, 1], [1, 0], [0, 0])
    )
    assert (won, lost, tied) == pytest.approx((0.352187, 0.068534, 0.579279), abs=1e-6)
    assert won + lost + tied == pytest.approx(1)


def test_a_tie_of_equals_costs_nothing_in_bradley_terry():
    assert BradleyTerry().terms(ranked([0, 0]), raw(2.0, 2.0))[0].item() == pytest.approx(0, abs=1e-9)
    assert BradleyTerry().terms(ranked([0, 0]), raw(2.0, 0.0))[0].item() > 0.1
    assert BradleyTerry(ties="drop").terms(ranked([0, 0]), raw(2.0, 0.0))[0].numel() == 0


def test_margins_and_centring():
    plain = BradleyTerry().terms(ranked([0, 1]), raw(0.7, 0.2))[0].item()
    assert plain == pytest.approx(math.log1p(math.exp(-0.5)))
    moved = BradleyTerry(margin=0.1, own_margins=0.5).terms(ranked([0, 1], margin=0.4), raw(0.7, 0.2))[0].item()
    assert moved == pytest.approx(math.log1p(math.exp(-0.2)))
    assert BradleyTerry(centring=0.01).terms(ranked([0, 1]), raw(0.7, 0.2))[0].item() == pytest.approx(
        plain + 0.01 * 0.81
    )


def slope_at(loss: BradleyTerry, lead: float, share: float) -> float:
    """Slope of the expected loss in the lead, where the first is called better at this rate."""
    scores = torch.tensor([[lead, 0.0]], dtype=torch.float64, requires_grad=True)
    won, lost = (loss.terms(ranked(places), Raw(scores))[0].sum() for places in ([0, 1], [1, 0]))
    (share * won + (1 - share) * lost).backward()
    return float(scores.grad[0, 0])


@pytest.mark.parametrize("clean", [0.6, 0.9])
@pytest.mark.parametrize("flips", [0.1, 0.3])
def test_known_flips_do_not_move_the_optimum(clean: float, flips: float):
    """The corrected loss is least at the clean log-odds; the plain one is drawn to those of the wrong labels."""
    seen = clean * (1 - flips) + (1 - clean) * flips
    assert slope_at(BradleyTerry(flips=flips), math.log(clean / (1 - clean)), seen) == pytest.approx(0, abs=1e-12)
    assert slope_at(BradleyTerry(), math.log(seen / (1 - seen)), seen) == pytest.approx(0, abs=1e-12)
    assert slope_at(BradleyTerry(), math.log(clean / (1 - clean)), seen) > 0.05 * flips


def test_smoothing_has_its_optimum_at_the_smoothed_log_odds():
    assert slope_at(BradleyTerry(smoothing=0.1), math.log(0.9 / 0.1), 1.0) == pytest.approx(0, abs=1e-12)


def test_plackett_luce_gives_every_order_a_probability():
    scores = (0.3, -1.2, 0.8)
    chances = []
    for order in itertools.permutations(range(3)):
        places = [order.index(i) for i in range(3)]
        terms, record = PlackettLuce().terms(ranked(places), raw(*scores))
        assert record.tolist() == [0, 0]
        chances.append(math.exp(-terms.sum().item()))
    assert sum(chances) == pytest.approx(1)


def test_plackett_luce_of_two_is_bradley_terry_and_records_do_not_mix():
    data, scores = ranked([1, 0], [0, 1, 2], [0, 1]), raw(0.1, 0.9, 2.0, 0.5, -0.5, 0.3, 0.4)
    listed, record = PlackettLuce().terms(data, scores)
    by_record = torch.zeros(3, dtype=torch.float64).index_add_(0, record, listed[0])
    assert by_record[0].item() == pytest.approx(math.log1p(math.exp(-0.8)))
    assert by_record[2].item() == pytest.approx(math.log1p(math.exp(0.1)))
    alone = PlackettLuce().terms(ranked([0, 1, 2]), raw(2.0, 0.5, -0.5))[0].sum()
    assert by_record[1].item() == pytest.approx(alone.item())


def test_a_winner_among_many_is_one_choice():
    data = ranked([1, 0, 1])
    terms, _ = PlackettLuce().terms(data, raw(0.0, 1.0, 2.0))
    assert terms.shape == (1, 1)
    assert terms.item() == pytest.approx(-torch.tensor([0.0, 1.0, 2.0]).log_softmax(0)[1].item(), rel=1e-6)


def test_distributional_is_the_normal_law():
    variance = torch.tensor([[0.5, 1.5]], dtype=torch.float64)
    loss = Distributional(penalty=0).terms(ranked([0, 1]), raw(1.0, 0.0, variance=variance))[0].item()
    assert loss == pytest.approx(-math.log(0.5 * (1 + math.erf(1 / math.sqrt(2) / math.sqrt(2)))))
    with pytest.raises(ValueError, match="variance"):
        Distributional().terms(ranked([0, 1]), raw(1.0, 0.0))


@pytest.mark.parametrize(
    "bad", [{"flips": 0.5}, {"smoothing": -0.1}, {"flips": 0.1, "smoothing": 0.1}, {"centring": -1}]
)
def test_impossible_settings_are_refused(bad: dict[str, float]):
    with pytest.raises(ValueError, match=r"flips|smoothing|centring"):
        BradleyTerry(**bad)
    with pytest.raises(ValueError, match="theta"):
        RaoKupper(theta=1.0)
