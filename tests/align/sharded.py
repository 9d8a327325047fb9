"""Runs of a tiny UNet for `test_sharding`, in processes that share it and in one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import align
import align.reports
from align import Lora, Trainer, sharding
from align.memory import Memory
from align.stepper import Stepper
from tests.align.runs import CASES, Near, config_of, stop_at

HOW: dict[str, Any] = {"lora": Lora(rank=4), "micro_batch": 2, "batch": 8, "updates": 3, "eval_every": 0}
HOW |= {"save_every": 3, "epsilon": 1e-3, "eval_prompts": ("a b", "c"), "eval_samples": 2}


class Choosy(Near):
    """Does not judge the brighter samples, so that rows are dropped: not equally many in each process."""

    def measure(self, media, prompts):
        return torch.where(media.detach().flatten(1).mean(1) > 0.5, torch.nan, super().measure(media, prompts))


def run(name: str, out: Path, model: Path, cut: int | None = None) -> Trainer:
    """Trains a LoRA, or goes on with a run that was cut off.

    Args:
        name: of one of `CASES`, or "case:checkpointing"; "case:half" has a half-precision base.
        cut: ask to stop in the update after so many.
    """
    align.reports.draw_curves = lambda *a, **k: None
    if (out / "checkpoints").is_dir():
        trainer = Trainer.resume(out)
    else:
        name, _, variant = name.partition(":")
        case, reward = CASES[name], Near() if name == "Backprop" else Choosy()
        memory = {"memory": Memory(variant)} if variant in ("none", "block") else {}  # pyright: ignore
        config = config_of(out, **{**case.config, **HOW, **memory})
        dtype = "bfloat16" if variant == "half" else "float32"
        policy = align.load_policy(model, device="cpu", dtype=dtype, waiting=sharding.asked())
        trainer = Trainer(policy, case.objective().bind(reward), case.source(out).bind(reward), config)
    if cut is not None:
        stop_at(trainer, cut)
    trainer.fit()
    return trainer


def together(name: str, out: Path, model: Path) -> None:
    """For processes started together: a whole run and what it took, one that is cut off, and one that was, gone on with."""
    idle, keep_up = [], Stepper._keep_up
    Stepper._keep_up = lambda *args: (idle.append(1), keep_up(*args))[1]
    trainer = run(name, out / "whole" / name, model)
    Stepper._keep_up = keep_up
    found = {"idle": len(idle), **held(trainer)}
    (out / f"{name}-{trainer.world.rank}.json").write_text(json.dumps(found))
    if ":" not in name:
        run(name, out / "cut" / name, model, cut=1)
    if (out / "begun" / name).is_dir():
        run(name, out / "begun" / name, model)


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes of the frozen weights: of all, and of what this process has in memory."""
    frozen = [p for p in trainer.policy.network.parameters() if not p.requires_grad]
    local = [getattr(p, "_local_tensor", p).untyped_storage() for p in frozen]
    return {
        "all": sum(p.numel() * p.element_size() for p in frozen),
        "mine": sum({s.data_ptr(): s.nbytes() for s in local}.values()),
    }
