"""Rewards made of rewards: weighted sums, products, image rewards on video, micro-batches.

Each is a `Reward` itself, so they nest. What it looks at, whether it has a gradient and whether it reads the prompt
follow from its children. A NaN of a child is a NaN of the row, whatever its weight: no combination turns a failure into
a number. Ensembles are in `ensembles.py`, functions of one reward in `transforms.py`, constraints in `constraints.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from .base import Prompt, Reward, Scores
from .composite import Composite, Rewards, Wrapper, numbers

__all__ = ["Batched", "Framewise", "Product", "Weighted"]

Weights = list[float] | dict[str, float] | None


class Weighted(Composite):
    """The weighted sum of several rewards.

    total = sum_k weights[k] * rewards[k]; no normalisation. `parts` holds the total of each reward before its weight,
    named by the keys of a dict, or by class (`CLIPScore`, `CLIPScore_2`, ...).

    Range: of the sum
    Size: as its parts
    Gradient: as its parts

    Args:
        rewards: what to add; a dict gives the parts names.
        weights: one a reward, in the same form; None weighs all by 1. A negative weight asks for less of something.

    Raises:
        ValueError: no rewards, modalities that differ, or weights that do not match or are not finite.
    """

    def __init__(self, rewards: Rewards, weights: Weights = None) -> None:
        super().__init__(rewards)
        self.weights = numbers("weights", [1.0] * len(self.labels) if weights is None else weights, self.labels)

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        parts = self.totals(media, prompts)
        terms = (w * t for w, t in zip(self.weights, parts.values(), strict=True))
        return Scores(sum(terms, media.new_zeros(len(media), dtype=torch.float32)), parts)


class Product(Composite):
    """The product of several rewards: all of them must be high, which a sum does not ask.

    Meant for scores that are never negative, such as probabilities and shares: the product of two negative scores is positive.
    `parts` holds the factors.

    Range: of the product
    Size: as its parts
    Gradient: as its parts; that of a factor is scaled by the product of the others

    Args:
        rewards: what to multiply; a dict gives the parts names.

    Raises:
        ValueError: no rewards, or modalities that differ.
    """

    def __init__(self, rewards: Rewards) -> None:
        super().__init__(rewards)

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        parts = self.totals(media, prompts)
        return Scores(torch.stack(list(parts.values())).prod(dim=0), parts)


class Framewise(Wrapper):
    """An image reward applied to every frame of a video.

    All frames of all videos go through the reward in one call; wrap it in `Batched` to bound the memory. Total and
    parts are reduced over the frames by the same rule, so with "min" each may come from another frame.

    Range: as its part
    Size: as its part
    Gradient: as its part

    Args:
        reward: an image reward.
        reduce: how the scores of the frames become the score of the video.

    Raises:
        ValueError: the reward does not look at images, or compares samples, or `reduce` is unknown.
    """

    def __init__(self, reward: Reward, reduce: Literal["mean", "min", "max", "median"] = "mean") -> None:
        super().__init__(reward)
        if reward.modality != "image":
            raise ValueError(f"Framewise lifts image rewards; {reward.name} looks at {reward.modality}")
        rules = {"mean": torch.mean, "min": torch.amin, "max": torch.amax, "median": middle}
        if reduce not in rules:
            raise ValueError(f"reduce must be one of {', '.join(rules)}; got {reduce!r}")
        if reward.compares:
            raise ValueError(
                f"{reward.name} would compare frames with one another: put it around Framewise, not inside"
            )
        self.reduce = rules[reduce]
        self.modality = "video"

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        frames = media.shape[1]
        scores = self.reward.score(media.flatten(0, 1), [p for p in prompts for _ in range(frames)])

        def over_frames(values: Tensor) -> Tensor:
            return self.reduce(values.unflatten(0, (-1, frames)), dim=1)  # (B*F,) -> (B,)

        return Scores(over_frames(scores.total), {k: over_frames(v) for k, v in scores.parts.items()})


def middle(values: Tensor, dim: int) -> Tensor:
    """The median, the lower of the two middle values if their number is even; NaN if any is NaN."""
    return values.median(dim=dim).values


class Batched(Wrapper):
    """A reward evaluated a few samples at a time; the scores are the same.

    Range: as its part
    Size: as its part
    Gradient: as its part

    Args:
        reward: what to evaluate.
        size: samples a call.
        recompute: whether the gradient recomputes each call's activations instead of keeping them. Without it a
            backward pass needs the memory of the whole batch, whatever `size` is.

    Raises:
        ValueError: `size` is below 1, or the reward compares samples.
    """

    def __init__(self, reward: Reward, size: int = 8, recompute: bool = False) -> None:
        super().__init__(reward)
        if size < 1:
            raise ValueError(f"size must be at least 1; got {size}")
        if reward.compares:
            raise ValueError(
                f"{reward.name} compares samples that Batched would separate: put Batched around its parts"
            )
        self.size, self.recompute = size, recompute

    @property
    def name(self) -> str:
        return self.reward.name

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        scores = []
        for start in range(0, len(media), self.size):
            rows = slice(start, start + self.size)
            if self.recompute and torch.is_grad_enabled():
                scores.append(recompute(self.reward.score, media[rows], prompts[rows], use_reentrant=False))
            else:
                scores.append(self.reward.score(media[rows], prompts[rows]))
        names = dict.fromkeys(name for s in scores for name in s.parts)
        parts = {k: torch.cat([s.parts.get(k, torch.full_like(s.total, torch.nan)) for s in scores]) for k in names}
        return Scores(torch.cat([s.total for s in scores]), parts)
