"""Tiny random PixArt pipelines: α with and without micro-conditions of size, its latent-consistency student, Σ."""

from __future__ import annotations

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from tests.samplers.families.parts import autoencoder, stirred, t5


def build(pipeline=PixArtAlphaPipeline, side: int = 8, scheduler=None, variance: bool = True):
    """A side of 128 is what makes α tell its network the size."""
    with torch.random.fork_rng(devices=[]):
        encoder, words = t5()
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8 if variance else 4,
            num_layers=2,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=side,
            use_additional_conditions=None if pipeline is PixArtAlphaPipeline else False,
        )
        vae = autoencoder()
    parts = {"tokenizer": words, "text_encoder": encoder, "transformer": stirred(transformer), "vae": vae}
    return pipeline(**parts, scheduler=scheduler or DPMSolverMultistepScheduler(beta_end=0.02))


VARIANTS = {
    "alpha": build,
    "alpha-1024": lambda: build(side=128),
    "alpha-lcm": lambda: build(scheduler=LCMScheduler()),
    "sigma": lambda: build(PixArtSigmaPipeline),
}
