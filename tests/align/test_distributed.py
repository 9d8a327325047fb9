"""Laws of several processes: real ones, under `accelerate launch`, make the updates of one.

Sums over two processes round differently from sums over one, so float64 weights agree to 1e-12 and not bitwise, and to 1e-9 where
the gradient passes through a float32 reward; two runs of two processes agree bitwise.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from align import checkpoints, train
from align.trainer import Trainer
from tests.align.runs import trainer_of, world_of
from tests.align.test_resume import same

ROOT = Path(__file__).resolve().parents[2]
# --cpu starts one process whatever --num_processes says; those of --multi_gpu run on the CPU, over gloo, if the model does
LAUNCH = [
    "launch",
    "--multi_gpu",
    "--num_machines=1",
    "--num_processes=2",
    "--mixed_precision=no",
    "--dynamo_backend=no",
]
# statistics of groups, of the whole update, of prompts over time; a reward that follows the run; an earlier policy; a gradient
# through the sampler
SHARING = ["PolicyGradient-running", "PolicyGradient-moving", "Unary", "Weighted-softmax", "DiffusionNFT", "Backprop"]
pytestmark = pytest.mark.usefixtures("plain")


def start(*argv: object, module: str = "tests.align.launched") -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    accelerate = Path(sys.executable).parent / "accelerate"
    command = [accelerate, *LAUNCH, "--main_process_port", port, "-m", module, *argv]
    return subprocess.Popen(
        [str(a) for a in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def state(out: Path) -> dict:
    return checkpoints.read(checkpoints.latest(out))[1]


def assert_close(one: dict, other: dict, name: str) -> None:
    close = 1e-9 if name == "Backprop" else 1e-12
    for who, voice in {**one["voices"], "policy": one["weights"]}.items():
        theirs = other["weights"] if who == "policy" else other["voices"][who]
        torch.testing.assert_close(theirs, voice, rtol=close, atol=close)
    for mine, theirs in zip(one["log"], other["log"], strict=True):
        alike = {"loss", "grad_norm", "reward", "reward_std", "baseline", "weight_squared", "items", "multiplier_home"}
        for name in mine.keys() & alike:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-6), name
    for (_, mine), (_, theirs) in zip(one["evaluations"], other["evaluations"], strict=True):
        torch.testing.assert_close(theirs["scores"], mine["scores"], equal_nan=True)
        assert theirs["kl"] == pytest.approx(mine["kl"], abs=1e-9)
        assert theirs["diversity"] == pytest.approx(mine["diversity"], rel=1e-6)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """Runs of two processes: whole, cut off after three updates, and a copy of the latter gone on with by two."""
    out = tmp_path_factory.mktemp("two")
    process = start("several", out, data, *SHARING)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return out


@pytest.mark.parametrize("name", SHARING)
def test_two_processes_make_the_updates_of_one(two, data, tmp_path, name):
    trainer_of(name, tmp_path / "one", data).fit()
    assert_close(state(tmp_path / "one"), state(two / "whole" / name), name)


@pytest.mark.parametrize("name", SHARING)
def test_two_processes_go_on_bit_for_bit(two, name):
    assert len(state(two / "cut" / name)["log"]) == 3
    same(state(two / "again" / name), state(two / "whole" / name))


@pytest.mark.parametrize("name", SHARING)
def test_one_process_goes_on_with_what_two_began(two, data, tmp_path, name):
    shutil.copytree(two / "cut" / name, tmp_path / "run")
    trainer = Trainer.resume(tmp_path / "run")
    assert (trainer.batch is None) == (name == "Backprop")  # the shares of both are put together
    trainer.fit()
    assert_close(state(two / "whole" / name), state(tmp_path / "run"), name)


def test_each_process_samples_its_share(two):
    config, _, shards = checkpoints.read(checkpoints.latest(two / "cut" / "PolicyGradient-running"))
    assert config["processes"] == len(shards) == 2
    items = torch.cat([shard["batch"]["columns"]["item"] for shard in shards])
    assert items.tolist() == list(range(24))
    first, second = (shard["batch"]["rows"]["latents"] for shard in shards)
    assert len(first) == len(second) == 12
    assert not (first == second).flatten(1).all(1).any()


@pytest.mark.slow
def test_when_one_process_fails_all_end_and_the_last_save_stays(data, tmp_path):
    process = start("breaking", tmp_path / "run", data, "PolicyGradient")
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "this process fails" in output
    assert checkpoints.latest(tmp_path / "run").name == "000004"
    Trainer.resume(tmp_path / "run").fit()
    trainer_of("PolicyGradient", tmp_path / "one", data, save_every=2).fit()
    assert_close(state(tmp_path / "one"), state(tmp_path / "run"), "PolicyGradient")


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_all_save_together(data, tmp_path, number, everyone):
    """A terminal signals the launcher and its processes, and the launcher signals them again; a scheduler may signal it alone."""
    process = start("endless", tmp_path / "run", data, "PolicyGradient")
    log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    (os.killpg if everyone else os.kill)(process.pid, number)
    output = process.communicate(timeout=300)[0]
    saved = checkpoints.latest(tmp_path / "run")
    assert int(saved.name) > 0, output
    assert len(checkpoints.read(saved)[2]) == 2


@pytest.mark.parametrize(("name", "how", "said"), [
    ("PolicyGradient", {"batch": 9}, "9 cannot be divided evenly among 2 processes: choose a multiple of 2"),
    ("PolicyGradient", {"batch": 5}, "5 cannot be divided evenly among 2 processes"),
    ("Backprop", {"batch": 3}, "3 cannot be divided evenly among 2 processes"),
    ("Unary", {"batch": 1}, "1 cannot be divided evenly among 2 processes"),
])  # fmt: skip
def test_a_batch_that_cannot_be_divided_is_refused(data, tmp_path, monkeypatch, name, how, said):
    """Before anything is sampled or written."""
    monkeypatch.setattr("align.trainer.World", lambda cpu: world_of(0, 2))
    with pytest.raises(ValueError, match=said):
        trainer_of(name, tmp_path / "run", data, **how)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Backprop", "PolicyGradient"])
def test_the_command_line_under_accelerate(tiny_folder, tmp_path, name):
    """A LoRA on a random Stable Diffusion, in float32: to 2 % of what it learnt, in absolute numbers 1e-5. A random network
    amplifies the rounding of its batch sizes, so AdamW's ε keeps it from dividing noise by noise."""
    how = {"Backprop": {}, "PolicyGradient": {"clip": 0.2}}[name]  # no ratio at the edge of its clip range
    rolled = {"Backprop": {}, "PolicyGradient": {"group": 2, "updates": 2, "epochs": 2}}[name]
    kind = "Prompts" if name == "Backprop" else "Rollouts"
    config = {
        "model": str(tiny_folder), "device": "cpu", "reward": "Brightness",
        "objective": {"class_path": name, "init_args": how},
        "source": {"class_path": kind, "init_args": {"prompts": ["a cat", "two dogs"], **rolled}},
        "updates": 4, "batch": 4, "micro_batch": 2, "steps": 2, "eval_samples": 1, "tracker": None, "epsilon": 1e-3,
        "learning_rate": 1e-3, "schedule": "linear", "lora": {"rank": 2},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    process = start("train", tmp_path / "c.yaml", "--out", tmp_path / "two", module="align.cli")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    train(config, out=str(tmp_path / "one"))
    one, two = (state(tmp_path / name) for name in ("one", "two"))
    assert checkpoints.read(checkpoints.latest(tmp_path / "two"))[0]["processes"] == 2
    moved = max(float(w.abs().max()) for n, w in one["weights"].items() if "lora_B" in n)  # from 0
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=0.02 * moved)
