"""Calibration and best-of-n against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from align.learning import report


def test_the_slope_maximises_the_likelihood():
    lead = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 0.4
    best = report.slope_of(lead)
    assert all(report.nll(lead, best) <= report.nll(lead, best * f) for f in (0.9, 0.99, 1.01, 1.1))
    assert report.slope_of(-lead.abs()) == 0.0
    assert math.isfinite(report.slope_of(lead.abs() + 1))


def test_calibrated_choices_have_no_calibration_error():
    draw = torch.Generator().manual_seed(1)
    lead = 3 * torch.rand(20_000, generator=draw)
    right = torch.rand(20_000, generator=draw) < torch.sigmoid(lead)
    signed = torch.where(right, lead, -lead)
    assert report.ece(signed) < 0.01
    assert report.slope_of(signed) == pytest.approx(1, abs=0.05)
    assert report.ece(5 * signed) > 0.05
    assert report.ece(5 * signed, report.slope_of(5 * signed)) < 0.01


def test_ties_out_and_ties_half():
    found = report.accuracy(torch.tensor([1.0, -1.0, 2.0, 0.0, 5.0]), torch.tensor([False, False, False, False, True]))
    assert found == pytest.approx({"accuracy": 2.5 / 4, "accuracy_ties_half": 3 / 5})


def test_best_of_n_is_the_mean_over_all_draws():
    draw = torch.Generator().manual_seed(2)
    proxy, gold = torch.randn(7, generator=draw), torch.randn(7, generator=draw)
    for n in range(1, 8):
        drawn = [gold[max(rows, key=lambda i: proxy[i])] for rows in itertools.combinations(range(7), n)]
        assert report.best_of(proxy, gold, n) == pytest.approx(torch.stack(drawn).mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match="1 to the 7"):
        report.best_of(proxy, gold, 8)


def test_the_curve_averages_prompts_and_leaves_out_what_gold_could_not_judge():
    proxy, gold = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0]), torch.tensor([1.0, 0.0, 5.0, 7.0, math.nan])
    found = report.curve(proxy, gold, torch.tensor([0, 0, 1, 1, 1]))
    assert found["n"] == [1.0, 2.0]
    assert found["gold"] == pytest.approx([(0.5 + 6) / 2, (0 + 7) / 2])
    assert found["kl"] == pytest.approx([0, math.log(2) - 0.5])
