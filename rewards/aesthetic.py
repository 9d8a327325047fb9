"""LAION's aesthetic predictors: how much people like an image, whatever it shows.

A small head on the unit embedding e of a CLIP, trained on people's ratings from 1 to 10:

    v1    w·e + b                                   one file a CLIP, such as sa_0_4_vit_l_14_linear.pth
    v2    W₅(W₄(W₃(W₂(W₁ e)))), with biases         sac+logos+ava1-l14-linearMSE.pth: 768-1024-128-64-16-1

v2 has no activations between its layers, and its dropouts rest outside its training, so it too is an affine function of e: one
direction of the embedding, and no more, is beautiful to it. That makes it easy to overdo; watch another reward beside it.

Source: Schuhmann et al., "LAION-5B", 2022, arXiv 2210.08402; v2 from the repository improved-aesthetic-predictor. As a reward:
DDPO, 2305.13301; AlignProp, 2310.03739; DRaFT, 2309.17400.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Prompt, Reward
from .loading import expand, find, loading, pretrained, read_weights
from .preprocess import Quantize, from_image_processor

__all__ = ["Aesthetic"]

LAYER = re.compile(r"(?:layers\.(\d+)\.)?(weight|bias)")  # v2 numbers its layers, dropouts included; v1 is one layer


class Aesthetic(Reward):
    """LAION's aesthetic predictor, v2 by default.

    Range: 1 to 10; photographs and unaltered samples get 4 to 7
    Size: 224, the shorter side fitted and the centre cut
    Gradient: unless `quantize` is "hard"
    Weights: openai/clip-vit-large-patch14 and trl-lib/ddpo-aesthetic-predictor
    Licence: Apache-2.0 (head), MIT (CLIP)

    Reads no prompt. More than 8 is a sign of over-optimisation.

    Args:
        model: folder or hub id of the CLIP the head was made for, in the transformers layout.
        head: the head's weights, .pth or .safetensors: a file, or owner/name/file on the hub. Its keys say whether it is v1 or
            v2. v1 is published on GitHub only (LAION-AI/aesthetic-predictor).
        dtype: type the CLIP runs in; the head and the score are always float32.
        quantize: whether pixels are rounded to 8 bits as published tables did: "hard" (no gradient), "ste" or "none".

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the head has another layout, or was made for another CLIP.
    """

    needs_prompt = False

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, CLIPModel

        network = pretrained(CLIPModel, model)
        with loading(model, "preprocessor_config.json"):
            images = AutoImageProcessor.from_pretrained(expand(model))
        self.preprocess = from_image_processor(images.to_dict(), quantize)
        self.differentiable = self.preprocess.differentiable
        self.tower = network.vision_model.to(getattr(torch, dtype))
        self.projection = network.visual_projection.to(getattr(torch, dtype))
        self.head = read_head(head, len(self.projection.weight))
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        pixels = self.preprocess(media).to(self.projection.weight.dtype)
        embedding = self.projection(self.tower(pixel_values=pixels).pooler_output)
        return self.head(F.normalize(embedding.to(self.head[0].weight.dtype), dim=-1)).squeeze(-1)


def read_head(name: str, width: int) -> nn.Sequential:
    """The layers that a head's file describes, in float32.

    Args:
        name: a file, or owner/name/file on the hub.
        width: of the embeddings it must read.
    """
    with loading(name, "a file of a LAION aesthetic head, or owner/name/file of one on the hub"):
        weights = read_weights(find(name))
    layout = "weight and bias (v1), or layers.N.weight and layers.N.bias (v2)"
    keys = {key: LAYER.fullmatch(str(key)) for key in weights}
    if not keys or not all(keys.values()):
        raise ValueError(f"an aesthetic head holds {layout}; {name} holds {', '.join(map(str, list(keys)[:4]))}")
    layers: list[nn.Module] = []
    for number in sorted({int(match[1] or 0) for match in keys.values() if match}):
        mine = {match[2]: weights[key].float() for key, match in keys.items() if match and int(match[1] or 0) == number}
        if set(mine) != {"weight", "bias"} or mine["weight"].ndim != 2 or mine["weight"].shape[1] != width:
            shapes = {part: tuple(value.shape) for part, value in mine.items()}
            raise ValueError(
                f"layer {number} of {name} should read {width} numbers: the CLIP's width, or the layer before; got {shapes}"
            )
        width = len(mine["weight"])
        layers.append(nn.Linear(mine["weight"].shape[1], width))
        layers[-1].load_state_dict(mine)
    if width != 1:
        raise ValueError(f"an aesthetic head ends in one number; {name} ends in {width}")
    return nn.Sequential(*layers)
