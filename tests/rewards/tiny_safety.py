"""Random image classifiers and safety checkers in the hub's folder layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_classifier(folder: Path, labels: tuple[str, ...] = ("normal", "nsfw")) -> Path:
    """A ViT as Falconsai's, with its processor: 32 x 32 squeezed, bilinear."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = ViTConfig(**SHAPE, image_size=32, patch_size=8, id2label=names, label2id={v: k for k, v in names.items()})
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_checker(folder: Path) -> Path:
    """Stable Diffusion's safety checker with the keys and the old processor file of CompVis, thresholds near typical cosines."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(1)
    text = {**SHAPE, "vocab_size": 99, "eos_token_id": 98, "bos_token_id": 97}
    vision = {**SHAPE, "image_size": 32, "patch_size": 8}
    model = StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.1 * torch.randn_like(p) if p.ndim > 1 else p)
        model.concept_embeds.copy_(torch.randn(17, 16))
        model.special_care_embeds.copy_(torch.randn(3, 16))
        model.concept_embeds_weights.copy_(0.1 + 0.2 * torch.rand(17))
        model.special_care_embeds_weights.copy_(0.1 + 0.1 * torch.rand(3))
    model.config.save_pretrained(folder)
    inner = "vision_model."  # published before transformers 5, which took one level away
    weights = {f"{inner}{k}" if k.startswith(inner) else k: v for k, v in model.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")
    processor = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": True,
        "size": 32,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": 32,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
