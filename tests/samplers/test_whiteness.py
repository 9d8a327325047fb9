"""The regularisers of noise optimisation: least or zero at true noise, by the laws they are made of."""

import math

import pytest
import torch

from samplers.whiteness import autocorrelation, log_bounds, penalise, radius


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generators(rows):
    return [torch.Generator().manual_seed(row) for row in range(rows)]


def test_the_norm_is_the_density_of_a_chi_radius():
    """Its differences are those of −log p(|z|) for |z| ~ χ_d."""
    d, z = 12, noise(2, 1, 12)
    r = z.flatten(1).norm(dim=1)
    log_p = (d - 1) * r.log() - r.square() / 2
    torch.testing.assert_close(radius(z) - radius(z[:1]), log_p[0] - log_p)
    _, gradient = penalise("norm", z, generators(2))
    expected = (r - (d - 1) / r)[:, None] * z.flatten(1) / r[:, None]
    torch.testing.assert_close(gradient.flatten(1), expected)


def test_every_noise_has_a_norm_of_its_own():
    z = noise(3, 4, 5, 2)
    torch.testing.assert_close(radius(z), sum(radius(z[:, v : v + 1]) for v in range(4)))


@pytest.mark.parametrize("dimension", [4, 16, 64])
def test_the_bound_on_the_mean_is_left_as_often_as_chi_square_says(dimension):
    """m·|mean|² ~ χ²_k, and log p₁ < 0 where it exceeds 2k·log 2: a quarter of the time for k = 4."""
    trials = 2000
    first = log_bounds(noise(trials, 16 * dimension, seed=dimension), dimension)[0]
    left = torch.special.gammaincc(torch.tensor(dimension / 2.0), torch.tensor(dimension * math.log(2))).item()
    error = math.sqrt(left * (1 - left) / trials)
    assert abs((first < 0).double().mean().item() - left) < 4 * error


def test_the_second_moment_of_true_noise_is_within_its_bound():
    second = log_bounds(noise(500, 4096))[1]
    assert (second < 0).double().mean() < 0.02


@pytest.mark.parametrize(("scale", "shift", "left"), [(1.05, 0.0, 1), (0.95, 0.0, 1), (1.0, 0.05, 0)])
def test_stretched_and_shifted_noise_is_found_out(scale, shift, left):
    """On noise within both bounds there is no gradient at all; stretched, the moment tells; shifted, the mean."""
    fresh = noise(1, 1, 65536, seed=1)
    assert torch.equal(log_bounds(fresh.flatten(1)), torch.zeros(2, 1, dtype=torch.float64))
    leaf = fresh.clone().requires_grad_()
    log_bounds(leaf.flatten(1)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() == 0
    assert log_bounds((scale * fresh + shift).flatten(1))[left] < 0


@pytest.mark.parametrize(
    ("scale", "shift", "published"),
    [(1, 0, 0.0679176), (1.05, 0, 0.7236352), (1, 0.05, 2.6693439), (0.9, 0, 2.2105503)],
)
def test_concentration_agrees_with_the_authors_code(scale, shift, published):
    """Recorded from their function with the same 100 orders, but for the constant log 2 of each of the four bounds."""
    z = scale * torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(3)) + shift
    value, gradient = penalise("concentration", z[None], generators(1))
    assert value.item() == pytest.approx(published, abs=2e-6)
    assert gradient.shape == (1, 5, 4, 16, 16)


@pytest.mark.parametrize("kind", ["norm", "concentration", "whiteness"])
def test_penalties_have_their_own_gradients_and_do_not_mix_rows(kind, monkeypatch):
    monkeypatch.setattr("samplers.whiteness.ORDERS", 3)
    z = 1.2 * noise(2, 2, 3, 16, 8) + 0.3
    value, gradient = penalise(kind, z, generators(2))
    for row in range(2):
        alone = penalise(kind, z[row : row + 1], generators(2)[row : row + 1])
        torch.testing.assert_close(alone[0], value[row : row + 1])
        torch.testing.assert_close(alone[1], gradient[row : row + 1])
    direction = noise(2, 2, 3, 16, 8, seed=5)
    h = 1e-5
    there, back = (penalise(kind, z + s * h * direction, generators(2))[0] for s in (1, -1))
    torch.testing.assert_close((there - back) / (2 * h), (gradient * direction).flatten(1).sum(1), rtol=1e-5, atol=1e-7)


def test_no_regulariser_is_no_penalty():
    value, gradient = penalise("none", noise(2, 1, 4), generators(2))
    assert not value.any()
    assert not gradient.any()


def test_autocorrelation_is_the_mean_over_all_shifts_and_scales():
    z = noise(2, 1, 3, 16, 12)
    total = torch.zeros(2, dtype=torch.float64)
    for images in (z[:, 0], torch.nn.functional.avg_pool2d(z[:, 0], 2)):
        for axis in (2, 3):
            side = images.shape[axis]
            shifted = [(images * images.roll(s, axis)).mean((2, 3)).square() for s in range(1, side)]
            total += torch.stack(shifted).mean(0).sum(1)
    torch.testing.assert_close(autocorrelation(z), total)


def test_autocorrelation_tells_smooth_fields_from_white_ones():
    white = noise(1, 1, 1, 64, 64)
    smooth = torch.nn.functional.avg_pool2d(white[:, 0], 5, 1, 2)
    smooth = (smooth / smooth.std())[:, None]
    assert autocorrelation(smooth) > 20 * autocorrelation(white)
