"""AuraFlow: a rectified flow whose text is padded with zeros that its network attends to, so always to the same length.

Source: AuraFlow 0.1 … 0.3, blog.fal.ai/auraflow; the transformer is that of 2403.03206 followed by blocks of one stream.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..latents import FlowPolicy
from ..levels import Levels
from ..policy import Cond, Size

__all__ = ["AuraFlow"]


class AuraFlow(FlowPolicy):
    """Any `AuraFlowPipeline`."""

    sided, upcasts = False, True
    max_sequence_length = 256

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        config = pipe.transformer.config
        self.multiple = pipe.vae_scale_factor * config.patch_size
        self.longest = math.isqrt(config.pos_embed_max_size) * self.multiple  # the network has learned no place beyond
        self.guidance, self.steps, self.size = 3.5, 50, (min(1024, self.longest),) * 2

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        tokens, *_ = self.pipe.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": tokens[0]}

    def shape(self, size: Size) -> tuple[int, ...]:
        shape = super().shape(size)
        if max(size) > self.longest:
            raise ValueError(f"this AuraFlow paints up to {self.longest} × {self.longest} pixels; got {size}")
        return shape

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, t = x.to(self.dtype), (at.t / 1000).float().to(x.device).expand(len(x))
        tokens = cond.positive["encoder_hidden_states"].to(x)
        return self.network(x, encoder_hidden_states=tokens, timestep=t, return_dict=False)[0]
