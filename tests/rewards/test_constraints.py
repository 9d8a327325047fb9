"""Constraints: the mixture, the steps of the multipliers, and the Karush-Kuhn-Tucker point of a Gaussian policy."""

import math

import pytest
import torch

from rewards import Brightness, Colour, Constrained, Reward
from tests.rewards.tiny import natural

IMAGES = natural(4, 12, 12)
SPREAD = 0.1


class Near(Reward):
    """Minus the squared distance of the mean pixel to a target."""

    needs_prompt = False

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = target

    def measure(self, media, prompts):
        return -(media.flatten(1).mean(1) - self.target).square()


def made(squash="none", **how) -> Constrained:
    how = {"rate": 0.05, "momentum": 0.0, **how}
    return Constrained(Near(0.9), {"home": Near(0.1)}, {"home": -0.05}, squash=squash, **how)


def test_the_mixtures() -> None:
    bright, red = Brightness(), Colour("red")
    r, c = bright(IMAGES), red(IMAGES)
    plain = Constrained(bright, [red, red], [0.5, 0.2], initial=2.0)
    torch.testing.assert_close(plain(IMAGES), r + 2 * (c - 0.5) + 2 * (c - 0.2))
    m = 1 / (1 + math.exp(-0.3))
    squashed = Constrained(bright, [red, red], [0.5, 0.2], squash="sigmoid", initial=0.3)
    torch.testing.assert_close(squashed(IMAGES), (2 - 2 * m) * r + m * (c - 0.5) + m * (c - 0.2))
    m = math.tanh(-0.3)
    equal = Constrained(bright, [red], [0.5], squash="tanh", initial=-0.3)
    torch.testing.assert_close(equal(IMAGES), (1 - m) * r + m * (c - 0.5))
    scores = equal.score(IMAGES)
    assert list(scores.parts) == ["objective", "Colour"]
    torch.testing.assert_close(scores.parts["Colour"], c)


@pytest.mark.parametrize("squash", ["none", "sigmoid", "tanh"])
def test_states_step_as_torch_would_step_them(squash) -> None:
    """Stochastic gradient descent with momentum on sum_i m_i (J_i - theta_i), as published."""
    reward = made(squash, rate=0.2, momentum=0.1, initial=0.4)
    state = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([state], lr=0.2, momentum=0.1)
    rule = {"none": lambda x: x, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[squash]
    for mean in (-0.6, -0.3, -0.04, -0.01):
        values = torch.tensor([[mean - 0.1], [mean + 0.1], [math.nan]], dtype=torch.float64)
        optimizer.zero_grad()
        (rule(state) * (mean + 0.05)).sum().backward()
        optimizer.step()
        reward.learn(values)
        assert reward.states == pytest.approx(state.tolist(), rel=1e-12)


def test_multipliers_stay_in_their_range() -> None:
    high, low = made(rate=1e6), made(rate=1e6, initial=1.0)
    high.learn(torch.tensor([[-1.0]]))
    low.learn(torch.tensor([[0.0]]))
    assert high.multipliers == [100.0] and low.multipliers == [0.0]


def test_a_collection_that_nobody_could_judge_moves_nothing() -> None:
    reward = made("sigmoid")
    reward.learn(torch.full((3, 1), math.nan))
    assert reward.state() == made("sigmoid").state()


@pytest.mark.parametrize("squash", ["none", "sigmoid"])
@pytest.mark.parametrize("momentum", [0.0, 0.1])
def test_dual_ascent_converges_to_the_kkt_point(squash, momentum) -> None:
    """A Gaussian policy N(mu, s²), here by two points that have its mean and variance, answers with its best mu.

    E[r_0] = -(mu - 0.9)² - s² and E[r_1] = -(mu - 0.1)² - s² ≥ -0.05, so with d = sqrt(0.05 - s²) the optimum is mu = 0.1 + d, and
    stationarity 2 (0.9 - mu) = lambda 2 (mu - 0.1) gives lambda = (0.8 - d) / d.
    """
    reward = made(squash, rate=2.0, momentum=momentum)
    mu = 0.5
    for _ in range(3000):
        media = torch.tensor([mu - SPREAD, mu + SPREAD], dtype=torch.float64)[:, None, None, None].expand(-1, 3, 2, 2)
        reward.seen = []
        reward(media)
        reward.learn(torch.cat(reward.seen).double())
        m = reward.multipliers[0]
        weight = 1.0 if squash == "none" else 1 - m
        mu = (weight * 0.9 + m * 0.1) / (weight + m)  # where the slope of the mixture is 0
    d = math.sqrt(0.05 - SPREAD**2)
    ratio = reward.multipliers[0] / (1.0 if squash == "none" else 1 - reward.multipliers[0])
    assert mu == pytest.approx(0.1 + d, abs=1e-4)
    assert ratio == pytest.approx((0.8 - d) / d, rel=1e-3)


def test_a_constraint_that_does_not_bind_costs_nothing() -> None:
    """Complementary slackness: the multiplier falls to 0."""
    reward = made(rate=1.0, initial=0.5)
    for _ in range(100):
        reward.learn(torch.tensor([[-0.01]]))
    assert reward.multipliers == [0.0]
    torch.testing.assert_close(reward(IMAGES), Near(0.9)(IMAGES))


def test_scoring_alone_moves_nothing() -> None:
    reward = made()
    before = reward.state()
    reward(IMAGES)
    assert reward.state() == before
    assert reward.worth_watching() == {"multiplier_home": 0.0}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"constraints": []}, "at least one constraint"),
        ({"constraints": {"objective": Brightness()}, "thresholds": [1.0]}, 'called "objective"'),
        ({"thresholds": [1.0, 2.0]}, "as many thresholds as rewards: got 2 for 1"),
        ({"thresholds": [math.nan]}, "thresholds must be finite"),
        ({"squash": "relu"}, "squash must be"),
        ({"momentum": 1.0}, "momentum 0 to below 1"),
        ({"initial": -1.0}, "initial must be 0 to most"),
    ],
)
def test_wrong_constraints_raise(how, message) -> None:
    with pytest.raises(ValueError, match=message):
        Constrained(**{"objective": Brightness(), "constraints": [Colour()], "thresholds": [0.5], **how})
