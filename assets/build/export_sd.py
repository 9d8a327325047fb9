"""Writes assets/tiny-sd, a `StableDiffusionPipeline` folder, from the averaged weights of work/unet.pt; half precision on disk."""

from __future__ import annotations

import json
import shutil

import torch
from common import ASSETS, WORK, tidy
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from train_unet import SCHEDULER, UNET, text_encoder
from transformers import CLIPTokenizer

GENERATION = {"num_inference_steps": 20, "guidance_scale": 3.0, "world": "shapes"}


def main() -> None:
    state = torch.load(WORK / "unet.pt", weights_only=False)
    tokenizer = CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    unet, text = UNet2DConditionModel(**UNET), text_encoder(tokenizer)
    unet.load_state_dict(state["unet_ema"])
    text.load_state_dict(state["text_ema"])
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(WORK / "vae"),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = ASSETS / "tiny-sd"
    pipe.to(torch.float16).save_pretrained(folder)
    shutil.copytree(WORK / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)  # vocab.json for older transformers
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    for name in ("vae", "text_encoder"):
        tidy(folder / name / "config.json")
    print(f"step {state['step']} written to {folder}")


if __name__ == "__main__":
    main()
