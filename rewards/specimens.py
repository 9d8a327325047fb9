"""What rewards are tried on and under: pictures, clips, chords and tokens made by rule, ways to spoil them, double precision."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prompt, Reward, as_prompts

__all__ = ["DAMAGE", "doubled", "example", "interior"]

PALETTE = {"red": (230, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40)}


def example(reward: Reward) -> tuple[Tensor, list[Prompt]]:
    """Four samples and prompts in the layout of a reward: discs and squares, still or moving; chords; random tokens.

    Prompts fit their own samples, but for the last, which asks for something else; each comes twice for a reward that `compares`.
    """
    if reward.modality == "audio":
        time_ = torch.arange(48_000) / 48_000
        tones = [
            sum(torch.sin(2 * torch.pi * f * time_) for f in chord) / 4
            for chord in ((220,), (440, 660), (880,), (130, 165, 196))
        ]
        room = torch.randn(
            4, 1, len(time_), generator=torch.Generator().manual_seed(0)
        )  # no recording is silent beside its tones
        media = torch.stack([tone[None] for tone in tones]) + 0.003 * room  # type: ignore[union-attr]
        texts = ["a low hum", "two notes of a flute", "a high beep", "an organ chord"]
    elif reward.modality == "tokens":
        media, texts = torch.arange(32).view(4, 8), ["one", "two", "three", "four"]
    else:
        frames = [
            [drawn(c, round_, n, f) for f in range(8 if reward.modality == "video" else 1)] for c, round_, n in SCENES
        ]
        video = torch.stack([torch.stack(clip) for clip in frames])
        media = video if reward.modality == "video" else video[:, 0]
        words = {1: "a", 2: "two"}
        texts = [f"{words[n]} {c} {'circle' if r else 'square'}{'s' * (n > 1)}" for c, r, n in SCENES]
        texts[-1] = "a green square"
    if reward.compares:
        texts = [texts[0], texts[0], texts[2], texts[2]]
    return media, as_prompts(texts)


SCENES = (("red", True, 1), ("green", True, 1), ("blue", False, 2), ("yellow", False, 1))  # colour, round, how many


def drawn(colour: str, round_: bool, count: int, frame: int) -> Tensor:
    """Discs or squares on white that drift to the right: (3, 128, 128)."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.functional import pil_to_tensor

    picture = Image.new("RGB", (128, 128), "white")
    pen = ImageDraw.Draw(picture)
    for i in range(count):
        left = 16 + 52 * i + 2 * frame
        (pen.ellipse if round_ else pen.rectangle)((left, 44, left + 38, 82), fill=PALETTE[colour])
    return pil_to_tensor(picture).float() / 255


def interior(media: Tensor) -> Tensor:
    """Media away from the ends of their range, so that no clamp hides a slope."""
    return (0.1 + 0.8 * media.detach()) if media.ndim > 3 else 0.8 * media.detach()


@contextmanager
def doubled(reward: Reward) -> Iterator[None]:
    """A reward in float64 for a while; casting there and back is exact."""
    kinds = {name: weight.dtype for name, weight in chain(reward.named_parameters(), reward.named_buffers())}
    reward.double()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, weight in chain(reward.named_parameters(), reward.named_buffers()):
            weight.data = weight.data.to(kinds[name])
        reward._apply(lambda t: t)  # lets rewards forget what they remembered in float64


def blurred(media: Tensor, strength: int) -> Tensor:
    """Media shrunk by 2, 4 or 8 and enlarged again."""
    flat = media.flatten(0, -4)
    small = F.interpolate(flat, scale_factor=0.5**strength, mode="bilinear", antialias=True)
    return F.interpolate(small, size=flat.shape[-2:], mode="bicubic").clamp(0, 1).view_as(media)


def noised(media: Tensor, strength: int) -> Tensor:
    """Gaussian noise of standard deviation 0.05, 0.1 or 0.2."""
    noise = torch.randn(media.shape, generator=torch.Generator().manual_seed(0)).to(media)
    return (media + 0.025 * 2**strength * noise).clamp(0, 1)


def compressed(media: Tensor, strength: int) -> Tensor:
    """JPEG at quality 40, 15 or 4."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    result = []
    for frame in (255 * media.flatten(0, -4)).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        with io.BytesIO() as file:
            Image.fromarray(frame).save(file, format="JPEG", quality=(40, 15, 4)[strength - 1])
            result.append(pil_to_tensor(Image.open(file).convert("RGB")).float() / 255)
    return torch.stack(result).to(media).view_as(media)


DAMAGE = {"blur": blurred, "noise": noised, "compression": compressed}
