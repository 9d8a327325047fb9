"""Tiny random Sana pipelines: with the levels of DPM-Solver and of Euler (1.5, with normed queries), and Sprint."""

from __future__ import annotations

import inspect

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from tests.samplers.families.parts import gemma2, stirred

INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def build(pipeline=SanaPipeline, scheduler=None, variance: bool = False, **config):
    with torch.random.fork_rng(devices=[]):
        encoder, words = gemma2(" ".join(INSTRUCTION))
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=8 if variance else 4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
            guidance_embeds=pipeline is SanaSprintPipeline,
            **config,
        )
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            scaling_factor=0.41407,
        )
    parts = {"tokenizer": words, "text_encoder": encoder, "transformer": stirred(transformer), "vae": stirred(vae)}
    solver = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    return pipeline(**parts, scheduler=scheduler or DPMSolverMultistepScheduler(**solver))


VARIANTS = {
    "dpm-solver": build,
    "euler": lambda: build(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), qk_norm="rms_norm_across_heads", timestep_scale=0.5
    ),
    "sprint": lambda: build(SanaSprintPipeline, SCMScheduler(), qk_norm="rms_norm_across_heads"),
}
