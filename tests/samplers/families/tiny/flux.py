"""Tiny random FLUX.1 pipelines: dev, schnell, and a checkpoint trained out of the distillation."""

from __future__ import annotations

import diffusers
import torch

from tests.samplers.families.parts import autoencoder, clip, stirred, t5, unhurried


def build(guidance_embeds: bool = True, growing: bool = True, **network) -> diffusers.FluxPipeline:
    with torch.random.fork_rng(devices=[]):
        (encoder, tokenizer), (encoder_2, tokenizer_2) = clip(16), t5(24)
        transformer = diffusers.FluxTransformer2DModel(
            **{
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": 24,
                "pooled_projection_dim": 16,
                "guidance_embeds": guidance_embeds,
                "axes_dims_rope": (2, 2, 4),
            }
            | network
        )
        vae = autoencoder(scaling_factor=0.3611, shift_factor=0.1159)
    levels = {"shift": 3.0, "use_dynamic_shifting": True} if growing else {"shift": 1.0}
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**levels),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=unhurried(stirred(transformer)),
    )


VARIANTS = {
    "dev": build,
    "schnell": lambda: build(guidance_embeds=False, growing=False),
    "undistilled": lambda: build(guidance_embeds=False),
}
