"""`align.train`: from a configuration to a trained adapter."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoints, sharding
from .config import FREE_TO_CHANGE, NAMES, TrainConfig
from .description import describe, differences
from .loading import load_policy
from .parsing import LOADING
from .reports import TrainResult
from .trainer import Trainer
from .world import World

if TYPE_CHECKING:
    from jsonargparse import Namespace

__all__ = ["make_trainer", "read_yaml", "train"]


def train(config: str | Path | Mapping[str, Any], **overrides: Any) -> TrainResult:
    """Trains a policy.

    Args:
        config: a YAML file, or a mapping with the same keys: `model`, `reward`, `objective`, `source` and the fields of
            `TrainConfig`. Components are a class name, or {"class_path": …, "init_args": {…}}.
        overrides: keys that replace those of `config`; `resume=folder` continues a run.

    Returns:
        The result; `result.folder` holds the adapter, curves, samples and a model card.

    Raises:
        ValueError: keys or values that cannot work, before any work; an unknown key is answered with the nearest valid one.
        FileExistsError: the folder holds another run.
    """
    from .commands.train import parser as train_parser

    parser = train_parser()
    parser.exit_on_error = False
    if not isinstance(config, Mapping):
        if not Path(config).is_file():
            raise FileNotFoundError(f"no configuration file {config}")
        config = read_yaml(Path(config))
    given = {**config, **overrides}
    try:
        return make_trainer(parser, lambda defaults: parser.parse_object(given, defaults=defaults)).fit()
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error


def make_trainer(parser: Any, parse: Callable[[bool], Namespace]) -> Trainer:
    """The trainer that parsed options describe.

    Args:
        parse: the options, with the defaults of all that was not said, or without.
    """
    said = {k for k in parse(False).as_dict() if k not in ("config", "resume")}
    options = parse(True)
    if options.get("resume"):
        return _resumed(parser, options, said)
    if missing := [name for name in ("objective", "source") if options.get(name) is None]:
        raise ValueError(
            f"{' and '.join(missing)} must be given: take a file of configs/tiny or configs/train to start from"
        )
    World(cpu=options.device == "cpu")  # chooses this process's device before anything is loaded
    built = parser.instantiate(options)
    config = TrainConfig(**{name: built[name] for name in NAMES})
    how: dict[str, Any] = {name: options[name] for name in ("device", "dtype", *LOADING)}
    how["waiting"] = sharding.asked()
    policy = load_policy(options.model, lora=options.adapter, student=options.student, **how)
    return Trainer(policy, built.objective.bind(built.reward), built.source.bind(built.reward), config)


def _resumed(parser: Any, options: Namespace, said: set[str]) -> Trainer:
    """Continues a run; whatever else is said must be what it was made with, or free to change."""
    folder = checkpoints.latest(Path(options.resume))
    recorded = checkpoints.read_config(folder)["description"]
    if fixed := said - FREE_TO_CHANGE:
        built = parser.instantiate(options)
        wrong = []
        for name in sorted(fixed):
            if name in NAMES:
                wrong += differences(recorded["train"]["init_args"].get(name), describe(built[name]), name)
            elif name in ("objective", "source", "reward"):
                wrong += differences(recorded[name], describe(built[name]), name)
            else:
                wrong += differences(recorded["policy"].get(name), options[name], name)
        if wrong:
            raise ValueError(
                f"{options.resume} was made with another configuration: {'; '.join(wrong)}. Resume without these, or start a "
                "new run in another folder"
            )
    changes = {name: options[name] for name in said & FREE_TO_CHANGE}
    return Trainer.resume(options.resume, **changes)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a configuration file.

    Raises:
        ValueError: it holds something else.
    """
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold keys and values; got {type(loaded).__name__}")
    return loaded
