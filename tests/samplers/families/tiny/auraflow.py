"""A tiny random AuraFlow pipeline."""

from __future__ import annotations

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from tests.samplers.families.parts import autoencoder, stirred, t5


def build():
    with torch.random.fork_rng(devices=[]):
        _, words = t5()
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        )
        transformer = AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        )
        vae = autoencoder()
    parts = {"text_encoder": stirred(encoder).eval(), "transformer": stirred(transformer), "vae": vae}
    return AuraFlowPipeline(tokenizer=words, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73), **parts)


VARIANTS = {"auraflow": build}
