"""Rollover budget forcing against a plain transcription of it, its limits, and its accounts."""

import math

import pytest
import torch

from samplers import (
    CPS,
    DDIM,
    ODE,
    Budget,
    Clean,
    FlowSDE,
    Interrupted,
    Levels,
    Problem,
    RolloverBudget,
    SeededNoise,
    Unmask,
    run,
)
from samplers.families.gaussian import GaussianPolicy
from tests.conftest import Linear

STEPS = 5


class Bumpy(Linear):
    """Not monotone, so that estimates of early steps do not tell all."""

    def measure(self, media, prompts):
        return torch.sin(3 * super().measure(media, prompts))


def problem(kernel=None, seeds=range(6), particles=3, frame="vp", **options):
    policy = GaussianPolicy([[-1.0], [1.2]], [0.5, 0.3], [0.6, 0.4], frame=frame)
    groups = len(seeds) // particles
    options = {"particles": particles, "prompts": ["a"] * groups, "batch": 99, **options}
    noise = SeededNoise(seeds, (1,))
    return Problem(policy, kernel or DDIM(1.0), policy.encode(["a"] * groups), policy.levels(STEPS), noise, **options)


def transcribed(one, seed, candidates, initial):
    """One chain, one candidate at a time: (the rewards of its candidates in order, the best of the last step)."""
    policy, levels, cond = one.policy, one.levels, one.policy.encode(["a"])
    steps = STEPS - 1  # the last step of DDIM draws no noise
    quota = (candidates - initial) // steps

    def judged(stream, i, law=None):
        noise = SeededNoise([seed], (1,), stream=stream)(i).double()
        x = noise if law is None else law.sample(noise)
        return float(Bumpy()(policy.denoise(x, levels[i], cond).x0, [""])), x

    tries = [judged(j, 0) for j in range(initial)]
    bar, x = max(tries, key=lambda pair: pair[0])
    rewards, here, left = [value for value, _ in tries], [], 0
    for i in range(steps):
        left = candidates - len(rewards) if i == steps - 1 else quota + left
        law, here = one.kernel(policy.denoise(x, levels[i], cond), x, levels, i), []
        while left:
            here.append(judged(len(here), i + 1, law))
            left -= 1
            if i < steps - 1 and here[-1][0] > bar:
                break
        rewards += [value for value, _ in here]
        best, x = max(here, key=lambda pair: pair[0])
        bar = max(bar, best)
    return rewards, max(value for value, _ in here)


@pytest.mark.parametrize(("candidates", "initial"), [(43, 6), (15, 3), (19, 11)])
def test_it_is_the_transcription(candidates, initial):
    found = run(problem(), RolloverBudget(Bumpy(), candidates=candidates, initial=initial))
    plain, *history = found.history["reward"].flatten(1)
    lost = 0
    for row, seed in enumerate(range(6)):
        rewards, last = transcribed(problem(), seed, candidates, initial)
        assert [value[row].item() for value in history] == pytest.approx(rewards, abs=1e-6)
        assert found.rewards.flatten()[row].item() == pytest.approx(max(*rewards, plain[row].item()), abs=1e-6)
        lost += last < found.rewards.flatten()[row].item() - 1e-4
    assert lost, "the best of the last step, which the published code returns, is not always the best seen"
    assert found.ledger.counts["network"] == 6 * (STEPS + candidates)
    assert found.ledger.counts["reward"] == 6 * (1 + candidates)


@pytest.mark.parametrize("speculative", [2, 3, 50])
def test_speculation_changes_nothing_but_the_bill(speculative):
    one, many = problem(), problem()
    slow = run(one, RolloverBudget(Bumpy(), candidates=43, initial=6))
    fast = run(many, RolloverBudget(Bumpy(), candidates=43, initial=6, speculative=speculative))
    assert torch.equal(fast.x0, slow.x0)
    assert torch.equal(fast.rewards, slow.rewards)
    assert fast.ledger.counts["network"] > slow.ledger.counts["network"], "what came too late was paid for"
    assert len(fast.history["reward"]) < len(slow.history["reward"])


def test_a_quota_of_one_is_the_plain_sample():
    """A single candidate of every step is accepted as it is: the noise of the seed."""
    steering = RolloverBudget(Linear(), candidates=STEPS, initial=1)
    found = run(problem(), steering)
    assert torch.allclose(found.history["reward"][-1], found.history["reward"][0], atol=1e-6)


@pytest.mark.parametrize(("kernel", "walked"), [(CPS(0.7), 0), (FlowSDE(0.5), 1)])
def test_what_an_estimate_leaves_out_is_walked_at_the_end(kernel, walked):
    """FlowSDE adds noise in its last step, so that its samples are no estimates; on a quota of one they are the plain ones."""
    found = run(problem(kernel, frame="flow"), RolloverBudget(Linear(), candidates=STEPS, initial=1))
    assert torch.allclose(found.history["reward"][-1], found.history["reward"][0], atol=1e-6)
    assert found.ledger.counts["network"] == 6 * (STEPS + STEPS + walked)


def test_a_deterministic_kernel_leaves_the_choice_of_the_noise():
    one = problem(ODE())
    found = run(one, RolloverBudget(Linear(), candidates=9, initial=4))
    tries = torch.stack([SeededNoise(range(6), (1,), stream=j)(0).double() for j in range(9)])
    ended = torch.stack([problem(ODE()).sample([x]).x0 for x in tries])
    assert torch.allclose(found.history["reward"][-1].flatten(), ended.amax(0).flatten(), atol=1e-6)


def test_nothing_is_worse_than_the_plain_sample_and_more_is_better():
    few, many = (run(problem(), RolloverBudget(Linear(), candidates=n, initial=5)) for n in (10, 200))
    assert (few.rewards >= few.history["reward"][0]).all()
    assert many.rewards.mean() > few.rewards.mean() + 0.1


@pytest.mark.parametrize("speculative", [1, 4])
def test_neither_batches_nor_other_prompts_change_a_chain(speculative):
    steering = RolloverBudget(Bumpy(), candidates=23, initial=3, speculative=speculative)
    together = run(problem(), steering)
    for size in (1, 4):
        assert torch.equal(run(problem(batch=size), steering).x0, together.x0)
    for group in range(2):
        alone = run(problem(seeds=range(3 * group, 3 * group + 3)), steering)
        assert torch.equal(alone.x0, together.x0[3 * group : 3 * group + 3])


@pytest.mark.parametrize(("amount", "unit"), [(600, "nfe"), (300, "rewards")])
def test_a_budget_is_made_into_candidates(amount, unit):
    one = problem(budget=Budget(amount, unit))
    found = run(one, RolloverBudget(Linear()))
    assert 0.9 * amount < one.spent <= amount
    assert found.history["reward"][-1].isfinite().all(), "every chain came to its last step"


def test_a_budget_of_rewards_that_pays_for_little_more_than_the_plain_sample_is_kept():
    one = problem(budget=Budget(8, "rewards"))
    assert torch.equal(run(one, RolloverBudget(Linear())).x0, run(problem()).x0)
    assert one.spent == 6


def test_seconds_are_made_into_candidates_too():
    one = problem(budget=Budget(1e-4, "s"))
    assert len(run(one, RolloverBudget(Linear())).history["reward"]) <= 2


class Moody(Bumpy):
    """Cannot judge what is far to the left."""

    def measure(self, media, prompts):
        return super().measure(media, prompts).masked_fill(media.flatten() < -1.0, torch.nan)


def test_what_cannot_be_judged_is_counted_and_passed_over():
    found = run(problem(), RolloverBudget(Moody(), candidates=43, initial=6))
    assert found.failures["Moody"] > 0
    assert found.rewards.isfinite().all()
    assert (found.x0 >= -1.0).all()


def test_ctrl_c_keeps_the_best():
    def stop(iterate):
        if iterate.index == 20:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="after 21 of 45") as caught:
        run(problem(seen=stop), RolloverBudget(Linear(), candidates=43, initial=6))
    kept = caught.value.trajectory
    assert torch.equal(kept.rewards, kept.history["reward"].nan_to_num(-math.inf).amax(0))


def test_on_a_flow_the_ancestral_kernel_is_that_of_the_variance_preserving_path():
    """The published change of interpolant: a state c·x of a path of the same alpha/sigma has the same law, c being 1/norm."""
    flow = Levels(*(torch.tensor(v, dtype=torch.float64) for v in ([0.9, 0.4], [0.1, 0.6], [0.9, 0.4])))
    norm = (flow.alpha**2 + flow.sigma**2).sqrt()
    preserving = Levels(flow.t, flow.alpha / norm, flow.sigma / norm)
    x0, eps = torch.randn(2, 7, 1, dtype=torch.float64)
    laws = []
    for levels in (flow, preserving):
        x = levels.alpha[0] * x0 + levels.sigma[0] * eps
        laws.append(DDIM(1.0)(Clean(x0, eps), x, levels, 0))
    assert torch.allclose(laws[0].mean / norm[1], laws[1].mean)
    assert torch.allclose(laws[0].std / norm[1], laws[1].std)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"initial": 0}, "initial"),
        ({"speculative": 0}, "speculative"),
        ({"candidates": 25}, "candidates"),
    ],
)
def test_arguments_out_of_range(arguments, named):
    with pytest.raises(ValueError, match=named):
        RolloverBudget(Linear(), **arguments)


def test_what_cannot_work_is_refused_before_the_network_runs():
    with pytest.raises(ValueError, match="too few"):
        run(problem(), RolloverBudget(Linear(), candidates=8, initial=6))
    with pytest.raises(ValueError, match="without a gap"):
        run(problem(DDIM(1.0, noisy_steps=[True, False, True, True, False])), RolloverBudget(Linear()))
    with pytest.raises(ValueError, match="needs a reward"):
        run(problem(), RolloverBudget())
    tokens = problem(Unmask())
    tokens.noise = lambda i: torch.zeros(6, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="tokens have none"):
        run(tokens, RolloverBudget(Linear()))
