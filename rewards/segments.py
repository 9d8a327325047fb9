"""Image rewards on some frames of a video: which frames are looked at, and how much each counts.

`Sampled` looks at frames chosen by a simple rule and takes their mean, as VADER decodes all of them, every other one, three or one.

`Segmental` is InstructVideo's segmental video reward with temporally attenuated weights: F frames are cut in S segments of F // S,
one frame g_i is taken of each, and

    R = 1/S sum_i f_i r(x_{g_i}),    f_i = exp(-λ |g_i - F/2|)

The distance counts frames, so with λ = 1 the frame nearest to the middle is nearly all there is: F = 16 and g = (2, 6, 9, 13) give
f = (0.00248, 0.1353, 0.3679, 0.00674), and R is an eighth of r. `normalise` offers two remedies that are not the paper's.

A random choice is drawn once for each length of video from `seed`, not anew in each call as they train: a score is a function
of its sample. Vary `seed` to see other frames.

Sources: Yuan et al., "InstructVideo", 2023, arXiv 2312.12490. Prabhudesai et al., "VADER", 2024, arXiv 2407.08737.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .base import Prompt, Reward, Scores
from .composite import Wrapper

__all__ = ["Sampled", "Segmental"]

Choice = Literal["all", "stride", "first-middle-last", "random"]


class Lift(Wrapper):
    """A video reward that asks an image reward about frames.

    Raises:
        ValueError: the reward does not look at images, or compares samples.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__(reward)
        if reward.modality != "image" or reward.compares:
            raise ValueError(
                f"{type(self).__name__} lifts image rewards that judge each picture by itself; {reward.name} "
                + ("compares samples" if reward.compares else f"looks at {reward.modality}")
            )
        self.modality = "video"

    def ask(
        self, media: Tensor, prompts: list[Prompt], frames: list[int], reduce: Callable[[Tensor], Tensor]
    ) -> Scores:
        """Scores of the frames named, total and parts reduced alike: (B, K) -> (B,)."""
        scores = self.reward.score(media[:, frames].flatten(0, 1), [p for p in prompts for _ in frames])
        parts = {k: reduce(v.unflatten(0, (-1, len(frames)))) for k, v in scores.parts.items()}
        return Scores(reduce(scores.total.unflatten(0, (-1, len(frames)))), parts)


class Sampled(Lift):
    """The mean of an image reward over some frames of a video.

    Cheaper than `Framewise`, above all where each frame would have to be decoded for a gradient.

    Range: as its part
    Size: as its part
    Gradient: as its part, at the frames chosen

    Args:
        reward: an image reward.
        frames: "all"; "stride" for each `stride`-th; "first-middle-last"; "random" for `count` of them; or indices, where negative
            ones count from the end.
        stride: of "stride".
        count: of "random".
        seed: of "random".

    Raises:
        ValueError: the reward does not look at images, or an argument is out of its range.
    """

    def __init__(
        self, reward: Reward, frames: Choice | list[int] = "stride", *, stride: int = 2, count: int = 1, seed: int = 0
    ) -> None:
        super().__init__(reward)
        if (isinstance(frames, str) and frames not in Choice.__args__) or not frames:
            raise ValueError(f"frames must be one of {', '.join(Choice.__args__)} or a list of indices; got {frames!r}")
        if stride < 1 or count < 1:
            raise ValueError(f"stride and count must be at least 1; got {stride} and {count}")
        self.frames, self.stride, self.count, self.seed = frames, stride, count, seed

    def chosen(self, total: int) -> list[int]:
        """The frames looked at in a video of so many.

        Raises:
            ValueError: there are too few.
        """
        if not isinstance(self.frames, str):
            needed, found = max(i + 1 if i >= 0 else -i for i in self.frames), list(self.frames)
        elif self.frames == "random":
            drawn = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[: self.count]
            needed, found = self.count, sorted(drawn.tolist())
        elif self.frames == "first-middle-last":
            needed, found = 1, sorted({0, total // 2, total - 1})
        else:
            needed, found = 1, list(range(0, total, self.stride if self.frames == "stride" else 1))
        if total < needed:
            raise ValueError(f"{self.name} needs {needed} frames for frames={self.frames!r}; got {total}")
        return found

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        return self.ask(media, prompts, self.chosen(media.shape[1]), lambda scores: scores.mean(dim=1))


class Segmental(Lift):
    """An image reward on a frame of each segment of a video, weighted towards the middle (InstructVideo).

    Range: that of its part times the mean weight; as its part with normalise="weights"
    Size: as its part
    Gradient: as its part, at the frames chosen

    Args:
        reward: an image reward.
        segments: S, of F // S frames each; frames that are left over at the end are in none.
        decay: λ, 0 for equal weights.
        index: which frame of a segment: "random" by `seed`, or the "centre".
        seed: of "random".
        normalise: "none" as published; "distance" counts it from 0 in the middle to 1 at the ends, whatever the length; "weights"
            divides by the sum of the weights instead of S.

    Raises:
        ValueError: the reward does not look at images, or an argument is out of its range.
    """

    def __init__(
        self,
        reward: Reward,
        segments: int = 4,
        decay: float = 1.0,
        *,
        index: Literal["random", "centre"] = "random",
        seed: int = 0,
        normalise: Literal["none", "distance", "weights"] = "none",
    ) -> None:
        super().__init__(reward)
        if segments < 1 or decay < 0:
            raise ValueError(f"segments must be at least 1 and decay at least 0; got {segments} and {decay}")
        if index not in ("random", "centre"):
            raise ValueError(f"index must be random or centre; got {index!r}")
        if normalise not in ("none", "distance", "weights"):
            raise ValueError(f"normalise must be none, distance or weights; got {normalise!r}")
        self.segments, self.decay, self.index, self.seed, self.normalise = segments, decay, index, seed, normalise

    def chosen(self, total: int) -> list[int]:
        """The frame of each segment in a video of so many frames.

        Raises:
            ValueError: there are fewer frames than segments.
        """
        span = total // self.segments
        if span < 1:
            raise ValueError(f"{self.name} needs at least {self.segments} frames, one a segment; got {total}")
        within = torch.full((self.segments,), span // 2)
        if self.index == "random":
            within = torch.randint(span, (self.segments,), generator=torch.Generator().manual_seed(self.seed))
        return (span * torch.arange(self.segments) + within).tolist()

    def weights(self, frames: list[int], total: int) -> Tensor:
        """What each frame's score is multiplied with before the sum: (S,) float64."""
        distance = (torch.tensor(frames, dtype=torch.float64) - total / 2).abs()
        weights = torch.exp(-self.decay * (distance / (total / 2) if self.normalise == "distance" else distance))
        return weights / (weights.sum() if self.normalise == "weights" else len(frames))

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        frames = self.chosen(media.shape[1])
        weights = self.weights(frames, media.shape[1]).to(media.device, torch.float32)
        return self.ask(media, prompts, frames, lambda scores: scores @ weights.to(scores.dtype))
