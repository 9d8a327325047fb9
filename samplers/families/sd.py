"""Stable Diffusion 1.x and 2.x, their latent-consistency and turbo students, with a ControlNet or without.

Sources: latent diffusion, 2112.10752; progressive distillation (v), 2202.00512; latent consistency models, 2310.04378;
SD-Turbo (known by trailing Euler levels), 2311.17042.
"""

from __future__ import annotations

from torch import Tensor

from ..unets import UNetPolicy

__all__ = ["StableDiffusion"]


class StableDiffusion(UNetPolicy):
    """Any `StableDiffusionPipeline`, `StableDiffusionControlNetPipeline` or `LatentConsistencyModelPipeline`."""

    sided = False

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        self.guidance, self.steps = (8.5 if self.embeds_guidance else 1.0, 4) if self.few_step else (7.5, 50)

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.pipe.encode_prompt([text], self.device, 1, False)[0][0]}
