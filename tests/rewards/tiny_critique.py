"""MM-RLHF-Reward in its published layout: a LLaVA-OneVision by the names of LLaVA-NeXT's code, with a reward head."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from tests.rewards import tiny_vlm

LLAVA_NEXT = (
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.language_model\.", "model."),
)


def save_mmrlhf(folder: Path, side: int = 30) -> Any:
    """Writes the folder, for tiles of `side` pixels; the same network by transformers' own names, as made."""
    from safetensors.torch import save_file
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    torch.manual_seed(5)
    tokens = tiny_vlm.tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    flat = {**tiny_vlm.TEXT, "vocab_size": len(tokens) + 9, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    vision = {"hidden_size": 72, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, image_size=side, patch_size=14, vision_use_head=False),
        text_config=Qwen2Config.from_dict({**flat, "model_type": "qwen2"}),
        image_token_index=len(tokens),
        video_token_index=len(tokens) + 1,
        image_grid_pinpoints=[[side * i, side * j] for i in (1, 2) for j in (1, 2)],
    )
    network = LlavaOnevisionForConditionalGeneration(config).eval()
    tiny_vlm.loud(network)
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}
    for pattern, name in LLAVA_NEXT:
        weights = {re.sub(pattern, name, key): weight for key, weight in weights.items()}
    width = config.text_config.hidden_size
    for name, shape in {"dense.weight": (width, width), "dense.bias": (width,), "out_proj.weight": (1, width)}.items():
        weights[f"rm_head.{name}"] = torch.randn(shape) / width**0.5
    weights["rm_head.out_proj.bias"] = torch.tensor([0.25])
    folder.mkdir(parents=True, exist_ok=True)
    tokens.save_pretrained(folder)
    halves = sorted(weights)[::2], sorted(weights)[1::2]
    for i, names in enumerate(halves, 1):
        save_file({name: weights[name] for name in names}, folder / f"model-0000{i}-of-00002.safetensors")
    places = {name: f"model-0000{i}-of-00002.safetensors" for i, names in enumerate(halves, 1) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    published = {"model_type": "llava_qwen", "architectures": ["LlavaQwenForCausalLM"], "is_rm": True}
    published |= {"image_grid_pinpoints": "(1x1),...,(2x2)", "image_aspect_ratio": "anyres_max_9"}
    published |= {
        "mm_vision_tower": f"tiny/siglip-patch14-{side}",
        "mm_projector_type": "mlp2x_gelu",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps({**published, **flat}))
    return network
