"""Qwen-Image: packed latent patches and the hidden states of a vision-language model that is asked to describe the image.

Guidance is the pipeline's true guidance: the guided velocity of every patch is brought back to the length it has without
guidance. An empty negative prompt is read as " ", as the model card has it: the pipeline guides only where one is given. The
autoencoder is one of videos; an image is its only frame.

Deviations: a text may have the 1024 tokens at which the tokenizer cuts, where the pipeline would cut it to 512 without a word.
Networks that take the guidance scale as an input are refused: none is published, and diffusers' own cannot be called with one.

Source: 2508.02324.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.base import Prompt

from ..latents import FlowPolicy
from ..levels import Levels
from ..policy import Cond, Size

__all__ = ["QwenImage"]


class QwenImage(FlowPolicy):
    """Any `QwenImagePipeline`.

    Raises:
        ValueError: a network that takes the guidance scale as an input.
    """

    even = True
    max_sequence_length = 1024

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        if pipe.transformer.config.guidance_embeds:
            raise ValueError("the network takes the guidance scale as an input, which no published Qwen-Image does")
        self.multiple = 2 * pipe.vae_scale_factor
        self.guidance, self.steps = 4.0, 50
        self.size = (pipe.default_sample_size * pipe.vae_scale_factor,) * 2

    @property
    def channels(self) -> int:
        return self.vae.config.z_dim

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        text = text or (" " if negative else "")
        tokens, _ = self.pipe.encode_prompt([text], self.device, max_sequence_length=self.max_sequence_length)
        real = torch.ones(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        return {"encoder_hidden_states": tokens[0], "encoder_hidden_states_mask": real}

    def pack(self, x: Tensor) -> Tensor:
        return self.pipe._pack_latents(x, *x.shape)

    def unpack(self, tokens: Tensor, size: Size) -> Tensor:
        """The inverse of `pack`, for latents of this height and width."""
        return self.pipe._unpack_latents(tokens, *size, 1)[:, :, 0]

    def published(
        self, prompts: Sequence[Prompt], guidance: float, steps: int, size: Size, x: Tensor
    ) -> dict[str, Any]:
        asked = super().published(prompts, guidance, steps, size, x)
        del asked["guidance_scale"]
        asked["negative_prompt"] = [p.negative or " " for p in prompts] if guidance > 1 else None
        return asked | {"true_cfg_scale": guidance}

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, size = x.to(self.dtype), x.shape[2:]
        tokens = self.network(
            hidden_states=self.pack(x),
            timestep=at.t.to(x.device, x.dtype).expand(len(x)) / 1000,  # rounded as the pipeline rounds it
            encoder_hidden_states=cond.positive["encoder_hidden_states"].to(x),
            encoder_hidden_states_mask=cond.positive["encoder_hidden_states_mask"],
            img_shapes=[[(1, size[0] // 2, size[1] // 2)]] * len(x),
            return_dict=False,
        )[0]
        return self.unpack(tokens, size)

    def guided(self, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        tokens, plain = (self.pack(v) for v in (super().guided(negative, positive, scale), positive))
        length = plain.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
        return self.unpack(tokens * length, positive.shape[2:])

    def encoded(self, pixels: Tensor) -> Tensor:
        return super().encoded(pixels[:, :, None])

    def scaled(self, z: Tensor) -> Tensor:
        mean, std = self._moments(self.vae.config, z)
        return (z[:, :, 0] - mean) / std

    def unscaled(self, x0: Tensor, config: Mapping[str, Any]) -> Tensor:
        if "latents_mean" not in config:  # a small autoencoder of images, for previews
            return super().unscaled(x0, config)
        mean, std = self._moments(config, x0)
        return (x0 * std + mean)[:, :, None]

    def _moments(self, config: Mapping[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(config[name]).view(-1, 1, 1).to(like) for name in ("latents_mean", "latents_std"))
        return mean, std

    def _decode(self, vae: Any, x0: Tensor) -> Tensor:
        images = super()._decode(vae, x0)
        return images if images.ndim == 4 else images[:, :, 0]
