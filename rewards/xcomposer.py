"""InternLM-XComposer2.5-Reward: how good an answer about an image is.

The reward of a dialogue whose answer is wanted, about the images it shows: a scalar head on InternLM-XComposer2.5, trained on pairs
of answers. Zang et al., "InternLM-XComposer2.5-Reward: A Simple Yet Effective Multi-Modal Reward Model", 2025, arXiv 2501.12368.

It judges words about a given image, not an image made for given words. Here `question` and `answer` make a dialogue of the prompt,
by default one in which the prompt describes the image; nobody has validated that on generated images.

The network is code in the checkpoint's repository (`get_score(chat, image_files, hd_num)`), written for transformers 4: where a
newer one cannot run it, score from an environment of its own.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Prompt, Reward
from .loading import expand, loading, precision, pretrained
from .wire import eight_bits

__all__ = ["XComposerReward"]


class XComposerReward(Reward):
    """InternLM-XComposer2.5-Reward (Zang et al. 2025, arXiv 2501.12368).

    Range: unbounded; published examples are 5.76 and -2.84
    Size: slices of 560, at most `slices` of them
    Gradient: no
    Weights: internlm/internlm-xcomposer2d5-7b-reward
    Licence: Apache-2.0 (code); weights free for research, commercial use by application

    Args:
        model: folder or hub id of the model and its code.
        question: what the user says in the dialogue; `{prompt}` stands for the prompt.
        answer: what is answered, and scored; likewise.
        trust_remote_code: whether the authors' code, which comes with the model, may run; nothing works without.
        slices: into which a large image is cut at most (the authors' `hd_num`).
        dtype: type the network runs in; "float16" as published.

    Raises:
        ValueError: `trust_remote_code` is off, or neither text holds `{prompt}`.
        OSError: files are missing, incomplete or unreadable, or hold another kind of model.
    """

    differentiable = False

    def __init__(
        self,
        model: str = "internlm/internlm-xcomposer2d5-7b-reward",
        question: str = "Describe the image.",
        answer: str = "{prompt}",
        *,
        trust_remote_code: bool = False,
        slices: int = 9,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    ) -> None:
        super().__init__()
        self.dtype = precision(dtype)
        if not trust_remote_code:
            raise ValueError(f"{model} runs code of its authors: read it, then pass trust_remote_code=True")
        if "{prompt}" not in question + answer:
            raise ValueError(f"question or answer must hold {{prompt}}; got {question!r} and {answer!r}")
        from transformers import AutoModel, AutoTokenizer

        self.network: Any = pretrained(AutoModel, model, trust_remote_code=True, dtype=self.dtype)
        with loading(model, "a model with the method get_score, and its tokenizer"):
            if not callable(getattr(self.network, "get_score", None)):
                raise OSError(f"{type(self.network).__name__} has no method get_score")
            self.network.tokenizer = AutoTokenizer.from_pretrained(expand(model), trust_remote_code=True)
        self.question, self.answer, self.slices = question, answer, slices
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        from PIL import Image

        scores = []
        half = torch.autocast(media.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        with TemporaryDirectory() as folder, half:  # the authors' code reads files
            for i, (image, prompt) in enumerate(zip(media, prompts, strict=True)):
                file = str(Path(folder) / f"{i}.png")
                Image.fromarray(eight_bits(image)).save(file)
                texts = {"user": self.question, "assistant": self.answer}
                chat = [{"role": who, "content": text.replace("{prompt}", prompt.text)} for who, text in texts.items()]
                scores.append(
                    self.network.get_score(chat, [file], hd_num=self.slices)
                )  # one by one: no padding by neighbours
        return torch.tensor([float(score) for score in scores], device=media.device)
