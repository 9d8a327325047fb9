"""Predicted against measured peak memory, on real shapes with random weights.

Networks, autoencoders and text encoders have the published configurations (written out below; no download). Every case is predicted
on the meta device (`align.planning`), in other processes, and run on the device: steering of 4 particles, and training of a LoRA of
rank 16 for two updates, evaluations and all, in bfloat16. Measured is `torch.cuda.max_memory_allocated`; on a CPU the bytes of live
storages. A case that does not fit is a case too.

    python benchmarks/plan.py --device cuda [--models half sd15 sdxl sd35 flux] [--out FOLDER] [--seconds 280]
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import align
import align.reports
from align import Lora, Memory, TrainConfig, Trainer
from align.footprint import LiveBytes
from align.objectives import Backprop, PolicyGradient
from align.planning.targets import Target
from align.planning.walks import steering_walk, training_walk
from align.sources import Prompts, Rollouts
from rewards import Brightness, Prompt
from samplers import FeynmanKac, Guided

RESULTS = Path(__file__).resolve().parent / "results"
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
SD15: dict[str, Any] = {  # stable-diffusion-v1-5/unet/config.json
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8,
    "down_block_types": (CROSS[0],) * 3 + (PLAIN[0],), "up_block_types": (PLAIN[1],) + (CROSS[1],) * 3,
}  # fmt: skip
HALF: dict[str, Any] = SD15 | {"sample_size": 8, "block_out_channels": (160, 320, 640, 640)}  # of the width, for CPUs
SDXL: dict[str, Any] = {  # stabilityai/stable-diffusion-xl-base-1.0/unet/config.json
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "down_block_types": (PLAIN[0], CROSS[0], CROSS[0]), "up_block_types": (CROSS[1], CROSS[1], PLAIN[1]),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD35: dict[str, Any] = {  # stabilityai/stable-diffusion-3.5-medium/transformer/config.json
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
}  # fmt: skip
FLUX: dict[str, Any] = {  # black-forest-labs/FLUX.1-dev/transformer/config.json
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2,
}  # fmt: skip
UNETS = {"half": HALF, "sd15": SD15, "sdxl": SDXL}
BETAS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}


def words(length: int = 77) -> Any:
    """A tokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocabulary, [], model_max_length=length)


def build(name: str, device: str) -> Any:
    """A policy of a published shape with random bfloat16 weights."""
    diffusers: Any = import_module("diffusers")
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -3.0) for c in "▁abcdefghijklmnopqrstuvwxyz")]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            unet, kl = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL
            if name in UNETS:
                parts: dict[str, Any] = {"unet": unet(**UNETS[name]), "vae": kl(**VAE, latent_channels=4)}
            else:
                few = {
                    "use_quant_conv": False,
                    "use_post_quant_conv": False,
                    "scaling_factor": 0.36,
                    "shift_factor": 0.12,
                }
                net = (
                    diffusers.FluxTransformer2DModel(**FLUX)
                    if name == "flux"
                    else diffusers.SD3Transformer2DModel(**SD35)
                )
                parts = {"transformer": net, "vae": kl(**VAE, latent_channels=16, **few)}
            kind = CLIPTextModelWithProjection if name == "sd35" else CLIPTextModel
            parts["text_encoder"] = kind(CLIPTextConfig(**CLIP_L))
            if name in ("sdxl", "sd35"):
                parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G))
            if (
                name == "flux"
            ):  # a short T5: the real one would be half the memory, and says nothing about the network's
                short: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 2, "num_heads": 64}
                parts["text_encoder_2"] = T5EncoderModel(T5Config(**short))
    finally:
        torch.set_default_dtype(before)
    parts["tokenizer"] = words()
    if "text_encoder_2" in parts:
        parts["tokenizer_2"] = T5Tokenizer(vocab=letters, extra_ids=0) if name == "flux" else words()
    if name in UNETS:
        parts["scheduler"] = diffusers.DDIMScheduler(**BETAS)
    else:
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=name == "flux")
    if name in ("half", "sd15"):
        from samplers.families.sd import StableDiffusion as family

        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts)
    elif name == "sdxl":
        from samplers.families.sdxl import StableDiffusionXL as family

        pipe = diffusers.StableDiffusionXLPipeline(**parts)
    elif name == "sd35":
        from samplers.families.sd3 import StableDiffusion3 as family

        pipe = diffusers.StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None)
    else:
        from samplers.families.flux import Flux as family

        pipe = diffusers.FluxPipeline(**parts)
    return family(pipe)


def cases(models: list[str]) -> list[dict[str, Any]]:
    """What is measured, cheap models first; `mode` is the checkpointing of training."""
    found = []
    for model in models:
        grid = [(rows, mode) for rows in (1, 2, 4) for mode in ("block", "step", "none")]
        if model in ("sd35", "flux"):
            grid = [(1, "block"), (1, "step"), (2, "block")]
        found += [{"model": model, "what": what, "rows": 4, "mode": ""} for what in ("steer", "guided")]
        found += [{"model": model, "what": "policy gradient", "rows": 2, "mode": mode} for mode in ("block", "none")]
        found += [{"model": model, "what": "backprop", "rows": rows, "mode": mode} for rows, mode in grid]
    return found


def parts_of(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Arguments of the run that a case describes."""
    if case["what"] in ("steer", "guided"):
        steering = FeynmanKac(Brightness(), 1.0) if case["what"] == "steer" else Guided(Brightness(), 1.0)
        return {"steering": steering, "how": {"particles": case["rows"], "steps": 3, "batch": case["rows"]}}
    memory = Memory(checkpointing=case["mode"], decode_chunk=1)
    config = TrainConfig(
        out=f"{folder}/run", updates=2, batch=2 * case["rows"], micro_batch=case["rows"], lora=Lora(rank=16), steps=3,
        memory=memory, eval_prompts=["a cat", "a dog"], eval_samples=1, eval_every=0, sample_rows=2, tracker=None,
    )  # fmt: skip
    reward, prompts = Brightness(), ["a cat", "a dog"]
    if case["what"] == "backprop":
        return {
            "objective": Backprop("last", k=1).bind(reward),
            "source": Prompts(prompts).bind(reward),
            "config": config,
        }
    source = Rollouts(prompts, group=2, timestep_fraction=0.67).bind(reward)
    return {"objective": PolicyGradient().bind(reward), "source": source, "config": config}


def predicted(case: dict[str, Any], target: Target) -> dict[str, Any]:
    """Bytes and phase of the peak, and the seconds it took to foresee them."""
    torch.set_num_threads(1)
    began, policy = time.perf_counter(), build(case["model"], "meta")
    run = parts_of(case, "")
    if "steering" in run:
        walk = steering_walk(policy, [Prompt("a cat")], run["steering"], target, **run["how"])
    else:
        walk = training_walk(policy, **run, target=target)
    phases = {name: moment.total for name, moment in walk.phases.items()}
    return {
        "predicted": walk.peak,
        "phase": walk.phase,
        "weights": walk.weights.bytes,
        "phases": phases,
        "walked": time.perf_counter() - began,
    }


def measured(case: dict[str, Any], device: str) -> dict[str, Any]:
    """Bytes of the peak, or none where the run does not fit."""
    cuda = device.startswith("cuda")
    live = LiveBytes()
    began = time.perf_counter()
    if cuda:
        torch._C._cuda_clearCublasWorkspaces()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        policy = build(case["model"], device)
        if not cuda:
            live.__enter__()
        elif torch.cuda.max_memory_allocated() > 1.02 * torch.cuda.memory_allocated():
            torch.cuda.reset_peak_memory_stats()  # of making the weights
        with tempfile.TemporaryDirectory() as folder:
            run = parts_of(case, folder)
            if "steering" in run:
                align.steer(policy, ["a cat"], run["steering"], plain=False, gold=None, **run["how"])
            else:
                Trainer(policy, run["objective"], run["source"], run["config"]).fit()
        weights = sum(
            t.untyped_storage().nbytes()
            for t in {t.untyped_storage()._cdata: t for t in policy.state_dict().values()}.values()
        )
        peak = torch.cuda.max_memory_allocated() if cuda else live.peak + weights
    except torch.OutOfMemoryError:
        peak = None
    finally:
        if not cuda and live.now:
            live.__exit__(None, None, None)
    return {"measured": peak, "seconds": time.perf_counter() - began}


def table(rows: list[dict[str, Any]], device: str) -> str:
    """The cases as Markdown."""
    lines = [
        f"Peak memory in GB on {device}, bfloat16, weights included.", "",
        "| model | run | rows | recomputed | predicted | measured | ratio | phase of the peak |", "| --- " * 8 + "|",
    ]  # fmt: skip
    for row in rows:
        real = row.get("measured")
        ratio = f"{row['predicted'] / real:.3f}" if real else ""
        seen = "" if "measured" not in row else f"{real / 1e9:.2f}" if real else "did not fit"
        cells = (
            row["model"],
            row["what"],
            row["rows"],
            row["mode"],
            f"{row['predicted'] / 1e9:.2f}",
            seen,
            ratio,
            row["phase"],
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=["sd15", "sdxl", "sd35", "flux"])
    parser.add_argument("--only", nargs="+", help="kinds of runs: steer, guided, backprop, 'policy gradient'")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=280, help="no case is begun later than this")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    align.reports.draw_curves = lambda *args, **how: None  # pyright: ignore
    target = Target.here() if options.device.startswith("cuda") else Target()
    name = target.name if target.cuda else "the CPU"
    began, rows = (
        time.perf_counter(),
        [c for c in cases(options.models) if options.only is None or c["what"] in options.only],
    )
    options.out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        known = [row for row in rows if "predicted" in row]
        (options.out / "plan.json").write_text(
            json.dumps({"device": name, "torch": torch.__version__, "rows": known}, indent=1) + "\n"
        )
        (options.out / "plan.md").write_text(table(known, name) + "\n")

    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(predicted, row, target.unlimited()) for row in rows]
        for row, foreseen in zip(rows, waiting, strict=True):
            if not options.predict and time.perf_counter() - began < options.seconds:
                try:
                    row |= measured(row, options.device)
                except Exception as error:  # the other cases still count
                    row["error"] = f"{type(error).__name__}: {error}"
            try:
                row |= foreseen.result()
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
            line = {k: v for k, v in row.items() if k not in ("phases", "weights")}
            print(f"{time.perf_counter() - began:6.0f} s", json.dumps(line), flush=True)
            write()
    print(table([row for row in rows if "predicted" in row], name))


if __name__ == "__main__":
    main()
