"""Stable Diffusion XL: the schedulers and students of published checkpoints, encoders absent, latents with moments; ControlNets."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import torch

from tests.conftest import build_pipeline, save_tokenizer
from tests.samplers.families.parts import autoencoder, stirred

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
BLOCKS = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,  # the pooled text and six sizes
}


def encoder(words, kind, width: int):
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=8,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.eos_token_id,
    )
    return stirred(kind(config), seed=width).eval()


def build(scheduler=None, *, embeds=False, encoders=2, zeros=True, controlled=False, **vae):
    """A random pipeline of the real classes, whose images are eight times the size of their latents."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
        words = save_tokenizer(Path(folder))
        parts = {"tokenizer": words, "text_encoder": encoder(words, CLIPTextModel, 16)}
        if encoders == 1:
            parts = dict.fromkeys(parts)
        width = 24 if encoders == 2 else 8
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            time_cond_proj_dim=8 if embeds else None,
            **BLOCKS,
        )
        parts |= {"tokenizer_2": words, "text_encoder_2": encoder(words, CLIPTextModelWithProjection, 8)}
        parts |= {"unet": stirred(unet), "vae": autoencoder(3, **vae), "force_zeros_for_empty_prompt": zeros}
        if controlled:
            beside = diffusers.ControlNetModel(
                cross_attention_dim=width, conditioning_embedding_out_channels=(4, 4, 8, 8), **BLOCKS
            )
            parts["controlnet"] = stirred(beside, seed=1)
    kind = diffusers.StableDiffusionXLControlNetPipeline if controlled else diffusers.StableDiffusionXLPipeline
    scheduler = scheduler or diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
    return kind(**parts, scheduler=scheduler, add_watermarker=False)


def build_controlled_sd(guidance_embedding=False):
    """Stable Diffusion with a ControlNet."""
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        pipe = build_pipeline(Path(folder), guidance_embedding=guidance_embedding)
        beside = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return diffusers.StableDiffusionControlNetPipeline(
        **parts | {"unet": stirred(pipe.unet), "controlnet": stirred(beside, seed=1)}, requires_safety_checker=False
    )


VARIANTS = {
    "base": build,
    "empty negatives that speak": lambda: build(zeros=False),
    "DDIM, latents with moments": lambda: build(
        diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        latents_mean=[-1.6, 1.1, 0.2, -0.3],
        latents_std=[8.4, 5.9, 4.2, 4.5],
    ),
    "turbo": lambda: build(diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")),
    "lightning": lambda: build(diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")),
    "LCM": lambda: build(diffusers.LCMScheduler(**BETAS), embeds=True),
    "merged LCM-LoRA": lambda: build(diffusers.LCMScheduler(**BETAS)),
    "second encoder alone": lambda: build(encoders=1),
}
