"""What backpropagation through the sampler holds in memory, against the number of steps.

The embedded model, full backpropagation through T steps (DRaFT with K = T), batch 2. Bytes are those of every tensor storage that
came to life since the rollout began and is still alive, counted at each operation: so recomputed activations count, and weights
do not. Time is the median over repetitions, in units of one step's forward pass without a graph.

    python benchmarks/memory.py [--steps 5 10 20 50]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import align
from align import Lora, Memory
from align.adapters import add_lora
from align.footprint import LiveBytes
from samplers import DDIM, SeededNoise, always, rollout

RESULTS = Path(__file__).resolve().parent / "results"
MODES = ("none", "block", "step")
LIMITS = {"growth": 1.1, "time": 4.3}


def gradient(policy, steps: int, batch: int) -> None:
    """One full backpropagation from the final latent."""
    cond = policy.encode(["a red circle left of a blue square"] * batch).with_guidance(1.0)
    noise = SeededNoise(range(batch), policy.shape(policy.size))
    run = rollout(policy, DDIM(1.0), cond, policy.levels(steps, policy.size), noise, grad=always)
    run.x0.square().sum().backward()
    policy.network.zero_grad(set_to_none=True)


def forward(policy, steps: int, batch: int) -> None:
    """The same rollout without a graph."""
    cond = policy.encode(["a red circle left of a blue square"] * batch).with_guidance(1.0)
    noise = SeededNoise(range(batch), policy.shape(policy.size))
    rollout(policy, DDIM(1.0), cond, policy.levels(steps, policy.size), noise)


def seconds(what, repeat: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        what()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def measure(policy, mode: str, steps: int, batch: int, repeat: int) -> dict[str, float]:
    """Peak bytes, bytes that the stored states account for, and time in forward units."""
    Memory(checkpointing=mode).apply(policy)
    gradient(policy, 2, batch)  # warm up
    with LiveBytes() as live:
        gradient(policy, steps, batch)
    latent = 4 * batch * torch.Size(policy.shape(policy.size)).numel()
    ratio = seconds(lambda: gradient(policy, steps, batch), repeat) / seconds(
        lambda: forward(policy, steps, batch), repeat
    )
    return {"mode": mode, "steps": steps, "peak": live.peak, "latents": latent * steps, "forward_units": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    policy = align.load_policy(device="cpu")
    add_lora(policy, Lora(rank=8), 0)
    rows = [measure(policy, mode, t, options.batch, options.repeat) for mode in MODES for t in options.steps]
    ends = {
        t: next(r for r in rows if r["mode"] == "step" and r["steps"] == t)
        for t in (options.steps[0], options.steps[-1])
    }
    first, last = ends.values()
    growth = (last["peak"] - last["latents"]) / (first["peak"] - first["latents"])
    slowest = max(r["forward_units"] for r in rows if r["mode"] == "step")
    lines = ["| T | " + " | ".join(f"{m}: MB | {m}: forward units" for m in MODES) + " |", "| --- " * 7 + "|"]
    for t in options.steps:
        cells = [
            f"{r['peak'] / 1e6:.2f} | {r['forward_units']:.2f}"
            for m in MODES
            for r in rows
            if (r["mode"], r["steps"]) == (m, t)
        ]
        lines.append(f"| {t} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    span = f"from T = {options.steps[0]} to {options.steps[-1]}"
    print(f"per step: peak × {growth:.3f} {span} besides the stored states (limit {LIMITS['growth']});")
    print(f"at most {slowest:.2f} forward units a step (limit {LIMITS['time']})")
    RESULTS.mkdir(exist_ok=True)
    result = {"rows": rows, "growth": growth, "forward_units": slowest, "limits": LIMITS}
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=1))
    (RESULTS / "memory.md").write_text("\n".join(lines) + "\n")
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for mode, colour, mark in zip(MODES, ("#b3261e", "#e6a100", "#1f5fa8"), "osD", strict=True):
        mine = [r for r in rows if r["mode"] == mode]
        axis.plot([r["steps"] for r in mine], [r["peak"] / 1e6 for r in mine], color=colour, marker=mark, label=mode)
    axis.set(
        xlabel="steps T", ylabel="peak MB held for one gradient", yscale="log", title="Backpropagation through T steps"
    )
    axis.grid(alpha=0.3)
    axis.legend(title="recomputed", frameon=False)
    figure.savefig(RESULTS / "memory.png", dpi=120)


if __name__ == "__main__":
    main()
