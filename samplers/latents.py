"""What the families of latent image models share: the parts of a loaded diffusers pipeline, seen as a policy.

A family is a subclass that says how a text is embedded (`embed`) and how its network is called (`predict`), and corrects what
else is its own. Here are the cache of embeddings, sizes, the autoencoder's scale, and the two kinds of level tables, both
taken from the pipeline's scheduler: variance preserving (`VPPolicy`) and rectified flow (`FlowPolicy`).

A pipeline's `__call__` is never used. Deviations from what it does: a step always goes to the next level of the table, where
diffusers' DDIM goes back by the rounded quotient of training and inference steps; schedulers of higher order lend their
levels alone, since a multistep solver is no Markov chain; samples are never clipped (`clip_sample`, `thresholding`), which has
no density and no useful gradient; a run begins with noise of variance 1, where Euler's schedulers begin with σ_T².

Sources: latent diffusion, 2112.10752; rectified flow at scale, 2403.03206 (and its resolution-dependent shift of levels);
zero terminal SNR, 2305.08891; tiny autoencoders, madebyollin/taesd.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rewards.base import Prompt, as_prompts

from .kernels import DDIM, ODE, Consistency, Kernel
from .levels import Levels, at_least_float32
from .overflow import check_output
from .policy import Cond, Policy, Size, joined
from .tokens import told_of_cuts

__all__ = ["FlowPolicy", "LatentPolicy", "VPPolicy"]

logger = logging.getLogger("kilter")
REMEMBERED = 256 * 2**20  # bytes of text embeddings
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
OWN_LEVELS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler")


class LatentPolicy(Policy):
    """The parts of a loaded pipeline of latent diffusion or flow, seen as a policy.

    Args:
        pipe: the loaded pipeline; its modules are frozen and put in eval mode.
        preview_vae: an `AutoencoderTiny` that decodes intermediate estimates; the full VAE always decodes the result.

    Attributes:
        schedulers: names of the scheduler classes a folder of this family may hold.
        half: the type of half precision it was published in; bfloat16 has room for what overflows in float16.
        contrasts: whether there is an unconditional branch, that is, classifier-free guidance.
        sided: whether the unconditional branch may embed a text otherwise than the other does.
        spares: parts whose folder may be absent; the policy then does without them.
        upcasts: whether an autoencoder that overflows in float16 (`force_upcast`) is kept in float32, and the pipeline's with it.
        multiple: what the sides of an image must be multiples of, in pixels.
        max_sequence_length: tokens the text is padded or cut to, where the pipeline has a choice.

    Raises:
        ValueError: a scheduler of another kind of model.
    """

    schedulers: ClassVar[tuple[str, ...]]
    spares: ClassVar[tuple[str, ...]] = ()
    upcasts: ClassVar[bool] = False
    half: ClassVar[torch.dtype] = torch.float16
    contrasts: bool = True
    sided: bool = True
    multiple: int = 8
    max_sequence_length: int | None = None
    vae: Any

    def __init__(self, pipe: Any, preview_vae: nn.Module | None = None) -> None:
        super().__init__()
        if (scheduler := type(pipe.scheduler).__name__) not in self.schedulers:
            raise ValueError(
                f"{type(self).__name__} walks the levels of {', '.join(self.schedulers)}; the model's scheduler is {scheduler}"
            )
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                setattr(self, "network" if name in ("unet", "transformer") else name, part)
        self.pipe, self.scheduler, self.preview_vae = pipe, pipe.scheduler, preview_vae
        if self.upcasts and self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)
        self._embeddings: dict[tuple[str, bool], dict[str, Tensor]] = {}
        self.requires_grad_(False).eval()

    @abstractmethod
    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        """The conditions of one text, each without a batch axis; `negative` for the unconditional branch. A condition of
        several tokens has them first; texts of fewer tokens are filled up with zeros, so a mask must say which are real."""

    def encode(self, prompts: Sequence[str | Prompt]) -> Cond:
        prompts = as_prompts(prompts)
        positive = self._embedded([p.text for p in prompts], False)
        negative = self._embedded([p.negative for p in prompts], True) if self.contrasts else None
        return Cond(positive, negative, self.guidance)

    @torch.no_grad()
    def _embedded(self, texts: list[str], negative: bool) -> dict[str, Tensor]:
        """Each distinct text goes through the encoders once, and alone: so no sample depends on its batch."""
        negative = negative and self.sided
        new = [text for text in dict.fromkeys(texts) if (text, negative) not in self._embeddings]
        for text in new:
            with told_of_cuts(self.pipe, text):
                self._embeddings[text, negative] = self.embed(text, negative)
            check_output("text encoder", *self._embeddings[text, negative].values())
        rows = [self._embeddings[text, negative] for text in texts]
        if new:
            self._forget_oldest()
        return {name: joined([row[name][None] for row in rows]) for name in rows[0]} if rows else {}

    def _forget_oldest(self) -> None:
        sizes = {k: sum(v.numel() * v.element_size() for v in row.values()) for k, row in self._embeddings.items()}
        held = sum(sizes.values())
        for key, size in sizes.items():
            if held <= REMEMBERED:
                return
            del self._embeddings[key]
            held -= size

    def forget(self) -> None:
        self._embeddings.clear()

    def _apply(self, *args: Any, **how: Any) -> Any:
        """Moved to another device or type: so are the texts that are embedded from now on."""
        self.forget()
        return super()._apply(*args, **how)

    def shape(self, size: Size) -> tuple[int, ...]:
        if len(size) != 2 or any(n < self.multiple or n % self.multiple for n in size):
            nearest = tuple(max(1, round(n / self.multiple)) * self.multiple for n in size)
            raise ValueError(
                f"size must be (height, width) in multiples of {self.multiple} pixels; got {size}"
                + (f": {nearest} is near" if len(size) == 2 else "")
            )
        scale = self.pipe.vae_scale_factor
        return (self.channels, size[0] // scale, size[1] // scale)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.vae.config.latent_channels

    def pack(self, x: Tensor) -> Tensor:
        """Latents (B,C,H,W) in the pipeline's own layout."""
        return x

    def published(
        self, prompts: Sequence[Prompt], guidance: float, steps: int, size: Size, x: Tensor
    ) -> dict[str, Any]:
        """How the pipeline is asked for the samples whose initial latents are `x`: arguments of its `__call__`."""
        asked: dict[str, Any] = {"prompt": [p.text for p in prompts], "guidance_scale": guidance}
        if self.contrasts and any(p.negative for p in prompts):
            asked["negative_prompt"] = [p.negative for p in prompts]
        if self.max_sequence_length is not None:
            asked["max_sequence_length"] = self.max_sequence_length
        return asked | {"num_inference_steps": steps, "height": size[0], "width": size[1], "latents": self.pack(x)}

    def decode(self, x0: Tensor, frames: slice | None = None) -> Tensor:
        return self._decode(self.vae, x0)

    def preview(self, x0: Tensor) -> Tensor:
        return self._decode(self.preview_vae or self.vae, x0)

    @torch.no_grad()
    def encode_media(self, media: Tensor) -> Tensor:
        pixels = (2 * media - 1).to(self.runs_on or self.vae.device, self.vae.dtype)
        modes = [self.encoded(part) for part in pixels.split(self.decode_chunk)]
        return self.scaled(at_least_float32(torch.cat(modes)))

    def encoded(self, pixels: Tensor) -> Tensor:
        """The autoencoder's latents of pixels in [−1, 1]: the most likely, where it gives a law."""
        return self.vae.encode(pixels).latent_dist.mode()

    def scaled(self, z: Tensor) -> Tensor:
        """The autoencoder's latents as the network takes them."""
        config = self.vae.config
        return (z - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def unscaled(self, x0: Tensor, config: Mapping[str, Any]) -> Tensor:
        """The inverse of `scaled`, for an autoencoder of this configuration."""
        return x0 / config["scaling_factor"] + (config.get("shift_factor") or 0.0)

    def _decode(self, vae: Any, x0: Tensor) -> Tensor:
        latents = self.unscaled(x0.to(self.runs_on or vae.device, vae.dtype), vae.config)
        images = self.in_chunks(lambda part: vae.decode(part, return_dict=False)[0], latents)
        check_output(type(vae).__name__, images)
        return (at_least_float32(images) / 2 + 0.5).clamp(0, 1)

    def _steps_within(self, steps: int) -> int:
        most = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise ValueError(f"steps must lie in 1 … {most}, the model's training levels; got {steps}")
        return most

    def _schedule(self, kind: type | None = None) -> Any:
        """A scheduler of the model's configuration, of its own kind or another, to be set without a trace."""
        known = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        return (kind or type(self.scheduler)).from_config(known)  # pyright: ignore[reportAttributeAccessIssue]


class VPPolicy(LatentPolicy):
    """Variance preserving diffusion: α² + σ² = 1; the network predicts noise, v or the sample.

    Levels are those of the scheduler's own alphas and spacing, so all of `timestep_spacing`, `steps_offset`,
    `set_alpha_to_one`, `rescale_betas_zero_snr` and `use_karras_sigmas` mean what they mean in diffusers. Latent consistency
    students are known by their scheduler, turbo students by trailing Euler levels.

    Raises:
        ValueError: a prediction type that is none of these, or a consistency model with other boundaries than the published.
    """

    schedulers = (
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LCMScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverSinglestepScheduler",
        *OWN_LEVELS,
    )

    def __init__(self, pipe: Any, preview_vae: nn.Module | None = None) -> None:
        super().__init__(pipe, preview_vae)
        config = pipe.scheduler.config
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
        self.prediction = "consistency" if self.lcm else PREDICTIONS[config.prediction_type]  # pyright: ignore
        turbo = "Euler" in type(pipe.scheduler).__name__ and config.get("timestep_spacing") == "trailing"
        self.few_step = self.lcm or turbo

    @property
    def kernel(self) -> Kernel:
        return Consistency() if self.few_step else DDIM(eta=1.0)

    def levels(self, steps: int, size: Size = ()) -> Levels:
        from diffusers import DDIMScheduler

        most, name = self._steps_within(steps), type(self.scheduler).__name__
        schedule = self._schedule(None if self.lcm or name in OWN_LEVELS else DDIMScheduler)
        schedule.set_timesteps(steps)
        t = schedule.timesteps.cpu()
        if t[0] >= most:
            raise ValueError(f"steps = {steps} with this scheduler starts at level {t[0]} of {most}: take fewer steps")
        times = torch.cat([t.double(), torch.zeros(1)])
        if name in OWN_LEVELS:
            ratio = schedule.sigmas.cpu().double()  # σ/α
            return Levels(times, (1 + ratio**2).rsqrt(), ratio * (1 + ratio**2).rsqrt())
        end = torch.ones(1, dtype=torch.float64) if self.lcm else schedule.final_alpha_cumprod.double().reshape(1)
        alpha_bar = torch.cat([schedule.alphas_cumprod.double()[t], end])
        return Levels(times, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def training_levels(self, u: Tensor) -> Levels:
        t = (u.cpu().double() * self.scheduler.config.num_train_timesteps).long()
        alpha_bar = self.scheduler.alphas_cumprod.double().cpu()[t]
        return Levels(t, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


class FlowPolicy(LatentPolicy):
    """Rectified flow: α = 1 − t, σ = t; the network predicts the velocity eps − x0.

    Levels are those of the scheduler: its shift, or the shift that grows with the number of tokens of an image, the
    stretch to a terminal level, Karras, exponential or beta spacing. `t` is the network's time in training steps, 0 … 1000.

    Attributes:
        even: whether the pipeline gives its scheduler the unshifted levels 1, 1 − 1/T, … 1/T, or leaves them to it.
    """

    schedulers = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
    prediction = "flow"
    half = torch.bfloat16
    even: bool = False

    @property
    def kernel(self) -> Kernel:
        """Timestep-distilled students walk the deterministic path they were published with."""
        return ODE() if self.few_step else super().kernel

    def sigmas(self, steps: int) -> list[float] | None:
        """The unshifted levels that the pipeline gives its scheduler, or None where it leaves them to it."""
        return np.linspace(1.0, 1 / steps, steps).tolist() if self.even else None

    def tokens(self, size: Size) -> int:
        """Tokens of an image of `size`, on which its shift depends."""
        return (size[0] // self.multiple) * (size[1] // self.multiple)

    def shift(self, size: Size, steps: int) -> float:
        """The shift mu of an image of `size`: linear in its number of tokens."""
        config = self.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return least + (most - least) * (self.tokens(size) - few) / (many - few)

    def levels(self, steps: int, size: Size = ()) -> Levels:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._steps_within(steps)
        schedule = self._schedule(FlowMatchEulerDiscreteScheduler)
        if schedule.config.invert_sigmas:
            raise ValueError(
                "the scheduler's levels run backwards (invert_sigmas), which no image model here is known to do"
            )
        if steps == 1 and schedule.config.shift_terminal:
            raise ValueError(
                "the scheduler stretches its levels to a last one (shift_terminal): steps must be 2 or more, got 1"
            )
        mu = self.shift(size or self.size, steps) if schedule.config.use_dynamic_shifting else None
        schedule.set_timesteps(steps, sigmas=self.sigmas(steps), mu=mu)
        return self.table(schedule)

    def table(self, schedule: Any) -> Levels:
        """The levels of a scheduler that was set."""
        sigma = schedule.sigmas.double()
        return Levels(torch.cat([schedule.timesteps.double(), torch.zeros(1)]), 1 - sigma, sigma)

    def training_levels(self, u: Tensor) -> Levels:
        sigma = u.cpu().double()
        return Levels(self.scheduler.config.num_train_timesteps * sigma, 1 - sigma, sigma)
