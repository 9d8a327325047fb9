"""Random learned rewards in the layout that `kilter train-reward` writes."""

from __future__ import annotations

from pathlib import Path

import torch

from rewards import Reward
from rewards.base import Features, as_prompts
from rewards.heads import Head
from rewards.learned import encoded, write_learned
from tests.rewards import tiny

TEXTS = ["a red cat", "two dog on the house", "the blue bird", "photo of a car"] * 4


def seen_by(encoder: Reward) -> Features:
    """What the encoder sees in 16 pictures of natural statistics."""
    with torch.no_grad():
        return encoded(encoder, tiny.natural(16, 40, 40, seed=5), as_prompts(TEXTS))


def save_learned(folder: Path, encoder: Reward, clip: str, head: Head, users: tuple[str, ...] = ()) -> Path:
    """A head of random weights on a CLIP, its scores standardised over 16 pictures."""
    from align.learning.calibration import calibrate

    seen = seen_by(encoder)
    head.shape(seen.joint.shape[1], seen.prompt.shape[1], seed=7).fit_to(seen)
    codes = (
        torch.randn(len(users), head.code, generator=torch.Generator().manual_seed(8))
        if head.code
        else torch.empty(0, 0)
    )
    with torch.no_grad():
        scale = calibrate(head, seen, codes)
    config = {
        "encoder": {"class_path": "rewards.clip.CLIPScore", "init_args": {"model": clip, "variant": "cosine"}},
        "head": {"class_path": f"rewards.heads.{type(head).__name__}", "init_args": dict(head.arguments)},
        "widths": [seen.joint.shape[1], seen.prompt.shape[1]],
        "users": list(users),
        "mean": scale.mean.tolist(),
        "std": scale.std.tolist(),
        "temperature": 1.0,
        "lora": None,
    }
    write_learned(folder, config, head, encoder, codes, seen)
    return folder
