"""How a training run goes, whatever its method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, Optional

from rewards import Reward
from samplers import Kernel

from .adapters import Lora
from .memory import Memory

__all__ = ["FREE_TO_CHANGE", "TrainConfig"]

# What a resumed run may change without becoming another run.
FREE_TO_CHANGE = {
    "out",
    "updates",
    "save_every",
    "keep",
    "eval_every",
    "tracker",
    "max_skipped",
    "stop_on_hacking",
    "patience",
}


@dataclass(frozen=True)
class TrainConfig:
    """How a training run goes, whatever its method.

    Attributes:
        out: the run's folder; the next free runs/NNN by default.
        updates: optimiser steps.
        batch: items an update takes (samples, pairs, lists), over all processes.
        micro_batch: rows in one forward and backward pass.
        lora: the adapter to train; null trains all weights of the network.
        optimizer: AdamW, or bitsandbytes' with its state in 8 bits (2110.02861) where a tensor has at least 4096 numbers.
        learning_rate, betas, epsilon, weight_decay: of AdamW.
        schedule: of the learning rate after `warmup` updates: constant, or falling so that it would reach 0 one update after
            the last: linearly, as a cosine or as a square root.
        max_grad_norm: gradients are scaled down to this norm.
        ema: decay of an exponential moving average of the weights, which is then what is evaluated and kept; 0 for none. After
            n updates it is at most (1 + n)/(10 + n).
        ema_every: updates between two averagings.
        seed: of everything random.
        kernel, steps, guidance, size: how the policy samples; its own by default.
        sample_rows: samples in flight at a time when no graph is built.
        uncond_grad: whether the unconditional branch of guidance carries gradient; some flow methods cut it.
        memory: activation checkpointing, attention, decoding.
        eval_prompts: prompts to judge by: texts or .txt / .jsonl files; the first 32 of the source's own by default.
        eval_samples: a prompt, at fixed seeds.
        eval_every: updates between evaluations; 0 for none but the first and the last.
        panel: rewards to watch that are not optimised. The exact detector of an embedded world is always among them.
        stop_on_hacking: stop when the optimised reward has risen while the held-out reward fell, `patience` times in a row.
        patience: see `stop_on_hacking`; at this many the run warns in any case.
        save_every: updates between checkpoints.
        keep: checkpoints kept besides the best one.
        max_skipped: stop after this many updates in a row whose loss or gradient was not finite.
        tracker: where numbers go besides log.jsonl: "tensorboard" or any other tracker of accelerate's, or null.
    """

    out: Optional[str] = None
    updates: int = 100
    batch: int = 32
    micro_batch: int = 8
    lora: Optional[Lora] = field(default_factory=Lora)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    schedule: Literal["constant", "linear", "cosine", "sqrt"] = "constant"
    warmup: int = 0
    max_grad_norm: float = 1.0
    ema: float = 0.0
    ema_every: int = 1
    seed: int = 0
    kernel: Optional[Kernel] = None
    steps: Optional[int] = None
    guidance: Optional[float] = None
    size: Optional[tuple[int, int]] = None
    sample_rows: int = 64
    uncond_grad: bool = True
    memory: Memory = field(default_factory=Memory)
    eval_prompts: Sequence[str] = ()
    eval_samples: int = 2
    eval_every: int = 25
    panel: Sequence[Reward] = ()
    stop_on_hacking: bool = False
    patience: int = 2
    save_every: int = 25
    keep: int = 2
    max_skipped: int = 10
    tracker: Optional[str] = "tensorboard"

    def __post_init__(self) -> None:
        least = {
            "updates": 1,
            "batch": 1,
            "micro_batch": 1,
            "sample_rows": 1,
            "eval_samples": 1,
            "save_every": 1,
            "keep": 1,
        }
        least |= {"warmup": 0, "ema_every": 1, "eval_every": 0, "patience": 1, "max_skipped": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be ≥ {low}; got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0; got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1); got {self.ema}")

    def rate(self, update: int) -> float:
        """The learning rate of an update, counted from 0, as a share of `learning_rate`."""
        if update < self.warmup:
            return (update + 1) / self.warmup
        left = 1 - (update - self.warmup) / max(1, self.updates - self.warmup)
        if self.schedule == "cosine":
            import math

            return 0.5 * (1 + math.cos(math.pi * (1 - left)))
        return {"constant": 1.0, "linear": left, "sqrt": left**0.5}[self.schedule]


NAMES = tuple(f.name for f in fields(TrainConfig))
