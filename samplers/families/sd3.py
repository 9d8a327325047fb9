"""Stable Diffusion 3 and 3.5: a transformer over latent patches and text tokens; any of its three text encoders may be absent.

Deviation: the skipped-layer guidance of Stable Diffusion 3.5 medium is left out, since it is off by default.

Source: 2403.03206.
"""

from __future__ import annotations

from torch import Tensor

from ..latents import FlowPolicy
from ..levels import Levels
from ..policy import Cond

__all__ = ["StableDiffusion3"]


class StableDiffusion3(FlowPolicy):
    """Any `StableDiffusion3Pipeline`."""

    max_sequence_length = 256
    sided = False

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        self.multiple = pipe.vae_scale_factor * pipe.transformer.config.patch_size
        self.guidance, self.steps = 7.0, 28
        self.size = (pipe.default_sample_size * pipe.vae_scale_factor,) * 2

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            [text],
            [text],
            [text],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": tokens[0], "pooled_projections": pooled[0]}

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, t = x.to(self.dtype), at.t.float().to(x.device).expand(len(x))
        conditions = {name: value.to(x) for name, value in cond.positive.items()}
        return self.network(hidden_states=x, timestep=t, return_dict=False, **conditions)[0]
