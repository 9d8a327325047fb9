"""Stable Diffusion XL without its refiner, its turbo, lightning and latent-consistency students, with a ControlNet or without.

The network hears the pooled text and six numbers beside it: the size of the original and of the target, here both that of the
image, and where it was cut out, (0, 0). An empty negative prompt is a branch of zeros where the model's configuration says so
(`force_zeros_for_empty_prompt`), for each sample by itself; its pipeline does so only where no sample has a negative prompt.

Deviations: both encoders read the same prompt; guidance is not rescaled (off by default there too); the EDM schedulers of
Playground 2.5 are not supported, latents with a mean and a standard deviation are.

Sources: SDXL, 2307.01952; adversarial distillation (turbo), 2311.17042; SDXL-Lightning, 2402.13929; LCM-LoRA, 2311.05556.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..policy import Cond
from ..unets import UNetPolicy

__all__ = ["StableDiffusionXL"]


class StableDiffusionXL(UNetPolicy):
    """Any `StableDiffusionXLPipeline` or `StableDiffusionXLControlNetPipeline`."""

    upcasts = True

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        self.guidance, self.steps = (8.0 if self.embeds_guidance else 1.0, 4) if self.few_step else (5.0, 50)

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        tokens, _, pooled, _ = self.pipe.encode_prompt([text], device=self.device, do_classifier_free_guidance=False)
        silent = negative and not text and self.pipe.config.force_zeros_for_empty_prompt
        found = {"encoder_hidden_states": tokens[0], "text_embeds": pooled[0]}
        return {name: torch.zeros_like(value) for name, value in found.items()} if silent else found

    def added(self, x: Tensor, cond: Cond) -> dict[str, Tensor]:
        height, width = (n * self.pipe.vae_scale_factor for n in x.shape[2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x.device, dtype=torch.float32)
        return {"text_embeds": cond.positive["text_embeds"].to(x), "time_ids": sizes.expand(len(x), 6)}

    def scaled(self, z: Tensor) -> Tensor:
        mean, std = _moments(self.vae.config, z)
        return (z - mean) / std * self.vae.config.scaling_factor

    def unscaled(self, x0: Tensor, config: Mapping[str, Any]) -> Tensor:
        mean, std = _moments(config, x0)
        return x0 * std / config["scaling_factor"] + mean

    def published(self, prompts, guidance, steps, size, x) -> dict[str, Any]:
        asked = super().published(prompts, guidance, steps, size, x)
        if "negative_prompt" in asked and not all(
            asked["negative_prompt"]
        ):  # some are silent, and the pipeline would speak
            del asked["negative_prompt"]
            spoken = self._embedded([p.negative for p in prompts], True)
            asked["negative_prompt_embeds"] = spoken["encoder_hidden_states"]
            asked["negative_pooled_prompt_embeds"] = spoken["text_embeds"]
        return asked


def _moments(config: Mapping[str, Any], like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """The autoencoder's own mean and standard deviation of latents, 0 and 1 where it names none."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return 0.0, 1.0
    return tuple(torch.tensor(v).view(1, -1, 1, 1).to(like) for v in (mean, std))  # pyright: ignore
