"""Dual encoders in the layout of transformers: CLIP, SigLIP, SigLIP 2 and their fine-tunes.

Sources: Radford et al., "CLIP", 2021, arXiv 2103.00020. Zhai et al., "SigLIP", 2023, arXiv 2303.15343. Tschannen et al., "SigLIP
2", 2025, arXiv 2502.14786. Kirstain et al., "Pick-a-Pic", 2023, arXiv 2305.01569.

NaFlex, the kind of SigLIP 2 that keeps the aspect ratio, is fed without the padding that makes images of several sizes one batch:
the images of a call have one size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dual import DType, DualEncoder, Variant, pooled
from .loading import expand, fill, find, loading, pretrained, pretrained_tokenizer, read_weights, unfilled, warn_if_cut
from .preprocess import Quantize, pretrained_preprocess

__all__ = ["CLIPScore", "PickScore"]


class CLIPScore(DualEncoder):
    """Agreement of image and prompt by a CLIP or SigLIP in the transformers layout.

    Range: by `variant`; "logit" about 15 to 35 for CLIP
    Size: 224, or the model's own; resize rule and text padding are read from its files
    Gradient: unless `quantize` is "hard"
    Weights: openai/clip-vit-large-patch14, google/siglip2-so400m-patch16-naflex, any of these classes
    Licence: MIT (OpenAI CLIP), Apache-2.0 (SigLIP)

    Whatever follows the tower's 77 tokens (SigLIP: 64) is cut with a warning. Counts and relations are CLIP's weak points.

    Args:
        model: folder or hub id of a CLIP-like model: CLIP, SigLIP, SigLIP 2 (NaFlex keeps the aspect ratio) and their fine-tunes.
        variant: spelling of the score; see the module docstring.
        processor: folder or hub id of tokenizer and image processor; None means `model`.
        weights: a file, or owner/name/file on the hub, of a fine-tune that came without a folder of its own, such as
            RE-N-Y/pickscore-siglip/model.safetensors: `model` then says sizes only.
        dtype: type the networks run in; the score is always float32.
        quantize: whether pixels are rounded to 8 bits as published tables did: "hard" (no gradient), "ste" or "none".
        lowercase: whether prompts are lowercased beforehand; None does so for SigLIP 2, which was trained on such.
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
        weights: str | None = None,
        dtype: DType = "float32",
        quantize: Quantize = "none",
        lowercase: bool | None = None,
        baseline: list[str] | None = None,
        alpha: float = 0.5,
    ) -> None:
        super().__init__(variant, dtype, baseline, alpha)
        from transformers import AutoModel

        source = model if processor is None else processor
        network = pretrained(AutoModel, model) if weights is None else refilled(model, weights)
        kind = network.config.model_type
        if not all(hasattr(network, a) for a in ("get_image_features", "get_text_features", "logit_scale")):
            raise ValueError(f"{self.name} needs a dual encoder such as CLIP or SigLIP; {model!r} holds a {kind}")
        self.tokenizer: Any = pretrained_tokenizer(source)
        self.siglip, self.naflex = kind in ("siglip", "siglip2"), kind == "siglip2"
        self.lowercase = reads_lowercase(network.config) if lowercase is None else lowercase
        self.max_length = min(self.tokenizer.model_max_length, network.config.text_config.max_position_embeddings)
        self.ready(network, pretrained_preprocess(source, quantize))

    def encode_image(self, pixels: Tensor) -> Tensor:
        if self.naflex:
            return pooled(self.model.get_image_features(**patches(pixels, self.preprocess.factor)))
        return pooled(self.model.get_image_features(pixel_values=pixels))

    def encode_text(self, texts: list[str]) -> Tensor:
        if self.lowercase:
            texts = [text.lower() for text in texts]
        for text, ids in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            warn_if_cut(self.name, text, len(ids), self.max_length)
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


def refilled(model: str, weights: str) -> Any:
    """The network that a folder describes, with the weights of a file, which may all stand behind the prefix `model.`."""
    from transformers import AutoConfig, AutoModel

    with loading(model, "config.json"), unfilled():
        network = AutoModel.from_config(AutoConfig.from_pretrained(expand(model), trust_remote_code=False))
    with loading(weights, "a file of weights, or owner/name/file of one on the hub"):
        found = read_weights(find(weights))
    if all(key.startswith("model.") for key in found):
        found = {key.removeprefix("model."): value for key, value in found.items()}
    fill(network, found, weights, [r".*\.position_ids"])
    return network


def reads_lowercase(config: Any) -> bool:
    """Whether a model is a SigLIP 2, of whichever kind: those of fixed size differ from SigLIP in reading Gemma's vocabulary."""
    return config.model_type == "siglip2" or (
        config.model_type == "siglip" and config.text_config.vocab_size == 256_000
    )


def patches(pixels: Tensor, side: int) -> dict[str, Tensor]:
    """What NaFlex reads: (B, 3, H, W) -> its patches in rows (B, N, side * side * 3), none of them padding."""
    batch, _, height, width = pixels.shape
    grid = (height // side, width // side)
    tiles = pixels.unflatten(3, (grid[1], side)).unflatten(2, (grid[0], side))  # (B, 3, h, side, w, side)
    return {
        "pixel_values": tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
        "pixel_attention_mask": torch.ones(batch, grid[0] * grid[1], dtype=torch.long, device=pixels.device),
        "spatial_shapes": torch.tensor([grid] * batch),  # read one by one, so better not on the accelerator
    }
