"""Consistency against VBench's loop over frames and transformers' own features; actions against transformers' own classifier."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import resize

from rewards import Action, BackgroundConsistency, Prompt, SubjectConsistency
from rewards.consistency import Consistency
from rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from tests.rewards import tiny, tiny_frames
from tests.rewards.cases.motion import drifting

CLIPS = drifting()


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def by_frame(features: Tensor) -> float:
    """One video's score frame by frame: (F, D)."""
    total, first = 0.0, features[0]
    for before, now in pairwise(features):
        near, far = (torch.cosine_similarity(other, now, dim=0).item() for other in (before, first))
        total += (max(0.0, near) + max(0.0, far)) / 2
    return total / (len(features) - 1)


class Given(Consistency):
    """The first channel's corner pixels are the feature."""

    def features(self, frames: Tensor) -> Tensor:
        return 2 * frames[:, 0, 0, :2] - 1


def test_the_formula_in_closed_form() -> None:
    def clip(*vectors: tuple[float, float]) -> Tensor:
        frames = torch.tensor(vectors)[:, None, None].expand(-1, 3, 2, -1)
        return (frames[None] + 1) / 2

    assert Given()(clip((1, 0), (1, 0), (1, 0))).item() == 1
    assert Given()(clip((1, 0), (0, 1), (1, 0))).item() == 0.25  # (0 + 0) / 2 and (0 + 1) / 2
    assert Given()(clip((1, 0), (-1, 0))).item() == 0  # opposites count as strangers
    with pytest.raises(ValueError, match="at least 2 frames"):
        Given()(clip((1, 0)))


def test_subjects_are_seen_by_dino(tmp_path: Path) -> None:
    from transformers import ViTModel

    folder = str(tiny_frames.save_dino(tmp_path))
    model = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    expected = []
    for clip in CLIPS:
        x = normalised(resize(clip, [224], antialias=False), IMAGENET_MEAN, IMAGENET_STD)
        with torch.no_grad():
            expected.append(by_frame(model(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]))
    torch.testing.assert_close(SubjectConsistency(folder)(CLIPS), torch.tensor(expected), rtol=0, atol=1e-4)
    assert torch.tensor(expected).std() > 0.01


def test_scenes_are_seen_by_clip(clip_folder: str) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip_folder).eval()
    expected = []
    for clip in CLIPS:
        x = resize(clip, [32], InterpolationMode.BICUBIC, antialias=False)
        with torch.no_grad():
            found: Any = model.get_image_features(
                pixel_values=normalised(center_crop(x, [32, 32]), CLIP_MEAN, CLIP_STD)
            )
        expected.append(by_frame(found if isinstance(found, Tensor) else found.pooler_output))
    torch.testing.assert_close(BackgroundConsistency(clip_folder)(CLIPS), torch.tensor(expected), rtol=0, atol=1e-4)


def test_actions_are_the_classifiers_log_probabilities(tmp_path: Path) -> None:
    from transformers import VideoMAEForVideoClassification

    folder = str(tiny_frames.save_videomae(tmp_path))
    model = VideoMAEForVideoClassification.from_pretrained(folder).eval()
    clips = tiny.natural(12, 28, 28).unflatten(0, (2, 6))  # of the network's size: nothing is resized
    pixels = normalised(clips[:, [0, 2, 3, 5]], IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        expected = model(pixels).logits.log_softmax(dim=1)
    prompts = [Prompt("a man on a wall", meta={"action": "Abseiling"}), "air drumming"]
    torch.testing.assert_close(Action(folder)(clips, prompts), expected[[0, 1], [0, 1]], rtol=1e-4, atol=1e-5)
    one = Action(folder, "zumba")
    assert not one.needs_prompt
    torch.testing.assert_close(one(clips), expected[:, 2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one(clips, prompts), expected[:, 2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="nearest: yoga"):
        Action(folder, "yogo")
    assert Action(folder)(clips, ["abseiling", "a cat"]).isnan().tolist() == [False, True]
