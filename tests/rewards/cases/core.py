"""Dual encoders, the embedded rewards, rules and combinations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoTokenizer

import rewards
from rewards import Batched, Reward
from rewards.shapes import COLORS
from tests.rewards import tiny, tiny_encoders
from tests.rewards.cases import Case


def folder(name: str) -> Callable[[pytest.FixtureRequest], str]:
    return lambda request: str(request.getfixturevalue(name))


def hpsv2(request: pytest.FixtureRequest) -> Reward:
    import open_clip

    path = request.getfixturevalue("open_clip_folder")
    open_clip.add_model_config(path / "kilter-tiny.json")
    return rewards.HPSv2(checkpoint=str(path / "open_clip_model.safetensors"), model_name="kilter-tiny")


def social(request: pytest.FixtureRequest) -> Reward:
    import open_clip

    path = request.getfixturevalue("open_clip_folder")
    open_clip.add_model_config(path / "kilter-tiny.json")
    return rewards.SocialReward(str(path / "open_clip_model.safetensors"), model_name="kilter-tiny")


def mixed(request: pytest.FixtureRequest) -> Reward:
    return rewards.Weighted([rewards.CLIPScore(folder("clip_folder")(request), "cosine"), rewards.Brightness()], [1, 2])


GRAMMAR = ("a red circle", "a green circle", "two blue squares", "a red star")


def cross_encoder(request: pytest.FixtureRequest) -> Reward:
    """A random one in its own layout, with the embedded tokenizer."""
    from rewards.crossencoder import Network

    path = request.getfixturevalue("tmp_path")
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[3] / "assets" / "tiny-sd" / "tokenizer")
    tokenizer.save_pretrained(path)
    shape = {"vocab": len(tokenizer), "length": 12, "size": 32, "width": 32, "heads": 2}
    network = Network(**shape, image_layers=1, text_layers=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_file(network.state_dict(), path / "model.safetensors")
    config = {"network": {**shape, "image_layers": 1, "text_layers": 2}, "mean": 0.1, "std": 0.5}
    (path / "config.json").write_text(json.dumps(config))
    return rewards.CrossEncoder(path)


def shapes() -> Tensor:
    """A red and a green circle, two blue squares, a red square: what GRAMMAR asks for in order, but for the last."""
    pictures = []
    for color, marks in (("red", ["o"]), ("green", ["o"]), ("blue", ["s", "s"]), ("red", ["s"])):
        picture = Image.new("RGB", (128, 128), "white")
        draw = ImageDraw.Draw(picture)
        for i, mark in enumerate(marks):
            box = (20 + 56 * i, 40, 60 + 56 * i, 80)
            fill = tuple(round(255 * c) for c in COLORS[color])
            (draw.ellipse if mark == "o" else draw.rectangle)(box, fill=fill)
        pictures.append(pil_to_tensor(picture).float() / 255)
    return torch.stack(pictures)


CASES: dict[str, Case] = {
    "Aesthetic": Case(lambda r: rewards.Aesthetic(folder("clip_folder")(r), folder("aesthetic_head")(r))),
    "Batched": Case(lambda _: Batched(rewards.Brightness(), 3)),
    "Brightness": Case(lambda _: rewards.Brightness()),
    "CLIPScore": Case(lambda r: rewards.CLIPScore(folder("clip_folder")(r)), tolerance=1e-3),
    "Colour": Case(lambda _: rewards.Colour("blue")),
    "CrossEncoder": Case(cross_encoder, GRAMMAR, tolerance=1e-4),
    "Framewise": Case(
        lambda r: rewards.Framewise(mixed(r), "min"),
        media=lambda: (0.1 + 0.8 * tiny.natural(12, 36, 43)).unflatten(0, (4, 3)),
    ),
    "HPSv2": Case(hpsv2),
    "JPEGSize": Case(lambda _: rewards.JPEGSize(), size=None),
    "OpenCLIPScore": Case(
        lambda r: rewards.OpenCLIPScore(f"local-dir:{folder('open_clip_folder')(r)}"), tolerance=1e-3
    ),
    "PickScore": Case(lambda r: rewards.PickScore(*[folder("clip_folder")(r)] * 2), tolerance=1e-3),
    "ShadowAesthetic": Case(
        lambda r: rewards.ShadowAesthetic(str(tiny_encoders.save_shadow(r.getfixturevalue("tmp_path"))))
    ),
    "Shapes": Case(lambda _: rewards.Shapes(), GRAMMAR, shapes),
    "Sharpness": Case(lambda _: rewards.Sharpness(), size=None),
    "SmoothJPEGSize": Case(lambda _: rewards.SmoothJPEGSize(), tolerance=1e-4, size=None),
    "SocialReward": Case(social),
    "Weighted": Case(mixed),
}
