"""Laws of resuming: a run that is stopped, extended, moved or killed and then resumed is the run that never was."""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import checkpoints
from align.batches import Batch
from align.config import TrainConfig
from align.objectives import Backprop, PolicyGradient
from align.sources import Rollouts
from align.trainer import Trainer
from samplers.families.gaussian import GaussianPolicy
from tests.align import runs
from tests.align.runs import CASES, Near, stop_at, trainer_of

pytestmark = pytest.mark.usefixtures("plain")
PASSING = {"seconds", "ledger", "network_calls", "reward_calls"}  # the clock, and what was done twice


def same(one, other, at: str = "") -> None:
    """Bitwise equality of nested states."""
    assert type(one) is type(other), at
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one.keys() - PASSING:
            same(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{at}[{i}]")
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{at}: {text}")
    else:
        assert one == other or (one != one and other != other), at


def final(out: Path) -> dict:
    return checkpoints.read(checkpoints.latest(out))[1]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, voices, optimiser, source, histories and the adapter to take."""
    same(final(one), final(other))
    same(load_file(one / "trainable.safetensors"), load_file(other / "trainable.safetensors"))
    for name in ("log.jsonl", "evaluations.jsonl"):
        rows = [[json.loads(line) for line in (out / name).read_text().splitlines()] for out in (one, other)]
        same(*rows, name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """Runs that nothing stopped, by case."""
    known: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp("whole") / "run"
            assert trainer_of(name, known[name], data).fit().stopped is None
        return known[name]

    return of


@pytest.mark.parametrize(
    ("name", "update", "call"), [*((name, 3, 2) for name in CASES), ("PolicyGradient", 4, 1), ("SePPO", 4, 1)]
)
def test_a_stopped_run_goes_on_bit_for_bit(whole, data, tmp_path, name, update, call):
    """After three of the four updates of a collection, between micro-batches; and at the start of another."""
    stopped = stop_at(trainer_of(name, tmp_path / "run", data), update, call).fit()
    assert (stopped.stopped, len(stopped.log)) == ("interrupted", update)
    assert Trainer.resume(tmp_path / "run").fit().stopped is None
    assert_same_run(tmp_path / "run", whole(name))


def test_a_collection_goes_back_to_where_the_policy_is(data, tmp_path, monkeypatch):
    """On a GPU too: a checkpoint is read on the CPU."""
    stop_at(trainer_of("PolicyGradient", tmp_path / "run", data), 2).fit()
    went, restored = [], Batch.restored

    def seen(state, kernel, levels, shape, device="nowhere"):
        went.append(device)
        return restored(state, kernel, levels, shape, "cpu")

    monkeypatch.setattr(Batch, "restored", seen)
    monkeypatch.setattr(GaussianPolicy, "device", torch.device("cpu", 0), raising=False)
    Trainer.resume(tmp_path / "run")
    assert went == [torch.device("cpu", 0)]


@pytest.mark.parametrize("name", ["PolicyGradient-running", "DiffusionNFT", "Backprop", "SePPO"])
def test_k_and_k_updates_are_two_k(data, tmp_path, name):
    how = {"schedule": "constant", "eval_every": 2}
    trainer_of(name, tmp_path / "whole", data, **how, updates=6).fit()
    trainer_of(name, tmp_path / "parts", data, **how, updates=3, save_every=3).fit()
    for updates in (4, 6):
        Trainer.resume(tmp_path / "parts", updates=updates).fit()
    last = [final(tmp_path / part) for part in ("whole", "parts")]
    for state in last:
        state.pop("evaluations")  # the parts were judged at their ends too
    same(*last)


def test_a_run_can_be_stopped_while_it_samples(whole, data, tmp_path):
    trainer = trainer_of("PolicyGradient-running", tmp_path / "run", data)
    seen = []

    def watch(*_):
        seen.extend([0] * (trainer.update == 4))
        if len(seen) == 2:
            trainer.stop.request("interrupted")
        trainer.stop.check()

    trainer.run.watch = watch
    assert trainer.fit().stopped == "interrupted"
    Trainer.resume(tmp_path / "run").fit()
    assert_same_run(tmp_path / "run", whole("PolicyGradient-running"))


@pytest.mark.parametrize("update", [0, 4, 8])
def test_an_evaluation_that_was_cut_off_is_made_up_for(whole, data, tmp_path, update):
    trainer = trainer_of("PolicyGradient", tmp_path / "run", data)
    evaluator = trainer.evaluator

    def cut(*args):
        if trainer.update == update:
            trainer.stop.request("terminated")
        return evaluator(*args)

    cut.samples, cut.prompts, cut.panel = evaluator.samples, evaluator.prompts, evaluator.panel
    trainer.evaluator = cut
    stopped = trainer.fit()
    assert (stopped.stopped, len(stopped.evaluations)) == ("terminated", update // 4)
    Trainer.resume(tmp_path / "run").fit()
    assert_same_run(tmp_path / "run", whole("PolicyGradient"))


def test_a_collection_that_failed_leaves_no_trace(whole, data, tmp_path):
    """DDPO's memory of rewards must not hear of samples that are collected again."""
    trainer = trainer_of("PolicyGradient-running", tmp_path / "run", data, eval_every=0, save_every=100)
    annotate = trainer.objective.annotate

    def failing(policy, batch, seed):
        if trainer.update == 4:
            raise RuntimeError("out of memory")
        return annotate(policy, batch, seed)

    trainer.objective.annotate = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit()
    Trainer.resume(tmp_path / "run").fit()
    same(*(final(out)["source"] for out in (tmp_path / "run", whole("PolicyGradient-running"))))
    same(*(final(out)["weights"] for out in (tmp_path / "run", whole("PolicyGradient-running"))))


def test_a_step_that_broke_off_halfway_is_not_saved(whole, data, tmp_path):
    """Weights moved, but what belongs to the step did not: the last good checkpoint is the newest."""
    trainer = trainer_of("DiffusionNFT", tmp_path / "run", data, save_every=4)
    updated = trainer.objective.updated

    def failing(policy, update):
        if update == 6:
            raise RuntimeError("no more memory")
        updated(policy, update)

    trainer.objective.updated = failing
    with pytest.raises(RuntimeError, match="no more memory"):
        trainer.fit()
    assert checkpoints.latest(tmp_path / "run").name == "000004"
    Trainer.resume(tmp_path / "run").fit()
    assert_same_run(tmp_path / "run", whole("DiffusionNFT"))


def test_going_back_to_an_older_checkpoint_forgets_what_came_after(whole, data, tmp_path):
    out = tmp_path / "run"
    trainer_of("PolicyGradient", out, data, save_every=1, keep=9).fit()
    (out / "checkpoints" / "000008" / "state.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"000008 cannot be read .* resume from an older one"):
        Trainer.resume(out)
    trainer = Trainer.resume(out / "checkpoints" / "000005", save_every=4)
    assert len((out / "log.jsonl").read_text().splitlines()) == 5
    trainer.fit()
    assert [p.name for p in checkpoints.complete(out)][-2:] == ["000005", "000008"]
    assert_same_run(out, whole("PolicyGradient"))


def test_a_checkpoint_saved_elsewhere_is_enough(whole, data, tmp_path):
    trainer = stop_at(trainer_of("PolicyGradient", tmp_path / "first", data), 5)
    trainer.fit()
    trainer.save(tmp_path / "elsewhere" / "mine")
    Trainer.resume(tmp_path / "elsewhere" / "mine", out=str(tmp_path / "second")).fit()
    assert_same_run(tmp_path / "second", whole("PolicyGradient"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="taken is not empty"):
        Trainer.resume(tmp_path / "first", out=str(tmp_path / "taken"))


# What must be the same


def test_another_configuration_is_refused_with_its_fields(data, tmp_path):
    out = tmp_path / "run"
    trainer_of("PolicyGradient", out, data, updates=1).fit()
    with pytest.raises(
        ValueError, match=r"batch, learning_rate cannot change when a run is resumed; free are \['eval_every'"
    ):
        Trainer.resume(out, learning_rate=1.0, batch=3, updates=3)
    with pytest.raises(
        ValueError, match=r"another objective: objective.clip: 0.2 → 0.3; objective.kl_weight: 0.1 → None"
    ):
        Trainer.resume(out, objective=PolicyGradient(clip=0.3))
    with pytest.raises(ValueError, match=r"another objective: objective.class_path: .*PolicyGradient' → .*Backprop'"):
        Trainer.resume(out, objective=Backprop())
    with pytest.raises(ValueError, match=r"another source: source.group: 2 → 4"):
        Trainer.resume(out, source=Rollouts(runs.PROMPTS, group=4, updates=2, epochs=2))
    other = runs.GaussianPolicy([[0.0]])
    other.network.bias = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="trains other weights than this policy"):
        Trainer.resume(out, policy=other)
    assert Trainer.resume(out).fit().stopped is None


def test_other_versions_are_named(data, tmp_path, caplog):
    trainer_of("PolicyGradient", tmp_path / "run", data, updates=1).fit()
    path = checkpoints.latest(tmp_path / "run") / checkpoints.CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "versions": {**config["versions"], "torch": "1.13"}}))
    with caplog.at_level(logging.WARNING, "kilter"):
        Trainer.resume(tmp_path / "run")
    assert "not bit for bit: torch: '1.13' → " in caplog.text


def test_nothing_to_resume(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        Trainer.resume(tmp_path)
    trainer_of("PolicyGradient", tmp_path / "run", data)  # killed before it did anything
    with pytest.raises(FileNotFoundError, match="was cut off before it first saved: start it again"):
        Trainer.resume(tmp_path / "run")
    assert trainer_of("PolicyGradient", tmp_path / "run", data, updates=1).fit().stopped is None
    with pytest.raises(FileExistsError, match=r"is not empty: .* kilter train --resume .*run"):
        trainer_of("PolicyGradient", tmp_path / "run", data)


def test_the_generators_of_a_reward_go_on_too(tmp_path):
    """kilter draws from no global generator, but a reward may."""

    def run(out, **how):
        torch.manual_seed(3)
        config = runs.config_of(out, **how)
        return Trainer(runs.GaussianPolicy(runs.MEANS), PolicyGradient(), Rollouts(runs.PROMPTS, reward=Dice()), config)

    run(tmp_path / "whole").fit()
    stop_at(run(tmp_path / "parts"), 5).fit()
    torch.manual_seed(4)
    Trainer.resume(tmp_path / "parts").fit()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


class Dice(Near):
    """Adds luck to `Near`."""

    def measure(self, media, prompts):
        return super().measure(media, prompts) + torch.rand(len(media))


# Killed


def trained(out: Path, data: Path, name: str, how: dict) -> None:
    torch.set_num_threads(1)
    with (out.parent / f"{out.name}.txt").open("a") as sys.stderr:
        runs.one(name, out, data, how)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PolicyGradient-running", "DiffusionNFT"])
def test_kill_9_at_any_moment(data, tmp_path, name):
    """Twenty real processes are killed at random moments of their lives; whatever is left behind goes on to the same end."""
    processes = multiprocessing.get_context("forkserver")  # a process that has loaded everything starts quickly
    processes.set_forkserver_preload(["tests.align.runs", "accelerate", "peft.tuners.tuners_utils", "tqdm"])
    how = {"updates": 10, "save_every": 1, "keep": 2, "eval_every": 2}

    def start(out: Path):
        process = processes.Process(target=trained, args=(out, data, name, how))
        process.start()
        return process

    def finish(out: Path) -> str:
        process = start(out)
        process.join(120)
        assert process.exitcode == 0
        return final(out)["digest"]

    def wait_for(out: Path, updates: int, process) -> None:
        """Until so many updates are logged: how long a start takes says nothing about where a run is."""
        log = out / "log.jsonl"
        while process.is_alive() and updates > (log.read_bytes().count(b"\n") if log.is_file() else 0):
            time.sleep(0.002)

    finish(tmp_path / "warm")
    began = time.monotonic()
    digest = finish(tmp_path / "whole")
    duration = time.monotonic() - began
    moments = random.Random(0)
    reached = []
    for i in range(20):
        out = tmp_path / f"run-{i}"
        process = start(out)
        wait_for(out, i // 2, process)
        time.sleep(moments.uniform(0, duration / how["updates"]))
        process.kill()
        process.join()
        whole = checkpoints.complete(out)
        for folder in whole:
            checkpoints.read(folder)
        rows = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").is_file() else []
        saved = int(whole[-1].name) if whole else 0
        assert len(rows) <= saved + 1, "a kill loses at most what came after the last save"
        if (out / "trainable.safetensors").exists():
            load_file(out / "trainable.safetensors")
        assert finish(out) == digest
        assert not list(out.rglob(f"{checkpoints.PARTIAL}*"))
        reached.append(saved if whole else -1)
    assert len(set(reached)) > 5, f"the kills should meet runs at many stages; they met {sorted(reached)}"
    assert isinstance(Trainer.resume(tmp_path / "whole").config, TrainConfig)
