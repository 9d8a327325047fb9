"""Trains tiny-sd's UNet and, jointly, its CLIP text encoder on the whitened latents; keeps an average of the weights.

Loss: squared error of the predicted noise, weighted by min(1 + 1/SNR, 5): the layout of a scene is decided at high noise,
where the plain noise loss hardly sees it (compare Hang et al. 2023, arXiv 2303.09556). 10 % of the captions are dropped.
"""

from __future__ import annotations

import copy

import torch
from common import WORK, Run, arguments, autocast
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 112),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    cross_attention_dim=128,
    attention_head_dim=4,  # diffusers reads this as the number of heads
    norm_num_groups=8,
)
SCHEDULER = dict(  # as Stable Diffusion 1.5
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Three layers of width 128 over the world's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel._from_config(config, attn_implementation="eager")


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts to padded ids (B, L)."""
    return tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Moves the averaged weights toward the trained ones, with a half-life of at most 700 steps."""
    rate = max(0.001, 1 / (1 + step / 8))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), rate)


def main() -> None:
    args = arguments(__doc__, minutes=28, seed=21, batch=64, lr=1e-3)
    tokenizer = CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    captions = torch.load(WORK / "scenes.pt", weights_only=False)["true"]
    each = len(captions[0])
    ids = tokenize(tokenizer, [text for row in captions for text in row]).view(len(captions), each, -1)
    empty = tokenize(tokenizer, [""])
    latents = torch.load(WORK / "latents.pt")
    mean, std = latents["mean"].float(), latents["std"].float()

    unet = UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # torch's fused attention has a slow backward pass on CPUs
    text = text_encoder(tokenizer)
    print([sum(p.numel() for p in m.parameters()) for m in (unet, text)], "parameters")
    state = {"unet": unet, "text": text, "unet_ema": copy.deepcopy(unet), "text_ema": copy.deepcopy(text)}
    optimizer = torch.optim.AdamW([*unet.parameters(), *text.parameters()], weight_decay=0.01)
    run = Run("unet", args, optimizer, state)
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod[:, None, None, None]
    total = 0.0
    for step in run:
        rows = torch.randint(len(mean), (args.batch,), generator=run.generator)
        pick = torch.randint(each, (args.batch,), generator=run.generator)
        dropped = torch.rand(args.batch, 1, generator=run.generator) < 0.1
        t = torch.randint(len(alphas), (args.batch,), generator=run.generator)
        posterior, noise = torch.randn(2, args.batch, *mean.shape[1:], generator=run.generator)
        x0, a = mean[rows] + std[rows] * posterior, alphas[t]
        x = (a.sqrt() * x0 + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with autocast():
            context = text(torch.where(dropped, empty, ids[rows, pick])).last_hidden_state
            output = unet(x, t, context).sample
        loss = ((output.float() - noise).square() * (1 / a).clamp(max=5)).mean()  # 1/a is 1 + 1/SNR
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for key in ("unet", "text"):
            follow(state[f"{key}_ema"], state[key], step)
        total += loss.detach()
        if (step + 1) % 100 == 0:
            run.log(loss=total.item() / 100)
            total = 0.0


if __name__ == "__main__":
    main()
