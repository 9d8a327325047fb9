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

Sources: Radford et al., "CLIP", 2021, arXiv 2103.00020. Zhai et al., "SigLIP", 2023, arXiv 2303.15343. Kirstain et al.,
"Pick-a-Pic", 2023, arXiv 2305.01569. Wu et al., "Human Preference Score v2", 2023, arXiv 2306.09341. Rocamonde et al.,
"VLM-RM", 2023, arXiv 2310.12921.

Norms and cosines are in float32 whatever the networks run in: bfloat16 near 22 has steps of 0.125, more than two images
of one prompt differ. Scores are taken row by row, each image with its own prompt. The prompts' embeddings are
remembered.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import OrderedDict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Features, Prompt, Reward
from .loading import expand, loading, pretrained, pretrained_tokenizer
from .preprocess import Preprocess, Quantize, from_image_processor, from_open_clip

__all__ = ["CLIPScore", "DType", "DualEncoder", "HPSv2", "OpenCLIPScore", "PickScore", "Variant"]

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
        if dtype not in DType.__args__:
            raise ValueError(f"dtype must be one of {', '.join(DType.__args__)}; got {dtype!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be 0 to 1; got {alpha}")
        if baseline is not None and (isinstance(baseline, str) or not baseline):
            raise ValueError(f"baseline must be a list of prompts or None; got {baseline!r}")
        self.variant, self.baseline, self.alpha = variant, baseline, alpha
        self.dtype: torch.dtype = getattr(torch, dtype)
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

    def warn_if_cut(self, text: str, tokens: int, limit: int) -> None:
        """Warns that the end of a prompt is not read."""
        if tokens > limit:
            warnings.warn(
                f"{self.name} reads {limit} tokens: the last {tokens - limit} of {tokens} are cut in {text[:60]!r}...",
                stacklevel=2,
            )

    @property
    def tower_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.remembered.clear()  # what was computed on another device or in another precision
        return super()._apply(fn, recurse)


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


class CLIPScore(DualEncoder):
    """Agreement of image and prompt by a CLIP or SigLIP in the transformers layout.

    Range: by `variant`; "logit" about 15 to 35 for CLIP
    Size: 224, or the model's own; resize rule and text padding are read from its files
    Gradient: unless `quantize` is "hard"
    Weights: openai/clip-vit-large-patch14, google/siglip-so400m-patch14-384, any of these classes
    Licence: MIT (OpenAI CLIP), Apache-2.0 (SigLIP)

    Whatever follows the tower's 77 tokens (SigLIP: 64) is cut with a warning. Counts and relations are CLIP's weak points.

    Args:
        model: folder or hub id of a CLIP-like model: CLIP, SigLIP and their fine-tunes.
        variant: spelling of the score; see the module docstring.
        processor: folder or hub id of tokenizer and image processor; None means `model`.
        dtype: type the networks run in; the score is always float32.
        quantize: whether pixels are rounded to 8 bits as published tables did: "hard" (no gradient), "ste" or "none".
        lowercase: whether prompts are lowercased, as SigLIP 2 was trained.
        baseline: VLM-RM: prompts that describe the image without what is asked for; None switches it off.
        alpha: VLM-RM: strength of the projection, 0 to 1.

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the files hold another kind of model, or one whose resize rule is not known.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        variant: Variant = "logit",
        *,
        processor: str | None = None,
        dtype: DType = "float32",
        quantize: Quantize = "none",
        lowercase: bool = False,
        baseline: list[str] | None = None,
        alpha: float = 0.5,
    ) -> None:
        super().__init__(variant, dtype, baseline, alpha)
        from transformers import AutoImageProcessor, AutoModel

        source = model if processor is None else processor
        network = pretrained(AutoModel, model)
        kind = network.config.model_type
        if not all(hasattr(network, a) for a in ("get_image_features", "get_text_features", "logit_scale")):
            raise ValueError(f"{self.name} needs a dual encoder such as CLIP or SigLIP; {model!r} holds a {kind}")
        if kind == "siglip2":
            raise ValueError(f"{self.name} cannot feed NaFlex SigLIP 2 ({model!r}): use a checkpoint of fixed size")
        self.tokenizer: Any = pretrained_tokenizer(source)
        with loading(source, "preprocessor_config.json"):
            images = AutoImageProcessor.from_pretrained(expand(source))
        self.siglip, self.lowercase = kind == "siglip", lowercase
        self.max_length = min(self.tokenizer.model_max_length, network.config.text_config.max_position_embeddings)
        self.ready(network, from_image_processor(images.to_dict(), quantize))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pooled(self.model.get_image_features(pixel_values=pixels))

    def encode_text(self, texts: list[str]) -> Tensor:
        if self.lowercase:
            texts = [text.lower() for text in texts]
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            self.warn_if_cut(text, len(ids), self.max_length)
        # SigLIP pools the last position and has always been padded; for CLIP, padding behind the causal mask is inert.
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(next(self.model.parameters()).device)
        if self.siglip:  # trained without a mask
            return pooled(self.model.get_text_features(input_ids=tokens["input_ids"]))
        return pooled(
            self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        )


class PickScore(CLIPScore):
    """PickScore v1: which image people prefer for a prompt (Kirstain et al. 2023, arXiv 2305.01569).

    Range: about 18 to 24
    Size: 224
    Gradient: unless `quantize` is "hard"
    Weights: yuvalkirstain/PickScore_v1
    Licence: MIT (code and weights)

    The logit of a CLIP ViT-H/14 tuned on Pick-a-Pic; compare within one prompt. Known to be gamed by glossy, saturated,
    high-contrast images.

    Args:
        model: folder or hub id of the weights.
        processor: folder or hub id of tokenizer and image processor.
        dtype: type the networks run in; the score is always float32.
        quantize: 8-bit rounding of the pixels; see `CLIPScore`.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        dtype: DType = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__(model, "logit", processor=processor, dtype=dtype, quantize=quantize)


class OpenCLIPScore(DualEncoder):
    """Agreement of image and prompt by an open_clip model.

    Range: by `variant`; "logit" about 15 to 35
    Size: the model's own, as its resize rule
    Gradient: unless `quantize` is "hard"
    Weights: laion/CLIP-ViT-H-14-laion2B-s32B-b79K, any of open_clip
    Licence: MIT (laion)

    A local fine-tune of OpenAI's weights needs a `-quickgelu` model name: with the plain one it loads and scores
    wrongly.

    Args:
        model_name: open_clip's name of the architecture, or "hf-hub:org/name", or "local-dir:/path".
        pretrained: open_clip's tag or a checkpoint file; None for the two forms that name their weights.
        variant: spelling of the score; see the module docstring.
        dtype: type the networks run in; the score is always float32.
        quantize: 8-bit rounding of the pixels; see `CLIPScore`.
        baseline: VLM-RM: prompts that describe the image without what is asked for; None switches it off.
        alpha: VLM-RM: strength of the projection, 0 to 1.

    Raises:
        OSError: the weights are missing, incomplete or unreadable.
    """

    def __init__(
        self,
        model_name: str = "ViT-H-14",
        pretrained: str | None = "laion2b_s32b_b79k",
        variant: Variant = "logit",
        *,
        dtype: DType = "float32",
        quantize: Quantize = "none",
        baseline: list[str] | None = None,
        alpha: float = 0.5,
    ) -> None:
        super().__init__(variant, dtype, baseline, alpha)
        import open_clip

        if ":" in model_name:  # open_clip ignores the tag then
            pretrained = None
        with loading(f"{model_name} {pretrained or ''}".strip(), "open_clip's config and a complete checkpoint"):
            network = open_clip.create_model(model_name, pretrained, require_pretrained=True)
            self.tokenizer: Any = open_clip.get_tokenizer(model_name)
        self.ready(network, from_open_clip(open_clip.get_model_preprocess_cfg(network), quantize))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def encode_text(self, texts: list[str]) -> Tensor:
        for text in texts:
            self.warn_if_cut(text, self.count(text), self.tokenizer.context_length)
        return self.model.encode_text(self.tokenizer(texts).to(next(self.model.parameters()).device))

    def count(self, text: str) -> int:
        """Tokens of a text, start and end included, without truncation."""
        if hasattr(self.tokenizer, "encode"):
            return len(self.tokenizer.encode(text)) + 2
        return len(self.tokenizer.tokenizer(self.tokenizer.clean_fn(text), verbose=False)["input_ids"])


class HPSv2(OpenCLIPScore):
    """Human Preference Score v2.1 or v2 (Wu et al. 2023, arXiv 2306.09341).

    Range: v2.1 about 0.14 to 0.34, v2.0 about 0.24 to 0.29
    Size: 224, the longer side fitted and padded with black
    Gradient: unless `quantize` is "hard"
    Weights: xswu/HPSv2
    Licence: Apache-2.0 (code and weights)

    The cosine of a CLIP ViT-H/14 tuned on HPD v2, printed times 100 in tables; the versions do not compare.

    Args:
        version: of the weights.
        checkpoint: their file; None downloads it from the hub (xswu/HPSv2).
        model_name: open_clip's name of the architecture.
        antialias: False resizes as torchvision before 0.17 did, when the published tables were made.
        dtype: type the networks run in; the score is always float32.
        quantize: 8-bit rounding of the pixels; see `CLIPScore`.
    """

    def __init__(
        self,
        version: Literal["v2.1", "v2.0"] = "v2.1",
        checkpoint: str | None = None,
        *,
        model_name: str = "ViT-H-14",
        antialias: bool = True,
        dtype: DType = "float32",
        quantize: Quantize = "none",
    ) -> None:
        files = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}
        if version not in files:
            raise ValueError(f"version must be one of {', '.join(files)}; got {version!r}")
        if checkpoint is None:
            from huggingface_hub import hf_hub_download

            with loading("xswu/HPSv2", files[version]):
                checkpoint = hf_hub_download("xswu/HPSv2", files[version])
        super().__init__(model_name, str(expand(checkpoint)), "cosine", dtype=dtype, quantize=quantize)
        # The released code turns the image into a tensor first: float pixels, overshoots kept, black outside.
        self.preprocess = Preprocess(
            policy="longest_pad",
            size=self.preprocess.size,
            sides="round",
            antialias=antialias,
            clamp=False,
            quantize=quantize,
        )


def pooled(output: Any) -> Tensor:
    """The projected embedding: transformers 4 returns it, transformers 5 returns an object that holds it."""
    return output if isinstance(output, Tensor) else output.pooler_output
