"""Steering a prompt file with two real processes writes what one process writes, byte for byte."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a cat", "red dog", "two birds", "a fox", "one owl"]


def steer(launcher: list[str], model: Path, prompts: Path, out: Path) -> dict:
    options = ["--model", model, "--reward", "Brightness", "--budget", "40nfe", "--steps", "2", "--batch", "4"]
    command = [
        sys.executable,
        "-m",
        *launcher,
        "align.cli",
        "steer",
        prompts,
        *options,
        "--device",
        "cpu",
        "--out",
        out,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [str(a) for a in command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads((out / "result.json").read_text())


def test_two_processes_write_the_result_of_one(tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # --multi_gpu starts both processes; they run on the CPU, over gloo, because the model does
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "-m"]
    launcher[1:1] = ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    one = steer([], tiny_folder, prompts, tmp_path / "one")
    two = steer(launcher, tiny_folder, prompts, tmp_path / "two")
    assert [s["prompt"] for s in two["samples"][::8]] == [PROMPTS[0], PROMPTS[2], PROMPTS[4]]
    for part in ("samples", "groups", "failures", "stopped"):
        assert one[part] == two[part]
    for spent in ("network_evaluations", "decodes", "reward_calls"):
        assert one["ledger"][spent] == two["ledger"][spent] > 0
    assert one["ledger"]["budget"]["spent"] == two["ledger"]["budget"]["spent"] == 40  # two particles of five prompts
    images = sorted(p.name for p in (tmp_path / "one" / "images").iterdir())
    assert images == sorted(p.name for p in (tmp_path / "two" / "images").iterdir())
    assert all((tmp_path / "one/images" / n).read_bytes() == (tmp_path / "two/images" / n).read_bytes() for n in images)
