"""Small complete runs for the tests of the trainer: a Gaussian policy, rewards with closed forms, and which source suits which
objective.

As a program it trains one such run in a process of its own: python -m tests.align.runs OUT CASE [--resume] [--steps N] …
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from align import objectives as O
from align.config import TrainConfig
from align.feedback import Captions, Likes, Preferences
from align.objectives import Objective
from align.sources import Prompts, Rollouts, Source
from align.trainer import Trainer
from rewards import Reward
from samplers import DDIM
from samplers.families.gaussian import GaussianPolicy

PROMPTS = ["one", "two", "three", "four"]
MEANS = [[0.4, -0.3], [-0.5, 0.6]]
KERNEL = DDIM(eta=1.0)


class Near(Reward):
    """−|x − b|², smooth; NaN for the share `fails` of samples, chosen by their own values."""

    needs_prompt = False

    def __init__(self, b: float = 1.0, fails: float = 0.0) -> None:
        super().__init__()
        self.b, self.fails = b, fails

    def check(self, media):
        pass

    def measure(self, media, prompts):
        scores = -(media - self.b).square().flatten(1).sum(1)
        chance = (media.detach().flatten(1).sum(1) * 1e4).remainder(1.0)
        return torch.where(chance < self.fails, torch.nan, scores)


class Far(Near):
    """The opposite of `Near`."""

    def measure(self, media, prompts):
        return -super().measure(media, prompts)


class Blind(Near):
    """Cannot be differentiated."""

    differentiable = False


class Clip(Near):
    """Looks at video."""

    modality = "video"


@dataclass(frozen=True)
class Case:
    """An objective with a source that suits it.

    Attributes:
        objective, source: make them; a source of data gets the folder of `feedback`.
        config: fields of `TrainConfig`.
    """

    objective: Callable[[], Objective]
    source: Callable[[Path], Source]
    policy: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def rolled(**how) -> Callable[[Path], Source]:
    """Rollouts with two updates an epoch and two epochs, so that a run can be cut off within a collection."""
    return lambda data: Rollouts(PROMPTS, **{"group": 2, "updates": 2, "epochs": 2, **how})


def given(kind: type[Source], name: str, **how) -> Callable[[Path], Source]:
    return lambda data: kind(str(data / f"{name}.jsonl"), epochs=2, **how)


CLEAN = {"evidence": "clean", "draws": 2}
PAIRED = {"pairs": "best_worst", "shared_start": True}

# Which source suits which objective: every objective must be here, most with several sources.
CASES = {
    "PolicyGradient": Case(lambda: O.PolicyGradient(clip=0.2, kl_weight=0.1), rolled()),
    "PolicyGradient-running": Case(
        lambda: O.PolicyGradient(clip=0.2), rolled(advantage="running", least=2, timestep_fraction=0.5)
    ),
    "PolicyGradient-clean": Case(lambda: O.PolicyGradient(clip=0.5), rolled(**CLEAN)),
    "Pairwise-steps": Case(lambda: O.Pairwise(beta=1.0), rolled(**PAIRED)),
    "Pairwise-clean": Case(lambda: O.Pairwise(beta=10.0), rolled(evidence="clean", pairs="all", group=3)),
    "Pairwise-list": Case(lambda: O.Pairwise(beta=10.0), rolled(evidence="clean", pairs="list", group=4)),
    "Pairwise-data": Case(lambda: O.Pairwise(beta=10.0), given(Preferences, "preferences", draws=2)),
    "MaPO": Case(lambda: O.MaPO(), given(Preferences, "preferences")),
    "Unary": Case(lambda: O.Unary(beta=5.0), given(Likes, "likes")),
    "Weighted-softmax": Case(lambda: O.Weighted(), rolled(**CLEAN, advantage="none")),
    "Weighted-top": Case(lambda: O.Weighted("top"), rolled(evidence="clean", group=4)),
    "Weighted-none": Case(lambda: O.Weighted("none"), given(Captions, "captions")),
    "Backprop": Case(lambda: O.Backprop(k=2, kl_weight=0.1), lambda data: Prompts(PROMPTS)),
    "Backprop-random": Case(lambda: O.Backprop("random", low=1, high=3), lambda data: Prompts(PROMPTS)),
    "AdjointMatching": Case(lambda: O.AdjointMatching(scale=1.0), rolled(advantage="none")),
    "DiffusionNFT": Case(lambda: O.DiffusionNFT(every=4), rolled(**CLEAN, speaker="old")),
    "SePPO": Case(lambda: O.SePPO(beta=5.0, ring=3, every=1, steps=3, kernel=KERNEL), given(Captions, "captions")),
}


def feedback(folder: Path) -> Path:
    """Writes preferences, likes and captions on latents of the Gaussian policy."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    preferences, likes, captions = [], [], []
    for i in range(8):
        pair = []
        for k in range(2):
            name = f"{i}-{k}.safetensors"
            save_file({"x0": torch.randn(2, generator=generator, dtype=torch.float64)}, folder / name)
            pair.append(name)
        prompt = PROMPTS[i % len(PROMPTS)]
        preferences.append({"prompt": prompt, "latents": pair, "winner": i % 2})
        likes += [{"prompt": prompt, "latent": pair[k], "label": k} for k in range(2)]
        captions += [{"prompt": prompt, "latent": name} for name in pair]
    for name, rows in (("preferences", preferences), ("likes", likes), ("captions", captions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def policy_of(**how) -> GaussianPolicy:
    return GaussianPolicy(MEANS, [0.6, 0.8], [0.5, 0.5], **how)


def config_of(out: Path, **how) -> TrainConfig:
    quick = {"updates": 8, "batch": 12, "micro_batch": 5, "lora": None, "learning_rate": 0.01, "steps": 4, "kernel": KERNEL}
    quick |= {"eval_every": 4, "eval_samples": 2, "save_every": 4, "tracker": None, "schedule": "cosine", "ema": 0.9}
    return TrainConfig(out=str(out), **{**quick, **how})


def trainer_of(name: str, out: Path, data: Path, reward: Reward | None = None, **how) -> Trainer:
    """A new run of one of `CASES`."""
    case, reward = CASES[name], reward or Near()
    policy = policy_of(**case.policy)
    config = config_of(out, **{**case.config, **how})
    return Trainer(policy, case.objective().bind(reward), case.source(data).bind(reward), config)
