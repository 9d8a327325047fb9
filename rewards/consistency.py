"""Consistency of a video by the features of its frames, and how surely it shows an action.

`SubjectConsistency` and `BackgroundConsistency` are VBench's two dimensions of these names: with f_t the unit feature of frame t,

    mean_{t >= 1} ( max(0, f_t · f_{t-1}) + max(0, f_t · f_0) ) / 2

by DINO, which follows the subject, or by CLIP, which sees the scene. A frozen video has 1: weigh motion against them.

`Action` is the log-probability that a video classifier gives the action asked for, as VADER rewards it.

Sources: Huang et al., "VBench", 2023, arXiv 2311.17982, released code. Caron et al., "DINO", 2021, arXiv 2104.14294. Prabhudesai
et al., "VADER", 2024, arXiv 2407.08737. Tong et al., "VideoMAE", 2022, arXiv 2203.12602.

Deviations. VBench resizes 8-bit frames, here they are float; positions of a frame that is not square are interpolated by
transformers' rule. VADER exponentiates its logits without care for overflow and rewards the probability; the logarithm ranks alike
and keeps its slope far from the goal.
"""

from __future__ import annotations

from abc import abstractmethod
from difflib import get_close_matches
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prompt, Reward
from .loading import precision, pretrained
from .preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocess, at_least_float32, resample

__all__ = ["Action", "BackgroundConsistency", "SubjectConsistency"]

DType = Literal["float32", "bfloat16", "float16"]
SIDE = 224  # of the frames in VBench


class Consistency(Reward):
    """How alike the frames of a video are; a subclass says what a frame's feature is."""

    modality = "video"
    needs_prompt = False

    @abstractmethod
    def features(self, frames: Tensor) -> Tensor:
        """Features of frames with values in [0, 1]: (B, 3, H, W) -> (B, D)."""

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        if media.shape[1] < 2:
            raise ValueError(f"{self.name} needs at least 2 frames; got {media.shape[1]}")
        found = at_least_float32(self.features(at_least_float32(media).flatten(0, 1)))
        unit = F.normalize(found, dim=-1).unflatten(0, media.shape[:2])
        before = (unit[:, 1:] * unit[:, :-1]).sum(dim=-1).clamp(min=0)
        first = (unit[:, 1:] * unit[:, :1]).sum(dim=-1).clamp(min=0)
        return ((before + first) / 2).mean(dim=1)


class SubjectConsistency(Consistency):
    """VBench's subject consistency: frames like the one before and the first, to DINO.

    Range: 0 to 1, 1 for a still video; VBench reports 0.15 to 1, good models about 0.95
    Size: shorter side 224, nothing cut
    Gradient: yes
    Weights: facebook/dino-vitb16
    Licence: Apache-2.0

    Args:
        model: folder or hub id of a ViT in the transformers layout; its class token is the feature.
        dtype: type the network runs in; the score is in float32 at least.

    Raises:
        OSError: files are missing, incomplete or unreadable.
    """

    def __init__(self, model: str = "facebook/dino-vitb16", *, dtype: DType = "float32") -> None:
        super().__init__()
        run_in = precision(dtype)
        from transformers import ViTModel

        self.network = pretrained(ViTModel, model, add_pooling_layer=False).to(run_in)
        self.freeze()

    def features(self, frames: Tensor) -> Tensor:
        height, width = frames.shape[-2:]
        size = [int(SIDE * side / min(height, width)) for side in (height, width)]
        x = resample(frames, (size[0], size[1]), "bilinear", antialias=False)
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = ((x - mean) / std).to(self.network.dtype)
        return self.network(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]


class BackgroundConsistency(Consistency):
    """VBench's background consistency: frames like the one before and the first, to CLIP.

    Range: 0 to 1, 1 for a still video; VBench reports 0.26 to 1, good models about 0.96
    Size: 224, the shorter side fitted and the centre cut
    Gradient: yes
    Weights: openai/clip-vit-base-patch32
    Licence: MIT (OpenAI CLIP)

    Args:
        model: folder or hub id of a CLIP in the transformers layout.
        dtype: type the network runs in; the score is in float32 at least.

    Raises:
        OSError: files are missing, incomplete or unreadable.
    """

    def __init__(self, model: str = "openai/clip-vit-base-patch32", *, dtype: DType = "float32") -> None:
        super().__init__()
        run_in = precision(dtype)
        from transformers import CLIPModel

        network = pretrained(CLIPModel, model)
        self.tower = network.vision_model.to(run_in)
        self.projection = network.visual_projection.to(run_in)
        side = network.config.vision_config.image_size
        self.preprocess = Preprocess(
            size=side, mean=CLIP_MEAN, std=CLIP_STD, antialias=False, clamp=False, offset="round"
        )
        self.freeze()

    def features(self, frames: Tensor) -> Tensor:
        pixels = self.preprocess(frames).to(self.projection.weight.dtype)
        return self.projection(self.tower(pixel_values=pixels).pooler_output)


class Action(Reward):
    """How surely a video shows an action: its log-probability by a video classifier.

    Range: 0 and below, in natural units; chance is -6 among the 400 actions of Kinetics
    Size: 16 frames of 224 x 224, evenly spaced and squeezed
    Gradient: yes
    Weights: MCG-NJU/videomae-base-finetuned-kinetics
    Licence: CC-BY-NC-4.0

    Args:
        model: folder or hub id of a VideoMAE classifier in the transformers layout.
        action: name of the class, as in the model's labels; None takes it from the prompt's meta["action"], or else its text,
            and scores NaN where that is no class.
        dtype: type the network runs in; the score is in float32 at least.

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the model does not know the action.
    """

    modality = "video"

    def __init__(
        self,
        model: str = "MCG-NJU/videomae-base-finetuned-kinetics",
        action: str | None = None,
        *,
        dtype: DType = "float32",
    ) -> None:
        super().__init__()
        run_in = precision(dtype)
        from transformers import VideoMAEForVideoClassification

        network = pretrained(VideoMAEForVideoClassification, model)
        self.labels = {str(name).lower(): int(i) for i, name in network.config.id2label.items()}
        self.frames = network.config.num_frames
        self.preprocess = Preprocess(
            "squash", network.config.image_size, IMAGENET_MEAN, IMAGENET_STD, interpolation="bilinear"
        )
        self.action, self.needs_prompt = action, action is None
        if action is not None and action.lower() not in self.labels:
            near = ", ".join(get_close_matches(action.lower(), self.labels, 3, 0))
            raise ValueError(f"{model!r} knows {len(self.labels)} actions, not {action!r}; nearest: {near}")
        self.network = network.to(run_in)
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        if self.action is None:
            wanted = [str(prompt.meta.get("action", prompt.text)) for prompt in prompts]
        else:
            wanted = [self.action] * len(media)
        index = torch.tensor([self.labels.get(name.lower(), -1) for name in wanted], device=media.device)
        places = torch.linspace(0, media.shape[1] - 1, self.frames).round().long().tolist()
        pixels = self.preprocess(media[:, places].flatten(0, 1)).unflatten(0, (len(media), self.frames))
        logits: Any = self.network(pixel_values=pixels.to(self.network.dtype)).logits
        scores = at_least_float32(logits).log_softmax(dim=1).gather(1, index.clamp(min=0)[:, None])[:, 0]
        return scores.masked_fill(index < 0, torch.nan)
