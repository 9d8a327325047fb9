"""What the training scripts share: paths, seeds, atomic checkpoints, JSON-lines logs, and the bfloat16 fast path."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch

ASSETS = Path(__file__).resolve().parents[1]
WORK = ASSETS / "build" / "work"
SIZE = 32  # pixels a side


def arguments(
    description: str, minutes: float, seed: int, batch: int, lr: float, stages: tuple = ()
) -> argparse.Namespace:
    """The options every training script takes."""
    parser = argparse.ArgumentParser(description=description)
    if stages:
        parser.add_argument("stage", choices=stages)
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="length of the learning-rate schedule in minutes"
    )
    parser.add_argument("--steps", type=int, default=None, help="length in steps; overrides --minutes")
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where to train, for the scripts that take more than a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    WORK.mkdir(parents=True, exist_ok=True)
    return args


def autocast(device: str = "cpu"):
    """bfloat16 matrix products and convolutions, float32 weights: about five times faster on a CPU with AMX."""
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def save(state: dict, path: Path) -> None:
    """Writes a checkpoint atomically."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def tidy(path: Path) -> None:
    """Removes the build machine from a config, and lets half-precision files load as float32 by default."""
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


class Run:
    """One resumable run: progress, learning rate, log and checkpoint.

    `for step in run:` yields until the budget (seconds or steps, counted across restarts) is spent.
    """

    def __init__(
        self, name: str, args: argparse.Namespace, optimizer: torch.optim.Optimizer, state: dict, warmup: int = 200
    ):
        self.name, self.args, self.optimizer, self.state, self.warmup = name, args, optimizer, state, warmup
        self.generator = torch.Generator().manual_seed(args.seed)
        self.step, self.seconds, self.path = 0, 0.0, WORK / f"{name}.pt"
        if self.path.exists():
            saved = torch.load(self.path, weights_only=False, map_location="cpu")
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.generator.set_state(saved["generator"])
            optimizer.load_state_dict(saved["optimizer"])
            for key, module in state.items():
                module.load_state_dict(saved[key])

    @property
    def progress(self) -> float:
        """The share of the budget already spent, 0 to 1."""
        if self.args.steps:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def __iter__(self):
        mark = time.time()
        while self.progress < 1:
            rate = self.args.lr * min(1, (self.step + 1) / self.warmup) * max(0.02, min(1, 2.5 * (1 - self.progress)))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            yield self.step
            self.step += 1
            now = time.time()
            self.seconds, mark = self.seconds + now - mark, now
            if self.step % 500 == 0:
                self.checkpoint()
        self.checkpoint()

    def checkpoint(self) -> None:
        """Saves everything a restart needs."""
        saved = {key: module.state_dict() for key, module in self.state.items()}
        saved |= {"step": self.step, "seconds": self.seconds, "generator": self.generator.get_state()}
        save(saved | {"optimizer": self.optimizer.state_dict()}, self.path)

    def log(self, **values) -> None:
        """Appends one line to the log, and prints it."""
        line = json.dumps(
            {"step": self.step, "seconds": round(self.seconds, 1)} | {k: round(v, 5) for k, v in values.items()}
        )
        with (WORK / f"{self.name}.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def grid(images: torch.Tensor, path: Path, columns: int = 8, scale: int = 2) -> None:
    """Writes (B,3,H,W) images in [0,1] as one PNG."""
    from PIL import Image

    rows = images[: len(images) // columns * columns].float().clamp(0, 1)
    rows = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=0.5).unflatten(0, (-1, columns))
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (R,C,3,H,W) -> (R*H, C*W, 3)
    sheet = sheet.mul(255).round().byte().repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Image.fromarray(sheet.numpy()).save(path)
