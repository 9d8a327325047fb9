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
from samplers import ODE, DFlow, FeynmanKac, Guided

ROOT = Path(__file__).resolve().parents[2]
HELDOUT = ROOT / "assets" / "prompts" / "heldout.jsonl"
CONFIGS = {
    path.stem: path
    for path in sorted((ROOT / "configs" / "tiny").glob("*.yaml"))
    if yaml.safe_load(path.read_text()).get("model") == "tiny-flow"
}


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
def test_backpropagation_raises_gold_which_it_does_not_optimise(tmp_path):
    """On all held-out prompts, the same seeds before and after."""
    gain, error = gained("alignprop-flow", "gold", tmp_path / "run")
    assert gain > 3 * error, f"{gain:+.3f} ± {error:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"), [("flow-grpo", {"updates": 16, "batch": 32}), ("nft-flow", {"updates": 12})], ids=["grpo", "nft"]
)
def test_samples_alone_raise_the_reward_in_a_few_updates(name, how, tmp_path):
    """Of prompts never seen, for a reward that a few hundred samples can teach."""
    gain, error = gained(name, "Brightness", tmp_path / "run", reward="Brightness", **how)
    assert gain > 3 * error, f"{gain:+.3f} ± {error:.3f}"


def gained(name: str, judge: str, out: Path, **how) -> tuple[float, float]:
    """What a configuration gains on all held-out prompts, and its standard error."""
    how |= {"eval_prompts": [str(HELDOUT)], "eval_samples": 1, "eval_every": 0, "tracker": None, "device": "cpu"}
    result = align.train(CONFIGS[name], out=str(out), **how)
    assert (result.folder / "pytorch_lora_weights.safetensors").is_file()
    before, after = (result.evaluations[i][1].scores[judge] for i in (0, -1))
    return paired_gain(before, after, 1)


def heldout(count: int) -> list[str]:
    rows = [json.loads(line) for line in HELDOUT.read_text().splitlines()]
    prompts = [r["prompt"] for r in rows if r["task"] in ("position", "two_object", "counting")]
    return prompts[:: len(prompts) // count][:count]


@pytest.mark.slow
def test_particles_raise_gold_which_weighs_none_of_them(policy):
    """The mean of a steered population beats that of plain samples of its prompt by more than 3 standard errors."""
    prompts = [json.loads(line)["prompt"] for line in HELDOUT.read_text().splitlines()][::2]
    result = align.steer(policy, prompts, FeynmanKac(CrossEncoder(), 0.1), particles=4)
    plain, steered = (
        torch.tensor([s.scores["gold"] for s in result.arm(arm)]).reshape(len(prompts), 4).mean(1)
        for arm in ("plain", "steered")
    )
    gain = steered - plain
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kernel", "steps"),
    [
        (Guided(CrossEncoder(), 0.15, form="score", normalise="unit", through="x0"), None, 8),
        (DFlow(CrossEncoder(), rounds=6), ODE(), 4),
    ],
    ids=["guided", "d-flow"],
)
def test_gradients_raise_the_reward_of_every_sample(policy, how, kernel, steps):
    """Without any choice among samples, from the seeds of the plain run."""
    run = {"particles": 1, "steps": steps, "guidance": 1.0, "kernel": kernel, "rewards": [how.reward]}
    result = align.steer(policy, heldout(48), how, **run)
    plain, steered = (torch.tensor([s.scores["CrossEncoder"] for s in result.arm(arm)]) for arm in ("plain", "steered"))
    gain = steered - plain
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
