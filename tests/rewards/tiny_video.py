"""Tiny random video rewards in their published layouts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.rewards import tiny_vlm

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


def score_head() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {
        "score.weight": torch.randn(5, 32, generator=generator) / 6,
        "score.bias": 2.5 + torch.rand(5, generator=generator) / 4,
    }


def save_videoscore_qwen(folder: Path) -> Path:
    """A checkpoint in the layout of TIGER-Lab/VideoScore-Qwen2-VL: a sharded Qwen2-VL without a language head but with `score`."""
    from transformers import Qwen2VLForConditionalGeneration

    tiny_vlm.save_qwen2_vl(folder)
    state = released(Qwen2VLForConditionalGeneration.from_pretrained(folder).state_dict())
    state = {k: v for k, v in state.items() if k != "lm_head.weight"} | score_head()
    (folder / "model.safetensors").unlink()
    shards = {}
    for i, vision in enumerate((True, False), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        part = {k: v for k, v in state.items() if k.startswith("visual.") == vision}
        save_file(part, folder / file)
        shards |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return labelled(folder)


def labelled(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config |= {"problem_type": "regression", "id2label": {str(i): f"LABEL_{i}" for i in range(5)}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_videoscore_idefics(folder: Path) -> Path:
    """A checkpoint in the layout of TIGER-Lab/VideoScore: an Idefics2 with `score`."""
    from transformers import Idefics2Config, Idefics2ImageProcessor, Idefics2Model, Idefics2Processor

    tokens = tiny_vlm.tokenizer(["<|endoftext|>", "<|im_end|>", "<fake_token_around_image>", "<image>"])
    processor = Idefics2Processor(
        Idefics2ImageProcessor(size={"shortest_edge": 56, "longest_edge": 84}), tokens, image_seq_len=4
    )
    text = {**tiny_vlm.TEXT, "model_type": "mistral", "vocab_size": len(tokens) + 7}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    latents = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8}
    torch.manual_seed(8)
    config = Idefics2Config(
        text_config={**text, "pad_token_id": tokens.pad_token_id},
        vision_config={**vision, "image_size": 84, "patch_size": 14},
        perceiver_config={**latents, "num_key_value_heads": 2, "hidden_size": 32},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
    )
    model = Idefics2Model(config)
    tiny_vlm.loud(model)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file({f"model.{k}": v for k, v in model.state_dict().items()} | score_head(), folder / "model.safetensors")
    return labelled(folder)
