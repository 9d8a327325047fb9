"""VideoScore: five ratings of a generated video by a regression head on a vision-language model.

    (visual quality, temporal consistency, dynamic degree, text-to-video alignment, factual consistency) = W h(last token) + b

on the scale from 1 (bad) to 4 (as a real video) that its raters used. Two bases are published, and the checkpoint's config says
which it is: a Qwen2-VL that reads a video at 8 frames a second, and Mantis-Idefics2, which reads frames as separate images behind
the question, 16 of them at most (48 for VideoScore-v1.1).

Source: He et al., "VideoScore: Building Automatic Metrics to Simulate Fine-grained Human Feedback for Video Generation", 2024,
arXiv 2406.15252; question (`questions/videoscore.json`) and classes from TIGER-AI-Lab/VideoScore and TIGER-AI-Lab/Mantis.

The Qwen2-VL class of Mantis gives its backbone no coordinates of patches, so positions count the tokens one by one here as there.

Deviations. Frames are resized once, as float numbers, where the released pipelines resize 8-bit ones (Qwen2-VL: twice). The score
is the mean of the ratings asked for; the authors report each by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .base import Prompt, Reward, Scores
from .judging import published
from .loading import expand, fill, loading, precision, read_model
from .preprocess import Preprocess, Quantize, at_least_float32, resample
from .qwen import Reader, backbone, chosen, hidden, native, render

__all__ = ["VideoScore"]

Aspect = Literal[
    "visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment", "factual consistency"
]
ASPECTS: tuple[Aspect, ...] = Aspect.__args__
RATE = 8.0  # frames a second that the Qwen2-VL reads
FRAMES = 16  # at most, that the Idefics2 reads
# qwen-vl-utils: least and most pixels of a frame, and most of a pair of frames times their number
LEAST, MOST, TOTAL = 128 * 28 * 28, 768 * 28 * 28, 24576 * 28 * 28
NEVER_ZERO = 1e-6  # Idefics2 takes a frame of zeros, which is a grey one, for padding


class VideoScore(Reward):
    """VideoScore: quality, consistency, dynamics, alignment and factuality of a generated video.

    Range: 1 to 4, the scale of its raters
    Size: Qwen2-VL: 8 frames a second, 100352 to 602112 pixels each; Idefics2: 16 frames, shorter side from 378, longer to 980
    Gradient: unless `quantize` is "hard"
    Weights: TIGER-Lab/VideoScore-Qwen2-VL, TIGER-Lab/VideoScore-v1.1, TIGER-Lab/VideoScore
    Licence: MIT (code); that of the weights is on their pages

    Seven or eight billion weights. The parts are the five ratings.

    Args:
        model: folder or hub id of either kind.
        aspects: of which the score is the mean; None for all five.
        fps: frames a second of the media; the Idefics2 takes no notice.
        frames: Idefics2: at most so many are read; Qwen2-VL: exactly so many; None as published.
        max_pixels: Qwen2-VL: of a frame; None as published.
        dtype: type the network runs in; head and score are in float32.
        quantize: whether pixels are rounded to 8 bits as those of decoded videos: "hard" (no gradient), "ste" or "none".

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the checkpoint is of another kind, or an argument is out of its range.
    """

    modality = "video"
    claims_quality = True

    def __init__(
        self,
        model: str = "TIGER-Lab/VideoScore-Qwen2-VL",
        aspects: list[Aspect] | None = None,
        *,
        fps: float = 8.0,
        frames: int | None = None,
        max_pixels: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        run_in = precision(dtype)
        self.aspects: list[Aspect] = list(ASPECTS) if aspects is None else list(aspects)
        if not self.aspects or set(self.aspects) - set(ASPECTS):
            raise ValueError(f"aspects must be some of {', '.join(ASPECTS)}; got {aspects}")
        if fps <= 0 or (frames is not None and frames < 2):
            raise ValueError(f"fps must be above 0 and frames at least 2; got {fps} and {frames}")
        from transformers import PretrainedConfig

        with loading(model, "config.json"):
            config = PretrainedConfig.get_config_dict(expand(model))[0]
        kind, pooling = config.get("model_type"), config.get("score_type") or "end_token_mlp"
        if kind not in ("qwen2_vl", "idefics2") or pooling != "end_token_mlp":
            raise ValueError(
                f"VideoScore reads the last token of a qwen2_vl or idefics2; {model!r} is a {kind}, score_type {pooling!r}"
            )
        weights = read_model(model)
        self.head = read_head(weights, model)
        if kind == "qwen2_vl":
            self.reader: Qwen | Idefics = Qwen(model, weights, fps, frames, max_pixels, quantize)
        else:
            self.reader = Idefics(model, weights, frames or FRAMES, quantize)
        self.network = self.reader.network.to(run_in)
        self.question = published("videoscore", "regression")
        self.differentiable = quantize != "hard"
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        states, mask = self.reader(media, [self.question.replace("{prompt}", prompt.text) for prompt in prompts])
        last = mask.sum(dim=1) - 1  # padded on the right
        state = states[torch.arange(len(states), device=states.device), last]
        ratings = self.head(state.to(self.head.weight.dtype))
        parts: dict[str, Tensor] = dict(zip(ASPECTS, ratings.unbind(dim=1), strict=True))
        return Scores(torch.stack([parts[aspect] for aspect in self.aspects]).mean(dim=0), parts)


class Qwen:
    """A Qwen2-VL and how it reads videos: frames at a rate, as one video before the question."""

    def __init__(
        self,
        model: str,
        weights: Mapping[str, Tensor],
        fps: float,
        frames: int | None,
        max_pixels: int | None,
        quantize: Quantize,
    ) -> None:
        self.network, self.processor = backbone(model)
        fill(self.network, native(weights), model)
        self.fps, self.frames, self.max_pixels = fps, frames, max_pixels
        self.quantize: Quantize = quantize

    def __call__(self, media: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Last hidden states (B, L, D) and the mask of the tokens (B, L)."""
        clips = media[:, chosen(media.shape[1], self.fps, RATE, self.frames)]
        own = Reader(self.processor, "qwen2_vl").videos
        most = max(min(MOST, TOTAL * 2 // clips.shape[1]), int(1.05 * LEAST))
        most = self.max_pixels or min(most, own.max_pixels)
        reader = Reader(
            self.processor,
            "qwen2_vl",
            quantize=self.quantize,
            min_pixels=min(max(LEAST, own.min_pixels), most),
            max_pixels=most,
        )
        chats = [render(self.processor, [{"type": "video"}, {"type": "text", "text": text}]) for text in texts]
        inputs = reader(chats, [[clip] for clip in clips])
        return hidden(self.network, inputs, sequential=True), inputs["attention_mask"]


class Idefics:
    """An Idefics2 and how it reads videos: frames as images behind the question."""

    def __init__(self, model: str, weights: Mapping[str, Tensor], frames: int, quantize: Quantize) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoProcessor, Idefics2Config, Idefics2Model

        with loading(model, "config.json, tokenizer and preprocessor_config.json of an Idefics2"):
            config = Idefics2Config.from_pretrained(expand(model))
            self.processor = AutoProcessor.from_pretrained(expand(model), trust_remote_code=False)
        images = self.processor.image_processor
        if images.do_image_splitting or int(images.resample) != 2 or not images.size.get("shortest_edge"):
            raise ValueError(
                f"image processor of {model!r} not understood: splitting, a resample other than 2 (bilinear)"
            )
        self.processor.tokenizer.padding_side = "right"
        with init_empty_weights(include_buffers=False):
            self.network = Idefics2Model(config)
        fill(self.network, {k.removeprefix("model."): v for k, v in weights.items()}, model)
        self.frames, self.store = frames, Preprocess(quantize=quantize).store

    def __call__(self, media: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Last hidden states (B, L, D) and the mask of the tokens (B, L).

        Raises:
            ValueError: a prompt holds an image's placeholder.
        """
        if any("<image>" in text for text in texts):
            raise ValueError("a prompt holds <image>, which stands for a frame: remove it")
        frames = taken(media.shape[1], self.frames)
        asked = [text + "<image> " * len(frames) for text in texts]
        inputs = self.processor(text=asked, padding=True, return_tensors="pt").to(media.device)
        return self.network(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=self.pixels(media[:, frames]),
            use_cache=False,
        ).last_hidden_state, inputs["attention_mask"]

    def pixels(self, clips: Tensor) -> Tensor:
        """Resized and normalised frames: (B, F, 3, H, W) -> (B, F, 3, h, w)."""
        images = self.processor.image_processor
        x = at_least_float32(clips)
        size = within(x.shape[-2], x.shape[-1], images.size["shortest_edge"], images.size["longest_edge"])
        x = resample(self.store(x.flatten(0, 1)), size, "bilinear", store=self.store)
        mean, std = (x.new_tensor(list(v)).view(3, 1, 1) for v in (images.image_mean, images.image_std))
        return ((x - mean) / std + NEVER_ZERO).unflatten(0, clips.shape[:2])


def read_head(weights: dict[str, Tensor], model: str) -> nn.Linear:
    """Takes the head out of the weights of a checkpoint, in float32.

    Raises:
        ValueError: there is none, or it gives another number of ratings.
    """
    mine = {k.removeprefix("score."): weights.pop(k).float() for k in list(weights) if k.startswith("score.")}
    if set(mine) != {"weight", "bias"} or len(mine["weight"]) != len(ASPECTS):
        shapes = {f"score.{k}": tuple(v.shape) for k, v in mine.items()}
        raise ValueError(f"{model!r} needs score.weight and score.bias for {len(ASPECTS)} ratings; got {shapes}")
    head = nn.Linear(mine["weight"].shape[1], len(ASPECTS))
    fill(head, mine, model)
    return head


def taken(total: int, most: int) -> list[int]:
    """The frames of a video that are read: all, or so many at even steps from the first."""
    return list(range(total)) if total <= most else [int(i * total / most) for i in range(most)]


def within(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """(height, width) after Idefics2's resize: the longer side at most `most`, then both at least `least`."""
    if max(height, width) > most:
        height, width = (most, int(most * (width / height))) if height > width else (int(most / (width / height)), most)
    return max(height, least), max(width, least)
