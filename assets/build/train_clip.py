"""Trains tiny-clip and writes assets/tiny-clip (`CLIPModel` layout): contrastive, with a near-miss caption added for every image.

The image is classified among all captions of the batch and all near misses (compare NegCLIP, Yuksekgonul et al. 2023, arXiv
2210.01936); a caption among all images.
"""

from __future__ import annotations

import torch
from common import ASSETS, SIZE, WORK, Run, arguments, autocast, tidy
from torch.nn import functional as F
from train_reward import Scenes, roughen
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Two towers of width 128."""
    shared = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4)
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config=dict(shared, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=20, **ends),
        vision_config=dict(shared, num_hidden_layers=3, image_size=SIZE, patch_size=4),
        projection_dim=64,
    )
    return CLIPModel._from_config(config, attn_implementation="eager")


def export(model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Half precision on disk."""
    side = {"height": SIZE, "width": SIZE}
    half = [0.5] * 3
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side, image_mean=half, image_std=half)
    CLIPProcessor(images, tokenizer).save_pretrained(ASSETS / "tiny-clip")
    model.half().save_pretrained(ASSETS / "tiny-clip")
    tidy(ASSETS / "tiny-clip" / "config.json")


def main() -> None:
    args = arguments(__doc__, minutes=9, seed=51, batch=128, lr=1e-3)
    tokenizer = CLIPTokenizer.from_pretrained(WORK / "tokenizer")
    scenes, model = Scenes(tokenizer, "clip_scenes"), build(tokenizer)
    print(sum(p.numel() for p in model.parameters()), "parameters")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    run, target, total = Run("clip", args, optimizer, {"clip": model}), torch.arange(args.batch), torch.zeros(2)
    for step in run:
        pixels, true, false, _ = scenes.batch(args.batch, 0.05 if run.progress < 0.3 else 1.0, run.generator)
        with autocast():
            output = model(input_ids=torch.cat([true, false]), pixel_values=2 * roughen(pixels, run.generator) - 1)
        logits = output.logits_per_image.float()  # (images, captions and near misses)
        near = torch.stack([logits.diagonal(), logits[:, args.batch :].diagonal()], 1)
        loss = F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : args.batch].T, target)
        loss = loss + F.cross_entropy(near, torch.zeros_like(target))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # at most 100, as CLIP
        total += torch.stack([loss.detach(), (near[:, 0] > near[:, 1]).float().mean()])
        if (step + 1) % 100 == 0:
            loss, accuracy = (total / 100).tolist()
            run.log(loss=loss, accuracy=accuracy)
            total.zero_()
    export(model, tokenizer)


if __name__ == "__main__":
    main()
