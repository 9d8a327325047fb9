"""Tiny random Z-Image pipelines of the real classes."""

from __future__ import annotations

import diffusers
import torch

from tests.samplers.families.parts import autoencoder, dialogue_tokenizer, stirred

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def pipeline(shift: float = 6.0, **scheduler) -> diffusers.ZImagePipeline:
    """A pipeline whose latents have four channels and are twice smaller than its images."""
    from transformers import Qwen3Config, Qwen3Model

    with torch.random.fork_rng():
        tokenizer = dialogue_tokenizer("user assistant", CHAT)
        text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
        )
        transformer = diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[2, 2, 4],
            axes_lens=[256, 32, 32],
        )
        vae = autoencoder(scaling_factor=0.3611, shift_factor=0.1159)
    stirred(transformer).all_final_layer[
        "2-1"
    ].linear.weight.data *= 0.3  # so that samples bend little under guidance 6
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **scheduler),
        vae=vae,
        text_encoder=stirred(text_encoder),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def turbo() -> diffusers.ZImagePipeline:
    """The student, known by its name."""
    pipe = pipeline(shift=3.0)
    pipe.register_to_config(_name_or_path="Tongyi-MAI/Z-Image-Turbo")
    return pipe


VARIANTS = {"base": pipeline, "turbo": turbo, "growing shift": lambda: pipeline(1.0, use_dynamic_shifting=True)}
