"""Stable Diffusion: every prediction, the schedulers of published checkpoints, and the distilled students."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers

from tests.conftest import build_pipeline

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def built(scheduler, **kwargs) -> diffusers.DiffusionPipeline:
    with TemporaryDirectory() as folder:
        pipe = build_pipeline(Path(folder), scheduler=scheduler, **kwargs)
    return pipe


VARIANTS = {
    "1.5": lambda: built(diffusers.PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False)),
    "2.1": lambda: built(
        diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    ),
    "v with zero terminal SNR": lambda: built(
        diffusers.DDIMScheduler(
            **BETAS,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            clip_sample=False,
            steps_offset=1,
        )
    ),
    "DPM++ with Karras levels": lambda: built(
        diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True, steps_offset=1)
    ),
    "UniPC": lambda: built(diffusers.UniPCMultistepScheduler(**BETAS, steps_offset=1)),
    "turbo": lambda: built(diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing", steps_offset=1)),
    "LCM": lambda: built(
        diffusers.LCMScheduler(**BETAS), guidance_embedding=True, pipeline="LatentConsistencyModelPipeline"
    ),
    "merged LCM-LoRA": lambda: built(diffusers.LCMScheduler(**BETAS, steps_offset=1)),
}
