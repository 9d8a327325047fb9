"""What communication costs a training step, measured with two processes and projected to many.

A step exchanges the gradient of what is trained (one flat all-reduce of float32) and one reward a sample (an all-gather). Both are
timed between two CPU processes (gloo) on this machine; so is an update of configs/tiny/ddpo.yaml in one process. The projection is
weak scaling, every process doing the same work, with a ring all-reduce:

    seconds(R) = update + 2·latency·log2 R + 2·(R − 1)/R · bytes / bandwidth

    python benchmarks/scaling.py [--bandwidth 3.1e9]     # bytes a second between machines; measured here if not given
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import align
from align.world import World

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24)  # bytes
LORA = {"SD 1.5, rank 4 attention LoRA": 797_184 * 4, "12 B transformer, rank 32 LoRA": 90_000_000 * 4}


def exchange(repeat: int = 20) -> list[tuple[int, float]]:
    """Median seconds of an all-reduce of each size, in every process."""
    world, found = World(cpu=True), []
    for size in SIZES:
        values, times = torch.ones(size // 4), []
        for _ in range(repeat):
            world.wait()
            begin = time.perf_counter()
            world.sum(values)
            times.append(time.perf_counter() - begin)
        found.append((size, sorted(times)[repeat // 2]))
    return found


def fit(found: list[tuple[int, float]]) -> tuple[float, float]:
    """(latency in seconds, bandwidth in bytes a second) of a two-process all-reduce, which moves every byte once."""
    (small, low), (large, high) = found[0], found[-1]
    return low, (large - small) / max(high - low, 1e-9)


def update_seconds() -> tuple[float, int]:
    """Median seconds of an update of the embedded DDPO run in one process, and the bytes of its gradient."""
    with tempfile.TemporaryDirectory() as folder:
        quick = {"eval_every": 0, "eval_prompts": ["a red circle"], "tracker": None, "updates": 8}
        result = align.train(ROOT / "configs" / "tiny" / "ddpo.yaml", out=f"{folder}/run", **quick)
        weights = Path(folder) / "run" / "pytorch_lora_weights.safetensors"
        seconds = sorted(row["seconds"] for row in result.log)[len(result.log) // 2]
        return seconds, weights.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, help="bytes a second between processes")
    parser.add_argument("--exchange", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.exchange:
        found = exchange()
        if World(cpu=True).first:
            Path(options.exchange).write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/exchange.json"
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
        launch += [
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
            __file__,
            "--exchange",
            file,
        ]
        subprocess.run([sys.executable, "-m", *launch], check=True, cwd=ROOT)
        found = json.loads(Path(file).read_text())
    latency, measured = fit(found)
    bandwidth = options.bandwidth or measured
    seconds, size = update_seconds()
    print(
        f"all-reduce between two processes: {latency * 1e3:.2f} ms + bytes / {measured / 1e9:.2f} GB/s; update {seconds:.2f} s"
    )
    lines = [
        "| gradient | MB | " + " | ".join(f"{r} processes" for r in (2, 8, 64)) + " |",
        "| " + " | ".join(["---"] * 5) + " |",
    ]
    for name, bytes_ in {"embedded model, configs/tiny/ddpo.yaml": size, **LORA}.items():
        cells = []
        for r in (2, 8, 64):
            spent = 2 * latency * math.log2(r) + 2 * (r - 1) / r * bytes_ / bandwidth
            cells.append(
                f"{spent * 1e3:.0f} ms ({seconds / (seconds + spent):.1%})"
                if bytes_ == size
                else f"{spent * 1e3:.0f} ms"
            )
        lines.append(f"| {name} | {bytes_ / 1e6:.1f} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scaling.md").write_text("\n".join(lines) + "\n")
    record = {"exchange": found, "latency": latency, "bandwidth": bandwidth, "update_seconds": seconds, "bytes": size}
    (RESULTS / "scaling.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
