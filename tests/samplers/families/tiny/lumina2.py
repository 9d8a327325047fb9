"""Tiny random Lumina-Image 2.0 pipelines of the real classes."""

from __future__ import annotations

import string

import diffusers
import torch

from tests.samplers.families.parts import autoencoder, spelt, stirred

MARKS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
SYSTEM = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based on "
    "textual prompts or user prompts. <Prompt Start>"
)


def pipeline(**scheduler) -> diffusers.Lumina2Pipeline:
    """A pipeline whose latents have four channels; they are eight times smaller than its images, as the pipeline insists."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    with torch.random.fork_rng():
        vocabulary, merges = spelt([*MARKS, *string.printable, "▁"], SYSTEM.replace(" ", "▁"))
        tokenizer = GemmaTokenizer(vocabulary, merges, add_bos_token=True)
        text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                query_pre_attn_scalar=8,
            )
        )
        transformer = diffusers.Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(256, 16, 16),
            cap_feat_dim=16,
        )
        vae = autoencoder(halvings=3, scaling_factor=0.3611, shift_factor=0.1159)
    return diffusers.Lumina2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 6.0} | scheduler)),
        vae=vae,
        text_encoder=stirred(text_encoder),
        tokenizer=tokenizer,
        transformer=stirred(transformer),
    )


VARIANTS = {"base": pipeline, "growing shift": lambda: pipeline(shift=1.0, use_dynamic_shifting=True)}
