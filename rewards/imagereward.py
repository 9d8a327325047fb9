"""Cross-encoders of the BLIP family: an image is read by a vision transformer, and the prompt by a BERT that looks at it.

    image     -> ViT-L/16                             197 tokens v
    prompt    -> BERT with cross-attention to v       h, the last hidden state at [CLS]
    ImageReward, IterComp      (W₅W₄W₃W₂W₁ h, with biases, - mean) / std      no activations: an affine function of h
    CycleReward                a perceptron of h with GELUs, as it comes out

The four publications share one layout of weights, `blip.visual_encoder.*`, `blip.text_encoder.*` and `mlp.layers.*`, whose names
are BLIP's own; they are renamed to those of transformers' BLIP. Sizes are read from the weights, given that heads of every ViT and
BERT are 64 wide. What BLIP's pretraining leaves in a checkpoint (projections, momentum copies, queues) is not read; anything else
is an error.

Sources: Xu et al., "ImageReward", 2023, arXiv 2304.05977. Zhang et al., "IterComp", 2024, arXiv 2410.07171. Bahng et al., "Cycle
Consistency as Reward", 2025, arXiv 2506.02095. Li et al., "BLIP", 2022, arXiv 2201.12086.

Unlike in BLIP's own matching head the prompt begins with [CLS], not [ENC]; the released code of all four agrees on that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .base import Prompt, Reward
from .loading import fill, find, loading, precision, pretrained_tokenizer, read_weights, unfilled, warn_if_cut
from .preprocess import Preprocess, Quantize

if TYPE_CHECKING:
    from transformers import BlipTextModel, BlipVisionModel

__all__ = ["CycleReward", "ImageReward", "IterComp"]

HEAD_WIDTH = 64
# of the head's output over ImageReward's training set; its released code
MEAN, STD = 0.16717362830052426, 1.0333394966054072
REMEMBERED = 4096  # prompts; their tokens take 0.5 kB each
RENAMED = {  # in this order
    "blip.visual_encoder.": "vision.",
    "blip.text_encoder.": "text.",
    "mlp.layers.": "head.",
    "vision.cls_token": "vision.embeddings.class_embedding",
    "vision.pos_embed": "vision.embeddings.position_embedding",
    "vision.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "vision.norm.": "vision.post_layernorm.",
    "vision.blocks.": "vision.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}
UNREAD = [r"blip\.(vision|text)_proj\..*", r"blip\.\w+_m\..*", r"blip\.(\w*queue\w*|temp)", r".*\.position_ids"]


class ImageReward(Reward):
    """ImageReward v1.0: which image people prefer for a prompt.

    Range: about -2.3 to 2; mean 0 and standard deviation 1 over the images it was trained on
    Size: 224, the shorter side fitted and the centre cut
    Gradient: unless `quantize` is "hard"
    Weights: THUDM/ImageReward (zai-org/ImageReward)
    Licence: Apache-2.0 (code and weights)

    Weighs alignment with the prompt more than looks. A constant -0.1618 says that a retrained head has collapsed to 0. Prompts are
    cut at 35 tokens with a warning.

    Args:
        weights: a file in the published layout, or owner/name/file on the hub. The prefix `module.` of distributed training is
            dropped.
        tokenizer: folder or hub id of BERT's uncased tokenizer.
        dtype: type the networks run in; the head and the score are always float32.
        quantize: whether pixels are rounded to 8 bits as published tables did: "hard" (no gradient), "ste" or "none".

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the weights have another layout.
    """

    length = 35
    activation: type[nn.Module] = nn.Identity
    mean, std = MEAN, STD

    def __init__(
        self,
        weights: str = "THUDM/ImageReward/ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        kind = precision(dtype)
        self.tokenizer = pretrained_tokenizer(tokenizer)
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's, the last of its vocabulary
        with loading(weights, "a file in the layout of ImageReward.pt, or owner/name/file of one on the hub"):
            found = renamed(read_weights(find(weights)))
        try:
            with unfilled():
                self.vision, self.text = vision_model(found), text_model(found)
            self.head = perceptron(found, self.activation)
        except KeyError as missing:
            wanted, holds = ", ".join(f"{old}*" for old in list(RENAMED)[:3]), ", ".join(list(found)[:4])
            raise ValueError(
                f"{self.name} needs the keys {wanted}; {weights} lacks {missing} and holds {holds}..."
            ) from missing
        fill(self, found, weights, UNREAD)
        vocab = self.text.config.vocab_size
        if len(self.tokenizer) > vocab:
            raise ValueError(f"the tokenizer {tokenizer} knows {len(self.tokenizer)} words, but {weights} {vocab}")
        size = self.vision.config.image_size
        assert isinstance(size, int)
        self.preprocess = Preprocess("shortest_crop", size, offset="round", quantize=quantize)
        self.differentiable = self.preprocess.differentiable
        self.vision.to(kind)
        self.text.to(kind)
        self.remembered: OrderedDict[str, tuple[list[int], list[int]]] = OrderedDict()
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        pixels = self.preprocess(media).to(self.vision.dtype)
        ids, mask = (torch.tensor(rows, device=media.device) for rows in zip(*map(self.tokens, prompts), strict=True))
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state[:, 0]
        return (self.head(text.to(self.head[0].weight.dtype)).squeeze(-1) - self.mean) / self.std

    def tokens(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Ids and mask of a prompt, padded to the model's length; each is computed once."""
        if prompt.text not in self.remembered:
            full = len(self.tokenizer(prompt.text, verbose=False)["input_ids"])
            warn_if_cut(self.name, prompt.text, full, self.length)
            read = self.tokenizer(prompt.text, padding="max_length", truncation=True, max_length=self.length)
            self.remembered[prompt.text] = read["input_ids"], read["attention_mask"]
            if len(self.remembered) > REMEMBERED:
                self.remembered.popitem(last=False)
        return self.remembered[prompt.text]


class IterComp(ImageReward):
    """IterComp's reward models: attribute binding, spatial relations or other relations in a picture.

    Range: unbounded, in ImageReward's unit
    Size: 224, the shorter side fitted and the centre cut
    Gradient: unless `quantize` is "hard"
    Weights: comin/IterComp
    Licence: MIT (code)

    ImageReward's network, tuned on rankings of six generators' pictures. IterComp trains on the sum of relu(2 - r) over all three:
    `Weighted` over three of these.

    Args:
        weights: file of one of the three models, or owner/name/file on the hub, where they are in the folder reward_models.
        tokenizer: folder or hub id of BERT's uncased tokenizer.
        dtype: type the networks run in; the head and the score are always float32.
        quantize: 8-bit rounding of the pixels; see `ImageReward`.
    """

    def __init__(
        self,
        weights: str,
        tokenizer: str = "google-bert/bert-base-uncased",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__(weights, tokenizer, dtype=dtype, quantize=quantize)


class CycleReward(ImageReward):
    """CycleReward: how well prompt and picture could be told from one another.

    Range: unbounded; compare within one prompt
    Size: 224, the shorter side fitted and the centre cut
    Gradient: unless `quantize` is "hard"
    Weights: NagaSaiAbhinay/CycleReward-Combo, -T2I, -I2T, converted from github.com/hjbahng/cyclereward, release v1.0.0
    Licence: MIT (code and weights)

    Trained on cycle consistency instead of people, for long and detailed prompts: it reads 128 tokens.

    Args:
        weights: one of the released files (CycleReward-Combo.pth and others), or owner/name/file on the hub.
        tokenizer: folder or hub id of BERT's uncased tokenizer.
        dtype: type the networks run in; the head and the score are always float32.
        quantize: 8-bit rounding of the pixels; see `ImageReward`.
    """

    length = 128
    activation = nn.GELU
    mean, std = 0.0, 1.0

    def __init__(
        self,
        weights: str = "NagaSaiAbhinay/CycleReward-Combo/model.safetensors",
        tokenizer: str = "google-bert/bert-base-uncased",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__(weights, tokenizer, dtype=dtype, quantize=quantize)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names to those of this module."""
    result = {}
    for key, value in weights.items():
        key = key.removeprefix("module.")
        for old, new in RENAMED.items():
            key = key.replace(old, new)
        result[key] = value
    return result


def vision_model(weights: Mapping[str, Tensor]) -> BlipVisionModel:
    """An empty BLIP vision transformer of the size of the weights."""
    from transformers import BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = weights["vision.embeddings.patch_embedding.weight"].shape
    patches = weights["vision.embeddings.position_embedding"].shape[1] - 1
    return BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(weights["vision.encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=depth(weights, "vision.encoder.layers."),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=patch * round(patches**0.5),
            patch_size=patch,
            layer_norm_eps=1e-6,  # of the published module; transformers' default is 1e-5
        )
    )


def text_model(weights: Mapping[str, Tensor]) -> BlipTextModel:
    """An empty BERT with cross-attention of the size of the weights."""
    from transformers import BlipTextConfig, BlipTextModel

    vocab, width = weights["text.embeddings.word_embeddings.weight"].shape
    return BlipTextModel(
        BlipTextConfig(
            vocab_size=vocab,
            hidden_size=width,
            encoder_hidden_size=weights["text.encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=len(weights["text.encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=depth(weights, "text.encoder.layer."),
            num_attention_heads=width // HEAD_WIDTH,
            max_position_embeddings=len(weights["text.embeddings.position_embeddings.weight"]),
            bos_token_id=None,
            sep_token_id=None,
            is_decoder=True,  # gives it cross-attention; it runs with a full, not a causal, mask
        ),
        add_pooling_layer=False,
    )


def perceptron(weights: Mapping[str, Tensor], activation: type[nn.Module]) -> nn.Sequential:
    """An empty head of the size of the weights. Numbers that hold none are activations, or dropouts at rest."""
    found = {i: weights.get(f"head.{i}.weight") for i in range(depth(weights, "head."))}
    return nn.Sequential(*(activation() if w is None else nn.Linear(w.shape[1], len(w)) for w in found.values()))


def depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the largest number behind a prefix.

    Raises:
        KeyError: nothing stands behind it.
    """
    numbers = [int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix)]
    if not numbers:
        raise KeyError(f"{prefix}*")
    return 1 + max(numbers)
