"""Dual encoders: how well an image matches its prompt, as the cosine between two embeddings.

With e_i and e_t the unit embeddings of image and prompt, s = e_i · e_t, τ the learned scale and b the learned bias
(zero but for SigLIP), one score has six published spellings. They rank alike and are not interchangeable as numbers:

| variant        | score           | typical       | used by                                                       |
|----------------|-----------------|---------------|---------------------------------------------------------------|
| `logit`        | τ s + b         | 15 to 35      | transformers' `logits_per_image`, PickScore                   |
| `logit/100`    | (τ s + b) / 100 | 0.15 to 0.35  | DiffusionNFT                                                  |
| `cosine`       | s               | 0.15 to 0.35  | HPSv2                                                         |
| `clipscore`    | 2.5 max(s, 0)   | 0 to 2.5      | Hessel et al., "CLIPScore", 2021, arXiv 2104.08718            |
| `torchmetrics` | max(100 s, 0)   | 0 to 100      | torchmetrics' CLIPScore                                       |
| `sigmoid`      | sigmoid(τ s + b)| 0 to 1        | SigLIP's probability; flat for most pairs, so not for training |

Source of the projected score: Rocamonde et al., "VLM-RM", 2023, arXiv 2310.12921.

Norms and cosines are in float32 whatever the networks run in: bfloat16 near 22 has steps of 0.125, more than two images
of one prompt differ. Scores are taken row by row, each image with its own prompt. The prompts' embeddings are
remembered.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Features, Prompt, Reward
from .loading import precision
from .preprocess import Preprocess

__all__ = ["DType", "DualEncoder", "Variant", "pooled", "projected", "unit"]

Variant = Literal["logit", "logit/100", "cosine", "clipscore", "torchmetrics", "sigmoid"]
DType = Literal["float32", "bfloat16", "float16"]
REMEMBERED = 4096  # prompts; 768 floats each make 12 MB


class DualEncoder(Reward):
    """An image tower, a text tower and the cosine between them.

    A subclass loads the towers, calls `ready`, and says how to run them in `encode_image` and `encode_text`.

    Args:
        variant: spelling of the score; see the module docstring.
        dtype: type the towers run in.
        baseline: VLM-RM: prompts that describe the image without what is asked for, such as ["a photo"].
        alpha: VLM-RM: strength of the projection on the line from baseline to prompt, 0 (none) to 1 (only the line).
    """

    preprocess: Preprocess
    scale: float
    bias: float

    def __init__(
        self, variant: Variant, dtype: DType = "float32", baseline: list[str] | None = None, alpha: float = 0.5
    ) -> None:
        super().__init__()
        if variant not in Variant.__args__:
            raise ValueError(f"variant must be one of {', '.join(Variant.__args__)}; got {variant!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be 0 to 1; got {alpha}")
        if baseline is not None and (isinstance(baseline, str) or not baseline):
            raise ValueError(f"baseline must be a list of prompts or None; got {baseline!r}")
        self.variant, self.baseline, self.alpha = variant, baseline, alpha
        self.dtype = precision(dtype)
        self.remembered: OrderedDict[str, Tensor] = OrderedDict()

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels in `dtype` -> (B, D), not normalised."""

    @abstractmethod
    def encode_text(self, texts: list[str]) -> Tensor:
        """Texts -> (B, D), not normalised."""

    def ready(self, model: Any, preprocess: Preprocess) -> None:
        """Takes a loaded model: reads its scale and bias in full precision, then casts and freezes it."""
        bias = getattr(model, "logit_bias", None)
        self.scale = model.logit_scale.detach().double().exp().item()
        self.bias = 0.0 if bias is None else bias.detach().double().item()
        self.preprocess = preprocess
        self.differentiable = preprocess.differentiable
        self.model = model.to(self.dtype)
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        return self.spell(self.similarity(*self.embeddings(media, prompts)))

    def embed(self, media: Tensor, prompts: list[Prompt]) -> Features:
        image, text = self.embeddings(media, prompts)
        return Features(torch.cat([image, text, image * text], dim=-1), text)

    def embeddings(self, media: Tensor, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and prompts, (B, D) each."""
        pixels = self.preprocess(media)
        image = unit(self.encode_image(pixels.to(self.tower_dtype)))
        return image, self.text_features([prompt.text for prompt in prompts])

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """The cosine, or VLM-RM's projected one, row by row: (B, D) unit vectors twice -> (B,)."""
        if self.baseline is None:
            return (image * text).sum(dim=-1)
        return projected(image, text, self.text_features(self.baseline).mean(dim=0), self.alpha)

    def spell(self, cosine: Tensor) -> Tensor:
        """The cosine as `variant` publishes it."""
        logit = self.scale * cosine + self.bias
        return {
            "logit": logit,
            "logit/100": logit / 100,
            "cosine": cosine,
            "clipscore": 2.5 * cosine.clamp(min=0),
            "torchmetrics": 100 * cosine.clamp(min=0),
            "sigmoid": logit.sigmoid(),
        }[self.variant]

    def text_features(self, texts: list[str]) -> Tensor:
        """Unit embeddings of texts, each computed once: (B, D), never part of a graph."""
        missing = [text for text in dict.fromkeys(texts) if text not in self.remembered]
        with torch.no_grad():
            if missing:
                rows = unit(self.encode_text(missing))
                self.remembered.update((text, row.clone()) for text, row in zip(missing, rows, strict=True))
            features = torch.stack([self.remembered[text] for text in texts])
        for text in texts:
            self.remembered.move_to_end(text)
        while len(self.remembered) > REMEMBERED:
            self.remembered.popitem(last=False)
        return features

    @property
    def tower_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.remembered.clear()  # what was computed on another device or in another precision
        return super()._apply(fn, recurse)


def pooled(output: Any) -> Tensor:
    """The projected embedding: transformers 4 returns it, transformers 5 returns an object that holds it."""
    return output if isinstance(output, Tensor) else output.pooler_output


def unit(features: Tensor) -> Tensor:
    """Rows of length one, in float32 at least."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


def projected(image: Tensor, goal: Tensor, baseline: Tensor, alpha: float) -> Tensor:
    """VLM-RM's goal-baseline regularised score, 1 - |P (image - goal)|² / 2 with P = alpha d dᵀ/|d|² + (1 - alpha) I.

    d = goal - baseline, so alpha removes what the line from baseline to goal does not explain. alpha = 0 is the cosine.
    NaN where goal and baseline are the same.

    Args:
        image: (B, D) unit vectors.
        goal: (B, D) unit vectors.
        baseline: (D,), a mean of unit vectors.
        alpha: 0 to 1.
    """
    line = goal - baseline
    gap = image - goal
    along = (gap * line).sum(dim=-1, keepdim=True) / line.square().sum(dim=-1, keepdim=True) * line
    return 1 - (alpha * along + (1 - alpha) * gap).square().sum(dim=-1) / 2
