"""A price is what a run then spends."""

import pytest

from samplers import DDIM, SVDD, BestOfN, Compose, FeynmanKac, Guided, Problem, SeededNoise, Value, price, run
from samplers.families.gaussian import GaussianPolicy
from tests.conftest import Linear
from tests.samplers.test_outer import Redraw

STEPS = 5


class Half(Value):
    def forward(self, x, at, cond, prompts):
        return x.flatten(1).sum(1) / 2


class Expensive(Linear):
    """A reward that must not be asked."""

    def measure(self, media, prompts):
        pytest.fail("the reward ran")


STEERINGS = {
    "best": BestOfN,
    "fk": lambda r: FeynmanKac(r, every=2, start=0.2),
    "look ahead": lambda r: FeynmanKac(r, draws=2),
    "value": lambda r: FeynmanKac(r, value=Half()),
    "guided": lambda r: Compose(Guided(r, stop=0.5), FeynmanKac(r)),
    "guided cheaply": lambda r: Guided(r, through="x0"),
    "families": lambda r: SVDD(r, children=2),
    "outer": lambda r: Redraw(r, rounds=4),
}


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", STEERINGS)
def test_the_dry_run_counts_what_the_run_spends(name, prediction):
    make = STEERINGS[name]
    policy = GaussianPolicy([[0.5, 0.5]], [0.8], prediction=prediction)
    levels, kernel, cond = policy.levels(STEPS, ()), DDIM(1.0), policy.encode(["a", "b"])
    asked = price(make(Expensive()), policy, kernel, levels, cond, make(Linear()).least, (2,))
    problem = Problem(policy, kernel, cond, levels, SeededNoise(range(8), (2,)), particles=4, prompts=["a", "b"])
    spent = run(problem, make(Linear())).ledger.counts
    assert {on: 2 * n for on, n in asked.of(4, asked.rounds).items()} == spent
    assert sum(spent.values()) > 0


def test_tokens_have_no_stand_in():
    policy = GaussianPolicy([0.5], [0.8])
    policy.prediction = "logits"
    with pytest.raises(ValueError, match="makes tokens"):
        price(BestOfN(Linear()), policy, DDIM(1.0), policy.levels(2, ()), policy.encode(["a"]), 1, (1,))


def test_pricing_leaves_the_steering_as_it_was():
    reward, policy = Linear(), GaussianPolicy([0.5], [0.8])
    steering = Compose(Guided(reward), FeynmanKac(reward))
    price(steering, policy, DDIM(1.0), policy.levels(2, ()), policy.encode(["a"]), 1, (1,))
    assert steering.a.reward is steering.b.reward is reward
