"""What is said about pairs held out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from align.learning import report
from align.media import Media
from align.pairs import Side
from rewards import Prompt
from tests.align.learning.test_losses import ranked


def test_the_curve_averages_prompts_and_leaves_out_what_gold_could_not_judge():
    proxy, gold = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0]), torch.tensor([1.0, 0.0, 5.0, 7.0, math.nan])
    found = report.curve(proxy, gold, torch.tensor([0, 0, 1, 1, 1]))
    assert found["n"] == [1.0, 2.0]
    assert found["gold"] == pytest.approx([(0.5 + 6) / 2, (0 + 7) / 2])
    assert found["proxy"] == pytest.approx([(0.5 + 2.5) / 2, (1 + 3) / 2])
    assert found["kl"] == pytest.approx([0, math.log(2) - 0.5])
    assert report.curve(proxy, torch.full((5,), math.nan), torch.zeros(5))["n"] == []


def test_ties_count_half_or_not_at_all_and_the_scale_is_calibrated_away():
    data = ranked([0, 1], [1, 0], [0, 0])
    raw = torch.tensor([3.0, 0.0, 2.0, 0.0, 5.0, 1.0])  # right, wrong, tied
    pale = torch.tensor([0.2, 0.1, 0.9, 0.2, 0.4, 0.3])
    data = replace(data, samples=[Side(Prompt("a star"), Media(str(i))) for i in range(6)])
    found = report.judged(raw / 7, raw, data, pale, report.temperature_of(raw / 7, data))
    assert (found["accuracy"], found["accuracy_ties_half"]) == (0.5, 0.5)
    assert found["nll_calibrated"] <= found["nll"]
    scaled = report.judged(raw * 10, raw, data, pale, report.temperature_of(raw * 10, data))
    assert scaled["temperature"] == pytest.approx(70 * found["temperature"], rel=1e-6)
    assert scaled["nll_calibrated"] == pytest.approx(found["nll_calibrated"], abs=1e-6)
    assert math.isnan(found["slopes"]["prompt_word"])


def test_a_record_of_weight_three_is_three_records():
    places, scores, pale = [[0, 1], [1, 0], [0, 0], [0, 1]], [3.0, 0.0, 2.0, 0.0, 5.0, 1.0, 1.0, 0.5], [0.1] * 8
    told = []
    for times, weight in ((1, 3.0), (3, 1.0)):
        data = ranked(*places[:1] * times, *places[1:])
        weights = torch.tensor([weight] * times + [1.0] * 3)
        samples = [Side(Prompt("a star"), Media(str(i))) for i in range(len(data.rows))]
        data = replace(data, samples=samples, weight=weights)
        raw = torch.tensor(scores[:2] * times + scores[2:])
        grey = torch.tensor(pale[:2] * times + pale[2:])
        told.append(report.judged(raw, raw, data, grey, report.temperature_of(raw, data)))
    for name in ("accuracy", "accuracy_ties_half", "nll", "nll_calibrated", "temperature"):
        assert told[0][name] == pytest.approx(told[1][name]), name
    low, mid, high = torch.tensor([0.5, 2.0, 3.0]).sigmoid().tolist()  # wrong in the middle; the lower two share a bin
    assert told[0]["ece"] == pytest.approx((abs(low + mid - 1) + 3 * (1 - high)) / 5)


def test_curves_that_coincide_are_both_seen_and_n_is_whole(tmp_path, monkeypatch):
    """Of two samples a prompt, both curves are straight lines from corner to corner of their own scales."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *how, **more: (drawn.append(self), save(self, *how, **more)))
    points = {"n": [1.0, 2.0], "kl": [0.0, 0.2], "proxy": [0.0, 1.0], "gold": [0.5, 0.6]}
    told = {
        "reliability": [(0.6, 0.5, 3)],
        "accuracy": 0.5,
        "ece_calibrated": 0.1,
        "gold": "Shapes",
        "best_of_n": points,
    }
    report.draw(tmp_path / "report.png", told, [(1.0, 1.0), (0.5, 0.6)], 1)
    own, gold = drawn[0].axes[2:4]
    assert own.lines[0].get_linestyle() != gold.lines[0].get_linestyle()
    for axis in (drawn[0].axes[0], own):
        assert all(float(tick).is_integer() for tick in axis.get_xticks())
