"""What tiny random pipelines are made of: lively weights, autoencoders, tokenizers made here."""

from __future__ import annotations

import re

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

DIALOGUE = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter drawn anew, gains near 1: nothing starts at zero, so no equality is empty."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
            p.mul_(p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
            if "norm" in name and name.endswith(("weight", "gamma")):
                p.add_(1)
    return module


def autoencoder(halvings: int = 1, **config) -> nn.Module:
    """An `AutoencoderKL` whose latents have four channels and are 2^halvings smaller than its images."""
    return stirred(
        diffusers.AutoencoderKL(
            block_out_channels=(8,) * (halvings + 1),
            down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
            up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
            norm_num_groups=4,
            latent_channels=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **config,
        )
    )


def spelt(alphabet: list[str], text: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of a byte pair encoding in which the words of `text` are few tokens and others are spelt."""
    merges = []
    for word in dict.fromkeys(re.findall("[Ġ▁]?[A-Za-z]+", text)):
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    vocabulary = dict.fromkeys([*alphabet, *map("".join, merges)])
    return {token: i for i, token in enumerate(vocabulary)}, merges


def dialogue_tokenizer(known: str, chat_template: str | None = None):
    """A `Qwen2Tokenizer` that has the words of `known` as tokens."""
    from transformers import Qwen2Tokenizer

    vocabulary, merges = spelt(sorted(ByteLevel.alphabet()), known.replace(" ", "Ġ"))
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(DIALOGUE)}
    tokenizer = Qwen2Tokenizer(vocabulary, merges, additional_special_tokens=DIALOGUE[1:])
    tokenizer.chat_template = chat_template
    return tokenizer


def t5(width: int = 16):
    """A `T5EncoderModel` whose tokens are letters, without dropout, and its `T5Tokenizer`."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    words = T5Tokenizer(vocab=special + [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"], extra_ids=0)
    config = T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return stirred(T5EncoderModel(config)).eval(), words
