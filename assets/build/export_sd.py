"""Writes assets/tiny-sd, a `StableDiffusionPipeline` folder, from the averaged weights of work/unet.pt; half precision on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from common import ASSETS, WORK, tidy
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
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
    export(pipe, ASSETS / "tiny-sd", GENERATION)
    print(f"step {state['step']} written")


def export(pipe: DiffusionPipeline, folder: Path, generation: dict, texts: tuple[str, ...] = ("",)) -> None:
    """Writes a pipeline, whose text encoders' names end in `texts`, in half precision with its default settings."""
    pipe.to(torch.float16).save_pretrained(folder)
    for text in texts:  # vocab.json for older transformers
        shutil.copytree(WORK / "tokenizer", folder / f"tokenizer{text}", dirs_exist_ok=True)
        tidy(folder / f"text_encoder{text}" / "config.json")
    tidy(folder / "vae" / "config.json")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


if __name__ == "__main__":
    main()
