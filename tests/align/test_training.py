"""`align.train` and `kilter train`: one configuration as YAML, mapping or command line; what is refused, and how runs end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from align import train
from align.cli import main
from align.trainer import Trainer
from tests.align.test_cli import kilter
from tests.align.test_resume import final, same

pytestmark = pytest.mark.usefixtures("plain")


@pytest.fixture
def config(tiny_folder, tmp_path):
    """A run of two updates on the random model."""
    return {
        "model": str(tiny_folder), "device": "cpu", "reward": "Brightness", "objective": "Backprop",
        "source": {"class_path": "Prompts", "init_args": {"prompts": ["a cat", "two dogs"]}},
        "updates": 2, "batch": 2, "micro_batch": 1, "steps": 2, "eval_samples": 1, "tracker": None,
        "lora": {"rank": 2}, "out": str(tmp_path / "run"),
    }  # fmt: skip


def line(config: dict) -> list[str]:
    """The same as options."""
    options = []
    for key, value in config.items():
        if isinstance(value, dict) and "class_path" in value:
            options += [f"--{key}", value["class_path"]]
            value = {f"{key}.{k}": v for k, v in value["init_args"].items()}
        else:
            value = {key: value}
        for name, one in value.items():
            options += [f"--{name}", yaml.safe_dump(one, default_flow_style=True).strip().removesuffix("\n...")]
    return options


def test_a_mapping_a_file_and_a_line_are_the_same_run(capsys, config, tmp_path):
    """Keyword arguments override the mapping, options on the line the file."""
    results = [train({**config, "seed": 1}, out=str(tmp_path / "mapping"), seed=5)]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "seed": 5}))
    results.append(train(tmp_path / "c.yaml", out=str(tmp_path / "file")))
    (tmp_path / "d.yaml").write_text(yaml.safe_dump({**config, "seed": 4}))
    code, _, err = kilter(capsys, "train", tmp_path / "d.yaml", "--seed", 5, "--out", tmp_path / "shell")
    assert code == 0, err
    code, _, err = kilter(capsys, "train", *line({**config, "seed": 5, "out": str(tmp_path / "line")}))
    assert code == 0, err
    digests = {final(tmp_path / name)["digest"] for name in ("mapping", "file", "shell", "line")}
    assert digests == {r.digest for r in results} and len(digests) == 1
    assert "Brightness" in err and f"wrote {tmp_path / 'line'}" in err


def test_the_same_in_python(config, tmp_path):
    from align import Lora, TrainConfig, load_policy
    from align.objectives import Backprop
    from align.sources import Prompts
    from rewards import Brightness

    how = {k: config[k] for k in ("updates", "batch", "micro_batch", "steps", "eval_samples", "tracker")}
    own = TrainConfig(**how, lora=Lora(rank=2), out=str(tmp_path / "python"))
    policy = load_policy(config["model"], device="cpu")
    mine = Trainer(policy, Backprop(reward=Brightness()), Prompts(["a cat", "two dogs"]), own)
    assert mine.fit().digest == train(config).digest


WRONG = {
    "key": ({"learning_rat": 1.0}, "Did you mean 'learning_rate'"),
    "class": ({"objective": "Backpropp"}, "Did you mean 'Backprop'"),
    "reward": ({"reward": "Britness"}, "Did you mean 'Brightness'"),
    "argument": ({"objective": {"class_path": "Backprop", "init_args": {"trunkation": "last"}}}, "Did you mean 'truncation'"),
    "source argument": ({"source": {"class_path": "Prompts", "init_args": {"promts": ["a"]}}}, "Did you mean 'prompts'"),
    "value": ({"schedule": "cosin"}, "schedule"),
    "type": ({"updates": "many"}, "updates"),
    "range": ({"objective": {"class_path": "Backprop", "init_args": {"k": 0}}}, "k must be ≥ 1"),
    "lora": ({"lora": {"rnk": 2}}, "Did you mean 'rank'"),
    "memory": ({"memory": {"checkpoint": "step"}}, "Did you mean 'checkpointing'"),
    "kernel": ({"kernel": {"class_path": "DDIM", "init_args": {"etta": 1}}}, "Did you mean 'eta'"),
    "targets": ({"lora": {"rank": 2, "targets": ["to_qq"]}}, "did you mean 'to_q'"),
    "parts": ({"objective": "PolicyGradient"}, "PolicyGradient takes Steps or Noised rows, but Prompts makes Starts"),
    "gradient": ({"reward": "JPEGSize"}, "JPEGSize is not differentiable, and Backprop needs"),
    "modality": ({"reward": {"class_path": "Framewise", "init_args": {"reward": "Brightness"}}}, "scores video"),
    "nothing": ({"source": None}, "source must be given: take a file of configs/tiny"),
    "model": ({"model": "/no/such/model"}, "no folder"),
    "half": ({"lora": None, "dtype": "bfloat16"}, "trainable weights must be float32"),
    "resume": ({"resume": "/no/such/run"}, "holds no run to resume"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_before_any_work(capsys, config, tmp_path, name):
    """As an exception in Python, in one message with exit code 2 on the line; nothing is written."""
    change, said = WRONG[name]
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        train({**config, **change})
    assert said in str(refused.value)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, **change}))
    code, out, err = kilter(capsys, "train", tmp_path / "c.yaml")
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_configuration(tmp_path):
    for content, said in (("a: [", "is not YAML"), ("- a\n", "must hold keys and values; got list")):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(ValueError, match=said):
            train(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError, match="no configuration file"):
        train(tmp_path / "absent.yaml")


def test_a_finished_run_is_not_overwritten_and_goes_on_when_asked(capsys, config, tmp_path):
    whole = train({**config, "out": str(tmp_path / "whole"), "updates": 4, "save_every": 2})
    train({**config, "save_every": 2})
    code, _, err = kilter(capsys, "train", *line(config))
    assert code == 2
    assert f"kilter train --resume {tmp_path / 'run'}" in err
    assert train({}, resume=str(tmp_path / "run"), updates=3).stopped is None
    code, _, err = kilter(capsys, "train", "--resume", tmp_path / "run", "--updates", 4)
    assert code == 0, err
    assert final(tmp_path / "run")["digest"] == whole.digest
    same(final(tmp_path / "run")["weights"], final(tmp_path / "whole")["weights"])


def test_a_resumed_run_refuses_another_configuration(capsys, config, tmp_path):
    """All differences are listed; saying again what it was made with is no difference, nor is what is free to change."""
    train(config)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    code, _, err = kilter(
        capsys, "train", tmp_path / "c.yaml", "--resume", tmp_path / "run", "--updates", 3, "--keep", 1
    )
    assert code == 0, err
    other = ["--learning_rate", 1, "--lora.rank", 4, "--objective.k", 2, "--reward", "Colour", "--model", "elsewhere"]
    code, _, err = kilter(capsys, "train", tmp_path / "c.yaml", "--resume", tmp_path / "run", *other)
    assert code == 2
    for difference in (
        "learning_rate: 0.0003 → 1.0",
        "lora.rank: 2 → 4",
        "objective.k: 1 → 2",
        "Brightness' → ",
        "'elsewhere'",
    ):
        assert difference in err
    assert "batch" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_130(capsys, config, tmp_path, number):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background shell makes its children deaf to it
    log = tmp_path / "run" / "log.jsonl"

    def ask():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.is_file() and log.read_text().count("\n") >= 2):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        code, _, err = kilter(capsys, "train", *line({**config, "updates": 5000, "eval_every": 0}))
    finally:
        asking.join()
        signal.signal(signal.SIGINT, before)
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number]
    assert code == 130, err
    assert f"stopped: {word}; go on with: kilter train --resume {tmp_path / 'run'}" in err
    done = len(log.read_text().splitlines())
    assert (tmp_path / "run" / "checkpoints" / f"{done:06d}").is_dir()
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    assert main(["train", "--resume", str(tmp_path / "run"), "--updates", str(done + 1)]) == 0


def test_a_failure_midway_is_exit_code_1_and_is_saved(capsys, config, tmp_path, monkeypatch):
    step = Trainer._one_update

    def failing(trainer):
        if trainer.update == 1:
            raise RuntimeError("the card is gone")
        step(trainer)

    monkeypatch.setattr(Trainer, "_one_update", failing)
    code, _, err = kilter(capsys, "train", *line(config))
    assert code == 1
    assert "kilter: error: RuntimeError: the card is gone" in err
    assert "Traceback" not in err
    monkeypatch.undo()
    assert kilter(capsys, "train", "--resume", Path(tmp_path / "run"))[0] == 0
