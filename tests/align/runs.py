"""Small complete runs for the tests of the trainer: a Gaussian policy, rewards with closed forms, and which source suits which
objective.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import align.reports
from align.checkpoints import never_saved
from align.config import TrainConfig
from align.feedback import Captions, Likes, Preferences
from align.objectives import Backprop, HyperNoise, MaPO, Objective, Pairwise, PolicyGradient, Rebel, Unary, Weighted
from align.objectives.adjoint_matching import AdjointMatching
from align.objectives.direct_align import DirectAlign
from align.objectives.nft import DiffusionNFT
from align.objectives.seppo import SePPO
from align.sources import Prompts, Rollouts, Source
from align.trainer import Trainer
from align.windows import Window
from align.world import World
from rewards import Constrained, Reward, Standardised
from rewards import Weighted as Sum
from samplers import DDIM, Policy
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


class Worded(Near):
    """Wants x near the number of words of its prompt."""

    needs_prompt = True

    def measure(self, media, prompts):
        words = torch.tensor([float(len(p.text.split())) for p in prompts], dtype=media.dtype, device=media.device)
        return -(media.flatten(1) - self.b * words[:, None]).square().sum(1)


class Loose(Sum):
    """A weighted sum that takes any media, as the rewards of these runs do."""

    def check(self, media):
        pass


class Bound(Constrained):
    """The same of constraints."""

    check = Loose.check


class Scaled(Standardised):
    """The same of a standardised reward."""

    check = Loose.check


def moving() -> Reward:
    """A constraint whose multiplier follows the run around a scale that does, in a sum with a reward that fails at times."""
    how = {"squash": "sigmoid", "rate": 0.5}
    bound = Bound(Scaled(Near(2.0), "run"), {"home": Near(0.0)}, {"home": -1.0}, **how)  # pyright: ignore
    return Loose([bound, Near(0.5, fails=0.2)], [1.0, 0.1])


@dataclass(frozen=True)
class Case:
    """An objective with a source that suits it.

    Attributes:
        objective, source, reward: make them; a source of data gets the folder of `feedback`.
        config: fields of `TrainConfig`.
    """

    objective: Callable[[], Objective]
    source: Callable[[Path], Source]
    reward: Callable[[], Reward] = Near
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
    "PolicyGradient": Case(lambda: PolicyGradient(clip=0.2, kl_weight=0.1), rolled()),
    "PolicyGradient-running": Case(
        lambda: PolicyGradient(clip=0.2), rolled(advantage="running", least=2, timestep_fraction=0.5)
    ),
    "PolicyGradient-window": Case(
        lambda: PolicyGradient(clip=0.2), rolled(window=Window(1, every=1, order="random", last=1), shared_start=True)
    ),
    "PolicyGradient-moving": Case(lambda: PolicyGradient(clip=0.2), rolled(), moving),
    "PolicyGradient-clean": Case(lambda: PolicyGradient(clip=0.5), rolled(**CLEAN)),
    "Rebel": Case(lambda: Rebel(), rolled(evidence="paths", pairs="all")),
    "Pairwise-steps": Case(lambda: Pairwise(beta=1.0), rolled(**PAIRED)),
    "Pairwise-clean": Case(lambda: Pairwise(beta=10.0), rolled(evidence="clean", pairs="all", group=3)),
    "Pairwise-list": Case(lambda: Pairwise(beta=10.0), rolled(evidence="clean", pairs="list", group=4)),
    "Pairwise-data": Case(lambda: Pairwise(beta=10.0), given(Preferences, "preferences", draws=2)),
    "MaPO": Case(lambda: MaPO(), given(Preferences, "preferences")),
    "Unary": Case(lambda: Unary(beta=5.0), given(Likes, "likes")),
    "Weighted-softmax": Case(lambda: Weighted(), rolled(**CLEAN, advantage="none")),
    "Weighted-top": Case(lambda: Weighted("top"), rolled(evidence="clean", group=4)),
    "Weighted-none": Case(lambda: Weighted("none"), given(Captions, "captions")),
    "Backprop": Case(lambda: Backprop(k=2, kl_weight=0.1), lambda data: Prompts(PROMPTS)),
    "Backprop-random": Case(lambda: Backprop("random", low=1, high=3), lambda data: Prompts(PROMPTS)),
    "HyperNoise": Case(lambda: HyperNoise(0.1), lambda data: Prompts(PROMPTS)),
    "AdjointMatching": Case(lambda: AdjointMatching(scale=1.0), rolled(advantage="none")),
    "DiffusionNFT": Case(lambda: DiffusionNFT(every=4), rolled(**CLEAN, speaker="old")),
    "DirectAlign": Case(lambda: DirectAlign(scale=0.1), lambda data: Prompts(PROMPTS), Worded),
    "SePPO": Case(lambda: SePPO(beta=5.0, ring=3, every=1, steps=3, kernel=KERNEL), given(Captions, "captions")),
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


def config_of(out: Path, **how) -> TrainConfig:
    quick: dict[str, Any] = {"updates": 8, "batch": 12, "micro_batch": 5, "lora": None, "learning_rate": 0.01}
    quick |= {"steps": 3, "kernel": KERNEL, "schedule": "cosine", "ema": 0.9, "weight_decay": 0.0}
    quick |= {"eval_every": 4, "save_every": 4, "tracker": None}
    return TrainConfig(out=str(out), **{**quick, **how})


def trainer_of(
    name: str, out: Path, data: Path, reward: Reward | None = None, policy: Policy | None = None, **how
) -> Trainer:
    """A new run of one of `CASES`."""
    case = CASES[name]
    reward, policy = reward or case.reward(), policy or GaussianPolicy(MEANS, [0.6, 0.8], [0.5, 0.5])
    config = config_of(out, **{**case.config, **how})
    return Trainer(policy, case.objective().bind(reward), case.source(data).bind(reward), config)


def world_of(rank: int, size: int) -> World:
    """One of several processes, alone: it knows its share, and cannot gather."""
    world = object.__new__(World)
    world.rank, world.size, world.device = rank, size, torch.device("cpu")
    return world


def stop_at(trainer: Trainer, update: int, call: int = 1) -> Trainer:
    """Asks a run to stop in the `call`-th micro-batch after so many updates."""
    loss, calls = trainer.objective.loss, []

    def asking(policy, batch):
        calls.extend([0] * (trainer.update == update))
        if len(calls) == call:
            trainer.stop.request("interrupted")
        return loss(policy, batch)

    trainer.objective.loss = asking
    return trainer


def one(name: str, out: Path, data: Path, how: dict[str, Any], cut: int | None = None) -> Trainer:
    """Trains a run, or goes on with one that has saved.

    Args:
        cut: stop after so many updates.
    """
    align.reports.draw_curves = lambda *a, **k: None  # half of the time of such a short run
    if (out / "checkpoints").is_dir() and not never_saved(out):
        trainer = Trainer.resume(out, **{k: v for k, v in how.items() if k in ("updates", "save_every")})
    else:
        trainer = trainer_of(name, out, data, **how)
    if cut is not None:
        stop_at(trainer, cut - 1)
    trainer.fit()
    return trainer
