"""Stable Diffusion 1.x and 2.x, their latent-consistency and turbo students.

Sources: latent diffusion, 2112.10752; progressive distillation (v), 2202.00512; latent consistency models, 2310.04378;
SD-Turbo (known by trailing Euler levels), 2311.17042.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..latents import VPPolicy
from ..levels import Levels
from ..policy import Cond

__all__ = ["StableDiffusion"]


class StableDiffusion(VPPolicy):
    """Any `StableDiffusionPipeline` or `LatentConsistencyModelPipeline`.

    Raises:
        ValueError: a UNet that takes more than a latent (inpainting).
    """

    sided = False

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        channels, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        if channels != latent:
            raise ValueError(f"the UNet takes {channels} channels, a latent has {latent}: inpainting is not supported")
        self.embeds_guidance = pipe.unet.config.time_cond_proj_dim is not None  # the scale is an input of the network
        self.contrasts, self.multiple = not self.embeds_guidance, pipe.vae_scale_factor
        self.guidance, self.steps = (8.5 if self.embeds_guidance else 1.0, 4) if self.few_step else (7.5, 50)
        side = pipe.unet.config.sample_size
        self.size = tuple(n * self.multiple for n in (side if isinstance(side, (list, tuple)) else (side, side)))

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.pipe.encode_prompt([text], self.device, 1, False)[0][0]}

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, t = x.to(self.dtype), at.t.float().to(x.device).expand(len(x))
        scale = None
        if self.embeds_guidance:
            w = torch.full((len(x),), cond.guidance - 1.0)
            width = self.network.config.time_cond_proj_dim
            scale = self.pipe.get_guidance_scale_embedding(w, embedding_dim=width).to(x)
        embeddings = cond.positive["encoder_hidden_states"].to(x)
        return self.network(x, t, encoder_hidden_states=embeddings, timestep_cond=scale, return_dict=False)[0]
