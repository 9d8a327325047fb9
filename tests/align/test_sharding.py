"""Laws of sharding: two processes that share a network under FSDP make the updates of one process that has all of it.

Networks are float32, so sums over other batches of rows differ by rounding: weights, which learn in steps of 0.01, agree to 1e-5.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import Trainer, checkpoints, load_policy, sharding
from align.loading import _placed
from align.places import Placement
from align.world import World
from samplers.families.gaussian import GaussianPolicy
from tests.align import sharded
from tests.align.runs import MEANS, world_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "accelerate" / "fsdp_8_gpus.yaml"
# a reference and dropped rows; earlier weights; a gradient through the sampler, recomputed or not
NAMES = ["PolicyGradient", "DiffusionNFT", "Backprop"]
ALONE = ["Backprop:none", "Backprop:block", "Backprop:half"]
pytestmark = pytest.mark.usefixtures("plain")


def state(out: Path) -> dict:
    return checkpoints.read(checkpoints.latest(out))[1]


def assert_close(one: dict, other: dict) -> None:
    assert len(one["log"]) == len(other["log"]) == 3
    for who, voice in {**one["voices"], "policy": one["weights"]}.items():
        theirs = other["weights"] if who == "policy" else other["voices"][who]
        torch.testing.assert_close(theirs, voice, rtol=0, atol=1e-5)
    for mine, theirs in zip(one["log"], other["log"], strict=True):
        for name in mine.keys() & {"loss", "grad_norm", "reward", "items"}:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def two(tiny_folder, tmp_path_factory):
    """Runs of two processes under FSDP; one goes on with what a single process began."""
    out = tmp_path_factory.mktemp("sharded")
    sharded.run("PolicyGradient", out / "begun" / "PolicyGradient", tiny_folder, cut=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    how = ["--config_file", CONFIG, "--num_processes", "2", "--main_process_port", port]
    command = [Path(sys.executable).parent / "accelerate", "launch", *how, "-m", "tests.align.launched", "sharded"]
    done = subprocess.run(
        [str(a) for a in (*command, out, tiny_folder, *NAMES, *ALONE)], cwd=ROOT, text=True, timeout=500,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *ALONE[:2]])
def test_processes_that_share_the_network_make_the_updates_of_one(two, tiny_folder, tmp_path, name):
    sharded.run(name, tmp_path / "one", tiny_folder)
    one = state(tmp_path / "one")
    assert max(w.abs().max() for n, w in one["weights"].items() if "lora_B" in n) > 0.01, "it learns"
    assert_close(one, state(two / "whole" / name))


@pytest.mark.slow
def test_a_half_precision_base_is_shared_under_a_float32_adapter(two, tiny_folder, tmp_path):
    """Half-precision rounding grows from update to update, so only the first is compared."""
    sharded.run("Backprop:half", tmp_path / "one", tiny_folder)
    one, both = state(tmp_path / "one"), state(two / "whole" / "Backprop:half")
    assert {w.dtype for w in both["weights"].values()} == {torch.float32}
    assert both["log"][0]["grad_norm"] == pytest.approx(one["log"][0]["grad_norm"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *ALONE])
def test_each_process_holds_half_of_the_frozen_weights(two, name):
    for rank in range(2):
        found = json.loads((two / f"{name}-{rank}.json").read_text())
        assert found["mine"] < 0.52 * found["all"]


@pytest.mark.slow
def test_processes_with_fewer_micro_batches_keep_up(two):
    idle = [json.loads((two / f"PolicyGradient-{rank}.json").read_text())["idle"] for rank in range(2)]
    assert sum(idle) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_process_goes_on_with_what_two_shared(two, tmp_path, name):
    shutil.copytree(two / "cut" / name, tmp_path / "run")
    trainer = Trainer.resume(tmp_path / "run")
    assert trainer.update == 2 and not trainer.policy.sharded
    trainer.fit()
    assert_close(state(two / "whole" / name), state(tmp_path / "run"))


@pytest.mark.slow
def test_two_share_what_one_process_began(two):
    assert_close(state(two / "whole" / "PolicyGradient"), state(two / "begun" / "PolicyGradient"))


@pytest.mark.slow
def test_the_adapter_that_is_written_is_whole(two):
    folder = two / "whole" / "Backprop"
    kept = load_file(checkpoints.latest(folder) / "pytorch_lora_weights.safetensors")
    shapes = sorted(tuple(w.shape) for w in kept.values())
    assert shapes == sorted(tuple(w.shape) for w in state(folder)["weights"].values())


@pytest.fixture
def launched(monkeypatch):
    """What the launcher sets."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_one_process_has_nobody_to_share_with(launched):
    assert sharding.asked()
    launched.setenv("WORLD_SIZE", "1")
    assert not sharding.asked()


def test_all_weights_cannot_be_both_trained_and_shared(launched):
    policy = GaussianPolicy(MEANS, [0.6, 0.8], [0.5, 0.5])
    policy.network.requires_grad_(True)
    with pytest.raises(ValueError, match="set lora, or launch without FSDP"):
        sharding.shard(policy, world_of(0, 2))


@pytest.mark.parametrize(("name", "value", "said"), [
    ("FSDP_VERSION", "1", "FSDP version must be 2; got 1"),
    ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params must be false"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "set memory.checkpointing"),
    ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP", "gather the whole network at once"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(launched, name, value, said):
    launched.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        sharding.shard(GaussianPolicy(MEANS, [0.6, 0.8], [0.5, 0.5]), world_of(0, 2))


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"DeepSpeed is not supported.*fsdp_8_gpus\.yaml"):
        World()


def test_the_network_waits_on_the_cpu_while_the_rest_is_on_the_device(tiny_folder):
    loaded = load_policy(tiny_folder, device="cpu")
    policy = _placed(type(loaded), loaded.pipe, None, Placement(), torch.device("meta"), waiting=True)
    for name, p in policy.named_parameters():
        assert p.device.type == ("cpu" if name.startswith("network.") else "meta"), name
