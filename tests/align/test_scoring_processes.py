"""The command: one process or two, whole or killed and called again, they write the same scores."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet
import pytest

from tests.align import pictures

ROOT = Path(__file__).resolve().parents[2]
COUNT = 200


def command(source, out, diary, *, processes=1, pause=0.0) -> subprocess.Popen:
    launcher = []
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # --multi_gpu starts both processes; they run on the CPU, over gloo, because the rewards do
        launcher = ["accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}", "--num_machines=1"]
        launcher += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}", "-m"]
    options = ["--reward", "tests.align.pictures.Diary", "--panel+=Brightness", "--device", "cpu", "--out", out]
    options += ["--batch", "4", "--part", "8", "--threads", "1", "--json"]
    argv = [sys.executable, "-m", *launcher, "align.cli", "score", source, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIARY": str(diary), "PAUSE": str(pause)}
    return subprocess.Popen(
        [str(a) for a in argv], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out)


def killed(process: subprocess.Popen, diary: Path, rows: int) -> None:
    """Kills a run and all it started once it has scored some rows."""
    while len(diary.read_text().split()) < rows and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1][-2000:]
    family = psutil.Process(process.pid)
    for one in (family, *family.children(recursive=True)):  # the launcher's children have sessions of their own
        one.kill()
    process.communicate()


def scores(out: Path) -> list[dict]:
    return pyarrow.parquet.read_table(out / "scores").to_pylist()


@pytest.mark.slow
def test_two_processes_killed_and_called_again_write_what_one_writes(tmp_path):
    source = pictures.folder(tmp_path / "in", COUNT)
    (source / "0100.png").write_bytes(b"no image")
    diary = tmp_path / "diary"
    diary.touch()
    one = finished(command(source, tmp_path / "one", diary))
    diary.write_text("")
    killed(command(source, tmp_path / "two", diary, processes=2, pause=0.1), diary, 60)
    done = {r["prompt"] for r in scores(tmp_path / "two")}
    assert 0 < len(done) < COUNT
    diary.write_text("")
    two = finished(command(source, tmp_path / "two", diary, processes=2))
    again = diary.read_text().split()
    assert scores(tmp_path / "two")[50]["error"] == scores(tmp_path / "one")[50]["error"] is not None
    for ours, theirs in zip(scores(tmp_path / "two"), scores(tmp_path / "one"), strict=True):
        assert str(ours) == str(theirs)  # NaN and all
    assert (one["rows"], one["scored"], one["errors"]) == (COUNT, COUNT, 1)
    assert (two["rows"], two["scored"], two["errors"]) == (COUNT, COUNT - len(done), 1)
    assert len(again) == len(set(again))
    assert not done & {f"picture {level}" for level in again}
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert (manifest["done"], manifest["processes"], manifest["complete"]) == ([[0, COUNT]], 2, True)
