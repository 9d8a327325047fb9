"""Writes assets/tiny-turbo, a `LatentConsistencyModelPipeline` folder: tiny-sd with the averaged weights of work/turbo.pt."""

from __future__ import annotations

import torch
from common import ASSETS, WORK
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from export_sd import GENERATION, export
from train_turbo import LCM, TURBO


def main() -> None:
    state = torch.load(WORK / "turbo.pt", weights_only=False)
    teacher = StableDiffusionPipeline.from_pretrained(ASSETS / "tiny-sd", torch_dtype=torch.float32)
    unet = UNet2DConditionModel(**TURBO)
    unet.load_state_dict(state["unet_ema"])
    pipe = LatentConsistencyModelPipeline(
        vae=teacher.vae,
        text_encoder=teacher.text_encoder,
        tokenizer=teacher.tokenizer,
        unet=unet,
        scheduler=LCMScheduler(**LCM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    export(pipe, ASSETS / "tiny-turbo", GENERATION | {"num_inference_steps": 4})
    print(f"step {state['step']} written")


if __name__ == "__main__":
    main()
