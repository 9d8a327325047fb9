"""What rewards made of rewards share: their children, what follows from them, and numbers that follow a training run.

No combination turns a failure into a number: a NaN of a child is a NaN of the row.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .base import Prompt, Reward, Scores
from .preprocess import sharing

__all__ = ["Adaptive", "Composite", "Rewards", "Wrapper", "named", "numbers"]

Rewards = list[Reward] | dict[str, Reward]


class Composite(Reward):
    """A reward made of several.

    Attributes:
        labels: what the parts are called: the keys of a dict, or the classes (`CLIPScore`, `CLIPScore_2`, ...).
        rewards: in the same order.

    Raises:
        ValueError: no rewards, or modalities that differ.
        TypeError: something else than rewards.
    """

    def __init__(self, rewards: Rewards) -> None:
        super().__init__()
        kind = type(self).__name__
        if not rewards:
            raise ValueError(f"{kind} needs at least one reward; got none")
        for child in rewards.values() if isinstance(rewards, Mapping) else rewards:
            be_reward(child, kind)
        children = named(rewards)
        modalities = {label: child.modality for label, child in children.items()}
        if len(set(modalities.values())) > 1:
            raise ValueError(f"{kind} needs rewards of one modality; got {modalities}: lift image rewards by Framewise")
        self.labels = list(children)
        self.rewards = nn.ModuleList(children.values())
        self.modality = next(iter(children.values())).modality
        self.differentiable = all(child.differentiable for child in children.values())
        self.needs_prompt = any(child.needs_prompt for child in children.values())
        self.compares = any(child.compares for child in children.values())
        self.claims_quality = all(child.claims_quality for child in children.values())

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({', '.join(self.labels)})"

    def scored(self, media: Tensor, prompts: list[Prompt]) -> dict[str, Scores]:
        """What each child says, by its label."""
        pairs = zip(self.labels, self.rewards, strict=True)
        with sharing():
            return {label: child.score(media, prompts) for label, child in pairs}  # pyright: ignore[reportCallIssue]

    def totals(self, media: Tensor, prompts: list[Prompt]) -> dict[str, Tensor]:
        """The totals alone."""
        return {label: scores.total for label, scores in self.scored(media, prompts).items()}


class Wrapper(Reward):
    """A reward made of one."""

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        be_reward(reward, type(self).__name__)
        self.reward = reward
        self.modality = reward.modality
        self.differentiable = reward.differentiable
        self.needs_prompt = reward.needs_prompt
        self.compares = reward.compares
        self.claims_quality = reward.claims_quality

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.reward.name})"

    def told(self, total: Tensor, scores: Scores) -> Scores:
        """A new total beside the child's own, under its name, and the child's parts."""
        return Scores(total, {**scores.parts, self.reward.name: scores.total})


class Adaptive(Reward):
    """A reward with numbers that follow a training run, such as multipliers or running statistics.

    Only a trainer moves them: while it collects, `seen` is a list to which `watch` adds what was measured; after each collection
    `learn` takes what all processes have seen. Scores of one collection all come from the numbers at its start. Evaluation,
    steering and scoring change nothing.

    Attributes:
        seen: (B, C) each, or None while nobody collects.
    """

    seen: list[Tensor] | None = None

    def watch(self, values: Tensor) -> None:
        """Remembers (B, C) measurements for `learn`."""
        if self.seen is not None:
            self.seen.append(values.detach())

    @abstractmethod
    def learn(self, values: Tensor) -> None:
        """Takes what a collection measured: (N, C) float64, the same in every process; NaN where not judged."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The numbers, for a checkpoint: Python numbers and lists of them."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts `state()` back."""

    @abstractmethod
    def worth_watching(self) -> dict[str, float]:
        """The numbers by name, for the log of a run."""


def be_reward(part: Any, whole: str) -> None:
    """Raises a TypeError unless a part of a combination is a reward."""
    if not isinstance(part, Reward):
        raise TypeError(f"{whole} is made of rewards, such as CLIPScore(); got {type(part).__name__}: {part!r:.80}")


def named(rewards: Rewards) -> dict[str, Reward]:
    """Rewards by the keys of a dict, or by their names, numbered from the second of a kind."""
    if isinstance(rewards, Mapping):
        return dict(rewards)
    seen: dict[str, int] = {}
    result: dict[str, Reward] = {}
    for reward in rewards:
        seen[reward.name] = seen.get(reward.name, 0) + 1
        result[reward.name if seen[reward.name] == 1 else f"{reward.name}_{seen[reward.name]}"] = reward
    return result


def numbers(what: str, given: list[float] | dict[str, float], labels: Sequence[str]) -> list[float]:
    """One number a label, given in that order or by label.

    Raises:
        ValueError: they do not match the labels, or are not finite.
    """
    if isinstance(given, Mapping):
        if set(given) != set(labels):
            raise ValueError(f"{what} must name the rewards {list(labels)}; got {list(given)}")
        given = [given[label] for label in labels]
    if len(given) != len(labels):
        raise ValueError(f"there must be as many {what} as rewards: got {len(given)} for {len(labels)} rewards")
    if not all(map(math.isfinite, given)):
        raise ValueError(f"{what} must be finite; got {given}")
    return [float(number) for number in given]
