"""Writes assets/tiny-flow, a `StableDiffusion3Pipeline` folder without T5, from the averaged weights of work/flow.pt."""

from __future__ import annotations

import torch
from common import ASSETS, WORK
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from export_sd import export
from train_flow import ZEROS, networks
from transformers import CLIPTokenizer

GENERATION = {"num_inference_steps": 20, "guidance_scale": 3.0, "max_sequence_length": ZEROS, "world": "shapes"}


def main() -> None:
    state = torch.load(WORK / "flow.pt", weights_only=False, map_location="cpu")
    tokenizer = CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    models = networks(tokenizer)
    for name, model in models.items():
        model.load_state_dict(state[f"{name}_ema"])
    vae = AutoencoderKL.from_pretrained(WORK / "vae")
    vae.register_to_config(shift_factor=0.0)  # which the pipeline adds
    pipe = StableDiffusion3Pipeline(
        transformer=models["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=models["text"],
        tokenizer=tokenizer,
        text_encoder_2=models["text_2"],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    export(pipe, ASSETS / "tiny-flow", GENERATION, texts=("", "_2"))
    print(f"step {state['step']} written")


if __name__ == "__main__":
    main()
