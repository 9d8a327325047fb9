"""Sana: a linear transformer over the latents of a deep-compression autoencoder; and Sana-Sprint, its few-step student.

A prompt follows an instruction that asks the language model to enrich it (the pipeline's own), a negative prompt does
not. Sprint is a continuous-time consistency model in trigonometric time: x = cos(t)·x0 + sin(t)·σ_d·z. Divided by
σ_d that is the variance-preserving frame with α = cos t, σ = sin t and a v prediction; its network was a flow's, so x is
brought to the flow's line at s = sin t/(sin t + cos t) before, and the velocity back after. Sampling is `Consistency`.

The first level of Sprint is its pipeline's 1.5708, a hair beyond π/2, where α is −4e-6. Deviation: an image has the size that
was asked for (no `use_resolution_binning`).

Sources: Sana, 2410.10629; Sana-Sprint, 2503.09641; TrigFlow, 2410.11081; deep-compression autoencoder, 2410.10733.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..kernels import Consistency, Kernel
from ..latents import FlowPolicy
from ..levels import Levels, at_least_float32, spread
from ..policy import Cond, Policy, Size

__all__ = ["Sana", "SanaSprint"]


class Sana(FlowPolicy):
    """Any `SanaPipeline`: Sana and Sana-1.5, with the levels of DPM-Solver or of Euler on flows.

    Raises:
        ValueError: a DPM-Solver that does not walk a flow.
    """

    schedulers = (*FlowPolicy.schedulers, "DPMSolverMultistepScheduler")
    max_sequence_length = 300

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        config = pipe.scheduler.config
        self.solver = "DPMSolver" in type(pipe.scheduler).__name__
        if self.solver and not (config.use_flow_sigmas and config.prediction_type == "flow_prediction"):
            raise ValueError(
                "Sana is a flow: its scheduler must have use_flow_sigmas=True and prediction_type='flow_prediction'; "
                f"got {config.use_flow_sigmas} and {config.prediction_type!r}"
            )
        self.instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        self.multiple = max(32, pipe.vae_scale_factor * pipe.transformer.config.patch_size)
        self.guidance, self.steps = 4.5, 20
        self.size = (pipe.transformer.config.sample_size * pipe.vae_scale_factor,) * 2

    def embed(self, text: str, negative: bool) -> dict[str, Tensor]:
        once = {"do_classifier_free_guidance": False} if self.contrasts else {}
        tokens, mask, *_ = self.pipe.encode_prompt(
            [text],
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=None if negative else self.instruction,
            **once,
        )
        return {"encoder_hidden_states": tokens[0], "encoder_attention_mask": mask[0]}

    def levels(self, steps: int, size: Size = ()) -> Levels:
        if not self.solver:
            return super().levels(steps, size)
        self._steps_within(steps)
        schedule = self._schedule()
        schedule.set_timesteps(steps)
        return self.table(schedule)

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        return self.velocity(x, at.t * self.network.config.timestep_scale, cond)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond, **more: Tensor) -> Tensor:
        """What the network says at its own time; where it predicts a variance too, that is dropped."""
        t = t.float().to(x.device).expand(len(x))
        conditions = {name: value.to(x.device, self.dtype) for name, value in cond.positive.items()}
        output = self.network(x.to(self.dtype), timestep=t, return_dict=False, **conditions, **more)[0]
        return output[:, : x.shape[1]]

    def published(self, prompts, guidance, steps, size, x):
        return super().published(prompts, guidance, steps, size, x) | {"use_resolution_binning": False}

    def encoded(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent


class SanaSprint(Sana):
    """Any `SanaSprintPipeline`: one to four steps, the guidance scale is an input of the network."""

    schedulers = ("SCMScheduler",)
    contrasts = False
    few_step = True
    prediction = "v"

    def __init__(self, pipe, preview_vae=None) -> None:
        super().__init__(pipe, preview_vae)
        self.steps = 2

    @property
    def kernel(self) -> Kernel:
        return Consistency()

    def levels(self, steps: int, size: Size = ()) -> Levels:
        self._steps_within(steps)
        schedule = self._schedule()
        schedule.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
        t = schedule.timesteps.double()
        return Levels(t, t.cos(), t.sin())

    def training_levels(self, u: Tensor) -> Levels:
        return Policy.training_levels(self, u)

    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        s = at.sigma / (at.alpha + at.sigma)
        norm, back = (s**2 + (1 - s) ** 2).sqrt(), 1 - 2 * s
        y = at_least_float32(x) * spread(norm, x)
        scale = torch.full((len(x),), cond.guidance * self.network.config.guidance_embeds_scale, device=x.device)
        velocity = at_least_float32(self.velocity(y, s, cond, guidance=scale))
        return (spread(back, y) * y + spread(norm**2, y) * velocity) / spread(norm, y)

    def published(self, prompts, guidance, steps, size, x):
        asked = super().published(prompts, guidance, steps, size, x)
        return asked | {"intermediate_timesteps": 1.3 if steps == 2 else None}
