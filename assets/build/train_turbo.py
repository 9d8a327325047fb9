"""Distils tiny-sd into tiny-turbo: latent consistency distillation (2310.04378) with the guidance scale as an input.

The student f starts as the teacher. At a random one of the teacher's 20 levels its clean estimate is pulled toward the
estimate that a slow copy of it makes one level on, where the teacher's guided DDIM step lands:

    f(x_n, w)  ←  f⁻(DDIM_w(x_n → x_{n−1}), w),        w uniform in [1, 5],

under the pseudo-Huber loss. At the last level the right-hand side is the teacher's own estimate. Text encoder and VAE stay
the teacher's. What is shipped is an average of the weights.
"""

from __future__ import annotations

import copy
import sys

import torch
from common import ASSETS, WORK, Run, arguments, autocast
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from train_unet import SCHEDULER, UNET, follow, tokenize
from transformers import CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(ASSETS.parent))
from samplers.levels import Levels, to_clean

TURBO = UNET | {"time_cond_proj_dim": 64}
LCM = {k: v for k, v in SCHEDULER.items() if k.startswith("beta")} | {"original_inference_steps": 20}
HUBER = 0.01


def student(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with a guidance embedding that does nothing yet."""
    unet = UNet2DConditionModel(**TURBO)
    weights = teacher.state_dict()
    weights["time_embedding.cond_proj.weight"] = torch.zeros_like(unet.time_embedding.cond_proj.weight)
    unet.load_state_dict(weights)
    return unet


def embedded(guidance: torch.Tensor) -> torch.Tensor:
    """(B, 64) what the network reads the guidance scale from, as in `LatentConsistencyModelPipeline`."""
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    return embed(None, guidance - 1, embedding_dim=TURBO["time_cond_proj_dim"])  # pyright: ignore


def main() -> None:
    args = arguments(__doc__, minutes=45, seed=61, batch=64, lr=4e-4)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "tiny-sd" / "tokenizer")
    captions = torch.load(WORK / "scenes.pt", weights_only=False)["true"]
    each = len(captions[0])
    ids = tokenize(tokenizer, [text for row in captions for text in row]).view(len(captions), each, -1)
    latents = torch.load(WORK / "latents.pt")
    mean, std = latents["mean"].float(), latents["std"].float()

    load = {"dtype": torch.float32}
    teacher = UNet2DConditionModel.from_pretrained(ASSETS / "tiny-sd" / "unet", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(ASSETS / "tiny-sd" / "text_encoder", attn_implementation="eager", **load)
    teacher.requires_grad_(False), text.requires_grad_(False)
    unet = student(teacher)
    for model in (teacher, unet):
        model.to(memory_format=torch.channels_last)
        model.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow backward pass on CPUs
    state = {"unet": unet, "target": copy.deepcopy(unet), "unet_ema": copy.deepcopy(unet)}
    for name in ("target", "unet_ema"):
        state[name].requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0)
    run = Run("turbo", args, optimizer, state)

    scheduler = LCMScheduler(**LCM)
    scheduler.set_timesteps(LCM["original_inference_steps"])
    t = scheduler.timesteps.flip(0)  # 49, 99 … 999
    alpha_bar = scheduler.alphas_cumprod.double()[t]
    alpha_bar = torch.cat([DDIMScheduler(**SCHEDULER).final_alpha_cumprod.double()[None], alpha_bar])
    levels = Levels(torch.cat([torch.zeros(1), t.double()]), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    empty = text(tokenize(tokenizer, [""])).last_hidden_state.expand(args.batch, -1, -1)
    total = 0.0
    for step in run:
        g = run.generator
        rows = torch.randint(len(mean), (args.batch,), generator=g)
        pick = torch.randint(each, (args.batch,), generator=g)
        n = torch.randint(1, levels.steps + 1, (args.batch,), generator=g)
        guidance = 1 + 4 * torch.rand(args.batch, generator=g)
        posterior, noise = torch.randn(2, args.batch, *mean.shape[1:], generator=g)
        now, to = levels[n], levels[n - 1]
        alpha, sigma = now.like(noise)
        x = (alpha * (mean[rows] + std[rows] * posterior) + sigma * noise).contiguous(memory_format=torch.channels_last)
        condition = embedded(guidance)
        with autocast():
            with torch.no_grad():
                context = text(ids[rows, pick]).last_hidden_state
                both = teacher(torch.cat([x, x]), now.t.repeat(2), torch.cat([empty, context])).sample.float()
                negative, positive = both.chunk(2)
                clean = to_clean("eps", negative + guidance.view(-1, 1, 1, 1) * (positive - negative), x, now)
                alpha, sigma = to.like(noise)
                landed = alpha * clean.x0 + sigma * clean.eps
                output = state["target"](landed, to.t, context, timestep_cond=condition).sample
                goal = torch.where((n == 1).view(-1, 1, 1, 1), clean.x0, to_clean("consistency", output, landed, to).x0)
            output = unet(x, now.t, context, timestep_cond=condition).sample
        error = to_clean("consistency", output.float(), x, now).x0 - goal
        loss = ((error.square() + HUBER**2).sqrt() - HUBER).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(list(state["target"].parameters()), list(unet.parameters()), 0.05)
        follow(state["unet_ema"], unet, step)
        total += loss.detach()
        if (step + 1) % 100 == 0:
            run.log(loss=total.item() / 100)
            total = 0.0


if __name__ == "__main__":
    main()
