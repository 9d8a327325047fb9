"""What an encoder sees in every sample: computed once where it is frozen, at each step where a LoRA is trained on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from rewards import Reward
from rewards.base import Features
from rewards.learned import encoded

from ..media import image_size, load_rgb
from .data import Sample

__all__ = ["Cached", "Encodings", "Live", "encode", "pixels"]


class Encodings:
    """Features of samples by their numbers."""

    def __call__(self, samples: Tensor) -> Features:
        """The features of some samples."""
        raise NotImplementedError


class Cached(Encodings):
    """Features that were computed.

    Attributes:
        samples: whose.
        all: of all samples, on the CPU.
        brightness: (N,) mean pixel of each sample.
    """

    def __init__(self, samples: Sequence[Sample], seen: Features, brightness: Tensor) -> None:
        self.samples, self.all, self.brightness = samples, seen, brightness

    def __call__(self, samples: Tensor) -> Features:
        return Features(self.all.joint[samples], self.all.prompt[samples])


class Live(Encodings):
    """Features computed when they are asked for, as part of the graph."""

    def __init__(self, encoder: Reward, samples: Sequence[Sample], batch: int) -> None:
        self.encoder, self.samples, self.batch = encoder, samples, batch

    def __call__(self, samples: Tensor) -> Features:
        distinct, back = samples.unique(return_inverse=True)
        seen = _encode(self.encoder, [self.samples[i] for i in distinct.tolist()], self.batch, None)[0]
        return Features(seen.joint[back], seen.prompt[back])


def encode(
    encoder: Reward, samples: Sequence[Sample], batch: int = 32, cache: Path | None = None, progress: bool = False
) -> Cached:
    """Encodes all samples, or reads them from `cache` if they are there.

    Args:
        cache: a file for these samples and this encoder.
    """
    if cache is not None and cache.is_file():
        stored = load_file(cache)
    else:
        with torch.no_grad(), tqdm(total=len(samples), desc="encoding", unit="image", disable=not progress) as bar:
            seen, brightness = _encode(encoder, samples, batch, bar)
        stored = {"joint": seen.joint.cpu(), "prompt": seen.prompt.cpu().contiguous(), "brightness": brightness}
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            partial = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
            partial.write_bytes(save(stored))
            partial.replace(cache)
    return Cached(samples, Features(stored["joint"], stored["prompt"]), stored["brightness"])


def _encode(encoder: Reward, samples: Sequence[Sample], batch: int, bar: tqdm | None) -> tuple[Features, Tensor]:
    """Features in the order of the samples, and their brightness."""
    order, joint, prompt, brightness = [], [], [], []
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    for rows in _alike(samples, batch):
        media = torch.stack([pixels(samples[i]) for i in rows])
        seen = encoded(encoder, media.to(device), [samples[i].prompt for i in rows])
        order += rows
        joint.append(seen.joint)
        prompt.append(seen.prompt)
        brightness.append(media.mean((1, 2, 3)))
        if bar is not None:
            bar.update(len(rows))
    back = torch.tensor(order).argsort()
    together = [torch.cat(parts) for parts in (joint, prompt)]
    return Features(*(t[back.to(t.device)] for t in together)), torch.cat(brightness)[back]


def _alike(samples: Sequence[Sample], batch: int) -> Iterator[list[int]]:
    """Numbers of samples of one size, at most `batch` together."""
    waiting: dict[tuple[int, int], list[int]] = {}
    for i, sample in enumerate(samples):
        rows = waiting.setdefault(image_size(sample.media, verify=False), [])
        rows.append(i)
        if len(rows) == batch:
            yield rows.copy()
            rows.clear()
    yield from (rows for rows in waiting.values() if rows)


def pixels(sample: Sample) -> Tensor:
    """(3, H, W) in [0, 1]."""
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(load_rgb(sample.media)).float() / 255
