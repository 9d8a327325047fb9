"""Z-Image and its turbo student: one stream of image and text tokens, each row as long as its own text.

The pipeline counts guidance from 0, where it is off; kilter's scale is one more and counts from 1, so its default 5 is 6 here.
The network's time runs from 0, noise, to 1, data, and its output points from noise to data. A turbo student is known by its
name alone, which its folder or hub id must contain: nothing in its files tells it from its teacher.

Source: 2511.22699.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.base import Prompt

from ..latents import FlowPolicy
from ..levels import Levels
from ..policy import Cond, Size

__all__ = ["ZImage"]


class ZImage(FlowPolicy):
    """Any `ZImagePipeline`."""

    sided = False
    max_sequence_length = 512

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        self.multiple = 2 * pipe.vae_scale_factor
        self.few_step = "turbo" in str(pipe.name_or_path).lower()
        self.guidance, self.steps = (1.0, 8) if self.few_step else (6.0, 50)
        self.size = (1024, 1024)

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        (tokens,), _ = self.pipe.encode_prompt([text], self.device, False, max_sequence_length=self.max_sequence_length)
        return {"tokens": tokens, "real": torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)}

    def sigmas(self, steps: int) -> list[float]:
        return torch.linspace(1.0, 1 / steps, steps).tolist()

    def published(
        self, prompts: Sequence[Prompt], guidance: float, steps: int, size: Size, x: Tensor
    ) -> dict[str, Any]:
        return super().published(prompts, max(guidance - 1, 0.0), steps, size, x)

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, t = x.to(self.dtype), at.t.float().to(x.device).expand(len(x))
        lengths = cond.positive["real"].sum(1).tolist()  # the network takes lists, of rows as long as they are
        texts = [row[:n] for row, n in zip(cond.positive["tokens"].to(x), lengths, strict=True)]
        rows = self.network(list(x[:, :, None]), (1000 - t) / 1000, texts, return_dict=False)[0]
        return -torch.stack(rows)[:, :, 0]
