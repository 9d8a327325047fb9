"""Stable Diffusion 1.x and 2.x, their latent-consistency and turbo students.

Built on the parts of a loaded diffusers pipeline (tokenizer, text encoder, UNet, VAE, scheduler config), never on its
`__call__`. Levels come from the scheduler's own alphas and spacing: DDIM's for every scheduler but LCM's, so all of
`timestep_spacing`, `steps_offset`, `set_alpha_to_one` and `rescale_betas_zero_snr` mean what they mean in diffusers.

Deviations: a step always goes to the next level of the table; diffusers' DDIM goes back by the rounded quotient of training
and inference steps, which with "linspace", or where the division leaves a remainder, is a slightly different level. Samples
are never clipped (`clip_sample`, `thresholding`), since that has no density and no useful gradient. Runs begin with
noise of variance 1; diffusers' Euler begins with σ_T², 0.5 % less.

Sources: latent diffusion, 2112.10752; progressive distillation (v), 2202.00512; zero terminal SNR, 2305.08891; latent
consistency models, 2310.04378; SD-Turbo (known by trailing Euler levels), 2311.17042; tiny autoencoders, madebyollin/taesd.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.base import Prompt, as_prompts

from ..kernels import DDIM, Consistency, Kernel
from ..levels import Levels, at_least_float32
from ..policy import Cond, Policy, Size

__all__ = ["StableDiffusion"]

logger = logging.getLogger("kilter")
REMEMBERED = 1024  # prompts; 77 × 768 half-precision numbers each make 120 MB
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class StableDiffusion(Policy):
    """Any `StableDiffusionPipeline` or `LatentConsistencyModelPipeline`.

    Args:
        pipe: the loaded pipeline; its modules are frozen and put in eval mode.
        preview_vae: an `AutoencoderTiny` that decodes intermediate estimates; the full VAE always decodes the result.

    Raises:
        ValueError: a UNet that takes more than a latent (inpainting), or an unsupported prediction type.
    """

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__()
        config = pipe.scheduler.config
        channels, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        if channels != latent:
            raise ValueError(f"the UNet takes {channels} channels, a latent has {latent}: inpainting is not supported")
        if config.prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type must be one of {sorted(PREDICTIONS)}; got {config.prediction_type!r}")
        if config.get("clip_sample") or config.get("thresholding"):
            logger.warning("the scheduler asks for clipped samples; kilter samples without clipping")
        self.lcm = type(pipe.scheduler).__name__ == "LCMScheduler"
        if self.lcm and (config.prediction_type, config.timestep_scaling) != ("epsilon", 10.0):
            raise ValueError(
                "a latent consistency model must predict epsilon with timestep_scaling 10; "
                f"got {config.prediction_type!r} with {config.timestep_scaling}"
            )
        self.network, self.vae, self.text_encoder = pipe.unet, pipe.vae, pipe.text_encoder
        self.pipe, self.scheduler, self.preview_vae = pipe, pipe.scheduler, preview_vae
        self.prediction = "consistency" if self.lcm else PREDICTIONS[config.prediction_type]  # pyright: ignore
        turbo = "Euler" in type(pipe.scheduler).__name__ and config.get("timestep_spacing") == "trailing"
        self.few_step = self.lcm or turbo
        embeds = pipe.unet.config.time_cond_proj_dim is not None
        self.guidance, self.steps = (8.5 if embeds else 1.0, 4) if self.few_step else (7.5, 50)
        side = pipe.unet.config.sample_size
        sides = side if isinstance(side, (list, tuple)) else (side, side)
        self.size = tuple(n * pipe.vae_scale_factor for n in sides)
        self._embeddings: dict[str, Tensor] = {}
        self.requires_grad_(False).eval()

    @property
    def kernel(self) -> Kernel:
        return Consistency() if self.few_step else DDIM(eta=1.0)

    def encode(self, prompts: Sequence[str | Prompt]) -> Cond:
        prompts = as_prompts(prompts)
        positive = {"encoder_hidden_states": self._embed([p.text for p in prompts])}
        if self.network.config.time_cond_proj_dim is not None:  # the network takes the guidance scale as an input
            return Cond(positive, None, self.guidance)
        return Cond(positive, {"encoder_hidden_states": self._embed([p.negative for p in prompts])}, self.guidance)

    def _embed(self, texts: list[str]) -> Tensor:
        """(B, tokens, width), each distinct text through the encoder once, and alone: so no sample depends on its batch."""
        for text in dict.fromkeys(texts):
            if text not in self._embeddings:
                with torch.no_grad():
                    self._embeddings[text] = self.pipe.encode_prompt([text], self.device, 1, False)[0][0]
        embeddings = torch.stack([self._embeddings[text] for text in texts])
        while len(self._embeddings) > REMEMBERED:
            del self._embeddings[next(iter(self._embeddings))]
        return embeddings

    def shape(self, size: Size) -> tuple[int, ...]:
        scale = self.pipe.vae_scale_factor
        if len(size) != 2 or any(n < scale or n % scale for n in size):
            raise ValueError(f"size must be (height, width) in multiples of {scale} pixels; got {size}")
        return (self.vae.config.latent_channels, size[0] // scale, size[1] // scale)

    def levels(self, steps: int, size: Size = ()) -> Levels:
        from diffusers import DDIMScheduler

        most = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise ValueError(f"steps must lie in 1 … {most}, the model's training levels; got {steps}")
        schedule = type(self.scheduler) if self.lcm else DDIMScheduler
        schedule = schedule.from_config({k: v for k, v in self.scheduler.config.items() if not k.startswith("_")})
        schedule.set_timesteps(steps)
        t = schedule.timesteps.cpu()
        if t[0] >= most:
            raise ValueError(f"steps = {steps} with this scheduler starts at level {t[0]} of {most}: take fewer steps")
        end = torch.ones(1, dtype=torch.float64) if self.lcm else schedule.final_alpha_cumprod.double().reshape(1)
        alpha_bar = torch.cat([schedule.alphas_cumprod.double()[t], end])
        return Levels(torch.cat([t.double(), torch.zeros(1)]), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def training_levels(self, u: Tensor) -> Levels:
        t = (u.cpu().double() * self.scheduler.config.num_train_timesteps).long()
        alpha_bar = self.scheduler.alphas_cumprod.double().cpu()[t]
        return Levels(t, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, t = x.to(self.dtype), at.t.float().to(x.device).expand(len(x))
        scale = None
        if (width := self.network.config.time_cond_proj_dim) is not None:
            w = torch.full((len(x),), cond.guidance - 1.0)
            scale = self.pipe.get_guidance_scale_embedding(w, embedding_dim=width).to(x)
        embeddings = cond.positive["encoder_hidden_states"].to(x)
        return self.network(x, t, encoder_hidden_states=embeddings, timestep_cond=scale, return_dict=False)[0]

    def decode(self, x0: Tensor, frames: slice | None = None) -> Tensor:
        return self._decode(self.vae, x0)

    def preview(self, x0: Tensor) -> Tensor:
        return self._decode(self.preview_vae or self.vae, x0)

    @torch.no_grad()
    def encode_media(self, media: Tensor) -> Tensor:
        pixels = (2 * media - 1).to(self.device, self.vae.dtype)
        modes = [self.vae.encode(part).latent_dist.mode() for part in pixels.split(self.decode_chunk)]
        return at_least_float32(torch.cat(modes)) * self.vae.config.scaling_factor

    def _decode(self, vae, x0: Tensor) -> Tensor:
        x0 = x0.to(vae.dtype) / vae.config.scaling_factor
        images = self.in_chunks(lambda part: vae.decode(part, return_dict=False)[0], x0)
        return (at_least_float32(images) / 2 + 0.5).clamp(0, 1)
