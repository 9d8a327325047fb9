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
arXiv 2511.21631. Layout and time stamps as in transformers' processors, whose `pixel_values` and `input_ids` are reproduced:
exactly where nothing is resized, else up to the rounding of 8-bit pixels.

Deviations: the frames given are all read, none are sampled; Qwen3-VL's budget is that of the lengthened video.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .loading import expand, loading
from .preprocess import CLIP_MEAN, CLIP_STD, Colour3, Preprocess, Quantize

__all__ = ["FAMILY", "Patches", "Reader", "backbone", "chosen", "hidden", "native", "render"]

FEWEST_FRAMES, MOST_FRAMES = 4, 768  # that qwen-vl-utils takes of a video
FAMILY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # model types whose input is made here
INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


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
        return self.pixels(frames).resized(height, width)

    def pixels(self, frames: int) -> Preprocess:
        """The resize and normalisation of each of so many frames."""
        share = frames + -frames % self.temporal if self.volume else 1
        return Preprocess(
            policy="smart_resize",
            mean=self.mean,
            std=self.std,
            quantize=self.quantize,
            factor=self.patch * self.merge,
            min_pixels=-(-self.min_pixels // share),
            max_pixels=self.max_pixels // share,
        )

    def __call__(self, media: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Cuts videos of one size into patches.

        Args:
            media: (B, F, 3, H, W) with values in [0, 1], any floating type; images have F = 1.

        Returns:
            (B, N, 3 * temporal * patch²), normalised, in float32, or float64 if `media` is; and (frames, rows, columns) of
            the grid of N patches that each of them is.
        """
        x = self.pixels(media.shape[1])(media.flatten(0, 1)).unflatten(0, media.shape[:2])
        last = x[:, -1:].expand(-1, -x.shape[1] % self.temporal, -1, -1, -1)
        x = torch.cat([x, last], dim=1)
        p, m = self.patch, self.merge
        grid = x.shape[1] // self.temporal, x.shape[3] // p, x.shape[4] // p
        x = (
            x.unflatten(4, (grid[2] // m, m, p))
            .unflatten(3, (grid[1] // m, m, p))
            .unflatten(1, (grid[0], self.temporal))
        )
        # (B, T, t, 3, H/pm, m, p, W/pm, m, p) -> (B, T H/p W/p, 3 t p p)
        return x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).flatten(6).flatten(1, 5), grid


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
        if kind not in FAMILY:
            raise ValueError(f"a Qwen-VL reader needs one of {', '.join(FAMILY)}; got {kind!r}")
        self.tokenizer, self.kind, self.fps = processor.tokenizer, kind, fps
        self.places = {"image": processor.image_token, "video": processor.video_token}
        limits = {k: v for k, v in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if v is not None}
        self.images = replace(_patches(processor.image_processor, quantize), **limits)
        self.videos = _patches(processor.video_processor, quantize)
        self.videos = replace(self.videos, **limits, volume=kind.startswith("qwen3") and not limits)

    def __call__(
        self,
        texts: Sequence[str],
        media: Sequence[Sequence[Tensor]],
        side: Literal["left", "right"] = "right",
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """The keyword arguments of the network for B texts.

        Args:
            texts: rendered chats (see `render`) that hold one placeholder for each of their media.
            media: for each text, its images (3, H, W) and videos (F, 3, H, W) in the order of their placeholders.
            side: where shorter texts are padded.
            device: of the result; None means that of the media.

        Raises:
            ValueError: a text does not hold one placeholder a medium.
        """
        flat = [medium for row in media for medium in row]
        device = device or (flat[0].device if flat else "cpu")
        read = self.patches(flat)
        queue = iter(read)
        texts = [self.expand(text, [next(queue)[1] for _ in row], row) for text, row in zip(texts, media, strict=True)]
        result = self.tokens(texts, side)
        for name, (pixels, grid) in INPUTS.items():
            mine = [r for r, medium in zip(read, flat, strict=True) if (medium.ndim == 4) == (name == "video")]
            if mine:
                result[pixels] = torch.cat([patches for patches, _ in mine])
                result[grid] = torch.tensor([shape for _, shape in mine])
                if name == "video" and self.kind == "qwen2_5_vl":
                    result["second_per_grid_ts"] = torch.full((len(mine),), self.videos.temporal / self.fps)
        return {name: value.to(device) for name, value in result.items()}

    def tokens(self, texts: Sequence[str], side: Literal["left", "right"]) -> dict[str, Tensor]:
        """Ids, mask and kinds (0 text, 1 image, 2 video) of texts padded to one length."""
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            where = slice(length - len(row), None) if side == "left" else slice(len(row))
            ids[i, where], mask[i, where] = torch.tensor(row), 1
        for number, token in enumerate(self.places.values(), 1):
            kinds[ids == self.tokenizer.convert_tokens_to_ids(token)] = number
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}

    def patches(self, media: Sequence[Tensor]) -> list[tuple[Tensor, tuple[int, int, int]]]:
        """Patches and grid of each medium; those of one shape are resized together, and what comes twice only once."""
        groups: dict[tuple[int, ...], dict[int, Tensor]] = {}
        for medium in media:
            groups.setdefault(tuple(medium.shape), {})[id(medium)] = medium
        found = {}
        for shape, group in groups.items():
            stacked = torch.stack(list(group.values()))
            if len(shape) == 3:
                patches, grid = self.images(stacked[:, None])
            else:
                patches, grid = self.videos(stacked)
            found |= {key: (row, grid) for key, row in zip(group, patches, strict=True)}
        return [found[id(medium)] for medium in media]

    def expand(self, text: str, grids: Sequence[tuple[int, int, int]], media: Sequence[Tensor]) -> str:
        """A text with as many placeholders for each medium as it has tokens."""
        parts = re.split("(" + "|".join(map(re.escape, self.places.values())) + ")", text)
        wanted = [self.places["video" if medium.ndim == 4 else "image"] for medium in media]
        if parts[1::2] != wanted:
            raise ValueError(
                f"a text must hold one placeholder for each medium and no other; for {wanted} it holds {parts[1::2]}: "
                f"remove them from the prompt in {text[-200:]!r}"
            )
        for i, (frames, rows, columns) in enumerate(grids):
            token, blocks = wanted[i], rows * columns // self.images.merge**2
            parts[2 * i + 1] = token * (frames * blocks)
            if token == self.places["video"] and self.kind.startswith("qwen3"):
                parts[2 * i + 1] = "".join(
                    f"<{seconds:.1f} seconds><|vision_start|>{token * blocks}<|vision_end|>"
                    for seconds in self.stamps(len(media[i]))
                )
        return "".join(parts)

    def stamps(self, frames: int) -> list[float]:
        """Seconds at the middle of each patch of frames, the last frame repeated if need be."""
        t = self.videos.temporal
        return [(i + min(i + t - 1, frames - 1)) / 2 / self.fps for i in range(0, frames, t)]


def _patches(processor: Any, quantize: Quantize) -> Patches:
    """What an image or video processor of transformers says.

    Raises:
        ValueError: it resizes by another kernel, or leaves a step out.
    """
    steps = ("do_resize", "do_rescale", "do_normalize")
    if int(processor.resample) != 3 or not all(getattr(processor, step) for step in steps):
        raise ValueError(f"processor not understood: resample other than 3 (bicubic), or one of {steps} switched off")
    return Patches(
        patch=processor.patch_size,
        merge=processor.merge_size,
        temporal=processor.temporal_patch_size,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
        quantize=quantize,
    )


def render(processor: Any, content: Sequence[Mapping[str, str]], system: str = "", start: str = "") -> str:
    """The text of a chat of one question, up to where the answer goes on, by the checkpoint's own template.

    A template that lets the model think before it answers is told not to, or the thought is closed at once.

    Args:
        processor: the checkpoint's.
        content: parts of the question in order: {"type": "image"}, {"type": "video"} or {"type": "text", "text": ...}.
        system: what comes before the question; the template's own if empty.
        start: words that the answer begins with.
    """
    chat = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    chat.append({"role": "user", "content": list(content)})
    thinks = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **thinks)
    if text.rstrip().endswith("<think>"):
        text = text.rstrip() + "\n\n</think>\n\n"
    return text + start


def chosen(total: int, fps: float, rate: float, count: int | None = None) -> list[int]:
    """The frames that qwen-vl-utils takes of a video: evenly spaced, both ends included, an even number where there are enough.

    Args:
        total: frames of the video.
        fps: its frames a second.
        rate: wanted frames a second; at least 4 and at most 768 frames are taken.
        count: wanted frames, instead of `rate`.

    Raises:
        ValueError: there are fewer than two frames.
    """
    if total < 2:
        raise ValueError(f"a video needs at least 2 frames here; got {total}")
    most = min(MOST_FRAMES, total) // 2 * 2
    wanted = count if count is not None else min(max(total / fps * rate, FEWEST_FRAMES), most)
    wanted = min(round(wanted / 2) * 2, total)
    return torch.linspace(0, total - 1, wanted).round().long().tolist()


def hidden(network: Any, inputs: Mapping[str, Tensor], sequential: bool = False) -> Tensor:
    """The last hidden states of a stock Qwen-VL network without its language head: (B, L, D).

    Args:
        network: such as `Qwen2VLModel`.
        inputs: from a `Reader`.
        sequential: whether positions simply count the tokens, in all three coordinates, as in models that were trained on a
            `forward` of their own that left the coordinates of patches out.
    """
    positions = {}
    if sequential:
        count = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        positions = {"position_ids": count.expand(3, *count.shape)}
    return network(**inputs, **positions, use_cache=False).last_hidden_state


def backbone(model: str, tokens: Sequence[str] = ()) -> tuple[Any, Any]:
    """A `Qwen2VLModel` without weights (on the meta device, for `fill`) and its processor, both with room for more tokens.

    Args:
        model: folder or hub id of a Qwen2-VL checkpoint, of which config, tokenizer and processor are read.
        tokens: special tokens to add; the embedding has exactly one row for each token of the tokenizer then.

    Raises:
        OSError: files are missing, incomplete or unreadable.
    """
    from accelerate import init_empty_weights
    from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLModel

    with loading(model, "config.json, tokenizer and preprocessor_config.json of a Qwen2-VL"):
        config = Qwen2VLConfig.from_pretrained(expand(model))
        processor = AutoProcessor.from_pretrained(expand(model), trust_remote_code=False)
    if tokens:
        processor.tokenizer.add_tokens(list(tokens), special_tokens=True)
        config.get_text_config().vocab_size = len(processor.tokenizer)
    with init_empty_weights(include_buffers=False):
        return Qwen2VLModel(config), processor


def native(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Qwen2-VL by the names of `Qwen2VLModel`, from either of the two published namings; others keep theirs.

    `visual.` and `model.visual.` become `visual.`; `model.` and `model.language_model.` become `language_model.`.
    """
    names = {k: re.sub(r"^model\.(?:language_model\.)?(?!visual\.)", "language_model.", k) for k in weights}
    return {re.sub(r"^model\.visual\.", "visual.", names[k]): value for k, value in weights.items()}
