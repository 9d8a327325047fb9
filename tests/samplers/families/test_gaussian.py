"""Laws of the oracle itself: the denoiser against quadrature, predictions agree, the ODE transports noise to data."""

from __future__ import annotations

import math

import pytest
import torch

from samplers import DDIM, ODE, Levels, rollout
from samplers.families.gaussian import GaussianPolicy

WEIGHTS, MEANS, STDS = [0.3, 0.7], [[-2.0], [1.5]], [0.6, 0.4]
FRAMES = {
    "vp": Levels(
        *(f(torch.tensor([1.5, 1.2, 0.7, 0.3, 0.05], dtype=torch.float64)) for f in (lambda a: a, torch.cos, torch.sin))
    ),
    "flow": Levels(
        *(
            f(torch.tensor([0.97, 0.8, 0.5, 0.2, 0.05], dtype=torch.float64))
            for f in (lambda t: t, lambda t: 1 - t, lambda t: t)
        )
    ),
}
PAIRS = [("vp", "eps"), ("vp", "v"), ("vp", "x0"), ("flow", "eps"), ("flow", "flow"), ("flow", "x0")]


def mixture(frame: str, prediction: str = "x0") -> GaussianPolicy:
    return GaussianPolicy(MEANS, STDS, WEIGHTS, frame=frame, prediction=prediction)


def quadrature(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """E[x0 | x] by summing over a grid: no formula of Gaussians' posteriors is used."""
    grid = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    density = sum(
        w / s * torch.exp(-0.5 * ((grid - m) / s) ** 2) for w, (m,), s in zip(WEIGHTS, MEANS, STDS, strict=True)
    )
    log_posterior = density.log() - 0.5 * ((x - alpha * grid) / sigma) ** 2
    return (log_posterior.softmax(1) * grid).sum(1, keepdim=True)


@pytest.mark.parametrize(("frame", "prediction"), PAIRS)
@pytest.mark.parametrize("i", range(5))
def test_denoiser_is_the_posterior_mean(frame, prediction, i):
    at = FRAMES[frame][i]
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None]
    policy = mixture(frame, prediction)
    clean = policy.denoise(x, at, policy.encode([""] * 25))
    torch.testing.assert_close(clean.x0, quadrature(x, float(at.alpha), float(at.sigma)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(at.alpha * clean.x0 + at.sigma * clean.eps, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("frame", "prediction"), PAIRS)
def test_levels_a_row(frame, prediction):
    policy, steps = mixture(frame, prediction), torch.tensor([4, 0, 2, 2])
    x = torch.tensor([[0.1], [-1.0], [2.0], [0.4]], dtype=torch.float64)
    together = policy.denoise(x, FRAMES[frame][steps], policy.encode([""] * 4)).x0
    for row, i in enumerate(steps.tolist()):
        one = x[row : row + 1]
        alone = quadrature(one, float(FRAMES[frame].alpha[i]), float(FRAMES[frame].sigma[i]))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-9, atol=1e-9)


def test_dimensions_share_their_component():
    """In d dimensions the component is chosen once: the log-odds of a point are the sum over its coordinates."""
    policy = GaussianPolicy([[-2.0, 1.0, 0.0], [1.5, 0.0, 0.5]], STDS, WEIGHTS)
    at, x = FRAMES["vp"][2], torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = float(at.alpha), float(at.sigma)
    log_odds, estimates = [], []
    for w, m, s in zip(WEIGHTS, [[-2.0, 1.0, 0.0], [1.5, 0.0, 0.5]], STDS, strict=True):
        mean, var = alpha * torch.tensor(m, dtype=torch.float64), alpha**2 * s**2 + sigma**2
        marginal = torch.distributions.MultivariateNormal(mean, var * torch.eye(3, dtype=torch.float64))
        log_odds.append(math.log(w) + marginal.log_prob(x))
        precision = 1 / s**2 + alpha**2 / sigma**2
        estimates.append((torch.tensor(m, dtype=torch.float64) / s**2 + alpha * x / sigma**2) / precision)
    share = torch.stack(log_odds).softmax(0)[..., None]
    expected = (share * torch.stack(estimates)).sum(0)
    torch.testing.assert_close(policy.denoise(x, at, policy.encode([""] * 6)).x0, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("frame", "predictions"), [("vp", ("eps", "v", "x0")), ("flow", ("flow", "x0"))])
@pytest.mark.parametrize("kernel", [ODE(), DDIM(1.0)], ids=repr)
def test_every_prediction_samples_the_same(frame, predictions, kernel):
    noise = [torch.randn(8, 1, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(8)]
    runs = []
    for prediction in predictions:
        policy = mixture(frame, prediction)
        runs.append(rollout(policy, kernel, policy.encode([""] * 8), policy.levels(7), noise.__getitem__).x0)
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-9, atol=1e-9)


def quantile_error(frame: str, steps: int) -> float:
    """sup |F(x_u) − u| where x_u is where the ODE takes the u-quantile of N(0, 1): in 1-D the transport keeps order."""
    policy = mixture(frame)
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    start = torch.special.ndtri(u)[:, None]
    x0 = rollout(policy, ODE(), policy.encode([""] * 400), policy.levels(steps), lambda i: start).x0[:, 0]
    assert bool((x0.diff() > 0).all())
    cdf = sum(w * torch.special.ndtr((x0 - m) / s) for w, (m,), s in zip(WEIGHTS, MEANS, STDS, strict=True))
    return float((cdf - u).abs().max())


@pytest.mark.parametrize("frame", ["vp", "flow"])
def test_many_steps_transport_noise_to_the_data(frame):
    coarse, fine = quantile_error(frame, 100), quantile_error(frame, 800)
    assert fine < coarse < 0.05
    assert fine < 0.01  # mostly, in the vp frame, for starting at α = cos(0.49π) and not at 0


def test_velocity_of_the_other_frame_is_refused():
    for frame, prediction in (("vp", "flow"), ("flow", "v"), ("vp", "consistency"), ("ve", "eps")):
        with pytest.raises(ValueError, match=f"got '{prediction}' in frame '{frame}'"):
            mixture(frame, prediction)
