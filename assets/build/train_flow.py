"""Trains tiny-flow: a rectified flow in Stable Diffusion 3's classes, with two text encoders of its own, over tiny-sd's latents.

Loss: squared error of the predicted velocity eps − x0, at times t of a logit-normal law (2403.03206). 10 % of the captions are
dropped. T5 is absent: where Stable Diffusion 3 hears it there are zeros, a few here, and once in eight updates the 256 that
its pipeline takes by default. What is shipped is an average of the weights.
"""

from __future__ import annotations

import copy

import torch
from common import WORK, Run, arguments, autocast
from diffusers import SD3Transformer2DModel
from torch.nn.functional import pad
from train_unet import follow, tokenize
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

ZEROS = 4  # tokens that stand for T5's
TRANSFORMER = dict(
    sample_size=8,
    patch_size=1,
    in_channels=4,
    out_channels=4,
    num_layers=5,
    attention_head_dim=32,
    num_attention_heads=4,
    caption_projection_dim=128,
    joint_attention_dim=192,
    pooled_projection_dim=192,
    pos_embed_max_size=16,
    qk_norm="rms_norm",
)


def text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    """A CLIP text encoder over the world's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection._from_config(config, attn_implementation="eager")


def networks(tokenizer: CLIPTokenizer) -> dict[str, torch.nn.Module]:
    """The transformer and its two text encoders, of width 128 and 64."""
    return {
        "transformer": SD3Transformer2DModel(**TRANSFORMER),
        "text": text_encoder(tokenizer, 128, 4),
        "text_2": text_encoder(tokenizer, 64, 3),
    }


def embed(models: dict[str, torch.nn.Module], ids: torch.Tensor, zeros: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L + zeros, 192) tokens from the layer before the last, and (B, 192) pooled, as Stable Diffusion 3 joins them."""
    outputs = [models[name](ids, output_hidden_states=True) for name in ("text", "text_2")]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return pad(tokens, (0, 0, 0, zeros)), torch.cat([output.text_embeds for output in outputs], -1)


def main() -> None:
    args = arguments(__doc__, minutes=60, seed=71, batch=128, lr=1e-3)
    tokenizer = CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    captions = torch.load(WORK / "scenes.pt", weights_only=False)["true"]
    each = len(captions[0])
    device = args.device
    ids = tokenize(tokenizer, [text for row in captions for text in row]).view(len(captions), each, -1).to(device)
    empty = tokenize(tokenizer, [""]).to(device)
    latents = torch.load(WORK / "latents.pt")
    mean, std = latents["mean"].to(device).float(), latents["std"].to(device).float()

    models = {name: model.to(device) for name, model in networks(tokenizer).items()}
    print({name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}, "parameters")
    averages = {f"{name}_ema": copy.deepcopy(model) for name, model in models.items()}
    optimizer = torch.optim.AdamW([p for model in models.values() for p in model.parameters()], weight_decay=0.01)
    run = Run("flow", args, optimizer, models | averages)
    total = torch.zeros((), device=device)
    for step in run:
        g = run.generator
        rows = torch.randint(len(mean), (args.batch,), generator=g).to(device)
        pick = torch.randint(each, (args.batch,), generator=g).to(device)
        dropped = (torch.rand(args.batch, 1, generator=g) < 0.1).to(device)
        t = torch.randn(args.batch, generator=g).sigmoid().to(device)
        posterior, noise = torch.randn(2, args.batch, *mean.shape[1:], generator=g).to(device)
        x0, sigma = mean[rows] + std[rows] * posterior, t.view(-1, 1, 1, 1)
        with autocast(device):
            tokens, pooled = embed(
                models, torch.where(dropped, empty, ids[rows, pick]), 256 if step % 8 == 7 else ZEROS
            )
            output = models["transformer"]((1 - sigma) * x0 + sigma * noise, tokens, pooled, 1000 * t).sample
        loss = (output.float() - (noise - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, model in models.items():
            follow(averages[f"{name}_ema"], model, step)
        total += loss.detach()
        if (step + 1) % 100 == 0:
            run.log(loss=total.item() / 100)
            total.zero_()


if __name__ == "__main__":
    main()
