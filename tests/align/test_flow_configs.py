"""The published configurations for flow models run as they stand on tiny random models of the same classes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

import align
from rewards import Reward
from tests.samplers.families.tiny import flux, sd3

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"stabilityai/stable-diffusion-3.5-medium": "3.5", "black-forest-labs/FLUX.1-dev": "flux"}
CONFIGS = {
    path.stem: config
    for path in sorted((ROOT / "configs" / "train").glob("*.yaml"))
    if (config := yaml.safe_load(path.read_text())).get("model") in MODELS
}
for twin in ("flow-grpo-geneval", "flow-grpo-ocr"):  # of flow-grpo-pickscore, but for reward and prompts
    CONFIGS.pop(twin)


class Toned(Reward):
    """How bright an image is, and in what tone by the length of the prompt: a gradient, a prompt, no weights."""

    def measure(self, media, prompts):
        long = torch.tensor([len(p.text) % 3 for p in prompts], dtype=media.dtype, device=media.device)
        return media.mean((1, 2, 3)) + 0.1 * long * media[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}
    for name, build in (("3.5", sd3.VARIANTS["3.5"]), ("flux", flux.build)):
        made[name] = tmp_path_factory.mktemp(name.replace(".", "")) / "model"
        build().save_pretrained(made[name])
    return made


@pytest.mark.parametrize(
    "name", [n if n in ("flow-grpo-fast", "srpo-flux") else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_a_published_configuration_trains(name, folders, plain, tmp_path, monkeypatch):
    """One group, one update, few steps of an ODE; else as published: kernel, window, guidance, LoRA layers, evidence."""
    monkeypatch.chdir(ROOT)
    config = CONFIGS[name]
    given = config["source"].get("init_args", {})
    items = {"best_worst": 1}.get(given.get("pairs"), given.get("group", 2)) * given.get("draws", 1)
    changed = {"model": str(folders[MODELS[config["model"]]]), "reward": f"{__name__}.Toned", "dtype": "float32"}
    changed |= {"batch": max(1, items // given.get("updates", 1)), "micro_batch": 16, "size": [16, 16], "updates": 1}
    changed |= {"steps": 10 if config["kernel"] == {"class_path": "ODE"} else config["steps"]}
    changed |= {"eval_prompts": ["a cat"], "eval_samples": 1, "tracker": None, "device": "cpu"}
    result = align.train({**config, **changed}, out=str(tmp_path / "run"))
    row = result.log[0]
    assert result.stopped is None and math.isfinite(row["loss"]) and not row.get("skipped")
    assert row["grad_norm"] > 0
    if "ratio_max_deviation" in row:
        assert row["ratio_max_deviation"] < 1e-4
