"""The driver of methods around the loop: it begins at the plain sample, never loses the best, and stops when told."""

import pytest
import torch

import align
from samplers import (
    DDIM,
    ODE,
    BestOfN,
    Budget,
    Compose,
    Found,
    Interrupted,
    Outer,
    Problem,
    RewardFailed,
    SeededNoise,
    always,
    rollout,
    run,
)
from samplers.families.gaussian import GaussianPolicy
from tests.conftest import Linear

STEPS = 4


class Redraw(Outer):
    """Draws fresh noise every iterate: the simplest outer method."""

    def __init__(self, reward=None, rounds=3):
        self.reward, self.rounds = reward, rounds

    def iterations(self, problem, found):
        for i in range(self.rounds):
            fresh = SeededNoise(problem.noise.seeds, problem.noise.shape, stream=i)
            noise = problem.bank() if i == 0 else [fresh(j) for j in range(problem.levels.steps + 1)]
            found.offer(*problem.rate(noise, self._need_reward()), noise)
            yield


class Last(Redraw):
    keeps = "last"


def problem(kernel=None, **options):
    policy = GaussianPolicy([0.5], [0.8])
    options = {"particles": 2, "prompts": ["a", "b"], **options}
    kernel = kernel or DDIM(1.0)
    noise = SeededNoise(range(4), (1,))
    return Problem(policy, kernel, policy.encode(["a", "b"]), policy.levels(STEPS, ()), noise, **options)


def test_the_first_iterate_is_the_plain_sample():
    plain = run(problem())
    one = run(problem(), Redraw(Linear(), rounds=1))
    assert torch.equal(one.x0, plain.x0)
    assert one.ledger.counts["network"] == plain.ledger.counts["network"] == 4 * STEPS


def test_every_chain_keeps_its_best_and_the_noise_that_made_it():
    found = run(problem(), Redraw(Linear(), rounds=6))
    rewards, best = found.history["reward"], found.history["best"]
    assert rewards.shape == (6, 2, 2)
    assert torch.equal(best, rewards.cummax(0).values)
    assert torch.equal(found.rewards, best[-1])
    again = problem().sample(list(found.noise))
    torch.testing.assert_close(again.x0, found.x0)
    torch.testing.assert_close(found.rewards.flatten(), found.x0.flatten().double())


def test_a_sampler_returns_its_last_state():
    found = run(problem(), Last(Linear(), rounds=6))
    assert torch.equal(found.rewards, found.history["reward"][-1])
    torch.testing.assert_close(problem().sample(list(found.noise)).x0, found.x0)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_micro_batches_change_nothing(batch):
    whole, parts = (run(problem(batch=size), Redraw(Linear())) for size in (99, batch))
    torch.testing.assert_close(parts.x0, whole.x0)


@pytest.mark.parametrize(
    ("budget", "iterates"), [(Budget(3 * 16, "nfe"), 3), (Budget(3 * 16 - 1, "nfe"), 2), (Budget(5, "rewards"), 1)]
)
def test_a_budget_is_kept(budget, iterates):
    found = run(problem(budget=budget), Redraw(Linear(), rounds=9))
    assert len(found.history["reward"]) == iterates
    assert found.stopped_at is None


class Doubling(Redraw):
    """Costs twice as much every iterate, and says so."""

    def iterations(self, problem, found):
        for i in range(self.rounds):
            for _ in range(2**i):
                rated = problem.rate(problem.bank(), self._need_reward())
            found.offer(*rated)
            yield 2


def test_a_growing_method_keeps_its_budget():
    found = run(problem(budget=Budget(7 * 16 - 1, "nfe")), Doubling(Linear(), rounds=9))
    assert found.ledger.evaluations == 3 * 16


def test_the_ledger_counts_differentiated_evaluations():
    one = problem()
    one.sample([n.requires_grad_() for n in one.bank()], grad=always)
    assert (one.ledger.counts["network"], one.ledger.counts["gradient"]) == (4 * STEPS, 4 * STEPS)
    assert one.ledger.evaluations == 3 * 4 * STEPS


def test_ctrl_c_keeps_the_best():
    def stop(iterate):
        assert iterate.total == 5
        assert torch.equal(iterate.best, iterate.found.reward.reshape(2, 2))
        if iterate.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="after 3 of 5") as caught:
        run(problem(seen=stop), Redraw(Linear(), rounds=5))
    assert caught.value.trajectory.stopped_at == 3
    assert torch.equal(caught.value.trajectory.rewards, run(problem(), Redraw(Linear(), rounds=3)).rewards)


def test_ctrl_c_within_a_rollout_keeps_the_best_too():
    calls = iter(range(99))

    def stop(ctx):
        if next(calls) == 2 * (STEPS + 1) + 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="after 2 of 5") as caught:
        run(problem(watch=stop), Redraw(Linear(), rounds=5))
    assert caught.value.trajectory.x0.shape == (4, 1)


class Moody(Linear):
    """Judges nothing at the calls named, else all but the first row."""

    def __init__(self, silent=()):
        super().__init__()
        self.silent, self.calls = silent, 0

    def measure(self, media, prompts):
        scores = super().measure(media, prompts).clone()
        scores[slice(0, None if self.calls in self.silent else 1)] = torch.nan
        self.calls += 1
        return scores


def test_what_was_not_judged_is_counted_and_never_best():
    found = run(problem(), Redraw(Moody(), rounds=3))
    assert found.failures == {"Moody": 3}
    assert found.rewards[0, 0] == -torch.inf
    assert found.history["reward"][:, 0, 0].isnan().all()
    assert found.rewards.flatten()[1:].isfinite().all()


def test_a_reward_that_judges_nothing_stops_the_run():
    with pytest.raises(Interrupted, match="no sample") as caught:
        run(problem(), Redraw(Moody(silent=[0]), rounds=3))
    assert isinstance(caught.value.__cause__, RewardFailed)


@pytest.mark.parametrize("steering", [Redraw, BestOfN])
def test_a_reward_that_needs_prompts_says_so_before_the_network_runs(steering):
    class Wordy(Linear):
        needs_prompt = True

    one = problem(prompts=(), watch=lambda ctx: pytest.fail("the network has run"))
    with pytest.raises(ValueError, match="Wordy needs one prompt a sample"):
        run(one, steering(Wordy()))


class Late(Linear):
    """Cannot judge the rows of the first prompt at the calls named."""

    def __init__(self, silent):
        super().__init__()
        self.silent, self.calls = silent, 0

    def measure(self, media, prompts):
        scores = super().measure(media, prompts).clone()
        scores[: 2 * (self.calls in self.silent)] = torch.nan
        self.calls += 1
        return scores


def test_a_prompt_that_is_judged_late_stops_no_other():
    found = run(problem(), Redraw(Late([0, 1]), rounds=4))
    assert len(found.history["reward"]) == 4
    assert found.rewards.isfinite().all()
    assert found.failures == {"Late": 4}


def test_a_prompt_that_is_never_judged_is_told_in_the_end():
    with pytest.raises(Interrupted, match=r"after 3 of 3 iterates.*no sample of some prompt") as caught:
        run(problem(), Redraw(Late(range(9)), rounds=3))
    rewards = caught.value.trajectory.rewards
    assert (rewards[0] == -torch.inf).all()
    assert torch.equal(rewards[1], run(problem(), Redraw(Linear(), rounds=3)).rewards[1])


@pytest.mark.parametrize("at", range(4))
def test_ctrl_c_while_the_best_is_chosen_keeps_what_belongs_together(at, monkeypatch):
    """The interrupt falls between parts of the second iterate's samples: reward, state and noise stay of one kind."""
    from samplers import outer

    chosen, calls = outer.where_rows, iter(range(99))

    def interrupted(*parts):
        if next(calls) == at:
            raise KeyboardInterrupt
        return chosen(*parts)

    monkeypatch.setattr(outer, "where_rows", interrupted)
    with pytest.raises(Interrupted) as caught:
        run(problem(), Redraw(Linear(), rounds=3))
    kept = caught.value.trajectory
    torch.testing.assert_close(kept.rewards.flatten(), kept.x0.flatten().double())
    torch.testing.assert_close(problem().sample(list(kept.noise)).x0, kept.x0)


class Broken(Linear):
    """Fails at a call, as a server that is gone or a device out of memory."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def measure(self, media, prompts):
        self.calls += 1
        if self.calls > self.at:
            raise ConnectionError("gone")
        return super().measure(media, prompts)


def test_whatever_goes_wrong_later_keeps_the_best():
    with pytest.raises(Interrupted, match=r"after 2 of 5 iterates: gone") as caught:
        run(problem(), Redraw(Broken(2), rounds=5))
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert torch.equal(caught.value.trajectory.rewards, run(problem(), Redraw(Linear(), rounds=2)).rewards)
    with pytest.raises(ConnectionError):
        run(problem(), Redraw(Broken(0), rounds=5))


def test_outer_methods_do_not_run_within_a_rollout():
    one = problem()
    with pytest.raises(ValueError, match="rollouts of its own"):
        rollout(one.policy, one.kernel, one.cond, one.levels, one.noise, steering=Redraw(Linear()))
    with pytest.raises(ValueError, match="rollouts of its own"):
        Compose(BestOfN(), Redraw())


def test_a_deterministic_kernel_needs_only_the_initial_noise():
    assert len(problem(ODE()).bank()) == 1
    assert len(problem().bank()) == STEPS + 1
    with pytest.raises(ValueError, match="noise at every step"):
        problem().sample(problem(ODE()).bank())


def test_part_of_a_run_is_the_run():
    one = problem(DDIM(1.0, noisy_steps=[True, False, True, False]))
    noise, states = one.bank(), []
    whole = one.sample(noise, watch=lambda ctx: states.append(ctx.x.clone()))
    rest = one.sample([states[2], *noise[3:]], start=2)
    torch.testing.assert_close(rest.x0, whole.x0)


@pytest.mark.parametrize(("rows", "particles"), [(5, 1), (3, 2)])
def test_rows_must_fit(rows, particles):
    policy, noise = GaussianPolicy([0.5], [0.8]), SeededNoise(range(rows), (1,))
    with pytest.raises(ValueError, match=r"rows|one row"):
        Problem(policy, DDIM(1.0), policy.encode(["a", "b"]), policy.levels(2, ()), noise, particles=particles)


def test_steer_runs_outer_methods_from_the_same_seeds():
    seen = []
    policy = GaussianPolicy([0.5], [0.8])
    result = align.steer(
        policy, ["a"], Redraw(Linear(), rounds=3), particles=2, steps=STEPS, gold=None, seen=seen.append
    )
    assert [i.index for i in seen] == [0, 1, 2]
    (name,) = result.samples[0].scores
    for plain, steered in zip(result.arm("plain"), result.arm("steered"), strict=True):
        assert steered.scores[name] >= plain.scores[name]
    assert (
        result.ledger["arms"]["steered"]["network_evaluations"]
        == 3 * result.ledger["arms"]["plain"]["network_evaluations"]
    )
    assert isinstance(seen[-1].found, Found)
