"""What a file becomes for a reward: the pixels of an image or of the frames of a video, or the samples of a sound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rewards import Modality, Reward

from .media import SUFFIXES, Media, fitted, load_rgb, load_video
from .sound import load_wav

__all__ = ["FRAMES", "Decoder", "as_float", "pixels"]

FRAMES = 16  # two seconds at the 8 a second that rewards take videos to have
FILMS = SUFFIXES["video"] - SUFFIXES["image"]


@dataclass(frozen=True)
class Decoder:
    """Reads files of one modality.

    Attributes:
        modality: "image", "video" or "audio".
        size: (height, width) that images and frames are fitted to; as they are by default.
        frames: of a video, at most, spread evenly from the first to the last.
        rate: samples a second that sounds must have; any by default.

    Raises:
        ValueError: an argument does not fit, or files of this modality are not read.
    """

    modality: Modality = "image"
    size: tuple[int, int] | None = None
    frames: int = FRAMES
    rate: int | None = None

    @classmethod
    def of(cls, rewards: Iterable[Reward], size: tuple[int, int] | None = None, frames: int = FRAMES) -> Decoder:
        """What reads files for rewards that score together.

        Raises:
            ValueError: they do not look at the same media.
        """
        rewards = list(rewards)
        if len({reward.modality for reward in rewards}) > 1:
            got = ", ".join(f"{reward.name} of {reward.modality}" for reward in rewards)
            raise ValueError(
                f"rewards that score together look at the same media; got {got}: wrap those of images in Framewise, "
                "or score by each alone"
            )
        parts = (part for reward in rewards for part in reward.modules() if isinstance(part, Reward))
        rates = {rate for part in parts if isinstance(rate := getattr(part, "sample_rate", None), int)}
        if len(rates) > 1:
            raise ValueError(f"the rewards expect {sorted(rates)} samples a second: give them one sample_rate")
        return cls(rewards[0].modality, size, frames, next(iter(rates), None))

    def __post_init__(self) -> None:
        if self.modality not in SUFFIXES:
            raise ValueError(f"files hold {', '.join(SUFFIXES)}; got {self.modality}: pass tensors to align.score")
        if self.frames < 1:
            raise ValueError(f"frames must be ≥ 1; got {self.frames}")
        if self.size is not None and self.modality == "audio":
            raise ValueError(f"size fits images and videos, not sounds; got {self.size}")

    def __call__(self, media: Media) -> Tensor:
        """(3, H, W) uint8 of an image, (F, 3, H, W) uint8 of a video, (C, N) float32 of a sound.

        Raises:
            ValueError, OSError: it cannot be read, and why.
            ImportError: what reads it is not installed.
        """
        if self.modality == "audio":
            return self._sound(media)
        if self.modality == "video":
            return torch.stack([pixels(frame, self.size) for frame in load_video(media, self.frames)])
        try:
            return pixels(load_rgb(media), self.size)
        except ValueError as error:
            if Path(media.path or media.name).suffix.lower() in FILMS:
                raise ValueError(
                    f"{media.name} is a video, and images are scored: wrap the reward in Framewise"
                ) from error
            raise

    def _sound(self, media: Media) -> Tensor:
        sound, rate = load_wav(media)
        if self.rate not in (None, rate):
            raise ValueError(
                f"{media.name} has {rate} samples a second, but the reward expects {self.rate}: make it with "
                f"sample_rate={rate}, or resample the file"
            )
        return sound


def pixels(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """(3, H, W) uint8 of a PIL image, resized and cut to `size` = (H, W) if that is given."""
    from torchvision.transforms.functional import pil_to_tensor

    if size is not None and (image.height, image.width) != size:
        return (fitted(image, size) * 255).round().byte()
    return pil_to_tensor(image)


def as_float(media: Tensor) -> Tensor:
    """What rewards take: bytes become numbers in [0, 1]."""
    return media if media.is_floating_point() else media.float().div_(255)
