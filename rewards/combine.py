"""Rewards made of rewards: weighted sums, image rewards on video, micro-batches.

Each is a `Reward` itself, so they nest. What it looks at, whether it has a gradient and whether it reads the prompt
follow from its children. A NaN of a child is a NaN of the row, whatever its weight: no combination turns a failure into
a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from .base import Prompt, Reward, Scores

__all__ = ["Batched", "Framewise", "Weighted"]


class Weighted(Reward):
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

    def __init__(
        self, rewards: list[Reward] | dict[str, Reward], weights: list[float] | dict[str, float] | None = None
    ) -> None:
        super().__init__()
        if not rewards:
            raise ValueError("Weighted needs at least one reward; got none")
        self.labels = list(rewards) if isinstance(rewards, Mapping) else labels(rewards)
        children = list(rewards.values()) if isinstance(rewards, Mapping) else list(rewards)
        if isinstance(weights, Mapping):
            if set(weights) != set(self.labels):
                raise ValueError(f"weights must name the rewards {self.labels}; got {list(weights)}")
            weights = [weights[label] for label in self.labels]
        self.weights = [1.0] * len(children) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(children):
            raise ValueError(f"Weighted needs one weight a reward: got {len(self.weights)} for {len(children)} rewards")
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights must be finite; got {self.weights}")
        modalities = {label: child.modality for label, child in zip(self.labels, children, strict=True)}
        if len(set(modalities.values())) > 1:
            raise ValueError(
                f"Weighted needs rewards of one modality; got {modalities}: lift image rewards by Framewise"
            )
        self.rewards = nn.ModuleList(children)
        self.modality = children[0].modality
        self.differentiable = all(child.differentiable for child in children)
        self.needs_prompt = any(child.needs_prompt for child in children)

    @property
    def name(self) -> str:
        return f"Weighted({', '.join(self.labels)})"

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        totals = [child(media, prompts) for child in self.rewards]
        total = sum((w * t for w, t in zip(self.weights, totals, strict=True)), torch.zeros_like(totals[0]))
        return Scores(total, dict(zip(self.labels, totals, strict=True)))


def labels(rewards: Sequence[Reward]) -> list[str]:
    """Names of rewards, numbered from the second of a kind."""
    seen: dict[str, int] = {}
    result = []
    for reward in rewards:
        seen[reward.name] = seen.get(reward.name, 0) + 1
        result.append(reward.name if seen[reward.name] == 1 else f"{reward.name}_{seen[reward.name]}")
    return result


class Framewise(Reward):
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
        ValueError: the reward does not look at images, or `reduce` is unknown.
    """

    modality = "video"

    def __init__(self, reward: Reward, reduce: Literal["mean", "min", "max", "median"] = "mean") -> None:
        super().__init__()
        if reward.modality != "image":
            raise ValueError(f"Framewise lifts image rewards; {reward.name} looks at {reward.modality}")
        rules = {"mean": torch.mean, "min": torch.amin, "max": torch.amax, "median": middle}
        if reduce not in rules:
            raise ValueError(f"reduce must be one of {', '.join(rules)}; got {reduce!r}")
        self.reward = reward
        self.reduce = rules[reduce]
        self.differentiable = reward.differentiable
        self.needs_prompt = reward.needs_prompt

    @property
    def name(self) -> str:
        return f"Framewise({self.reward.name})"

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        frames = media.shape[1]
        scores = self.reward.score(media.flatten(0, 1), [p for p in prompts for _ in range(frames)])

        def over_frames(values: Tensor) -> Tensor:
            return self.reduce(values.unflatten(0, (-1, frames)), dim=1)  # (B*F,) -> (B,)

        return Scores(over_frames(scores.total), {k: over_frames(v) for k, v in scores.parts.items()})


def middle(values: Tensor, dim: int) -> Tensor:
    """The median, the lower of the two middle values if their number is even; NaN if any is NaN."""
    return values.median(dim=dim).values


class Batched(Reward):
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
        ValueError: `size` is below 1.
    """

    def __init__(self, reward: Reward, size: int = 8, recompute: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1; got {size}")
        self.reward, self.size, self.recompute = reward, size, recompute
        self.modality = reward.modality
        self.differentiable = reward.differentiable
        self.needs_prompt = reward.needs_prompt

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
        parts = {k: torch.cat([s.parts[k] for s in scores]) for k in scores[0].parts}
        return Scores(torch.cat([s.total for s in scores]), parts)
