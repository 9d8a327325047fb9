"""Tiny random FLUX.2 pipelines: dev, klein, klein base."""

from __future__ import annotations

import diffusers
import torch

from tests.samplers.families.parts import dialogue_tokenizer, spelt, stirred, unhurried

MARKS = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
MARKS += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% set mark = 'SYSTEM_PROMPT' if m.role == 'system' else 'INST' %}"
    "[{{ mark }}]{% for part in m.content %}{{ part.text }}{% endfor %}[/{{ mark }}]{% endfor %}"
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


def mistral():
    """Mistral 3, deep enough for the thirtieth hidden state, and its processor."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
        PreTrainedTokenizerFast,
    )

    vocabulary, merges = spelt([*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())], SYSTEM_MESSAGE.replace(" ", "Ġ"))
    words = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=MARKS[4:], padding_side="left", **named
    )
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=INSTRUCTIONS)
    sight = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    config = Mistral3Config(
        text_config=TEXT | {"model_type": "mistral", "vocab_size": len(tokenizer), "num_hidden_layers": 31},
        vision_config=sight | {"model_type": "pixtral", "image_size": 28},
    )
    return Mistral3ForConditionalGeneration(config), processor


def qwen():
    """Qwen 3, deep enough for the twenty-seventh hidden state, and its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = dialogue_tokenizer("user assistant think", CHAT)
    config = Qwen3Config(**TEXT, vocab_size=len(tokenizer), num_hidden_layers=28)
    return Qwen3ForCausalLM(config), tokenizer


def autoencoder() -> diffusers.AutoencoderKLFlux2:
    """An autoencoder of four channels, twice smaller than its images, with statistics of patches."""
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    )
    generator = torch.Generator().manual_seed(1)
    vae.bn.running_mean = 0.5 * torch.randn(16, generator=generator)
    vae.bn.running_var = 0.5 + torch.rand(16, generator=generator)
    return stirred(vae)


def build(klein: bool = False, **config):
    with torch.random.fork_rng(devices=[]):
        text_encoder, tokenizer = qwen() if klein else mistral()
        transformer = diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            mlp_ratio=2.0,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=not klein,
        )
        vae = autoencoder()
    return (diffusers.Flux2KleinPipeline if klein else diffusers.Flux2Pipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=stirred(text_encoder),
        tokenizer=tokenizer,
        transformer=unhurried(stirred(transformer)),
        **config,
    )


VARIANTS = {
    "dev": build,
    "klein": lambda: build(klein=True, is_distilled=True),
    "klein base": lambda: build(klein=True),
}
