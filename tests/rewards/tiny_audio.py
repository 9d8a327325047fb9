"""Tiny random CLAPs in the hub's folder layout, and sounds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.rewards.tiny import WORDS, word_tokenizer

RATE = 16_000  # of the tiny extractor, whose window is 1 s


def save_clap(folder: Path, fused: bool = False) -> Path:
    """A ClapModel with a window of 1 s at 16 kHz and 16 mel bands."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    torch.manual_seed(4)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = len(WORDS) + 2
    text = {
        **shape,
        "intermediate_size": 64,
        "vocab_size": end + 1,
        "max_position_embeddings": end + 25,
        "pad_token_id": end,
    }
    audio = {
        **shape,
        "num_mel_bins": 16,
        "spec_size": 64,
        "depths": [1, 1],
        "num_attention_heads": [2, 4],
        "patch_embeds_hidden_size": 16,
        "window_size": 4,
        "enable_fusion": fused,
        "fusion_type": "aff_2d" if fused else None,
        "aff_block_r": 2,
    }
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))
    with torch.no_grad():  # at initialisation all texts and sounds look alike
        for p in model.parameters():
            p.add_(0.25 * torch.randn_like(p) if p.ndim > 1 else 0)
        norm = model.audio_model.audio_encoder.batch_norm
        norm.running_mean.uniform_(-60, -20)  # type: ignore[union-attr]
        norm.running_var.uniform_(100, 400)  # type: ignore[union-attr]
    model.save_pretrained(folder)
    word_tokenizer(folder, 24, ["input_ids", "attention_mask"])
    ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=RATE,
        hop_length=160,
        fft_window_size=512,
        max_length_s=1,
        frequency_min=50,
        frequency_max=7000,
        truncation="fusion" if fused else "rand_trunc",
    ).save_pretrained(folder)
    return folder


def sounds(count: int = 4, samples: int = RATE, channels: int = 1, seed: int = 0) -> Tensor:
    """Tones, a sweep and noise, no two alike: (B, C, N) within [-0.8, 0.8]."""
    time = torch.arange(samples) / RATE
    tones = [torch.sin(2 * torch.pi * (200 + 150 * i) * time * (1 + 0.3 * i * time)) for i in range(count)]
    noise = torch.randn(count, channels, samples, generator=torch.Generator().manual_seed(seed))
    x = torch.stack(tones)[:, None] + 0.05 * noise * torch.arange(1, count + 1)[:, None, None]
    return 0.8 * x / x.abs().amax(dim=(1, 2), keepdim=True)
