"""Evaluation: what a policy does on prompts it is not trained on, by rewards it is not trained on.

Fixed prompts and seeds, so that differences over a run are paired. Three guards against over-optimisation are measured each
time: a held-out panel (the exact gold reward where the model's world has one), the divergence from the reference, and the
diversity of the samples of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewards import Prompt, Reward
from rewards.preprocess import sharing
from samplers import Policy
from samplers.noise import mix

from .batches import Batch, Paths
from .evidence import law
from .prompts import read_prompts, world_prompts
from .sampling import Sampling
from .world import World

__all__ = ["Evaluation", "Evaluator", "judged_prompts", "paired_gain"]

MOST = 32  # prompts, where none are given to evaluate on


@dataclass
class Evaluation:
    """The result of one evaluation.

    Attributes:
        scores: (N,) of each reward, by name, NaN where not judged; prompt by prompt, sample by sample.
        kl: nats a sample between the paths of the policy and the reference; NaN where the kernel has no density
            or the paths differ in their start.
        diversity: root mean square pixel distance between samples of one prompt, averaged over prompts; NaN with one sample.
        media: (N, …) on the CPU.
    """

    scores: dict[str, Tensor]
    kl: float
    diversity: float
    media: Tensor = field(repr=False)

    def means(self) -> dict[str, float]:
        """Everything as one number each."""
        return {
            **{name: float(s.nanmean()) for name, s in self.scores.items()},
            "kl": self.kl,
            "diversity": self.diversity,
        }


class Evaluator:
    """Samples fixed prompts with fixed seeds and scores them.

    Args:
        prompts: what to sample.
        samples: a prompt.
        panel: rewards by name.
        sampling: how the run samples.
        seed: of the samples.
    """

    def __init__(
        self, prompts: Sequence[Prompt], samples: int, panel: Mapping[str, Reward], sampling: Sampling, seed: int
    ) -> None:
        self.prompts, self.samples, self.panel = list(prompts), samples, dict(panel)
        self.sampling, self.seed = sampling, seed

    def __call__(
        self, policy: Policy, world: World, who: str = "policy", watch: Callable[[Any], None] | None = None
    ) -> Evaluation:
        """Evaluates the weights `who` names. The prompts are shared out among processes and the results gathered."""
        rows = [(p, s) for p in range(len(self.prompts)) for s in range(self.samples)]
        padded = rows + rows[:1] * (-len(rows) % world.size)  # equal shares; the surplus is cut off again
        mine = padded[world.share(len(padded))]
        columns: dict[str, list[Tensor]] = {name: [] for name in (*self.panel, "kl")}
        media: list[Tensor] = []
        for first in range(0, len(mine), self.sampling.rows):
            part = mine[first : first + self.sampling.rows]
            prompts = [self.prompts[p] for p, _ in part]
            seeds = [mix(self.seed, p, s) for p, s in part]
            with policy.acting_as(who):
                path = self.sampling.roll(policy, prompts, seeds, record="path", watch=watch)
            with torch.no_grad(), sharing():
                pixels = policy.decode(path.x0)
                for name, reward in self.panel.items():
                    columns[name].append(reward(pixels, prompts).cpu())
            assert path.latents is not None
            columns["kl"].append(
                self._divergence(
                    policy,
                    Batch(Paths(path.latents, path.cond, self.sampling.kernel, self.sampling.levels)),
                    [p * self.samples + s for p, s in part],
                    who,
                )
            )
            media.append(pixels.cpu())
        whole = {name: world.gather(torch.cat(parts))[: len(rows)] for name, parts in columns.items()}
        pixels = world.gather(torch.cat(media))[: len(rows)]
        kl = float(whole.pop("kl").mean())
        return Evaluation(whole, kl, diversity(pixels, self.samples), pixels)

    def _divergence(self, policy: Policy, batch: Batch, places: Sequence[int], who: str) -> Tensor:
        """(B,) unbiased estimates of Σ_t KL(policy step ‖ reference step): one stochastic step a row, times their number.

        The steps take turns over all rows, for a few of them make up most of the sum.
        """
        noisy = (self.sampling.kernel.stds(self.sampling.levels) > 0).nonzero().flatten()
        if not len(noisy) or self.sampling.shifted:
            return torch.full((len(batch),), math.nan)
        turns = torch.randperm(len(noisy), generator=torch.Generator().manual_seed(mix(self.seed, 7)))
        rows = batch.steps(noisy[turns[torch.tensor(places) % len(noisy)]][:, None]).rows
        with torch.no_grad():
            with policy.acting_as(who):
                mine = law(policy, rows)  # pyright: ignore
            with policy.acting_as("reference"):
                base = law(policy, rows)  # pyright: ignore
        return (mine.kl(base) * len(noisy)).float().cpu()


def judged_prompts(given: Sequence[str], world: str, own: Sequence[Prompt]) -> list[Prompt]:
    """Those given, else the held-out ones of the model's world, else a source's own, evenly thinned.

    Raises:
        ValueError: there are none.
    """
    if given:
        return read_prompts(given)
    distinct = list({p.text: p for p in world_prompts(world, "heldout") or own}.values())
    if not distinct:
        raise ValueError("there is nothing to evaluate on: set eval_prompts")
    return distinct[:: max(1, len(distinct) // MOST)][:MOST]


def diversity(media: Tensor, samples: int) -> float:
    """Root mean square distance a pixel between the samples of a prompt, averaged over prompts; NaN with one sample each."""
    if samples < 2:
        return math.nan
    flat = media.reshape(-1, samples, media[0].numel())  # (P*K, ...) -> (P, K, D)
    distances = [torch.pdist(group.float()).square().mean().sqrt() / flat.shape[2] ** 0.5 for group in flat]
    return float(torch.stack(distances).mean())


def paired_gain(before: Tensor, after: Tensor, samples: int) -> tuple[float, float]:
    """Mean gain and its standard error over prompts, the samples of a prompt averaged first; pairs not judged are left out."""
    gain = (after.double() - before.double()).reshape(-1, samples).nanmean(1)
    gain = gain[~gain.isnan()]
    error = float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else math.nan
    return float(gain.mean()), error
