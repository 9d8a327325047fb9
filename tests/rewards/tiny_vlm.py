"""Random vision-language models of some hundred kilobytes in the hub's folder layout: weights, configs, tokenizer, chat template,
processor. They answer nonsense, but the same nonsense each time, and every word and pixel matters to them.

The vocabulary is a byte-level BPE with every byte and some hundreds of merges, so any text can be read and written; "Yes", "No",
the digits and the five words of Q-Align are single tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewards.judging import published

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
WORDS = "Yes yes YES No no NO excellent good fair poor bad image video picture quality rating the of a an is this does show score"
WORDS += " please answer with prompt text red green blue cat dog house bird car photo two on reward assistant user system what"
PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}  # at most 9 tokens an image
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXT |= {"max_position_embeddings": 8192}
VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}

CHAT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}THINK{% endif %}{% endif %}"
)  # ChatML, as the Qwen family speaks it


def template(image: str, video: str, think: str = "") -> str:
    return CHAT.replace("IMAGE", image).replace("VIDEO", video).replace("THINK", think)


QWEN_CHAT = template(*(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")))
THINKING_CHAT = template(
    *(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")), think="<think>\n"
)


def tokenizer(special: list[str]) -> Any:
    """A Qwen2 tokenizer; ids of `special` follow those of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    words = sorted({*WORDS.split(), *published("hpsv3", "image").split()})  # long instructions in few tokens
    raw.train_from_iterator([word for word in words for word in (word, " " + word)], trainer)
    state = json.loads(raw.to_str())["model"]
    made = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(m) for m in state["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
        model_max_length=8192,
    )
    return made


def loud(model: nn.Module, scale: float = 0.15) -> None:
    """Weights large enough that inputs show in the outputs."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise if parameter.ndim > 1 else 0.02 * noise)


def ids(tokens: Any) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokens.convert_tokens_to_ids(token) for name, token in names.items()}


def finish(folder: Path, model: Any, processor: Any) -> Path:
    """Saves model and processor; greedy decoding that ends at the end of a turn."""
    tokens = processor.tokenizer
    loud(model)
    model.generation_config.eos_token_id = [tokens.eos_token_id, tokens.pad_token_id]
    model.generation_config.pad_token_id = tokens.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_qwen2_vl(folder: Path, chat: str = QWEN_CHAT) -> Path:
    """A Qwen2VLForConditionalGeneration with its processor; keys are named as in the published Qwen2-VL checkpoints."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(0)
    tokens = tokenizer(SPECIAL)
    ends = {
        "bos_token_id": tokens.pad_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    config = Qwen2VLConfig(
        text_config={
            **TEXT,
            **ends,
            "vocab_size": len(tokens) + 7,
            "rope_parameters": rope,
        },  # padded as the published are
        vision_config={**VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **ids(tokens),
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=PIXELS), tokens, Qwen2VLVideoProcessor(size=PIXELS), chat_template=chat
    )
    return finish(folder, Qwen2VLForConditionalGeneration(config), processor)


def save_qwen2_5_vl(folder: Path, chat: str = QWEN_CHAT) -> Path:
    """A Qwen2_5_VLForConditionalGeneration, whose vision attends in windows."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(1)
    tokens = tokenizer(SPECIAL)
    ends = {
        "bos_token_id": tokens.pad_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    windows = {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **ends, "vocab_size": len(tokens) + 7, "rope_parameters": rope},
        vision_config={**VISION, **windows, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32},
        **ids(tokens),
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=PIXELS), tokens, Qwen2VLVideoProcessor(size=PIXELS), chat_template=chat
    )
    return finish(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def save_qwen3_vl(folder: Path, chat: str = QWEN_CHAT) -> Path:
    """A Qwen3VLForConditionalGeneration: patches of 16, mean and std 0.5, time stamps in words between the frames of a video."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    torch.manual_seed(2)
    tokens = tokenizer(SPECIAL)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 5e6}
    deep = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16, "out_hidden_size": 32}
    config = Qwen3VLConfig(
        text_config={
            **TEXT, "head_dim": 8, "vocab_size": len(tokens) + 7, "rope_parameters": rope, "pad_token_id": tokens.pad_token_id,
        },
        vision_config={**VISION, **deep, "patch_size": 16, "hidden_size": 16, "intermediate_size": 32},
        **ids(tokens),
    )  # fmt: skip
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16}
    images = Qwen2VLImageProcessor(size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96}, **half)
    videos = Qwen3VLVideoProcessor(size={"shortest_edge": 4 * 32 * 32, "longest_edge": 4 * 96 * 96}, **half)
    return finish(
        folder, Qwen3VLForConditionalGeneration(config), Qwen3VLProcessor(images, tokens, videos, chat_template=chat)
    )


def save_llava_onevision(folder: Path) -> Path:
    """A LlavaOnevisionForConditionalGeneration: a SigLIP tower on a picture and its tiles."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    torch.manual_seed(3)
    tokens = tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"])
    side, tiles = {"height": 28, "width": 28}, [[28, 28], [28, 56], [56, 28]]
    ends = {
        "bos_token_id": tokens.pad_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, image_size=28, patch_size=14, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, **ends, vocab_size=len(tokens) + 7),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        video_token_index=tokens.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tiles,
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=tiles),
        tokens,
        LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n", "<video>\n"),
    )
    return finish(folder, LlavaOnevisionForConditionalGeneration(config), processor)


def save_hpsv3(folder: Path, qwen: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A file in HPSv3's published layout: a Qwen2-VL with one more token and a head, keys named as before transformers 4.52."""
    from safetensors.torch import load_file, save_file

    weights = load_file(qwen / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    rows = len(tokenizer([*SPECIAL, "<|Reward|>"]))
    added = torch.randn(1, 32, generator=generator)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name][: rows - 1], added])
    for layer, (read, written) in {0: (32, 24), 3: (24, 16), 5: (16, 2)}.items():
        weights[f"rm_head.{layer}.weight"] = torch.randn(written, read, generator=generator) * (2 / read) ** 0.5
        weights[f"rm_head.{layer}.bias"] = torch.randn(written, generator=generator) / 4
    folder.mkdir(parents=True, exist_ok=True)
    kept = {k: v.to(torch.float32 if k.startswith("rm_head") else dtype).contiguous() for k, v in weights.items()}
    save_file(kept, folder / "HPSv3.safetensors")
    return folder / "HPSv3.safetensors"


def save_t5_tokenizer(folder: Path) -> Path:
    """A FlanT5 tokenizer: letters, some words, two sentinels."""
    from transformers import T5Tokenizer

    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        *map(chr, range(33, 127)),
        *(f"▁{word}" for word in dict.fromkeys(WORDS.split())),
    ]
    scores = [(piece, -1.0 if piece.startswith("▁") and len(piece) > 1 else -9.0) for piece in pieces]
    T5Tokenizer(vocab=scores, extra_ids=2, model_max_length=512).save_pretrained(folder)
    return folder


def save_clip_flant5(folder: Path, tower: Path, with_tower: bool = True) -> Path:
    """A CLIP-FlanT5 in its published layout, one file, keys named as by transformers 4; `tower` gets CLIP's folder."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(5)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = CLIPVisionModel(CLIPVisionConfig(**vision, image_size=28, patch_size=14))
    loud(clip)
    clip.save_pretrained(tower)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 192}
    config = T5Config(**shape, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    loud(model, 0.3)
    weights = {k: v for k, v in model.state_dict().items() if "embed_tokens" not in k}
    weights["lm_head.weight"] = 0.3 * torch.randn(192, 32)  # FlanT5 does not tie it
    if with_tower:
        names = {k: k if k.startswith("vision_model.") else f"vision_model.{k}" for k in clip.state_dict()}
        weights |= {f"vision_tower.vision_tower.{names[k]}": v for k, v in clip.state_dict().items()}
    for layer, read in ((0, 16), (2, 32)):
        weights[f"mm_projector.{layer}.weight"] = torch.randn(32, read) / read**0.5
        weights[f"mm_projector.{layer}.bias"] = torch.randn(32) / 4
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    own = {
        "model_type": "clip_t5",
        "tie_word_embeddings": False,
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
    }
    own |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    (folder / "config.json").write_text(json.dumps({**shape, **own}))
    return folder
