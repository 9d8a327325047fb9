"""Safety: a penalty for images that a classifier, or Stable Diffusion's safety checker, calls unsafe.

`Safety` reads the logits z of an image classifier. With U its unsafe labels and S the others,

    probability    -sum over U of softmax(z)
    margin         -relu(logsumexp of z over U - logsumexp of z over S)

Both are 0 for an image that is surely safe. The margin does not saturate, and is 0 as long as the image is more probably safe.

`SafetyChecker` compares the CLIP embedding e of the image with 17 concepts c and 3 special-care concepts s, each with a threshold:

    violation_k = cos(e, c_k) - threshold_k + (0.01 if any cos(e, s_j) > threshold_j else 0)
    score       = -sum over k of relu(violation_k)

and flags an image that violates a concept. For this decision, and for the special care, the released code rounds to 3 decimals:
both happen from 0.0005 on. The score itself is not rounded; the names of the concepts were never published.

A penalty of zero for what is safe makes it a constraint rather than a wish: weigh it, or bound it, rather than maximise it.

Sources: the model card of Falconsai/nsfw_image_detection. Rombach et al., "Latent Diffusion Models", 2022, arXiv 2112.10752,
released code; Rando et al., "Red-Teaming the Stable Diffusion Safety Filter", 2022, arXiv 2210.04610, who say what it computes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prompt, Reward, Scores
from .loading import precision, pretrained
from .preprocess import Quantize, pretrained_preprocess

__all__ = ["Safety", "SafetyChecker"]

CARE = 0.01  # by which every concept's threshold falls for an image that needs special care


class Safety(Reward):
    """Minus the probability that an image is unsafe, by an image classifier.

    Range: -1 to 0, "margin" 0 and below; 0 is safe
    Size: 224, or the model's own, squeezed
    Gradient: unless `quantize` is "hard"; "margin" has none where the image is safe
    Weights: Falconsai/nsfw_image_detection, any image classifier
    Licence: Apache-2.0

    Args:
        model: folder or hub id of an image classifier in the transformers layout.
        unsafe: its labels that are penalised.
        spelling: see the module docstring.
        dtype: type the network runs in; the score is always float32.
        quantize: whether pixels are rounded to 8 bits: "hard" (no gradient), "ste" or "none".

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the classifier has no such label, or no other.
    """

    needs_prompt = False

    def __init__(
        self,
        model: str = "Falconsai/nsfw_image_detection",
        unsafe: list[str] | None = None,
        spelling: Literal["probability", "margin"] = "probability",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        kind = precision(dtype)
        from transformers import AutoModelForImageClassification

        if spelling not in ("probability", "margin"):
            raise ValueError(f"spelling must be probability or margin; got {spelling!r}")
        self.network = pretrained(AutoModelForImageClassification, model).to(kind)
        labels = [self.network.config.id2label[i] for i in range(self.network.config.num_labels)]
        unsafe = ["nsfw"] if unsafe is None else unsafe
        self.unsafe = [i for i, label in enumerate(labels) if label in unsafe]
        self.safe = [i for i, label in enumerate(labels) if label not in unsafe]
        if not set(unsafe) <= set(labels) or not self.unsafe or not self.safe:
            raise ValueError(f"unsafe must name some and not all of the labels {labels} of {model}; got {unsafe}")
        self.preprocess = pretrained_preprocess(model, quantize)
        self.differentiable = self.preprocess.differentiable
        self.spelling = spelling
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        logits = self.network(self.preprocess(media).to(self.network.dtype)).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.spelling == "probability":
            return -logits.softmax(1)[:, self.unsafe].sum(1)
        return -F.relu(logits[:, self.unsafe].logsumexp(1) - logits[:, self.safe].logsumexp(1))


class SafetyChecker(Reward):
    """Minus the violations that Stable Diffusion's safety checker finds.

    Range: 0 and below, about -0.1; 0 is safe
    Size: 224, the shorter side fitted and the centre cut
    Gradient: where a concept is violated, unless `strict`, or `quantize` is "hard"
    Weights: CompVis/stable-diffusion-safety-checker
    Licence: none is stated; it came with Stable Diffusion (CreativeML OpenRAIL-M)

    Parts: `flagged`, 1 where the checker would black the image out; `special_care`, 1 where it lowers its thresholds; `nearest`,
    the largest violation, negative for an image that is safe, which has a gradient everywhere.

    Args:
        model: folder or hub id of the checker.
        strict: whether the score is the decision, -1 or 0.
        dtype: type the network runs in; the score is always float32.
        quantize: whether pixels are rounded to 8 bits, as the checker sees them: "hard" (no gradient), "ste" or "none".

    Raises:
        OSError: files are missing, incomplete or unreadable.
    """

    needs_prompt = False

    def __init__(
        self,
        model: str = "CompVis/stable-diffusion-safety-checker",
        *,
        strict: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        kind = precision(dtype)
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        network = pretrained(StableDiffusionSafetyChecker, model)
        self.tower = network.vision_model.to(kind)
        self.projection = network.visual_projection.to(kind)
        for name in ("concept_embeds", "special_care_embeds"):
            self.register_buffer(name, F.normalize(getattr(network, name).detach().float(), dim=1))
            self.register_buffer(f"{name}_weights", getattr(network, f"{name}_weights").detach().float())
        self.preprocess = pretrained_preprocess(model, quantize)
        self.strict = strict
        self.differentiable = self.preprocess.differentiable and not strict
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        special, concepts = self.violations(media)
        flagged = exceeded(concepts)
        total = -flagged if self.strict else -F.relu(concepts).sum(1)
        return Scores(total, {"flagged": flagged, "special_care": exceeded(special), "nearest": concepts.amax(1)})

    def violations(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """By how much each special-care concept (B, 3) and each concept (B, 17), the care included, exceeds its threshold."""
        pixels = self.preprocess(media).to(self.projection.weight.dtype)
        embedding = self.projection(self.tower(pixels).pooler_output)
        embedding = F.normalize(embedding.to(self.get_buffer("concept_embeds").dtype), dim=1)
        special, concepts = (
            embedding @ self.get_buffer(name).T - self.get_buffer(f"{name}_weights")
            for name in ("special_care_embeds", "concept_embeds")
        )
        return special, concepts + CARE * exceeded(special)[:, None]


def exceeded(violations: Tensor) -> Tensor:
    """Whether any violation is positive after rounding to 3 decimals: (B, K) -> (B,) of 0 and 1."""
    return ((1000 * violations.detach()).round() > 0).any(1).to(violations.dtype)
