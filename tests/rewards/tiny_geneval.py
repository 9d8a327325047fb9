"""A random Mask2Former of a few kilobytes in the hub's folder layout."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_mask2former(folder: Path, classes: int = 80) -> Path:
    """Ten queries that are sure of their classes, and masks that follow the image."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(3)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=10,
        num_labels=classes,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.add_(0.3 * torch.randn_like(p))
            if name.startswith("class_predictor"):
                p.mul_(4)
    model.save_pretrained(folder)
    weights = load_file(
        folder / "model.safetensors"
    )  # published before transformers 5 gave Swin another norm, never used
    weights = {name: value for name, value in weights.items() if ".swin.layernorm." not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}, num_labels=classes).save_pretrained(folder)
    return folder
