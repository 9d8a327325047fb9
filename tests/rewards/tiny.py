"""Random dual encoders of a few kilobytes in the hub's folder layout, and images of natural statistics."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

WORDS = ["a", "the", "of", "on", "two", "red", "green", "blue", "cat", "dog", "bird", "house", "car", "photo"]


def natural(batch: int, height: int, width: int, seed: int = 0, slope: float = 1.0) -> Tensor:
    """Images with a 1/f**slope amplitude spectrum, like photographs at slope 1, filling [0, 1]: (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64) - 0.5
    fy, fx = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    radius = torch.hypot(fy, fx).clamp(min=1 / max(height, width))
    x = torch.fft.irfft2(torch.fft.rfft2(noise) / radius**slope, s=(height, width)).float()
    low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
    return (x - low) / (high - low)


def word_tokenizer(folder: Path, length: int, names: list[str]) -> None:
    """A whitespace tokenizer with start and end tokens; `names` are what it returns."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<unk>", *WORDS, "<s>", "</s>"])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=length,
        model_input_names=names,
    ).save_pretrained(folder)


def save_clip(folder: Path) -> Path:
    """A CLIPModel with logits of the published size, and a processor that shrinks to 36 and crops to 32."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = len(WORDS) + 2
    text = {**shape, "vocab_size": end + 1, "max_position_embeddings": 12, "eos_token_id": end, "bos_token_id": end - 1}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, logit_scale_init_value=4.6052)
    )
    with torch.no_grad():  # at initialisation all texts look alike
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) if p.ndim > 1 else 0)
    model.save_pretrained(folder)
    word_tokenizer(folder, 12, ["input_ids", "attention_mask"])
    CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """A SiglipModel, whose score has a bias and whose text is always padded."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": len(WORDS) + 3, "max_position_embeddings": 10, "projection_size": 32}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) if p.ndim > 1 else 0)
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-12.9)
    model.save_pretrained(folder)
    word_tokenizer(folder, 10, ["input_ids"])
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_siglip2(folder: Path) -> Path:
    """A NaFlex Siglip2Model for up to 16 patches of 8 pixels, whatever their arrangement."""
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    torch.manual_seed(4)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": len(WORDS) + 3, "max_position_embeddings": 10, "projection_size": 32}
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config={**shape, "num_patches": 16, "patch_size": 8}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) if p.ndim > 1 else 0)
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-12.9)
    model.save_pretrained(folder)
    word_tokenizer(folder, 10, ["input_ids"])
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return folder


OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def save_open_clip(folder: Path, resize_mode: str = "shortest") -> Path:
    """An open_clip model in the layout of its `local-dir:` names, with a plain checkpoint beside it."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(2)
    model = open_clip.CLIP(**OPEN_CLIP)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p) if p.ndim > 1 else 0)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"resize_mode": resize_mode}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "kilter-tiny.json").write_text(json.dumps(OPEN_CLIP))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def save_aesthetic(file: Path, width: int = 16) -> Path:
    """LAION's aesthetic head v2 in its published layout: the numbers left out are its dropouts."""
    generator, weights = torch.Generator().manual_seed(3), {}
    for layer, (read, written) in {0: (width, 24), 2: (24, 12), 4: (12, 8), 6: (8, 4), 7: (4, 1)}.items():
        weights[f"layers.{layer}.weight"] = torch.randn(written, read, generator=generator) * (2 / read) ** 0.5
        weights[f"layers.{layer}.bias"] = torch.randn(written, generator=generator) / 4
    weights["layers.7.bias"] += 5  # where ratings from 1 to 10 have their middle
    torch.save(weights, file)
    return file
