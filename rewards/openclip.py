"""Dual encoders of open_clip: any of its models, HPSv2 and Social Reward.

Sources: Ilharco et al., "OpenCLIP", 2021. Wu et al., "Human Preference Score v2", 2023, arXiv 2306.09341. Isajanyan et al., "Social
Reward", 2024, arXiv 2402.09872.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from .dual import DType, DualEncoder, Variant
from .loading import find, loading, warn_if_cut
from .preprocess import Preprocess, Quantize, from_open_clip

__all__ = ["HPSv2", "OpenCLIPScore", "SocialReward"]


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
            warn_if_cut(self.name, text, self.count(text), self.tokenizer.context_length)
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
        checkpoint: their file, or owner/name/file on the hub; None means that of `version` in xswu/HPSv2.
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
        weights = f"xswu/HPSv2/{files[version]}" if checkpoint is None else checkpoint
        with loading(weights, "a file of HPSv2's weights, or owner/name/file of one on the hub"):
            file = find(weights)
        super().__init__(model_name, str(file), "cosine", dtype=dtype, quantize=quantize)
        # The released code turns the image into a tensor first: float pixels, overshoots kept, black outside.
        self.preprocess = Preprocess(
            policy="longest_pad",
            size=self.preprocess.size,
            sides="round",
            antialias=antialias,
            clamp=False,
            quantize=quantize,
        )


class SocialReward(OpenCLIPScore):
    """Social Reward: which picture the users of a creative platform like to work on.

    Range: -1 to 1
    Size: 224, the shorter side fitted and the centre cut
    Gradient: unless `quantize` is "hard"

    The cosine of OpenAI's CLIP ViT-L/14 tuned on Picsart Image-Social by a triplet loss. Its authors released the code, which saves
    OpenAI's names, and no weights; a fine-tune in the transformers layout is a `CLIPScore`.

    Args:
        checkpoint: file of the weights, by OpenAI's names, or owner/name/file on the hub.
        model_name: open_clip's name of the architecture: with the quick GELU that OpenAI's weights need.
        dtype: type the networks run in; the score is always float32.
        quantize: 8-bit rounding of the pixels; see `CLIPScore`.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        model_name: str = "ViT-L-14-quickgelu",
        dtype: DType = "float32",
        quantize: Quantize = "none",
    ) -> None:
        with loading(checkpoint, "a file of Social Reward's weights, or owner/name/file of one on the hub"):
            file = find(checkpoint)
        super().__init__(model_name, str(file), "cosine", dtype=dtype, quantize=quantize)
