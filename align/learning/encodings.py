"""What an encoder sees in every sample: computed once where it is frozen, at each step where a LoRA is trained on it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from rewards import Reward
from rewards.base import Features
from rewards.files import whole
from rewards.learned import encoded, probe

from ..ahead import alike
from ..decoding import Decoder, as_float
from ..media import image_size
from ..pairs import Side
from ..scorer import device_of

__all__ = ["Cached", "Encodings", "Live", "encode", "pixels"]


class Encodings(ABC):
    """Features of samples by their numbers."""

    @abstractmethod
    def __call__(self, samples: Tensor) -> Features:
        """The features of some samples."""


class Cached(Encodings):
    """Features that were computed.

    Attributes:
        samples: whose.
        all: of all samples, on the CPU.
        brightness: (N,) mean pixel of each sample.
    """

    def __init__(self, samples: Sequence[Side], seen: Features, brightness: Tensor) -> None:
        self.samples, self.all, self.brightness = samples, seen, brightness

    def __call__(self, samples: Tensor) -> Features:
        return Features(self.all.joint[samples], self.all.prompt[samples])


class Live(Encodings):
    """Features computed when they are asked for, as part of the graph."""

    def __init__(self, encoder: Reward, samples: Sequence[Side], batch: int) -> None:
        self.encoder, self.samples, self.batch = encoder, samples, batch

    def __call__(self, samples: Tensor) -> Features:
        distinct, back = samples.unique(return_inverse=True)
        seen = _encode(self.encoder, [self.samples[i] for i in distinct.tolist()], self.batch, None)[0]
        return Features(seen.joint[back], seen.prompt[back])


def encode(
    encoder: Reward, samples: Sequence[Side], batch: int = 32, cache: Path | None = None, progress: bool = False
) -> Cached:
    """Encodes all samples, or reads them if that was done before.

    Args:
        cache: a folder of encodings, by what was encoded and what the encoder sees in its probe.
    """
    file = None if cache is None else cache / f"features-{_key(encoder, samples)}.safetensors"
    if file is not None and file.is_file():
        stored = load_file(file)
    else:
        with torch.no_grad(), tqdm(total=len(samples), desc="encoding", unit="image", disable=not progress) as bar:
            seen, brightness = _encode(encoder, samples, batch, bar)
        stored = {"joint": seen.joint.cpu(), "prompt": seen.prompt.cpu().contiguous(), "brightness": brightness}
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            whole(file, lambda path: save_file(stored, path), durable=False)
    return Cached(samples, Features(stored["joint"], stored["prompt"]), stored["brightness"])


def _key(encoder: Reward, samples: Sequence[Side]) -> str:
    """What determines encodings: equal where every image, every prompt and the encoder are."""
    total = hashlib.sha256(probe(encoder).numpy().tobytes())
    for sample in samples:
        total.update(repr((sample.media.digest, sample.prompt.text)).encode())
    return total.hexdigest()[:32]


def _encode(encoder: Reward, samples: Sequence[Side], batch: int, bar: tqdm | None) -> tuple[Features, Tensor]:
    """Features in the order of the samples, and their brightness."""
    order, joint, prompt, brightness = [], [], [], []
    device = device_of([encoder])
    for rows in alike((image_size(sample.media, verify=False) for sample in samples), batch):
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


def pixels(sample: Side) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return as_float(Decoder()(sample.media))
