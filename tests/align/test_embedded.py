"""Steering the model that ships with the repository, judged by its gold reward."""

import json
from pathlib import Path

import pytest
import torch

import align
from align.cli import main
from rewards import CrossEncoder
from samplers import BestOfN, FeynmanKac, Guided

HELDOUT = Path(__file__).resolve().parents[2] / "assets" / "prompts" / "heldout.jsonl"


@pytest.fixture(scope="module")
def policy():
    return align.load_policy()


def test_gold_is_reported_where_the_world_can_judge(policy):
    how = BestOfN(CrossEncoder())
    known = align.steer(policy, "a red circle left of a blue square", how, particles=2, steps=6)
    assert all(s.scores["gold"] in (0.0, 1.0) for s in known.samples)
    unknown = align.steer(policy, "a cat", how, particles=2, steps=2)
    assert all(set(s.scores) == {"CrossEncoder"} for s in unknown.samples)
    without = align.steer(policy, "a red circle", how, particles=1, steps=2, gold=None)
    assert all("gold" not in s.scores for s in without.samples)


def test_the_command_without_options_steers_the_embedded_model(tmp_path, capsys):
    code = main(
        [
            "steer",
            "a red circle left of a blue square",
            "--steps",
            "4",
            "--particles",
            "2",
            "--out",
            str(tmp_path / "run"),
            "--json",
        ]
    )
    printed = json.loads(capsys.readouterr().out)
    assert code == 0
    assert printed == json.loads((tmp_path / "run" / "result.json").read_text())
    assert printed["config"]["reward"]["class_path"].endswith("CrossEncoder")
    assert all(set(s["scores"]) == {"CrossEncoder", "gold"} for s in printed["samples"])


DUAL = """
reward: {class_path: CLIPScore, init_args: {model: assets/tiny-clip, variant: cosine}}
"""
CAUTIOUS = """
reward:
  class_path: Weighted
  init_args:
    rewards:
      liked:
        class_path: Ensemble
        init_args:
          rule: uncertainty
          penalty: 0.5
          rewards:
            - {class_path: CrossEncoder}
            - class_path: Standardised
              init_args: {reward: {class_path: CLIPScore, init_args: {model: assets/tiny-clip}}, mean: 10.0, std: 3.0}
      matched:
        class_path: LogSigmoid
        init_args: {reward: CrossEncoder, reference: 0.5}
    weights: {liked: 1.0, matched: 0.5}
"""


@pytest.mark.parametrize(("reward", "beta"), [(DUAL, 0.02), (CAUTIOUS, 0.5)], ids=["dual encoder", "composite"])
def test_any_reward_steers(reward, beta, tmp_path, monkeypatch):
    """What is steered by rises on the whole, from one file of settings."""
    monkeypatch.chdir(HELDOUT.parents[2])
    (tmp_path / "steer.yaml").write_text(f"{reward}steering: {{class_path: FeynmanKac, init_args: {{beta: {beta}}}}}\n")
    prompts = [
        "a red circle left of a blue square",
        "three green stars",
        "a black ring",
        "a blue star above a red ring",
    ]
    command = ["steer", *prompts, "--config", str(tmp_path / "steer.yaml"), "--steps", "10", "--particles", "6"]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["samples"]
    name = next(name for name in rows[0]["scores"] if name != "gold")
    gains = []
    for prompt in prompts:
        plain, steered = (
            [row["scores"][name] for row in rows if row["prompt"] == prompt and row["arm"] == arm]
            for arm in ("plain", "steered")
        )
        gains.append(sum(steered) / len(steered) - sum(plain) / len(plain))
    assert sum(gains) > 0


@pytest.mark.slow
def test_steering_raises_the_gold_reward_of_held_out_prompts(policy):
    """The reward is optimised, gold is not: the steered choice beats the unsteered mean by more than 3 standard errors."""
    rows = [json.loads(line) for line in HELDOUT.read_text().splitlines()]
    prompts = [r["prompt"] for r in rows if r["task"] in ("position", "two_object", "counting")][::4]
    result = align.steer(policy, prompts, FeynmanKac(CrossEncoder(), 0.2), particles=8)
    gains = []
    for group in range(len(prompts)):
        plain = [s.scores["gold"] for s in result.arm("plain") if s.group == group]
        gains.append(next(s.scores["gold"] for s in result.best if s.group == group) - sum(plain) / len(plain))
    gains = torch.tensor(gains)
    assert gains.mean() > 3 * gains.std() / len(gains) ** 0.5
    assert result.mean("CrossEncoder") > result.mean("CrossEncoder", "plain")


@pytest.mark.slow
def test_guidance_raises_the_reward_of_every_sample(policy):
    """Without any choice among samples: guided by the gradient at the clean estimate, from the seeds of the plain run."""
    rows = [json.loads(line) for line in HELDOUT.read_text().splitlines()]
    prompts, reward = [r["prompt"] for r in rows[:: len(rows) // 40]][:40], CrossEncoder()
    how = Guided(reward, 0.1, form="score", normalise="unit", through="x0")
    result = align.steer(policy, prompts, how, particles=1, rewards=[reward])
    plain, guided = (torch.tensor([s.scores[reward.name] for s in result.arm(arm)]) for arm in ("plain", "steered"))
    gains = guided - plain
    assert gains.mean() > 3 * gains.std() / len(gains) ** 0.5
