"""Laws of moving rewards: only collections move them, resuming goes on bit for bit, and judging never sees them move."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from align.adaptation import Adaptation
from align.objectives import Backprop, PolicyGradient
from align.sources import Prompts, Rollouts
from align.trainer import Trainer
from align.world import World
from rewards import Reward
from samplers.families.gaussian import GaussianPolicy
from tests.align.runs import MEANS, PROMPTS, Far, Loose, Near, Scaled, config_of, moving, stop_at
from tests.align.test_resume import assert_same_run, final

pytestmark = pytest.mark.usefixtures("plain")


def trainer_of(kind: str, out, reward: Reward, **how) -> Trainer:
    objective, source = {
        "rollouts": (PolicyGradient(), Rollouts(PROMPTS, group=2, updates=2, epochs=2)),
        "prompts": (Backprop(k=2), Prompts(PROMPTS)),
    }[kind]
    policy = GaussianPolicy(MEANS, [0.6, 0.8], [0.5, 0.5])
    return Trainer(policy, objective.bind(reward), source.bind(reward), config_of(out, **how))


def states(out) -> dict:
    return final(out)["reward"]["now"]


@pytest.mark.parametrize("kind", ["rollouts", "prompts"])
def test_k_and_k_updates_are_two_k(tmp_path, kind):
    how = {"schedule": "constant", "eval_every": 2, "updates": 6}
    trainer_of(kind, tmp_path / "whole", moving(), **how).fit()
    trainer_of(kind, tmp_path / "parts", moving(), **{**how, "updates": 3}, save_every=3).fit()
    for updates in (4, 6):
        Trainer.resume(tmp_path / "parts", updates=updates).fit()
    one, other = (final(tmp_path / part) for part in ("whole", "parts"))
    assert one["reward"] == other["reward"] and one["reward"]["now"] != one["reward"]["begun"]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name])


@pytest.mark.parametrize("kind", ["rollouts", "prompts"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, kind):
    """Between the micro-batches of an update, which then measures its samples again."""
    assert trainer_of(kind, tmp_path / "whole", moving()).fit().stopped is None
    assert stop_at(trainer_of(kind, tmp_path / "run", moving()), 3, 2).fit().stopped == "interrupted"
    assert Trainer.resume(tmp_path / "run").fit().stopped is None
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_each_collection_moves_the_numbers_once(tmp_path):
    """Eight updates are two collections of 12 × 2 samples, each scored by what was known before it."""
    reward = moving()
    result = trainer_of("rollouts", tmp_path / "run", reward).fit()
    bound = reward.rewards[0]
    assert bound.rewards[0].count == 48
    multipliers = [row["multiplier_home"] for row in result.log]
    assert len(set(multipliers[:4])) == len(set(multipliers[4:])) == 1 and multipliers[0] != multipliers[4]
    assert multipliers[-1] == bound.multipliers[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["multiplier_home"] == multipliers[-1]
    assert {"mean", "std"} <= rows[-1].keys()


def test_evaluations_are_made_with_the_numbers_the_run_began_with(tmp_path):
    """Without a learning rate every evaluation is the same, though the numbers move."""
    reward = moving()
    result = trainer_of("rollouts", tmp_path / "run", reward, learning_rate=1e-30).fit()
    assert states(tmp_path / "run") != moving_states(moving())
    first = result.evaluations[0][1].scores
    for _, evaluation in result.evaluations[1:]:
        for name, scores in first.items():
            torch.testing.assert_close(evaluation.scores[name], scores, rtol=0, atol=0, equal_nan=True)


def moving_states(reward: Reward) -> dict:
    return Adaptation(reward, World(cpu=True)).state()["begun"]


def test_scoring_evaluating_and_failures_move_nothing():
    reward = moving()
    adaptation = Adaptation(reward, World(cpu=True))
    media = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    reward(media)
    with adaptation.as_begun():
        reward(media)
    with pytest.raises(ValueError, match="one prompt a sample"), adaptation.following():
        Loose([reward, reward])(media, ["too", "few"])
    with adaptation.following():
        pass
    assert adaptation.state()["now"] == moving_states(moving())
    with adaptation.following():
        reward(media)
    assert adaptation.state()["now"] != moving_states(moving())


def test_the_numbers_do_not_depend_on_how_a_collection_is_cut():
    media = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (12, 5, 1):
        reward = moving()
        adaptation = Adaptation(reward, World(cpu=True))
        with adaptation.following():
            for part in media.split(size):
                reward(part)
        found.append(adaptation.state()["now"])
    assert found[0] == found[1] == found[2]


def test_a_reward_without_moving_parts_costs_a_checkpoint_nothing():
    for reward in (None, Near(), Loose([Near(), Far()])):
        adaptation = Adaptation(reward, World(cpu=True))
        with adaptation.following(), adaptation.as_begun(), nullcontext():
            pass
        assert adaptation.state() == {} and adaptation.worth_watching() == {}
        adaptation.restore({})


def test_names_that_parts_share_are_numbered():
    reward = Loose([Scaled(Near(), "run"), Scaled(Far(), "run")])
    assert list(Adaptation(reward, World(cpu=True)).worth_watching()) == ["mean", "std", "mean-2", "std-2"]


class Compared(Near):
    """Ranks the samples of a call; remembers how many there were."""

    compares = True

    def measure(self, media, prompts):
        self.calls = [*getattr(self, "calls", []), [p.text for p in prompts]]
        return super().measure(media, prompts).argsort().argsort().float()


def test_what_compares_samples_sees_whole_groups_and_judges_no_run(tmp_path):
    reward = Compared()
    trainer = trainer_of("rollouts", tmp_path / "run", reward, updates=4, sample_rows=5, panel=[Near()])
    result = trainer.fit()
    assert list(trainer.evaluator.panel) == ["Near"] and result.stopped is None
    for texts in reward.calls:
        assert len(texts) <= 5 and all(texts[i] == texts[i + 1] for i in range(0, len(texts), 2))
    with pytest.raises(ValueError, match="cannot judge a run: take it out of panel"):
        trainer_of("rollouts", tmp_path / "panel", Near(), panel=[reward])
    with pytest.raises(ValueError, match="Backprop scores a few samples at a time"):
        trainer_of("prompts", tmp_path / "backprop", reward, panel=[Near()])
