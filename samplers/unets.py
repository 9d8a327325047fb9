"""What latent diffusion by a UNet has in common: guidance as an input of the network, and ControlNets beside it.

A ControlNet is shown a picture with every prompt, `Prompt.meta["control"]`: a file, or a tensor (3, H, W) with values in
[0, 1], of the size of the run. What it finds is added to the UNet's own features, times `conditioning_scale`. It stays frozen;
gradients of the state pass through it.

Deviations from the pipelines: a control picture of another size is refused, where they stretch it; ControlNets act over the
whole run (no `control_guidance_start` and `_end`) and in both branches of guidance (no `guess_mode`).

Sources: guidance as an input, 2210.03142; ControlNet, 2302.05543.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.base import Prompt, as_prompts

from .latents import VPPolicy
from .levels import Levels
from .policy import Cond, Size

__all__ = ["UNetPolicy"]

SHARED = ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")


class UNetPolicy(VPPolicy):
    """Latent diffusion by a UNet, with a ControlNet or without.

    Attributes:
        embeds_guidance: whether the guidance scale is an input of the network.
        controlled: whether there is a ControlNet.
        conditioning_scale: what the ControlNet's features are multiplied by; 0 is the model without it.

    Raises:
        ValueError: a UNet that takes more than a latent (inpainting), or ControlNets of another kind.
    """

    conditioning_scale: float = 1.0
    controlnet: Any

    def __init__(self, pipe: Any, preview_vae: nn.Module | None = None) -> None:
        super().__init__(pipe, preview_vae)
        channels, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        if channels != latent:
            raise ValueError(f"the UNet takes {channels} channels, a latent has {latent}: inpainting is not supported")
        self.controlled = pipe.components.get("controlnet") is not None
        if self.controlled:
            kind = type(pipe.controlnet).__name__
            if kind != "ControlNetModel" or pipe.controlnet.config.global_pool_conditions:
                pooled = " that pools its picture (shuffle)" if kind == "ControlNetModel" else ""
                raise ValueError(f"expected one ControlNetModel that keeps places apart; got a {kind}{pooled}")
            check_beside(pipe.controlnet.config, pipe.unet.config, pipe.vae_scale_factor)
        self.embeds_guidance = pipe.unet.config.time_cond_proj_dim is not None
        self.contrasts, self.multiple = not self.embeds_guidance, pipe.vae_scale_factor
        side = pipe.unet.config.sample_size
        self.size = tuple(n * self.multiple for n in (side if isinstance(side, (list, tuple)) else (side, side)))

    def encode(self, prompts: Sequence[str | Prompt]) -> Cond:
        cond, prompts = super().encode(prompts), as_prompts(prompts)
        if not self.controlled or not prompts:
            return cond
        shown = {"control": control_images(prompts).to(self.device)}
        negative = None if cond.negative is None else {**cond.negative, **shown}
        return replace(cond, positive={**cond.positive, **shown}, negative=negative)

    def added(self, x: Tensor, cond: Cond) -> dict[str, Tensor] | None:
        """What else the network is conditioned on beside its text."""
        return None

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        x, t = x.to(self.dtype), at.t.float().to(x.device).expand(len(x))
        text = cond.positive["encoder_hidden_states"].to(x)
        given = {"encoder_hidden_states": text, "added_cond_kwargs": self.added(x, cond), "return_dict": False}
        found = self.residuals(x, t, cond.positive["control"], given) if self.controlled else {}
        scale = None
        if self.embeds_guidance:
            w = torch.full((len(x),), cond.guidance - 1.0)
            width = self.pipe.unet.config.time_cond_proj_dim
            scale = self.pipe.get_guidance_scale_embedding(w, embedding_dim=width).to(x)
        return self.network(x, t, timestep_cond=scale, **given, **found)[0]

    def residuals(self, x: Tensor, t: Tensor, control: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the ControlNet adds to the features of the UNet."""
        size = tuple(n * self.pipe.vae_scale_factor for n in x.shape[2:])
        if control.shape[2:] != size:
            raise ValueError(
                f"control images must have the size of the run, (height, width) = {size}; "
                f"got {tuple(control.shape[2:])}: resize them, or pass that as size"
            )
        down, middle = self.controlnet(
            x, t, controlnet_cond=control.to(x), conditioning_scale=self.conditioning_scale, **given
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def published(
        self, prompts: Sequence[Prompt], guidance: float, steps: int, size: Size, x: Tensor
    ) -> dict[str, Any]:
        asked = super().published(prompts, guidance, steps, size, x)
        if self.controlled:
            asked |= {"image": control_images(prompts), "controlnet_conditioning_scale": self.conditioning_scale}
        return asked


def check_beside(own: Any, unet: Any, factor: int) -> None:
    """Raises unless a ControlNet's features have the shapes of the UNet's.

    Args:
        own, unet: the configurations of both.
        factor: pixels a latent is wide.

    Raises:
        ValueError: it was made for another model.
    """
    pairs = {name: [tuple(v) if isinstance(v, list) else v for v in (own.get(name), unet.get(name))] for name in SHARED}
    pairs["pixels a latent"] = [2 ** (len(own["conditioning_embedding_out_channels"]) - 1), factor]
    for name, (its, wanted) in pairs.items():
        if its != wanted:
            raise ValueError(f"the ControlNet was made for another model: its {name} is {its}, the model's {wanted}")


def control_images(prompts: Sequence[Prompt]) -> Tensor:
    """(B, 3, H, W) in [0, 1]: what the ControlNet is shown with each prompt.

    Raises:
        ValueError: a prompt has no control image, or they differ in size.
    """
    images = [_control(prompt) for prompt in prompts]
    if len(sizes := {tuple(image.shape) for image in images}) > 1:
        raise ValueError(f"control images must have one size, that of the run; got {sorted(sizes)}")
    return torch.stack(images)


def _control(prompt: Prompt) -> Tensor:
    image = prompt.meta.get("control")
    if isinstance(image, (str, Path)):
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor

        if not Path(image).expanduser().is_file():
            raise ValueError(f"no control image {image} for the prompt {prompt.text!r}")
        with Image.open(Path(image).expanduser()) as file:
            image = pil_to_tensor(file.convert("RGB")).float() / 255
    if not isinstance(image, Tensor) or image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
        got = tuple(image.shape) if isinstance(image, Tensor) else image
        raise ValueError(
            f"a ControlNet needs a picture with every prompt: a file or a tensor (3, H, W) in [0, 1] as "
            f'meta["control"]; {prompt.text!r} has {got!r}'
        )
    return image.float()
