"""Aesthetic predictors: how much people like an image, whatever it shows.

`Aesthetic` is a small head on the unit embedding e of an image encoder, trained on people's ratings from 1 to 10:

    v1      w·e + b                             LAION: one file a CLIP, such as sa_0_4_vit_l_14_linear.pth
    v2      W₅(W₄(W₃(W₂(W₁ e)))), with biases   LAION: sac+logos+ava1-l14-linearMSE.pth, 768-1024-128-64-16-1 on CLIP ViT-L/14
    v2.5    as v2, 1152-1024-128-64-16-1        aesthetic_predictor_v2_5.pth, on the pooled output of SigLIP so400m at 384 pixels

There are no activations between the layers, and the dropouts rest outside training, so each is an affine function of e: one
direction of the embedding, and no more, is beautiful to it. That makes it easy to overdo; watch another reward beside it.

`ShadowAesthetic` is a vision transformer that sorts drawings into good and bad ones.

Sources: Schuhmann et al., "LAION-5B", 2022, arXiv 2210.08402; v2 from the repository improved-aesthetic-predictor, v2.5 from
aesthetic-predictor-v2-5; the model card of aesthetic-shadow-v2. As a reward: DDPO, 2305.13301; AlignProp, 2310.03739; DRaFT,
2309.17400.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Prompt, Reward
from .loading import find, loading, precision, pretrained, read_weights
from .preprocess import Quantize, pretrained_preprocess

__all__ = ["Aesthetic", "ShadowAesthetic"]

# v2 and v2.5 number their layers, dropouts included; v1 is one layer
LAYER = re.compile(r"(?:(?:layers|scoring_head)\.(\d+)\.)?(weight|bias)")


class Aesthetic(Reward):
    """How much people like an image, by a head on a CLIP or SigLIP: LAION's v1 and v2, or v2.5.

    Range: 1 to 10; photographs and unaltered samples get 4 to 7
    Size: the encoder's own; 224, the shorter side fitted and the centre cut, for CLIP
    Gradient: unless `quantize` is "hard"
    Weights: openai/clip-vit-large-patch14 and trl-lib/ddpo-aesthetic-predictor
    Licence: Apache-2.0 (LAION's heads), AGPL-3.0 (v2.5), MIT (CLIP), Apache-2.0 (SigLIP)

    Reads no prompt. More than 8 is a sign of over-optimisation.

    Args:
        model: folder or hub id of the encoder the head was made for, in the transformers layout: a CLIP, a SigLIP
            (google/siglip-so400m-patch14-384 for v2.5), or an image encoder with a pooled output.
        head: the head's weights, .pth or .safetensors: a file, or owner/name/file on the hub. Its keys say which it is. v1 and
            v2.5 are published on GitHub only (LAION-AI/aesthetic-predictor, discus0434/aesthetic-predictor-v2-5).
        dtype: type the encoder runs in; the head and the score are always float32.
        quantize: whether pixels are rounded to 8 bits as published tables did: "hard" (no gradient), "ste" or "none".

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the head has another layout, or was made for another encoder.
    """

    needs_prompt = False
    claims_quality = True

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        kind = precision(dtype)
        from transformers import AutoModel

        network = pretrained(AutoModel, model)
        self.preprocess = pretrained_preprocess(model, quantize)
        self.differentiable = self.preprocess.differentiable
        self.tower = getattr(network, "vision_model", network).to(kind)
        projection = getattr(network, "visual_projection", None)  # a CLIP projects what it pools
        self.projection = nn.Identity() if projection is None else projection.to(kind)
        pooled = getattr(network.config, "vision_config", network.config).hidden_size
        self.head = read_head(head, pooled if projection is None else projection.out_features)
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        pixels = self.preprocess(media).to(next(self.tower.parameters()).dtype)
        embedding = self.projection(self.tower(pixel_values=pixels).pooler_output)
        return self.head(F.normalize(embedding.to(self.head[0].weight.dtype), dim=-1)).squeeze(-1)


class ShadowAesthetic(Reward):
    """Aesthetic Shadow: how probably a drawing is of high quality, to a classifier of anime pictures.

    Range: 0 to 1; from about 0.7 a picture is called very aesthetic; "logit" is unbounded
    Size: 1024, squeezed
    Gradient: unless `quantize` is "hard"
    Weights: NeoChen1024/aesthetic-shadow-v2-backup; its author withdrew shadowlilac/aesthetic-shadow-v2
    Licence: CC-BY-NC-4.0 (weights)

    Args:
        model: folder or hub id of an image classifier in the transformers layout.
        label: of the class whose probability is the score.
        spelling: "probability", or "logit", its log-odds, which do not saturate.
        dtype: type the network runs in; the score is always float32.
        quantize: 8-bit rounding of the pixels; see `Aesthetic`.

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the classifier has no such label, or no other.
    """

    needs_prompt = False
    claims_quality = True

    def __init__(
        self,
        model: str = "NeoChen1024/aesthetic-shadow-v2-backup",
        label: str = "hq",
        spelling: Literal["probability", "logit"] = "probability",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        kind = precision(dtype)
        from transformers import AutoModelForImageClassification

        if spelling not in ("probability", "logit"):
            raise ValueError(f"spelling must be probability or logit; got {spelling!r}")
        self.network = pretrained(AutoModelForImageClassification, model).to(kind)
        labels = list(self.network.config.id2label.values())
        if label not in labels or len(labels) < 2:
            raise ValueError(f"label must be one of the two or more of {model}; got {label!r}, it has {labels}")
        self.wanted, self.spelling = labels.index(label), spelling
        self.preprocess = pretrained_preprocess(model, quantize)
        self.differentiable = self.preprocess.differentiable
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        logits = self.network(self.preprocess(media).to(self.network.dtype)).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.spelling == "probability":
            return logits.softmax(dim=-1)[:, self.wanted]
        others = [i for i in range(logits.shape[1]) if i != self.wanted]
        return logits[:, self.wanted] - logits[:, others].logsumexp(dim=-1)


def read_head(name: str, width: int) -> nn.Sequential:
    """The layers that a head's file describes, in float32.

    Args:
        name: a file, or owner/name/file on the hub.
        width: of the embeddings it must read.
    """
    with loading(name, "a file of an aesthetic head, or owner/name/file of one on the hub"):
        weights = read_weights(find(name))
    layout = "weight and bias (v1), or layers.N.weight and layers.N.bias (v2), or the same of scoring_head (v2.5)"
    keys = {key: LAYER.fullmatch(str(key)) for key in weights}
    if not keys or not all(keys.values()):
        raise ValueError(f"an aesthetic head holds {layout}; {name} holds {', '.join(map(str, list(keys)[:4]))}")
    layers: list[nn.Module] = []
    for number in sorted({int(match[1] or 0) for match in keys.values() if match}):
        mine = {match[2]: weights[key].float() for key, match in keys.items() if match and int(match[1] or 0) == number}
        if set(mine) != {"weight", "bias"} or mine["weight"].ndim != 2 or mine["weight"].shape[1] != width:
            shapes = {part: tuple(value.shape) for part, value in mine.items()}
            raise ValueError(
                f"layer {number} of {name} should read {width} numbers: the encoder's width, or the layer before; got {shapes}"
            )
        width = len(mine["weight"])
        layers.append(nn.Linear(mine["weight"].shape[1], width))
        layers[-1].load_state_dict(mine)
    if width != 1:
        raise ValueError(f"an aesthetic head ends in one number; {name} ends in {width}")
    return nn.Sequential(*layers)
