"""Lumina-Image 2.0: one transformer over latent patches and the hidden states of Gemma 2.

A prompt follows the pipeline's system prompt, a negative one stands alone. The network's time runs from 0, noise, to 1, data,
and its output points from noise to data. Every row of pixels of a guided velocity is brought back to the length it has without
guidance, and guidance is on at every level, as the pipeline's defaults are. Where a scheduler's shift grows with the image, the
pipeline counts the channels of a latent as its tokens, and so does this.

Source: 2503.21758.
"""

from __future__ import annotations

from torch import Tensor

from ..latents import FlowPolicy
from ..levels import Levels
from ..policy import Cond, Size

__all__ = ["Lumina2"]


class Lumina2(FlowPolicy):
    """Any `Lumina2Pipeline`."""

    even = True
    max_sequence_length = 256

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        self.multiple = 2 * pipe.vae_scale_factor
        self.guidance, self.steps = 4.0, 30
        self.size = (pipe.default_image_size,) * 2

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        if negative:
            tokens, real = self.pipe._get_gemma_prompt_embeds([text], self.device, self.max_sequence_length)
        else:
            tokens, real, _, _ = self.pipe.encode_prompt(
                [text], False, device=self.device, max_sequence_length=self.max_sequence_length
            )
        real = real[0].bool()
        return {"encoder_hidden_states": tokens[0][real], "encoder_attention_mask": real[real]}

    def tokens(self, size: Size) -> int:
        return self.channels

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, t = x.to(self.dtype), at.t.float().to(x.device).expand(len(x))
        return -self.network(
            hidden_states=x,
            timestep=1 - t / self.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond.positive["encoder_hidden_states"].to(x),
            encoder_attention_mask=cond.positive["encoder_attention_mask"],
            return_dict=False,
        )[0]

    def guided(self, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        guided = super().guided(negative, positive, scale)
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
