"""Tiny random Qwen-Image pipelines of the real classes."""

from __future__ import annotations

import diffusers
import torch

from tests.samplers.families.parts import dialogue_tokenizer, stirred

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
LEVELS = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}


def pipeline(scheduler: dict | None = None, **network) -> diffusers.QwenImagePipeline:
    """A pipeline whose latents have four channels and are twice smaller than its images."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng():
        tokenizer = dialogue_tokenizer(TEMPLATE)
        text_encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_heads": 2,
                    "out_hidden_size": 16,
                },
            )
        )
        transformer = diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
            **network,
        )
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7, 0.3, 0.1, 0.9],
            latents_std=[2.8, 1.4, 2.3, 0.6],
        )
    stirred(transformer)
    slow = transformer.time_text_embed.timestep_embedder.linear_1.weight.detach().unflatten(1, (2, -1))
    slow[:, :, : slow.shape[2] // 2] = (
        0  # smooth in time as trained networks are: in half precision theirs has three digits
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            **(LEVELS | {"shift_terminal": 0.02}) if scheduler is None else scheduler
        ),
        vae=stirred(vae),
        text_encoder=stirred(text_encoder),
        tokenizer=tokenizer,
        transformer=transformer,
    )


VARIANTS = {
    "base": pipeline,
    "lightning": lambda: pipeline(LEVELS | {"base_shift": 1.0986, "max_shift": 1.0986}),
}
