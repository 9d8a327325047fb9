"""The race: plain samples first, the draws of best of N one by one, the budget kept, and rivals only where they pay."""

import math

import pytest
import torch

from samplers import DDIM, ODE, Auto, BestOfN, Budget, FeynmanKac, Guided, Outer, Problem, SeededNoise, run
from samplers.auto import expected_rise
from samplers.families.gaussian import GaussianPolicy
from tests.conftest import Linear, Quadratic

STEPS, STRIDE = 4, 1 << 16


def problem(budget, prompts=("a", "b"), particles=1, batch=99, first=0, **options):
    policy = GaussianPolicy([[0.5, 0.0]], [0.8])
    seeds = [STRIDE * (first + p) + k for p in range(len(prompts)) for k in range(particles)]
    how = {"particles": particles, "prompts": list(prompts), "batch": batch, **options}
    budget = None if budget is None else Budget.parse(budget)
    levels, cond = policy.levels(STEPS, ()), policy.encode(prompts)
    return Problem(policy, DDIM(1.0), cond, levels, SeededNoise(seeds, (2,)), budget=budget, **how)


def arms(found):
    return set(found.history["arm"].flatten().long().tolist())


class Spoiled(Linear):
    """Judges every third sample of a call not at all."""

    def measure(self, media, prompts):
        scores = super().measure(media, prompts).clone()
        scores[2::3] = torch.nan
        return scores


class Fall(Outer):
    """Makes things worse."""

    rounds = 99

    def __init__(self, reward=None):
        self.reward = reward

    def iterations(self, problem, found):
        noise = problem.bank()
        for i in range(self.rounds):
            moved = [n - 0.5 * i for n in noise]
            found.offer(*problem.rate(moved, self._need_reward()), moved)
            yield


class Climb(Fall):
    """Moves every noise up: on a linear reward it always gains."""

    def iterations(self, problem, found):
        noise = problem.bank()
        for i in range(self.rounds):
            moved = [n + 0.5 * i for n in noise]
            found.offer(*problem.rate(moved, self._need_reward()), moved)
            yield


class Redrawn(Fall):
    """Goes where chance takes it."""

    def iterations(self, problem, found):
        noise = problem.bank()
        for i in range(self.rounds):
            found.offer(*problem.rate(noise, self._need_reward()), noise)
            noise = [n.roll(i + 1, 1) for n in noise]
            yield


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("mean", [-1.0, 0.0, 2.0])
def test_the_expected_rise_is_that_of_simulation(draws, mean):
    samples = mean + 1.5 * torch.randn(400_000, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rises = (samples.amax(1) - 1.0).clamp(min=0)
    assert expected_rise(mean, 1.5, 1.0, draws) == pytest.approx(
        float(rises.mean()), abs=5 * float(rises.std()) / 400_000**0.5
    )
    z = (mean - 1.0) / 1.5
    closed = 1.5 * (math.exp(-z * z / 2) / math.sqrt(2 * math.pi)) + (mean - 1.0) * float(
        torch.special.ndtr(torch.tensor(z))
    )
    assert expected_rise(mean, 1.5, 1.0) == pytest.approx(closed, abs=1e-4)


def test_without_spread_only_a_better_mean_rises():
    assert expected_rise(2.0, 0.0, 1.5) == 0.5
    assert expected_rise(1.0, 0.0, 1.5) == 0.0


@pytest.mark.parametrize("particles", [1, 3])
def test_a_small_budget_is_best_of_n(particles):
    """Too small for any rival: the same samples as best of N from the same seeds."""
    auto = run(problem(f"{2 * 12 * STEPS}nfe", particles=particles), Auto(Linear()))
    best = run(problem(None, particles=12), BestOfN(Linear()))
    assert arms(auto) <= {0, -1}
    torch.testing.assert_close(auto.rewards.amax(1), best.rewards.amax(1))
    assert auto.ledger.counts["network"] == 2 * 12 * STEPS
    torch.testing.assert_close(auto.history["reward"][0], best.rewards[:, :particles])  # the plain samples come first


@pytest.mark.parametrize("budget", ["1000nfe", "333nfe", "150rewards", "9rewards"])
def test_the_budget_is_kept_and_used(budget):
    found = run(problem(budget), Auto(Linear()))
    budget = Budget.parse(budget)
    spent = budget.spent(found.ledger, 0.0)
    assert spent <= budget.amount
    draw = STEPS if budget.unit == "nfe" else 1
    assert spent > budget.amount - 2 * draw  # less than one more sample a prompt


def test_seconds_end():
    found = run(problem("1s"), Auto(Linear()))
    assert found.ledger.counts["network"] > 20 * STEPS
    assert found.rewards.isfinite().all()


def test_the_race_is_a_function_of_the_seed_alone():
    """Prompts alone, in small batches, or together: the same samples."""
    how = {"reward": Quadratic(1.0, 0.7), "races": 6}
    whole = run(problem("1600nfe", ("a", "b")), Auto(**how))
    small = run(problem("1600nfe", ("a", "b"), batch=3), Auto(**how))
    assert max(arms(whole)) > 0
    torch.testing.assert_close(small.x0, whole.x0)
    torch.testing.assert_close(small.history["arm"], whole.history["arm"])
    for p, prompt in enumerate("ab"):
        alone = run(problem("800nfe", (prompt,), first=p), Auto(**how))
        torch.testing.assert_close(alone.x0[0], whole.x0[p])


def test_a_race_is_never_larger_than_its_part():
    """What earlier races left over, less than a sample, does not add up to a race for a rival that is too dear."""
    found = run(problem(f"{39 * STEPS}nfe", ("a",)), Auto(Linear(), rivals=[FeynmanKac(Linear(), 0.5)]))
    assert arms(found) <= {0, -1}
    assert found.ledger.counts["network"] == 39 * STEPS


def test_every_rival_that_can_run_is_tried_once_and_the_better_one_wins():
    races = run(problem("800nfe", ("a",)), Auto(Linear(), rivals=[Fall(Linear()), Climb(Linear())], races=10))
    order = races.history["arm"].flatten().long().tolist()
    assert order[1:6] == [0] * 5
    assert order[6:8] == [1, 2]
    assert set(order[8:11]) == {2}
    best = run(problem(None, ("a",), particles=200), BestOfN(Linear()))
    assert races.rewards.max() > best.rewards.max() + 1


def test_a_rival_that_falls_costs_one_race():
    found = run(problem("800nfe", ("a",)), Auto(Linear(), rivals=[Fall(Linear())], races=10))
    assert found.history["arm"].flatten().long().tolist()[1:].count(1) == 1
    best = run(problem(None, ("a",), particles=150), BestOfN(Linear()))
    assert found.rewards.max() >= best.rewards.max()


def test_rivals_need_not_judge_and_may_judge_otherwise():
    """A steering that keeps no rewards, and one that follows another reward, are judged by the race's own."""
    rivals = [Guided(Linear(), 0.5), FeynmanKac(Linear(-1.0), 0.5)]
    found = run(problem("800nfe", ("a",)), Auto(Linear(), rivals=rivals))
    assert {1, 2} <= arms(found)
    torch.testing.assert_close(found.x0.sum(1), found.rewards.flatten())


class Contrary(Linear):
    """Wants of "b" the opposite of what it wants of "a"."""

    needs_prompt = True

    def measure(self, media, prompts):
        return super().measure(media, prompts) * torch.tensor([1.0 if p.text == "a" else -1.0 for p in prompts])


def test_every_sample_is_judged_by_its_own_prompt():
    """In draws, populations and chains; small batches cut across prompts."""
    reward = Contrary()
    rivals = [FeynmanKac(reward, 0.5), Redrawn(reward)]
    found = run(problem("1600nfe", ("b", "a", "b"), particles=2, batch=5), Auto(reward, rivals=rivals))
    assert {1, 2} <= arms(found)
    sums = found.x0.sum(1).reshape(3, 2) * torch.tensor([[-1.0], [1.0], [-1.0]])
    torch.testing.assert_close(sums, found.rewards)
    assert (found.rewards.amax(1) > 1).all()


def test_what_was_not_judged_never_wins():
    found = run(problem("60rewards"), Auto(Spoiled(), races=4))
    assert found.failures["Spoiled"] > 0
    torch.testing.assert_close(found.x0.sum(1), found.rewards.flatten())


class Blunt(Linear):
    differentiable = False


@pytest.mark.parametrize(
    ("few_step", "kernel", "reward", "rivals"),
    [
        (False, DDIM(1.0), Linear(), ["FeynmanKac", "Compose", "ZeroOrder"]),
        (False, DDIM(1.0), Blunt(), ["FeynmanKac", "ZeroOrder"]),
        (False, ODE(), Linear(), ["ZeroOrder"]),
        (True, DDIM(1.0), Linear(), ["FeynmanKac", "ReNO"]),
        (True, ODE(), Blunt(), ["ZeroOrder"]),
    ],
)
def test_rivals_are_what_model_kernel_and_reward_allow(few_step, kernel, reward, rivals):
    one = problem("4000nfe", ("a",))
    one.policy.few_step, one.kernel, auto = few_step, kernel, Auto(reward)
    assert [type(rival).__name__ for rival in auto.field(auto._context(one))] == rivals
    found = run(one, auto)
    assert set(range(1, 1 + len(rivals))) <= arms(found)


def test_without_a_budget_it_draws_a_few():
    found = run(problem(None), Auto(Linear(), samples=5))
    assert found.ledger.counts["network"] == 2 * 5 * STEPS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"races": 0}, "races"),
        ({"share": 1.5}, "share"),
        ({"samples": 0}, "samples"),
        ({"rivals": [Auto()]}, "cannot race"),
    ],
)
def test_what_cannot_race_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Auto(Linear(), **options)


def test_the_reward_of_the_run_reaches_the_rivals():
    reward = Linear()
    bound = Auto(rivals=[FeynmanKac(), Guided(Linear(2.0))]).bind(reward)
    assert bound.reward is bound.rivals[0].reward is reward
    assert bound.rivals[1].reward is not reward
    assert len(bound.rewards()) == 2
