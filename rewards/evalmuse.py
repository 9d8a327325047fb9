"""FGA-BLIP2 of EvalMuse: how well an image shows its prompt, as people rate it from 1 to 5.

    image     -> EVA ViT-g/14, a norm                                        677 tokens v at 364 pixels
    32 learned queries and the prompt -> Q-Former, the queries looking at v  h_1 .. h_32 at the queries
    score     1 + 4 mean_k softmax(W h_k + b)[match]

BLIP-2's matching head, tuned on EvalMuse-40K's ratings. Its names are LAVIS' own; they are renamed to those of transformers'
BLIP-2. Sizes are read from the weights, given that heads are 88 wide in EVA's transformer and 64 in BERT's.

Sources: Han et al., "EvalMuse-40K", 2024, arXiv 2412.18150, and its released code. Li et al., "BLIP-2", 2023, arXiv 2301.12597.

As in the released evaluation prompts are lowercased, lose the marks . ! " ( ) * # : ; ~ and end after 50 words. Its scores of the
single words of a prompt are not given here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .base import Prompt, Reward
from .loading import fill, find, loading, precision, pretrained_tokenizer, read_weights, unfilled, warn_if_cut
from .preprocess import Preprocess, Quantize

if TYPE_CHECKING:
    from transformers import Blip2QFormerConfig, Blip2VisionModel

__all__ = ["EvalMuse"]

WORDS = 50
MARKS = re.compile(r"[.!\"()*#:;~]")
EVA_HEAD, BERT_HEAD = 88, 64
RENAMED = {  # in this order
    "visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "visual_encoder.blocks.": "vision.encoder.layers.",
    "ln_vision.": "vision.post_layernorm.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.proj.": ".self_attn.projection.",
    ".attn.": ".self_attn.",
    "Qformer.bert.embeddings.LayerNorm.": "qformer.layernorm.",
    "Qformer.bert.embeddings.": "embeddings.",
    "Qformer.bert.": "qformer.",
    "attention.self.": "attention.attention.",
}
UNREAD = [
    r"Qformer\.cls\..*",
    r"(vision|text|mask)_proj\..*",
    r"temp",
    r".*\.position_ids",
    r".*\.self_attn\.[qv]_bias",
]


class EvalMuse(Reward):
    """FGA-BLIP2 of EvalMuse: how well an image shows what its prompt says.

    Range: 1 to 5
    Size: 364, squeezed
    Gradient: unless `quantize` is "hard"
    Weights: hanshuhao/FGA-BLIP2, RE-N-Y/evalmuse
    Licence: Apache-2.0 (code), BSD-3-Clause (LAVIS)

    Args:
        weights: a file by LAVIS' names, or owner/name/file on the hub.
        tokenizer: folder or hub id of BERT's uncased tokenizer.
        dtype: type the image tower runs in; the rest and the score are always float32.
        quantize: whether pixels are rounded to 8 bits as published tables did: "hard" (no gradient), "ste" or "none".

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the weights have another layout.
    """

    def __init__(
        self,
        weights: str = "hanshuhao/FGA-BLIP2/fga_blip2.pth",
        tokenizer: str = "google-bert/bert-base-uncased",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        kind = precision(dtype)
        from transformers import Blip2QFormerModel
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        self.tokenizer = pretrained_tokenizer(tokenizer)
        self.tokenizer.add_tokens(["[DEC]"], special_tokens=True)
        with loading(weights, "a file in the layout of fga_blip2.pth, or owner/name/file of one on the hub"):
            found = renamed(read_weights(find(weights)))
        try:
            with unfilled():
                self.vision = vision_model(found)
                config = query_config(found)
                self.embeddings, self.qformer = Blip2TextEmbeddings(config), Blip2QFormerModel(config)
            self.query_tokens = nn.Parameter(torch.empty_like(found["query_tokens"]))
        except KeyError as missing:
            raise ValueError(
                "EvalMuse needs the keys visual_encoder.*, Qformer.bert.* and query_tokens; "
                f"{weights} lacks {missing} and holds {', '.join(list(found)[:4])}..."
            ) from missing
        self.itm_head = nn.Linear(config.hidden_size, 2)
        fill(self, found, weights, UNREAD)
        if len(self.tokenizer) > config.vocab_size:
            raise ValueError(
                f"the tokenizer {tokenizer} knows {len(self.tokenizer)} words, but {weights} {config.vocab_size}"
            )
        size = self.vision.config.image_size
        assert isinstance(size, int)
        self.preprocess = Preprocess("squash", size, quantize=quantize)
        self.differentiable = self.preprocess.differentiable
        self.vision.to(kind)
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        pixels = self.preprocess(media).to(self.vision.dtype)
        image = self.vision(pixel_values=pixels).last_hidden_state.to(self.query_tokens.dtype)
        captions = [self.caption(prompt.text) for prompt in prompts]
        limit = self.embeddings.position_embeddings.num_embeddings
        text = self.tokenizer(captions, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(
            media.device
        )
        queries = self.query_tokens.expand(len(media), -1, -1)
        count = queries.shape[1]
        states = self.qformer(
            query_embeds=self.embeddings(input_ids=text["input_ids"], query_embeds=queries),
            query_length=count,
            attention_mask=torch.cat(
                [text["attention_mask"].new_ones(len(media), count), text["attention_mask"]], dim=1
            ),
            encoder_hidden_states=image,
        ).last_hidden_state[:, :count]
        return 1 + 4 * self.itm_head(states).softmax(dim=-1)[..., 1].mean(dim=-1)

    def caption(self, text: str) -> str:
        """A prompt as LAVIS cleans it."""
        words = re.sub(r"\s{2,}", " ", MARKS.sub(" ", text.lower())).rstrip("\n").strip(" ").split(" ")
        warn_if_cut(self.name, text, len(words), WORDS, "words")
        return " ".join(words[:WORDS])


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names to those of this module; the biases of queries and values become one with zeros for the keys."""
    result = {}
    for key, value in weights.items():
        for old, new in RENAMED.items():
            key = key.replace(old, new)
        result[key] = value
    for key in [key for key in result if key.endswith(".q_bias")]:
        prefix, query = key.removesuffix("q_bias"), result[key]
        result[f"{prefix}qkv.bias"] = torch.cat([query, torch.zeros_like(query), result[f"{prefix}v_bias"]])
    return result


def vision_model(weights: Mapping[str, Tensor]) -> Blip2VisionModel:
    """An empty EVA transformer of the size of the weights."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    width, _, patch, _ = weights["vision.embeddings.patch_embedding.weight"].shape
    count = weights["vision.embeddings.position_embedding"].shape[1] - 1
    network = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=width,
            intermediate_size=len(weights["vision.encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=depth(weights, "vision.encoder.layers."),
            num_attention_heads=width // EVA_HEAD,
            image_size=patch * round(count**0.5),
            patch_size=patch,
        )
    )
    network.post_layernorm.eps = 1e-5  # LAVIS' own norm after the tower, which transformers has within
    return network


def query_config(weights: Mapping[str, Tensor]) -> Blip2QFormerConfig:
    """The Q-Former's sizes in the weights."""
    from transformers import Blip2QFormerConfig

    vocab, width = weights["embeddings.word_embeddings.weight"].shape
    return Blip2QFormerConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=depth(weights, "qformer.encoder.layer."),
        num_attention_heads=width // BERT_HEAD,
        intermediate_size=len(weights["qformer.encoder.layer.0.intermediate.dense.weight"]),
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        encoder_hidden_size=weights["qformer.encoder.layer.0.crossattention.attention.key.weight"].shape[1],
        use_qformer_text_input=True,
    )


def depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest number behind a prefix; there is one."""
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix))
