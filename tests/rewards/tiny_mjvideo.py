"""A tiny random MJ-VIDEO in the names and the layout of the released code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rewards.mjvideo import ASPECTS, Experts, skeleton
from tests.rewards import tiny_vlm

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
HEADS, GROUPS = 4, 2  # of the language model

NAMES = {
    r"vision_tower\.embeddings\.cls_token": "vision_model.embeddings.class_embedding",
    r"vision_tower\.embeddings\.position_embeddings": "vision_model.embeddings.position_embedding",
    r"vision_tower\.embeddings\.patch_embeddings\.projection": "vision_model.embeddings.patch_embedding",
    r"vision_tower\.encoder\.layer\.": "vision_model.encoder.layers.",
    r"\.lambda_": ".ls",
    r"\.layernorm_before": ".norm1",
    r"\.layernorm_after": ".norm2",
    r"\.attention\.projection_layer": ".attn.proj",
    r"multi_modal_projector\.layer_norm": "mlp1.0",
    r"multi_modal_projector\.linear_1": "mlp1.1",
    r"multi_modal_projector\.linear_2": "mlp1.3",
    r"language_model\.embed_tokens": "language_model.model.tok_embeddings",
    r"language_model\.(layers|norm)": r"language_model.model.\1",
    r"\.self_attn\.o_proj": ".attention.wo",
    r"\.mlp\.gate_proj": ".feed_forward.w1",
    r"\.mlp\.down_proj": ".feed_forward.w2",
    r"\.mlp\.up_proj": ".feed_forward.w3",
    r"\.input_layernorm": ".attention_norm",
    r"\.post_attention_layernorm": ".ffn_norm",
}


def released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of InternVL's own classes: the other way round, and written apart from the reward."""
    found = {}
    for key, value in state.items():
        q = re.fullmatch(r"(.*)\.(self_attn|attention)\.q_proj\.(weight|bias)", key)
        if q:
            rows = [state[key.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            if q[2] == "self_attn":  # a key-value head after another: its queries, key, value
                size = len(rows[1]) // GROUPS
                heads = [row.split(size) for row in rows]
                each = HEADS // GROUPS
                rows = [
                    part
                    for g in range(GROUPS)
                    for part in (*heads[0][each * g : each * (g + 1)], heads[1][g], heads[2][g])
                ]
            name = f"{q[1]}.{'attention.wqkv' if q[2] == 'self_attn' else 'attn.qkv'}.{q[3]}"
            key, value = name, torch.cat(list(rows))
        elif re.search(r"\.[kv]_proj\.", key):
            continue
        for pattern, old in NAMES.items():
            key = re.sub(pattern, old, key)
        found[f"model.{key}"] = value.clone()
    return found


def save_mjvideo(folder: Path) -> Path:
    """Weights (mjvideo.safetensors), config.json of the base, and a tokenizer."""
    tokens = tiny_vlm.tokenizer(SPECIAL)
    tokens.add_special_tokens({"bos_token": "<s>"})
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 7, "qkv_bias": True, "qk_normalization": False}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    text |= {"num_key_value_heads": GROUPS, "vocab_size": len(tokens), "max_position_embeddings": 8192, "bias": False}
    config = {
        "model_type": "internvl_chat",
        "vision_config": {**vision, "norm_type": "layer_norm", "layer_norm_eps": 1e-6},
        "llm_config": {
            **text, "architectures": ["InternLM2ForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 1e6,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        "downsample_ratio": 0.5,
        "force_image_size": 28,
        "select_layer": -1,
        "ps_version": "v2",
        "template": "internlm2-chat",
    }  # fmt: skip
    network = skeleton(config, tokens.convert_tokens_to_ids("<IMG_CONTEXT>"))
    torch.manual_seed(9)
    state = {
        name: 0.25 * torch.randn(empty.shape)
        if empty.ndim > 1
        else float("bias" not in name) + 0.02 * torch.randn(empty.shape)
        for name, empty in network.state_dict().items()
    }
    head = Experts(32, [list(criteria) for criteria in ASPECTS.values()], hidden=24)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.ndim > 1 and "matrix" not in name:
                parameter.normal_(std=0.4)
        head.aspect_gating.logit_scale.fill_(1.3)
    output = {"model.language_model.output.weight": torch.randn(len(tokens), 32)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**released(state), **output, **head.state_dict()}, folder / "mjvideo.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokens.save_pretrained(folder / "tokenizer")
    return folder
