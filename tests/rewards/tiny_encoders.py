"""Random cross-encoders and preference models of a few kilobytes, in the layouts they are published in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.rewards.tiny import WORDS


def bert_tokenizer(folder: Path) -> Path:
    """BERT's tokenizer with a vocabulary of the words here: 19 tokens."""
    from transformers import BertTokenizer

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(folder)
    return folder


def linear(weights: dict[str, Tensor], name: str, read: int, written: int, draw: torch.Generator) -> None:
    weights[f"{name}.weight"] = torch.randn(written, read, generator=draw) / read**0.5
    weights[f"{name}.bias"] = torch.randn(written, generator=draw) / 4


def norm(weights: dict[str, Tensor], name: str, width: int, draw: torch.Generator) -> None:
    weights[f"{name}.weight"] = 1 + torch.randn(width, generator=draw) / 10
    weights[f"{name}.bias"] = torch.randn(width, generator=draw) / 10


def imagereward_weights(head: dict[int, tuple[int, int]]) -> dict[str, Tensor]:
    """A checkpoint with the names of ImageReward.pt: a ViT for 32 pixels, a BERT of 21 words, and a head.

    Args:
        head: number of each linear layer among all the layers of the head -> what it reads and writes.
    """
    draw, weights = torch.Generator().manual_seed(5), {}
    vision, text, wide, words, places = 128, 64, 96, 21, 140
    eye, mouth = "blip.visual_encoder", "blip.text_encoder"
    weights[f"{eye}.cls_token"] = torch.randn(1, 1, vision, generator=draw)
    weights[f"{eye}.pos_embed"] = torch.randn(1, 17, vision, generator=draw)
    linear(weights, f"{eye}.patch_embed.proj", 192, vision, draw)
    weights[f"{eye}.patch_embed.proj.weight"] = weights[f"{eye}.patch_embed.proj.weight"].view(vision, 3, 8, 8)
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        norm(weights, f"{block}.norm1", vision, draw)
        linear(weights, f"{block}.attn.qkv", vision, 3 * vision, draw)
        linear(weights, f"{block}.attn.proj", vision, vision, draw)
        norm(weights, f"{block}.norm2", vision, draw)
        linear(weights, f"{block}.mlp.fc1", vision, 4 * vision, draw)
        linear(weights, f"{block}.mlp.fc2", 4 * vision, vision, draw)
    norm(weights, f"{eye}.norm", vision, draw)
    weights[f"{mouth}.embeddings.position_ids"] = torch.arange(places)[None]
    weights[f"{mouth}.embeddings.word_embeddings.weight"] = torch.randn(words, text, generator=draw)
    weights[f"{mouth}.embeddings.position_embeddings.weight"] = torch.randn(places, text, generator=draw) / 4
    norm(weights, f"{mouth}.embeddings.LayerNorm", text, draw)
    for i in range(2):
        layer = f"{mouth}.encoder.layer.{i}"
        for kind, memory in (("attention", text), ("crossattention", vision)):
            linear(weights, f"{layer}.{kind}.self.query", text, text, draw)
            linear(weights, f"{layer}.{kind}.self.key", memory, text, draw)
            linear(weights, f"{layer}.{kind}.self.value", memory, text, draw)
            linear(weights, f"{layer}.{kind}.output.dense", text, text, draw)
            norm(weights, f"{layer}.{kind}.output.LayerNorm", text, draw)
        linear(weights, f"{layer}.intermediate.dense", text, wide, draw)
        linear(weights, f"{layer}.output.dense", wide, text, draw)
        norm(weights, f"{layer}.output.LayerNorm", text, draw)
    linear(weights, "blip.vision_proj", vision, 256, draw)
    linear(weights, "blip.text_proj", text, 256, draw)
    for number, (read, written) in head.items():
        linear(weights, f"mlp.layers.{number}", read, written, draw)
    return weights


def save_imagereward(file: Path, prefix: str = "") -> Path:
    """ImageReward.pt: the numbers left out of the head are its dropouts."""
    head = {0: (64, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    torch.save({prefix + key: value for key, value in imagereward_weights(head).items()}, file)
    return file


def save_cyclereward(file: Path) -> Path:
    """CycleReward-Combo.pth: the numbers left out of the head are its GELUs."""
    head = {0: (64, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 8: (16, 1)}
    torch.save(imagereward_weights(head), file)
    return file


def save_mps(file: Path, clip: str, prefix: str = "mps.") -> Path:
    """The converted MPS: `model` is the CLIP of a folder, moved a little, `cross_model` two layers of 2 heads of 8.

    Args:
        file: .safetensors.
        clip: the folder.
        prefix: "" for the names of the released module.
    """
    from safetensors.torch import load_file, save_file

    draw, width, head, wide = torch.Generator().manual_seed(6), 16, 8, 64
    weights = {f"model.{key}": value for key, value in load_file(Path(clip) / "model.safetensors").items()}
    weights = {key: value + 0.05 * torch.randn(value.shape, generator=draw) for key, value in weights.items()}
    weights["model.text_model.embeddings.position_ids"] = torch.arange(12)[None]
    shapes = {
        0: {
            "to_q": (16, width),
            "to_kv": (2 * head, width),
            "to_out": (width, 16),
            "ff.0": (2 * wide, width),
            "ff.2": (width, wide),
        },
        1: {
            "fused_attn_ff_proj": (16 + 2 * head + 2 * wide, width),
            "attn_out": (width, 16),
            "ff_out.1": (width, wide),
        },
    }
    for i in range(2):
        for kind, parts in shapes.items():
            block = f"cross_model.layers.{i}.{kind}.fn"
            weights[f"{block}.norm.weight"] = 1 + torch.randn(width, generator=draw) / 10
            weights[f"{block}.norm.bias"] = torch.zeros(width)
            for part, (written, read) in parts.items():
                weights[f"{block}.{part}.weight"] = torch.randn(written, read, generator=draw) / read**0.5
        weights[f"cross_model.layers.{i}.1.fn.rotary_emb.inv_freq"] = 10000 ** (-torch.arange(0, head, 2) / head)
    save_file({prefix + key: value for key, value in weights.items()}, file)
    return file


def open_clip_weights(vision: int = 32, layers: int = 2) -> dict[str, Tensor]:
    """A CLIP for 32 pixels by OpenAI's names, which are open_clip's: `tiny.OPEN_CLIP`, but for the width of the image tower."""
    draw, weights, text, joint = torch.Generator().manual_seed(7), {}, 32, 16
    for tower, width in (("visual.transformer", vision), ("transformer", text)):
        for i in range(layers):
            block = f"{tower}.resblocks.{i}"
            norm(weights, f"{block}.ln_1", width, draw)
            linear(weights, f"{block}.attn.in_proj", width, 3 * width, draw)
            linear(weights, f"{block}.attn.out_proj", width, width, draw)
            norm(weights, f"{block}.ln_2", width, draw)
            linear(weights, f"{block}.mlp.c_fc", width, 4 * width, draw)
            linear(weights, f"{block}.mlp.c_proj", 4 * width, width, draw)
    for name, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        norm(weights, name, width, draw)
    shapes = {
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": (17, vision),
        "visual.conv1.weight": (vision, 3, 8, 8),
        "visual.proj": (vision, joint),
        "token_embedding.weight": (49408, text),
        "positional_embedding": (12, text),
        "text_projection": (text, joint),
    }
    weights |= {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()}
    weights["logit_scale"] = torch.tensor(4.6052)
    return {k.replace("in_proj.", "in_proj_"): v for k, v in weights.items()}


def aesthetic_weights(layers: dict[int, tuple[int, int]]) -> dict[str, Tensor]:
    """An aesthetic head, by the numbers of its layers -> what each reads and writes."""
    draw, weights = torch.Generator().manual_seed(8), {}
    for number, (read, written) in layers.items():
        linear(weights, str(number), read, written, draw)
    return weights


def save_shadow(folder: Path) -> Path:
    """A ViT that sorts pictures of 32 pixels into hq and lq, in the layout of aesthetic-shadow-v2."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(9)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    labels = {"id2label": {0: "hq", 1: "lq"}, "label2id": {"hq": 0, "lq": 1}}
    model = ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=8, **labels))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) if p.ndim > 1 else 0)
    model.save_pretrained(folder)
    mean, std = [0.65463551, 0.60715182, 0.61108185], [0.32903292, 0.32726001, 0.31909652]
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=mean, image_std=std).save_pretrained(folder)
    return folder


def redraw(file: Path) -> Path:
    """Replaces the weights of a .safetensors file by ones that depend on their names and shapes only."""
    from safetensors.torch import load_file, save_file

    draw, weights = torch.Generator().manual_seed(10), load_file(file)
    for name, value in sorted(weights.items()):
        if name.endswith("weight") and "norm" in name:
            weights[name] = 1 + torch.randn(value.shape, generator=draw) / 10
        elif name != "logit_scale":
            weights[name] = torch.randn(value.shape, generator=draw) / 5
    save_file(weights, file, metadata={"format": "pt"})
    return file


def evalmuse_weights() -> dict[str, Tensor]:
    """A checkpoint with the names of fga_blip2.pth: an EVA transformer for 28 pixels and a Q-Former of 20 words and 32 queries."""
    draw, weights = torch.Generator().manual_seed(11), {}
    vision, text, wide, words, places = 88, 64, 96, 20, 64
    eye, mouth = "visual_encoder", "Qformer.bert"
    weights[f"{eye}.cls_token"] = torch.randn(1, 1, vision, generator=draw)
    weights[f"{eye}.pos_embed"] = torch.randn(1, 17, vision, generator=draw)
    linear(weights, f"{eye}.patch_embed.proj", 147, vision, draw)
    weights[f"{eye}.patch_embed.proj.weight"] = weights[f"{eye}.patch_embed.proj.weight"].view(vision, 3, 7, 7)
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        norm(weights, f"{block}.norm1", vision, draw)
        linear(weights, f"{block}.attn.qkv", vision, 3 * vision, draw)
        del weights[f"{block}.attn.qkv.bias"]
        weights[f"{block}.attn.q_bias"] = torch.randn(vision, generator=draw) / 4
        weights[f"{block}.attn.v_bias"] = torch.randn(vision, generator=draw) / 4
        linear(weights, f"{block}.attn.proj", vision, vision, draw)
        norm(weights, f"{block}.norm2", vision, draw)
        linear(weights, f"{block}.mlp.fc1", vision, 4 * vision, draw)
        linear(weights, f"{block}.mlp.fc2", 4 * vision, vision, draw)
    norm(weights, "ln_vision", vision, draw)
    weights[f"{mouth}.embeddings.position_ids"] = torch.arange(places)[None]
    weights[f"{mouth}.embeddings.word_embeddings.weight"] = torch.randn(words, text, generator=draw)
    weights[f"{mouth}.embeddings.position_embeddings.weight"] = torch.randn(places, text, generator=draw) / 4
    norm(weights, f"{mouth}.embeddings.LayerNorm", text, draw)
    for i in range(4):
        layer = f"{mouth}.encoder.layer.{i}"
        for kind, memory in (("attention", text), ("crossattention", vision))[: 2 - i % 2]:
            linear(weights, f"{layer}.{kind}.self.query", text, text, draw)
            linear(weights, f"{layer}.{kind}.self.key", memory, text, draw)
            linear(weights, f"{layer}.{kind}.self.value", memory, text, draw)
            linear(weights, f"{layer}.{kind}.output.dense", text, text, draw)
            norm(weights, f"{layer}.{kind}.output.LayerNorm", text, draw)
        for kind in ("", "_query"):
            linear(weights, f"{layer}.intermediate{kind}.dense", text, wide, draw)
            linear(weights, f"{layer}.output{kind}.dense", wide, text, draw)
            norm(weights, f"{layer}.output{kind}.LayerNorm", text, draw)
    linear(weights, "Qformer.cls.predictions.transform.dense", text, text, draw)
    linear(weights, "vision_proj", text, 256, draw)
    linear(weights, "text_proj", text, 256, draw)
    linear(weights, "itm_head", text, 2, draw)
    for number, (read, written) in {0: (text, 256), 2: (256, 128), 4: (128, 64), 6: (64, 16), 8: (16, 1)}.items():
        linear(weights, f"mask_proj.layers.{number}", read, written, draw)
    weights["query_tokens"] = torch.randn(1, 32, text, generator=draw)
    weights["temp"] = torch.tensor(0.07)
    return weights


def save_evalmuse(folder: Path) -> Path:
    """fga_blip2.pth as LAVIS saves it, with a tokenizer beside it."""
    bert_tokenizer(folder)
    torch.save({"model": evalmuse_weights(), "optimizer": {"state": {}}, "epoch": 4}, folder / "fga_blip2.pth")
    return folder / "fga_blip2.pth"
