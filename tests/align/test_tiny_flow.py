"""The embedded rectified flow: every kind of training runs on it, training and steering raise rewards that they do not optimise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

import align
from align.evaluation import paired_gain
from rewards import CrossEncoder
from samplers import ODE, DanceSDE, DFlow, FeynmanKac, Guided, ReNO

ROOT = Path(__file__).resolve().parents[2]
HELDOUT = ROOT / "assets" / "prompts" / "heldout.jsonl"
CONFIGS = {
    path.stem: path
    for path in sorted((ROOT / "configs" / "tiny").glob("*.yaml"))
    if yaml.safe_load(path.read_text()).get("model") == "tiny-flow"
}
STEPS = 8


@pytest.fixture(scope="module")
def policy():
    return align.load_policy("tiny-flow", device="cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_begins_as_it_should(name, plain, tmp_path, monkeypatch):
    """Ratios begin at 1, preferences at log 2, a contrast at the weights that sampled; and the update has a gradient."""
    monkeypatch.chdir(ROOT)
    small = {"updates": 1, "batch": 4, "micro_batch": 16, "eval_prompts": ["a red circle"], "eval_samples": 1}
    result = align.train(CONFIGS[name], out=str(tmp_path / "run"), tracker=None, device="cpu", **small)
    row = result.log[0]
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and not row["skipped"]
    laws = {"ratio_max_deviation": 0.0, "old_distance": 0.0, "accuracy": 0.5, "weight": 1.0}
    for column in laws.keys() & row.keys():
        assert row[column] == pytest.approx(laws[column], abs=1e-4)
    if "accuracy" in row:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alignprop-flow", "flow-grpo", "nft-flow"])
def test_training_raises_gold_by_more_than_three_standard_errors(name, tmp_path):
    """On all held-out prompts, the same seeds before and after."""
    judged = {"eval_prompts": [str(HELDOUT)], "eval_samples": 1, "eval_every": 0}
    result = align.train(CONFIGS[name], out=str(tmp_path / "run"), tracker=None, device="cpu", **judged)
    before, after = (result.evaluations[i][1].scores["gold"] for i in (0, -1))
    gain, error = paired_gain(before, after, 1)
    assert gain > 3 * error, f"{gain:+.3f} ± {error:.3f}"
    assert (result.folder / "pytorch_lora_weights.safetensors").is_file()


def heldout(count: int) -> list[str]:
    rows = [json.loads(line) for line in HELDOUT.read_text().splitlines()]
    prompts = [r["prompt"] for r in rows if r["task"] in ("position", "two_object", "counting")]
    return prompts[:: len(prompts) // count][:count]


@pytest.mark.slow
def test_steering_raises_the_gold_reward(policy):
    """The reward is optimised, gold is not: the steered choice beats the unsteered mean by more than 3 standard errors."""
    how = {"particles": 8, "steps": STEPS, "guidance": 1.0, "kernel": DanceSDE(0.7, [True] * (STEPS - 1) + [False])}
    result = align.steer(policy, heldout(24), FeynmanKac(CrossEncoder(), 0.2), **how)
    gains = []
    for group in range(24):
        plain = [s.scores["gold"] for s in result.arm("plain") if s.group == group]
        gains.append(next(s.scores["gold"] for s in result.best if s.group == group) - sum(plain) / len(plain))
    gain = torch.tensor(gains)
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kernel"),
    [
        (Guided(CrossEncoder(), 0.1, form="score", normalise="unit", through="x0"), None),
        (ReNO(CrossEncoder(), rounds=8), ODE()),
        (DFlow(CrossEncoder(), rounds=8), ODE()),
    ],
    ids=["guided", "reno", "d-flow"],
)
def test_gradients_raise_the_reward_of_every_sample(policy, how, kernel):
    """Without any choice among samples, from the seeds of the plain run."""
    run = {"particles": 1, "steps": 4, "guidance": 1.0, "kernel": kernel, "rewards": [how.reward]}
    result = align.steer(policy, heldout(20), how, **run)
    plain, steered = (torch.tensor([s.scores["CrossEncoder"] for s in result.arm(arm)]) for arm in ("plain", "steered"))
    gain = steered - plain
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
