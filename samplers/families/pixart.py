"""PixArt-α and PixArt-Σ: a transformer over latent patches that reads its text from T5, and its latent-consistency students.

Texts are lowercased and stripped. Deviations: captions are not cleaned (`clean_caption`), which would make an image depend on
whether two optional packages are installed; an image has the size that was asked for (no `use_resolution_binning`); the
variance that the network also predicts is dropped, as in its pipelines.

Sources: PixArt-α, 2310.00426 (and its micro-conditions of size at 1024 pixels); PixArt-δ, 2401.05252; PixArt-Σ, 2403.04692.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..latents import VPPolicy
from ..levels import Levels
from ..policy import Cond

__all__ = ["PixArt"]


class PixArt(VPPolicy):
    """Any `PixArtAlphaPipeline` or `PixArtSigmaPipeline`."""

    sided = False

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        self.max_sequence_length = 120 if "Alpha" in type(pipe).__name__ else 300
        self.sized = pipe.transformer.use_additional_conditions  # the network hears how large the image is to be
        self.multiple = pipe.vae_scale_factor * pipe.transformer.config.patch_size
        self.guidance, self.steps = (1.0, 4) if self.few_step else (4.5, 20)
        self.size = (pipe.transformer.config.sample_size * pipe.vae_scale_factor,) * 2

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        tokens, mask, *_ = self.pipe.encode_prompt(
            [text], False, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": tokens[0], "encoder_attention_mask": mask[0]}

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, t = x.to(self.dtype), at.t.float().to(x.device).expand(len(x))
        conditions = {name: value.to(x) for name, value in cond.positive.items()}
        sizes = {"resolution": None, "aspect_ratio": None}
        if self.sized:
            height, width = (n * self.pipe.vae_scale_factor for n in x.shape[2:])
            sizes = {
                "resolution": torch.tensor([[height, width]]).to(x).expand(len(x), 2),
                "aspect_ratio": torch.tensor([[height / width]]).to(x).expand(len(x), 1),
            }
        output = self.network(x, timestep=t, added_cond_kwargs=sizes, return_dict=False, **conditions)[0]
        return output[:, : x.shape[1]]

    def published(self, prompts, guidance, steps, size, x):
        asked = super().published(prompts, guidance, steps, size, x)
        return asked | {"clean_caption": False, "use_resolution_binning": False}
