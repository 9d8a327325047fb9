"""FLUX.1: a transformer over 2×2 patches of latents and T5 tokens; dev was distilled from guidance, schnell from steps too.

A network with a guidance embedding (dev, Krea) takes `guidance` as an input and has no negative branch. One without it
(schnell, and checkpoints trained out of the distillation) is guided by two branches, the pipeline's `true_cfg_scale`, off at
the default of 1. Schnell is known by its unshifted levels: 4 Euler steps on 256 tokens of text, as published.

Deviation: the second, true scale that the pipeline has for dev beside the embedded one is left out: a run has one scale.

Sources: black-forest-labs/flux; rectified flow at scale, 2403.03206; guidance distillation, 2210.03142; adversarial
distillation in latent space, 2403.12015.
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

__all__ = ["Flux"]


class Flux(FlowPolicy):
    """Any `FluxPipeline`: dev and its descendants, schnell.

    Raises:
        ValueError: a network that takes more than a latent (fill, depth, canny).
    """

    even, sided = True, False

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        config = pipe.transformer.config
        taken, packed = config.in_channels, 4 * pipe.vae.config.latent_channels
        if taken != packed:
            raise ValueError(
                f"the network takes {taken} channels, a packed latent has {packed}: filling and image conditions "
                "are not supported"
            )
        self.embeds_guidance = config.guidance_embeds
        self.contrasts, self.multiple = not self.embeds_guidance, 2 * pipe.vae_scale_factor
        self.few_step = not self.embeds_guidance and not pipe.scheduler.config.get("use_dynamic_shifting")
        self.guidance, self.steps = 3.5 if self.embeds_guidance else 1.0, 4 if self.few_step else 28
        self.max_sequence_length = 256 if self.few_step else 512
        self.size = (pipe.default_sample_size * pipe.vae_scale_factor,) * 2

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        tokens, pooled, _ = self.pipe.encode_prompt(
            [text], None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": tokens[0], "pooled_projections": pooled[0]}

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, (rows, _, height, width) = x.to(self.dtype), x.shape
        conditions = {name: value.to(x) for name, value in cond.positive.items()}
        scale = torch.full((rows,), cond.guidance, device=x.device) if self.embeds_guidance else None
        places = {"device": x.device, "dtype": torch.float32}
        output = self.network(
            hidden_states=self.pack(x),
            timestep=at.t.to(x.device, x.dtype).expand(rows) / 1000,  # rounded as the pipeline rounds it
            guidance=scale,
            txt_ids=torch.zeros(conditions["encoder_hidden_states"].shape[1], 3, **places),
            img_ids=self.pipe._prepare_latent_image_ids(rows, height // 2, width // 2, **places),
            return_dict=False,
            **conditions,
        )[0]
        return self.pipe._unpack_latents(output, height, width, vae_scale_factor=1)

    def pack(self, x: Tensor) -> Tensor:
        return self.pipe._pack_latents(x, *x.shape)

    def published(
        self, prompts: Sequence[Prompt], guidance: float, steps: int, size: Size, x: Tensor
    ) -> dict[str, Any]:
        asked = super().published(prompts, guidance, steps, size, x)
        if self.contrasts:
            asked |= {"true_cfg_scale": guidance, "negative_prompt": [p.negative for p in prompts]}
        return asked
