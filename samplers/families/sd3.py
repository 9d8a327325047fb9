"""Stable Diffusion 3 and 3.5: a transformer over latent patches and text tokens; any of its three text encoders may be absent.

An absent encoder is heard as zeros, as in training, where each was dropped at random (2403.03206). Without T5 the pipeline does
the same. It embeds no text without both CLIPs, so there it is given the embeddings; the width of a CLIP that is absent is what the
other leaves of the pooled embedding, since both pool to the width of their tokens.

Deviation: the skipped-layer guidance of Stable Diffusion 3.5 medium is left out, since it is off by default.

Source: 2403.03206.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rewards.base import Prompt

from ..latents import FlowPolicy
from ..levels import Levels
from ..policy import Cond, Size

__all__ = ["StableDiffusion3"]


class StableDiffusion3(FlowPolicy):
    """Any `StableDiffusion3Pipeline`."""

    spares = ("text_encoder", "text_encoder_2", "text_encoder_3")
    max_sequence_length = 256
    sided = False

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        self.multiple = pipe.vae_scale_factor * pipe.transformer.config.patch_size
        self.guidance, self.steps = 7.0, 28
        self.size = (pipe.default_sample_size * pipe.vae_scale_factor,) * 2

    def shape(self, size: Size) -> tuple[int, ...]:
        places = self.pipe.transformer.config.pos_embed_max_size
        if places and max(size) > places * self.multiple:
            raise ValueError(
                f"the network knows {places} places a side, {places * self.multiple} pixels; got size {size}"
            )
        return super().shape(size)

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        pipe, config = self.pipe, self.pipe.transformer.config
        pairs = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
        heard = [None if encoder is None else self._clip(text, words, encoder) for words, encoder in pairs]
        clips = [clip for clip in heard if clip is not None]
        length = len(clips[0][0]) if clips else pipe.tokenizer_max_length
        width = (config.pooled_projection_dim - sum(len(pooled) for _, pooled in clips)) // max(1, 2 - len(clips))
        silence = torch.zeros(length, width, device=self.device), torch.zeros(width, device=self.device)
        tokens, pooled = (torch.cat(parts, -1) for parts in zip(*(clip or silence for clip in heard), strict=True))
        how = {"max_sequence_length": self.max_sequence_length, "device": self.device, "dtype": tokens.dtype}
        rest = pipe._get_t5_prompt_embeds([text], **how)[0]
        tokens = torch.cat([pad(tokens, (0, rest.shape[-1] - tokens.shape[-1])), rest])
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def _clip(self, text: str, tokenizer: Any, encoder: Any) -> tuple[Tensor, Tensor]:
        """(L, D) the tokens of a text and (D,) its pooled embedding, by one of the CLIPs."""
        how = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        ids = tokenizer([text], **how, return_tensors="pt").input_ids
        output = encoder(ids.to(self.device), output_hidden_states=True)
        return output.hidden_states[-2][0], output.text_embeds[0]

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, t = x.to(self.dtype), at.t.float().to(x.device).expand(len(x))
        conditions = {name: value.to(x) for name, value in cond.positive.items()}
        return self.network(hidden_states=x, timestep=t, return_dict=False, **conditions)[0]

    def published(
        self, prompts: Sequence[Prompt], guidance: float, steps: int, size: Size, x: Tensor
    ) -> dict[str, Any]:
        asked = super().published(prompts, guidance, steps, size, x)
        if None not in (self.pipe.text_encoder, self.pipe.text_encoder_2):
            return asked
        cond = self.encode(prompts)
        for branch, side in (("", cond.positive), ("negative_", cond.negative or {})):
            asked.pop(f"{branch}prompt", None)
            asked[f"{branch}prompt_embeds"] = side["encoder_hidden_states"]
            asked[f"{branch}pooled_prompt_embeds"] = side["pooled_projections"]
        return asked
