"""Tiny random video rewards in their published layouts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NORMS = {"VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811, "TA_mean": 2.8105, "TA_std": 2.5121}
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "use_rslora": False}


def video_reward(base: Path, output_dim: int = 1) -> Any:
    """The network of VideoReward on a tiny Qwen2-VL, in peft's wrapper as when it was trained, with LoRA that matters."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    tokens = Qwen2VLProcessor.from_pretrained(base).tokenizer
    tokens.add_tokens(["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"], special_tokens=True)
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(base)
    torch.manual_seed(5)
    model.resize_token_embeddings(len(tokens))
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "language_model" in n]
    model.rm_head = torch.nn.Linear(32, output_dim, bias=False)
    wrapped: Any = get_peft_model(
        model, LoraConfig(target_modules=linear, r=LORA["lora_r"], lora_alpha=LORA["lora_alpha"])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        model.rm_head.weight.normal_()
    return wrapped.eval()


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the transformers of the released checkpoint (4.45) gave."""
    return {
        re.sub(r"model\.(visual\.)", r"\1", k.replace("model.language_model.", "model.")): v.clone()
        for k, v in state.items()
    }


def save_video_reward(
    folder: Path, state: dict[str, Tensor], base: Path, output_dim: int = 1, **changes: dict[str, Any]
) -> Path:
    """A checkpoint in the layout of KwaiVGI/VideoReward."""
    (folder / "checkpoint-12").mkdir(parents=True)
    torch.save(state, folder / "checkpoint-12" / "model.pth")
    data = {"max_frame_pixels": 84 * 84, "num_frames": None, "fps": 2.0, "prompt_template_type": "detailed_special"}
    config = {
        "data_config": {**data, "sample_type": "uniform", "eval_dim": ["VQ", "MQ", "TA"]},
        "model_config": {"model_name_or_path": str(base), "output_dim": output_dim, "use_special_tokens": True},
        "peft_lora_config": LORA,
        "inference_config": NORMS,
    }
    for part, values in changes.items():
        config[part] = {**config[part], **values}
    (folder / "model_config.json").write_text(json.dumps(config))
    return folder
