"""Agreement with preferences: enumerated thresholds, closed forms, and recovered temperatures."""

from __future__ import annotations

import math

import pytest
import torch

from align.agreement import accuracy, calibrated, calibration_error, fit_temperature, log_loss, reliability, with_ties

D = torch.tensor([2.0, -1.0, 0.5, 0.0, 0.1, -0.1, 3.0], dtype=torch.float64)
Y = torch.tensor([1, -1, -1, 1, 0, 0, -1], dtype=torch.float64)


def random(count: int, temperature: float = 1.0, ties: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences, and labels that follow sigmoid(D / temperature)."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(count, generator=generator, dtype=torch.float64)
    chance, tied = (torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.where(chance < torch.sigmoid(d / temperature), 1.0, -1.0)
    return d, torch.where(tied < ties, 0.0, y)


def test_accuracies_by_hand() -> None:
    assert float(accuracy(D, Y)) == pytest.approx(2.5 / 5)
    assert float(accuracy(D, Y, tie=0.0)) == pytest.approx(2 / 5)
    assert float(with_ties(D, Y)) == pytest.approx(2 / 7)
    assert float(with_ties(D, Y, threshold=0.1)) == pytest.approx(4 / 7)
    best, threshold = calibrated(D, Y)
    assert (float(best), float(threshold)) == pytest.approx((4 / 7, 0.1))
    assert accuracy(D[4:6], Y[4:6]).isnan()


@pytest.mark.parametrize("rounded", [False, True])
def test_the_best_threshold_is_the_best_of_all(rounded: bool) -> None:
    for seed in range(20):
        d, y = random(50, 0.5, 0.4, seed)
        d = (3 * d).round() if rounded else d  # many are equal, some are 0
        best, threshold = calibrated(d, y)
        every = [float(with_ties(d, y, threshold=t)) for t in [0.0, *d.abs().tolist()]]
        assert float(best) == pytest.approx(max(every))
        assert float(with_ties(d, y, threshold=float(threshold))) == pytest.approx(max(every))


def test_weights_are_repetitions() -> None:
    d, y = random(30, 0.5, 0.3)
    counts = torch.randint(0, 4, (5, 30), generator=torch.Generator().manual_seed(1))
    for rule in (accuracy, with_ties, lambda *given: calibrated(*given)[0]):
        weighted = rule(d, y, counts)
        for row, value in zip(counts, weighted, strict=True):
            repeated = rule(d.repeat_interleave(row), y.repeat_interleave(row))
            assert float(value) == pytest.approx(float(repeated[0]))


def test_weights_are_repetitions_in_calibration() -> None:
    d, y = random(300, 0.7, 0.3)
    counts = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(1))
    more_d, more_y = (of.repeat_interleave(counts) for of in (d, y))
    assert fit_temperature(d, y, counts) == pytest.approx(fit_temperature(more_d, more_y))
    assert log_loss(d, y, 0.7, counts) == pytest.approx(log_loss(more_d, more_y, 0.7))
    for bins in (1, 10):  # a pair stays in one bin, its repetitions need not
        error = calibration_error(d, y, 0.7, counts, bins)
        assert error == pytest.approx(
            calibration_error(more_d, more_y, 0.7, bins=bins), abs=1e-9 if bins == 1 else 0.02
        )


def test_a_heavy_pair_has_a_bin_to_itself() -> None:
    d, y = torch.arange(1.0, 10.0, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    weights = torch.tensor([1.0, 1, 1, 1, 8, 1, 1, 1, 1], dtype=torch.float64)
    confidence, right, count = reliability(d, -y, 2.0, weights, bins=2)
    assert count.tolist() == [4, 5] and right.tolist() == [0, 0]
    assert float(confidence[1]) == pytest.approx(float((weights * torch.sigmoid(d / 2))[4:].sum()) / 12)
    assert reliability(d, y, 2.0, weights, bins=4)[2].tolist() == [4, 1, 4]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    d, y = random(40000, 1.0)
    assert fit_temperature(temperature * d, y) == pytest.approx(temperature, rel=0.04)


def test_the_temperature_of_many_pairs_is_where_the_loss_is_least() -> None:
    d, y = random(300, 0.7, 0.2)
    best = fit_temperature(d, y, torch.full((300,), 1e6))
    least = log_loss(d, y, best)
    assert all(log_loss(d, y, best * f) > least for f in (0.5, 0.98, 1.02, 2.0))
    assert least < math.log(2) == pytest.approx(log_loss(d, y, math.inf))
    assert fit_temperature(d, y) == pytest.approx(best, rel=0.05)


def test_ends_of_the_temperature() -> None:
    d, _ = random(50)
    assert fit_temperature(d, -d.sign()) == math.inf
    assert fit_temperature(0 * d, d.sign()) == math.inf
    assert fit_temperature(d, 0 * d) == math.inf


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_pairs_that_are_all_right_are_as_sure_as_their_number_allows(count: int) -> None:
    """Platt's target of n pairs is (n + 1) / (n + 2), and so is the confidence where all differences are equal."""
    d = torch.full((count,), 3.0, dtype=torch.float64)
    best = fit_temperature(d, d.sign())
    assert torch.sigmoid(d[0] / best) == pytest.approx((count + 1) / (count + 2))
    assert log_loss(-d, d.sign(), best) == pytest.approx(math.log(count + 2))  # a wrong pair, with any scale
    assert fit_temperature(1e-12 * d, d.sign()) == pytest.approx(1e-12 * best)


def test_a_pair_that_is_all_but_even_does_not_drive_the_temperature_to_nothing() -> None:
    d = torch.tensor([1.0] * 20 + [-1e-9], dtype=torch.float64)
    assert fit_temperature(d, torch.ones(21, dtype=torch.float64)) == pytest.approx(1 / math.log(22), rel=1e-6)


def test_a_calibrated_reward_has_no_calibration_error_and_a_sure_one_has() -> None:
    d, y = random(40000)
    assert calibration_error(d, y, 1.0) < 0.01
    right = float(accuracy(d, y))
    assert calibration_error(d, y, 1e-6) == pytest.approx(1 - right, abs=0.02)  # always sure
    assert calibration_error(d, y, math.inf) == pytest.approx(right - 0.5, abs=1e-9)  # never sure
    confidence, right, count = reliability(d, y, 1.0)
    assert count.tolist() == [4000] * 10 and (confidence.diff() > 0).all()
    torch.testing.assert_close(confidence, right, atol=0.03, rtol=0)


def test_calibrated_ties_are_those_of_the_released_code_where_no_differences_are_equal() -> None:
    """Numbers of `calc_accuracy.py` in KwaiVGI/VideoAlign, commit 3e5ebc6, on these values."""
    i = torch.arange(1, 13, dtype=torch.float64)
    d = torch.sin(3 * i) * (1 + i / 6)
    y = torch.tensor([0, -1, 1, 0, 1, -1, 1, -1, 0, -1, 1, -1], dtype=torch.float64)
    best, threshold = calibrated(d, y)
    assert (float(best), float(threshold)) == pytest.approx((0.8333333333333334, 0.16464000940317844))


def test_equal_differences_pass_the_threshold_together() -> None:
    """The released code says 0.75 of these four pairs and 0.5 of the same in another order; no threshold reaches 0.75."""
    d = torch.tensor([1.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    for y in ([0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]):
        assert float(calibrated(d, torch.tensor(y, dtype=torch.float64))[0]) == 0.5
