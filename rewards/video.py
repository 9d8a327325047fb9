"""VideoReward: visual quality, motion quality and text alignment of a video by a Qwen2-VL with three special tokens.

The question is a fixed text about the three criteria; each section ends with a token of its own, and the reward of a criterion is a
linear function of the last hidden state there:

    r_c = w_c · h(token_c),    score = sum_c (r_c - mean_c) / std_c

with the means and deviations over the training set. The prompt stands in the last section, so that VQ and MQ, read before it by a
causal network, do not know it. The published head has one row w for all three criteria, the released training script three.

Source: Liu et al., "Improving Video Generation with Human Feedback", 2025, arXiv 2501.13918; github.com/KwaiVGI/VideoAlign.

The released class leaves the positions of patches to its backbone, which under the transformers of its environment (4.45.2) counts
tokens alike in time, height and width. Trained so, it is run so here (`sequential`).

Deviations. LoRA is merged into the weights, once, in float32; the reference adds its branch in bfloat16 each time. Frames are
resized as float numbers unless `quantize` asks for the 8 bits of decoded video. An adapter, as the training script saves it,
(adapter_model.safetensors and non_lora_state_dict.pth) is not read: save the whole model, as the released one is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import Prompt, Reward, Scores
from .judging import published
from .loading import fill, folder, loading, precision, read_weights
from .preprocess import Quantize
from .qwen import Reader, backbone, chosen, hidden, native, render

__all__ = ["VideoReward"]

Part = Literal["VQ", "MQ", "TA"]
TOKENS: dict[Part, str] = {"VQ": "<|VQ_reward|>", "MQ": "<|MQ_reward|>", "TA": "<|TA_reward|>"}
MIN_PIXELS = 128 * 28 * 28  # of a frame, in the released vision_process.py


class VideoReward(Reward):
    """VideoReward of VideoAlign: which generated videos people prefer, by quality, motion and text.

    Range: a sum of z-scores over its training set, one a part; normalise=False gives raw numbers
    Size: 2 frames a second from at least 4 frames; each resized to 100352 to 200704 pixels
    Gradient: unless `quantize` is "hard"
    Weights: KwaiVGI/VideoReward (KlingTeam/VideoReward) and config and processor of Qwen/Qwen2-VL-2B-Instruct
    Licence: MIT (code), Apache-2.0 (Qwen2-VL); that of the weights is on their page

    Parts: VQ (visual quality), MQ (motion quality), TA (text alignment); the score is their sum. VQ and MQ know no prompt.

    Args:
        model: folder or hub id with model_config.json and checkpoint-N/model.pth, the highest N.
        base: folder or hub id of the Qwen2-VL that it was made of; None as model_config.json says. Its weights are not read.
        parts: of the score.
        fps: frames a second of the media.
        frames: how many frames are taken; None for as many a second as in training.
        max_pixels: of a frame; None as in training.
        normalise: whether each part becomes a z-score over the training set.
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
        model: str = "KwaiVGI/VideoReward",
        base: str | None = None,
        *,
        parts: list[Part] | None = None,
        fps: float = 8.0,
        frames: int | None = None,
        max_pixels: int | None = None,
        normalise: bool = True,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        run_in = precision(dtype)
        self.parts: list[Part] = list(TOKENS) if parts is None else [part for part in TOKENS if part in parts]
        if not self.parts or set(parts or TOKENS) - set(TOKENS):
            raise ValueError(f"parts must be some of {', '.join(TOKENS)}; got {parts}")
        if fps <= 0 or (frames is not None and frames < 2):
            raise ValueError(f"fps must be above 0 and frames at least 2; got {fps} and {frames}")
        path, config = read_config(model)
        data = config["data_config"]
        self.fps, self.frames, self.rate = fps, frames or data["num_frames"], data["fps"]
        self.norms = norms(model, config) if normalise else {part: (0.0, 1.0) for part in TOKENS}
        self.network, processor = backbone(base or config["model_config"]["model_name_or_path"], list(TOKENS.values()))
        most = max_pixels or data["max_frame_pixels"]
        self.processor = processor
        self.reader = Reader(
            processor, "qwen2_vl", quantize=quantize, min_pixels=min(MIN_PIXELS, most), max_pixels=most
        )
        weights = plain(read_weights(path), config["peft_lora_config"])
        head = weights.pop("rm_head.weight", torch.empty(0))
        if head.ndim != 2 or len(head) not in (1, 3):
            raise ValueError(f"{path} needs rm_head.weight with 1 or 3 rows; it has {tuple(head.shape)}")
        fill(self.network, native(weights), str(path), ignore=("lm_head.weight",))
        self.network.to(run_in)
        self.head = nn.Parameter(head.float())
        question = published("videoalign", "detailed_special")
        last = TOKENS[self.parts[-1]]
        self.question = question[: question.index(last) + len(last)]  # what follows is not seen from there
        self.needs_prompt = "TA" in self.parts
        self.differentiable = quantize != "hard"
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        clips = media[:, chosen(media.shape[1], self.fps, self.rate, self.frames)]
        texts = [prompt.text for prompt in prompts] if self.needs_prompt else [""] * len(clips)
        questions = [
            [{"type": "video"}, {"type": "text", "text": self.question.replace("{prompt}", text)}] for text in texts
        ]
        inputs = self.reader([render(self.processor, q) for q in questions], [[clip] for clip in clips])
        states = hidden(self.network, inputs, sequential=True).to(self.head.dtype)
        parts = {part: self.read(part, states, inputs["input_ids"]) for part in self.parts}
        return Scores(torch.stack(list(parts.values())).sum(dim=0), dict(parts))

    def read(self, part: Part, states: Tensor, ids: Tensor) -> Tensor:
        """The reward of a criterion: states (B, L, D) and token ids (B, L) -> (B,)."""
        here = (ids == self.processor.tokenizer.convert_tokens_to_ids(TOKENS[part])).int()
        # The template's own token is the one before the prompt, or for TA the one behind it.
        place = here.shape[1] - 1 - here.flip(1).argmax(dim=1) if part == "TA" else here.argmax(dim=1)
        row = self.head[list(TOKENS).index(part) % len(self.head)]
        mean, std = self.norms[part]
        return (states[torch.arange(len(ids), device=ids.device), place] @ row - mean) / std


def read_config(model: str) -> tuple[Path, dict[str, Any]]:
    """The weights' file and the config of a checkpoint in the released layout.

    Raises:
        OSError: files are missing or unreadable.
        ValueError: it was trained on another question, or reads other tokens.
    """
    with loading(model, "model_config.json and checkpoint-N/model.pth"):
        found = folder(model, "model_config.json", "checkpoint-*/model.pth")
        config = json.loads((found / "model_config.json").read_text())
        steps = {int(path.parent.name.rpartition("-")[2]): path for path in found.glob("checkpoint-*/model.pth")}
        if not steps:
            raise FileNotFoundError("no checkpoint-N/model.pth")
        config["data_config"].setdefault("num_frames", None)
        kind = config["data_config"]["prompt_template_type"], config["data_config"].get("sample_type", "uniform")
    if kind != ("detailed_special", "uniform") or not config["model_config"]["use_special_tokens"]:
        raise ValueError(
            f"VideoReward reads a checkpoint with the question detailed_special, special tokens and uniform frames; "
            f"{model!r} has {kind[0]}, use_special_tokens={config['model_config']['use_special_tokens']}, {kind[1]}"
        )
    return steps[max(steps)], config


def norms(model: str, config: Mapping[str, Any]) -> dict[Part, tuple[float, float]]:
    """Mean and deviation of each part over the training set.

    Raises:
        ValueError: the config has none.
    """
    numbers = config.get("inference_config") or {}
    lacking = [f"{part}_{what}" for part in TOKENS for what in ("mean", "std") if f"{part}_{what}" not in numbers]
    if lacking:
        raise ValueError(
            f"inference_config of {model!r} lacks {', '.join(lacking)}: pass normalise=False for raw scores"
        )
    return {part: (numbers[f"{part}_mean"], numbers[f"{part}_std"]) for part in TOKENS}


def plain(weights: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights without peft: its prefixes removed, each W + scale B A in the place of W, A and B.

    Args:
        weights: by the names of a model in peft's wrapper, or of one without.
        lora: peft_lora_config of the checkpoint.

    Raises:
        ValueError: a matrix of LoRA is without its fellows, or has another rank than the config says.
    """
    # peft wraps the layers it changes: their own weights are called base_layer
    bare = {key.removeprefix("base_model.model.").replace(".base_layer.", "."): value for key, value in weights.items()}
    low = {key: bare.pop(key) for key in list(bare) if ".lora_" in key}
    layers = sorted({key.partition(".lora_")[0] for key in low})
    if set(low) != {f"{layer}.lora_{x}.default.weight" for layer in layers for x in "AB"}:
        raise ValueError(
            f"LoRA weights not understood: lora_A.default and lora_B.default are not paired in {layers[:4]}"
        )
    for layer in layers:
        a, b = (low[f"{layer}.lora_{x}.default.weight"].float() for x in "AB")
        rank, whole = lora["lora_r"], bare.get(f"{layer}.weight")
        if whole is None or len(a) != rank:
            raise ValueError(
                f"LoRA of {layer} has rank {len(a)}: needs {layer}.weight, and the rank {rank} of the config"
            )
        scale = lora["lora_alpha"] / (rank**0.5 if lora.get("use_rslora") else rank)
        bare[f"{layer}.weight"] = (whole.float() + scale * (b @ a)).to(whole.dtype)
    return bare
