"""What tiny random pipelines are made of: lively weights, autoencoders, tokenizers made here."""

from __future__ import annotations

import re

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import nn

DIALOGUE = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter drawn anew, gains near 1: nothing starts at zero, so no equality is empty."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
            p.mul_(p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
            if "norm" in name and name.endswith(("weight", "gamma")) and not name.endswith("linear.weight"):
                p.add_(1)
    return module


def unhurried(network: nn.Module) -> nn.Module:
    """The network, deaf to the fastest waves of its time and fainter to fast ones: half precision rounds times, and them away."""
    for module in network.modules():
        if isinstance(module, diffusers.models.embeddings.TimestepEmbedding):
            weight = module.linear_1.weight.data
            weight.mul_(torch.linspace(0, 1, weight.shape[1] // 2).repeat(2))
    return network


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


def gemma2(known: str, width: int = 16):
    """A `Gemma2Model` that has the words of `known` as tokens, and its `GemmaTokenizer`."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary, merges = spelt([*special, "▁", *map(chr, range(33, 127))], known.replace(" ", "▁"))
    words = GemmaTokenizer(vocabulary, merges)
    words.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return stirred(Gemma2Model(config)).eval(), words


def clip(width: int = 16, projects: bool = False):
    """A CLIP text encoder whose tokens are letters, with a projection or without, and its `CLIPTokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    words = CLIPTokenizer(vocabulary, [], model_max_length=32)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.eos_token_id,
    )
    return stirred((CLIPTextModelWithProjection if projects else CLIPTextModel)(config), seed=width).eval(), words
