"""Tiny random vision networks in the hub's layout: a DINO (ViT) and a VideoMAE classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.rewards.tiny_vlm import loud

SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_dino(folder: Path) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(10)
    model = ViTModel(ViTConfig(**SHAPE, image_size=224, patch_size=56), add_pooling_layer=False)
    loud(model)
    model.save_pretrained(folder)
    return folder


def save_videomae(folder: Path) -> Path:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    torch.manual_seed(11)
    labels = dict(enumerate(["abseiling", "Air drumming", "zumba", "juggling balls", "yoga"]))
    config = VideoMAEConfig(**SHAPE, image_size=28, patch_size=14, num_frames=4, tubelet_size=2, id2label=labels)
    model = VideoMAEForVideoClassification(config)
    loud(model)
    model.save_pretrained(folder)
    return folder
