"""Laws of the guards: which evaluation is best, when a reward is over-optimised, and what a run does about it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file

from align.evaluation import Evaluation
from align.guard import best, hacked, held_out
from tests.align.runs import Far, Near, trainer_of

NOISE = torch.randn(16, generator=torch.Generator().manual_seed(0))


def evaluations(**rewards: Sequence[float]) -> list[tuple[int, Evaluation]]:
    """One every ten updates: 8 prompts of 2 samples whose scores lie about the given means, the same prompts hard every time."""
    rows = zip(*rewards.values(), strict=True)
    return [
        (10 * i, Evaluation({n: m + NOISE for n, m in zip(rewards, means, strict=True)}, 0.0, 0.0, torch.empty(0)))
        for i, means in enumerate(rows)
    ]


def test_who_judges():
    assert held_out("a", ["a", "b", "c", "gold"]) == "gold"
    assert held_out("a", ["a", "b", "c"]) == "b"
    assert held_out("a", ["a"]) == "a"
    assert held_out(None, ["b", "c"]) == "b"
    with pytest.raises(ValueError, match="no reward can judge this run"):
        held_out(None, [])


def test_the_best_is_the_highest_mean_and_of_equals_the_later():
    assert best(evaluations(gold=[0, 2, 1]), "gold") == 10
    assert best(evaluations(gold=[0, 2, 2, 1]), "gold") == 20
    assert best(evaluations(gold=[math.nan, -3, math.nan]), "gold") == 10
    assert best(evaluations(gold=[math.nan, math.nan]), "gold") == 10
    some = evaluations(gold=[0, 1])
    some[0][1].scores["gold"][3:] = math.nan  # those not judged are left out
    some[0][1].scores["gold"][:3] = 5.0
    assert best(some, "gold") == 0


@pytest.mark.parametrize(
    ("proxy", "gold", "times"),
    [
        ([0, 1, 2, 3], [0, 1, 0.5, 0.2], 2),
        ([0, 1, 2, 3], [0, 1, 2, 3], 0),
        ([0, 1, 2, 3], [3, 2, 1, 0], 3),
        ([0, 1, 2, 3], [0, 1, 0.5, 1.5], 0),  # it recovered
        ([0, 1, 0.5, 0.2], [0, 1, 0.5, 0.2], 0),  # both fall: no hacking, but bad training
        ([0, 1, 1, 2], [0, 1, 0.5, 0.2], 1),  # the proxy has to be above that of the best evaluation
        ([0], [0], 0),
    ],
)
def test_rising_reward_and_falling_judgement(proxy, gold, times):
    assert hacked(evaluations(proxy=proxy, gold=gold), "proxy", "gold", 2) == times


def test_only_what_is_sure_counts():
    """A fall within two standard errors over prompts is no fall; more prompts make a small one sure."""
    for prompts, times in ((4, 0), (4000, 1)):
        before = torch.zeros(prompts * 2)
        wobble = torch.randn(prompts, generator=torch.Generator().manual_seed(1))
        wobble = (wobble - wobble.mean()).repeat_interleave(2)
        scores = [{"proxy": before, "gold": before}, {"proxy": before + 1, "gold": before - 0.2 + wobble}]
        some = [(i, Evaluation(s, 0.0, 0.0, torch.empty(0))) for i, s in enumerate(scores)]
        assert hacked(some, "proxy", "gold", 2) == times


def test_without_another_judge_nothing_can_be_told():
    some = evaluations(proxy=[0, 1, 2], gold=[2, 1, 0])
    assert hacked(some, "proxy", "proxy", 2) == hacked(some, None, "gold", 2) == 0


def hacking(data, out, **how):
    """The held-out reward is the opposite of the optimised one."""
    quick = {"schedule": "constant", "eval_every": 1, "save_every": 1, "keep": 1, "ema": 0.0, "learning_rate": 0.1}
    return trainer_of("Backprop", out, data, Near(), panel=[Far()], **{**quick, **how})


@pytest.mark.parametrize("stop", [True, False])
def test_a_hacked_run_warns_stops_if_asked_and_keeps_the_best(data, tmp_path, caplog, plain, stop):
    trainer = hacking(data, tmp_path / "run", stop_on_hacking=stop, patience=3)
    first = trainer.policy.network.means.detach().clone()
    with caplog.at_level(logging.WARNING, "kilter"):
        result = trainer.fit()
    said = "Near rises while the held-out Far falls: the reward is being over-optimised"
    assert said in caplog.text
    assert (result.judge, result.best) == ("Far", 0)
    assert torch.equal(load_file(tmp_path / "run" / "trainable.safetensors")["means"], first)
    assert {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()} == {0, len(result.log)}
    assert (result.stopped, len(result.log)) == ((said, 3) if stop else (None, 8))


def test_the_best_weights_are_the_adapter_whatever_comes_later(data, tmp_path, plain):
    """The judge likes the run until its reward turns round."""
    how = {"eval_every": 1, "schedule": "constant", "ema": 0.0, "learning_rate": 0.05, "betas": (0.0, 0.9)}
    trainer = trainer_of("Backprop", tmp_path / "run", data, **how)
    seen, after = [], trainer._after_update

    def turning():
        seen.append(trainer.policy.network.means.detach().clone())
        after()
        if trainer.update == 4:
            trainer.objective.scale = -1.0

    trainer._after_update = turning
    result = trainer.fit()
    assert result.best == 4
    assert torch.equal(load_file(tmp_path / "run" / "trainable.safetensors")["means"], seen[4])
