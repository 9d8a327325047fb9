"""The Qwen-VL family on tensors: pixels and text to the network's input, differentiably, and the stock network run on it.

Qwen2-VL, Qwen2.5-VL and Qwen3-VL read an image or a video as a sequence of patches. A video of F frames of H x W pixels is

1. resized, antialiased bicubic, to multiples of p m pixels within a budget (`smart_size`), and normalised;
2. lengthened to a multiple of t frames by repeating the last one; an image counts as one frame;
3. cut into (F / t) (H / p) (W / p) patches of 3 t p p numbers, those of an m x m block next to one another:
   (F/t, t, 3, H/pm, m, p, W/pm, m, p) -> (F/t, H/pm, W/pm, m, m, 3, t, p, p).

Each block is one token of the language model, so a text holds as many placeholders as there are blocks. p = 14 (Qwen3-VL: 16),
m = 2, t = 2, means, deviations and budgets come from the checkpoint's processor. A Qwen3-VL video has a time stamp in words before
each pair of frames and a budget for all frames together.

Sources: Wang et al., "Qwen2-VL", 2024, arXiv 2409.12191. Bai et al., "Qwen2.5-VL", 2025, arXiv 2502.13923. "Qwen3-VL", 2025,
arXiv 2511.21631. Layout and time stamps as in transformers' processors, whose `pixel_values` and `input_ids` are reproduced: exactly
where nothing is resized, else up to the rounding of 8-bit pixels.

Deviations: the frames given are all read, none are sampled; Qwen3-VL's budget is that of the lengthened video.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .loading import expand, loading
from .preprocess import CLIP_MEAN, CLIP_STD, Colour3, Quantize, resample, smart_size

__all__ = ["FAMILY", "Patches", "Reader", "backbone", "hidden", "native", "render"]

FAMILY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # model types whose input is made here


@dataclass(frozen=True)
class Patches:
    """How pixels become patches.

    Attributes:
        patch: side of a patch in pixels.
        merge: blocks of merge x merge patches are one token.
        temporal: frames in a patch.
        mean: subtracted from each channel.
        std: divides each channel.
        min_pixels: smallest area of a resized frame.
        max_pixels: largest area of a resized frame.
        volume: whether the two count all frames together.
        quantize: imitation of 8-bit storage, see `Preprocess`.
    """

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    mean: Colour3 = CLIP_MEAN
    std: Colour3 = CLIP_STD
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    volume: bool = False
    quantize: Quantize = "none"

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) that frames are resized to."""
        share = frames if self.volume else 1
        low, high = self.min_pixels / share, self.max_pixels / share
        return smart_size(height, width, self.patch * self.merge, low, high)

    def __call__(self, media: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Cuts videos of one size into patches.

        Args:
            media: (B, F, 3, H, W) with values in [0, 1], any floating type; images have F = 1.

        Returns:
            (B, N, 3 * temporal * patch²), normalised, in float32, or float64 if `media` is; and (frames, rows, columns) of
            the grid of N patches that each of them is.
        """
        raise NotImplementedError


class Reader:
    """Turns texts and media into the input of a Qwen-VL network.

    Args:
        processor: the checkpoint's, from `AutoProcessor`.
        kind: the checkpoint's model type, one of `FAMILY`.
        quantize: imitation of 8-bit storage, see `Preprocess`.
        fps: frames a second that videos are taken to have; Qwen2-VL takes no notice.
        min_pixels: smallest area of an image or a frame; None as the processor says.
        max_pixels: largest area of an image or a frame; None as the processor says.

    Attributes:
        images: how images become patches.
        videos: how videos do.
    """

    images: Patches
    videos: Patches

    def __init__(
        self,
        processor: Any,
        kind: str,
        *,
        quantize: Quantize = "none",
        fps: float = 2.0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        raise NotImplementedError

    def __call__(
        self, texts: Sequence[str], media: Sequence[Sequence[Tensor]], side: Literal["left", "right"] = "right"
    ) -> dict[str, Tensor]:
        """The keyword arguments of the network for B texts, on the device of the media.

        Args:
            texts: rendered chats (see `render`) that hold one placeholder for each of their media.
            media: for each text, its images (3, H, W) and videos (F, 3, H, W) in the order of their placeholders.
            side: where shorter texts are padded.

        Raises:
            ValueError: a text does not hold one placeholder a medium.
        """
        raise NotImplementedError


def render(processor: Any, content: Sequence[Mapping[str, str]], system: str = "", start: str = "") -> str:
    """The text of a chat of one question, up to where the answer goes on, by the checkpoint's own template.

    Args:
        processor: the checkpoint's.
        content: parts of the question in order: {"type": "image"}, {"type": "video"} or {"type": "text", "text": ...}.
        system: what comes before the question; the template's own if empty.
        start: words that the answer begins with.
    """
    raise NotImplementedError


def hidden(network: Any, inputs: Mapping[str, Tensor], sequential: bool = False) -> Tensor:
    """The last hidden states of a stock Qwen-VL network without its language head: (B, L, D).

    Args:
        network: such as `Qwen2VLModel`.
        inputs: from a `Reader`.
        sequential: whether positions simply count the tokens, in all three coordinates, as in models that were trained on a
            `forward` of their own that left the coordinates of patches out.
    """
    raise NotImplementedError


def backbone(model: str, tokens: Sequence[str] = ()) -> tuple[Any, Any]:
    """A `Qwen2VLModel` without weights (on the meta device, for `fill`) and its processor, both with room for more tokens.

    Args:
        model: folder or hub id of a Qwen2-VL checkpoint, of which config, tokenizer and processor are read.
        tokens: special tokens to add; the embedding has exactly one row for each token of the tokenizer then.
    """
    raise NotImplementedError


def native(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Qwen2-VL by the names of `Qwen2VLModel`, from either of the two published namings; others keep theirs.

    `visual.` and `model.visual.` become `visual.`; `model.` and `model.language_model.` become `language_model.`.
    """
    raise NotImplementedError
