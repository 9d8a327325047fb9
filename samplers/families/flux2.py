"""FLUX.2: a transformer over patches of normalised latents and the stacked hidden states of a language model; dev and klein.

A latent here is the pipeline's patchified one, 2×2 patches as channels, normalised by the running statistics that the
autoencoder carries as a batch norm. Dev reads Mistral 3 after a system message and takes `guidance` as an input, without a
negative branch. Klein reads Qwen 3: distilled it makes samples in 4 Euler steps without guidance, base has both branches.
Texts are padded to 512 tokens and the padding is read too, as the networks were trained.

The levels' shift is the pipeline's own fit in tokens and steps. A LoRA goes on the attention of both kinds of blocks, as in
diffusers' training scripts: the single ones, most of the network, have it in layers of their own. Deviations: images as
conditions and rewritten prompts (`caption_upsample_temperature`) are left out.

Source: black-forest-labs/flux2.
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

__all__ = ["Flux2"]


class Flux2(FlowPolicy):
    """Any `Flux2Pipeline` (dev) or `Flux2KleinPipeline` (klein, distilled or base)."""

    even, sided = True, False
    max_sequence_length = 512

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        config = pipe.transformer.config
        out = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(config.num_single_layers)]
        self.targets = (*self.targets, *(["to_qkv_mlp_proj"] if out else []), *out)
        self.klein = type(pipe).__name__ == "Flux2KleinPipeline"
        self.embeds_guidance = config.guidance_embeds
        self.few_step = self.klein and pipe.config.is_distilled
        self.contrasts = self.klein and not self.few_step
        self.multiple = 2 * pipe.vae_scale_factor
        self.guidance, self.steps = (1.0, 4) if self.few_step else (4.0, 50)
        self.size = (pipe.default_sample_size * pipe.vae_scale_factor,) * 2

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        tokens, _ = self.pipe.encode_prompt([text], device=self.device, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": tokens[0]}

    def shape(self, size: Size) -> tuple[int, ...]:
        channels, height, width = super().shape(size)
        return (4 * channels, height // 2, width // 2)

    def shift(self, size: Size, steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(self.tokens(size), steps)

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x = x.to(self.dtype)
        text = cond.positive["encoder_hidden_states"].to(x)
        output = self.network(
            hidden_states=self.pipe._pack_latents(x),
            timestep=at.t.to(x.device, x.dtype).expand(len(x)) / 1000,  # rounded as the pipeline rounds it
            guidance=torch.full((len(x),), cond.guidance, device=x.device) if self.embeds_guidance else None,
            encoder_hidden_states=text,
            txt_ids=self.pipe._prepare_text_ids(text[:1]).to(x.device),
            img_ids=self.pipe._prepare_latent_ids(x[:1]).to(x.device),
            return_dict=False,
        )[0]
        return output.mT.unflatten(2, x.shape[2:])

    def pack(self, x: Tensor) -> Tensor:
        """As the pipelines give latents back, dev in tokens, klein as the autoencoder's own; both take them as they are here."""
        return self.unscaled(x, {}) if self.klein else self.pipe._pack_latents(x)

    def published(
        self, prompts: Sequence[Prompt], guidance: float, steps: int, size: Size, x: Tensor
    ) -> dict[str, Any]:
        asked = super().published(prompts, guidance, steps, size, x) | {"latents": x}
        if asked.pop("negative_prompt", None):  # which the pipeline takes embedded alone
            negative = self.encode(prompts).negative
            assert negative is not None
            asked["negative_prompt_embeds"] = negative["encoder_hidden_states"]
        return asked

    def scaled(self, z: Tensor) -> Tensor:
        mean, std = self._statistics(z)
        return (self.pipe._patchify_latents(z) - mean) / std

    def unscaled(self, x0: Tensor, config: Mapping[str, Any]) -> Tensor:
        mean, std = self._statistics(x0)
        return self.pipe._unpatchify_latents(x0 * std + mean)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 4C, 1, 1) the mean and standard deviation of the autoencoder's patches."""
        norm = self.vae.bn
        variance = norm.running_var + self.vae.config.batch_norm_eps
        return norm.running_mean.to(x)[:, None, None], variance.sqrt().to(x)[:, None, None]
