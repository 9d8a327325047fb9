"""Tiny random Stable Diffusion 3 pipelines: the networks of 3 and 3.5, every set of text encoders, shifts of levels."""

from __future__ import annotations

import diffusers
import torch

from tests.samplers.families.parts import autoencoder, clip, stirred, t5


def build(absent: str = "", scheduler: dict | None = None, **network) -> diffusers.StableDiffusion3Pipeline:
    """A pipeline without the text encoders whose numbers are in `absent`; both CLIPs pool to the width of their tokens."""
    with torch.random.fork_rng(devices=[]):
        encoders = {"": clip(16, projects=True), "_2": clip(24, projects=True), "_3": t5(48)}
        transformer = diffusers.SD3Transformer2DModel(
            **{
                "sample_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": 48,
                "caption_projection_dim": 16,
                "pooled_projection_dim": 40,
                "pos_embed_max_size": 12,
            }
            | network
        )
        vae = autoencoder(scaling_factor=1.5305, shift_factor=0.0609)
    texts = {}
    for i, (suffix, (encoder, tokenizer)) in enumerate(encoders.items(), 1):
        gone = str(i) in absent
        texts |= {f"text_encoder{suffix}": None if gone else encoder, f"tokenizer{suffix}": None if gone else tokenizer}
    levels = diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} if scheduler is None else scheduler))
    return diffusers.StableDiffusion3Pipeline(transformer=stirred(transformer), scheduler=levels, vae=vae, **texts)


VARIANTS = {
    "3": build,
    "3.5": lambda: build(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "without T5": lambda: build("3"),
    "T5 alone": lambda: build("12"),
    "without the first CLIP": lambda: build("1"),
    "growing shift": lambda: build(scheduler={"use_dynamic_shifting": True, "max_shift": 1.16}),
}
