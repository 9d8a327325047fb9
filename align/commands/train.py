"""`kilter train`: change a model's weights by a reward or by preferences."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Literal, Optional

from jsonargparse import ActionConfigFile

from rewards import Reward

from .. import feedback  # noqa: F401 (its sources can be named)
from ..config import TrainConfig
from ..loading import EMBEDDED, Student
from ..objectives import Objective
from ..parsing import FAILED, INTERRUPTED, Parser, add_loading
from ..sources import Source

HELP = "change the weights by a reward or by preferences"


def parser() -> Parser:
    """The options of `kilter train`, which are the keys of its YAML files."""
    options = Parser(description="Change a model's weights by a reward, or by preferences.")
    options.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    options.add_argument("--resume", type=Optional[str], help="a run's folder: continue it, with its own configuration")
    options.add_argument("--model", type=str, default=str(EMBEDDED), help="folder or hub id of a diffusers pipeline")
    options.add_argument(
        "--student", type=Optional[Student], help="schedule of a few-step LoRA over a plain checkpoint"
    )
    options.add_argument("--adapter", type=Optional[str], help="LoRA weights to go on from: folder, file or hub id")
    options.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …")
    options.add_argument(
        "--dtype", type=Optional[Literal["float32", "float16", "bfloat16"]], help="of the frozen weights"
    )
    add_loading(options)
    options.add_argument("--reward", type=Optional[Reward], help="what to optimise; data needs none")
    options.add_argument("--objective", type=Objective, help="how a batch becomes a loss")
    options.add_argument("--source", type=Source, help="where batches come from")
    options.add_class_arguments(TrainConfig)
    return options


def run(argv: Sequence[str]) -> int:
    from ..training import make_trainer

    options = parser()
    trainer = make_trainer(options, lambda defaults: options.parse_args(argv, defaults=defaults))
    try:
        result = trainer.fit()
    except Exception as error:
        logging.getLogger("kilter").debug("", exc_info=True)
        print(f"kilter: error: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    if trainer.world.first:
        for name in trainer.evaluator.panel:
            gain, error = result.gain(name)
            known = (
                f"{gain:+.3f} ± {f'{error:.3f}' if error == error else '–'}" if gain == gain else "could not be judged"
            )
            print(f"{name:>16} {known}", file=sys.stderr)
        print(f"wrote {result.folder}", file=sys.stderr)
    if result.stopped is None:
        return 0
    print(f"stopped: {result.stopped}; go on with: kilter train --resume {result.folder}", file=sys.stderr)
    return INTERRUPTED if result.stopped in ("interrupted", "terminated") else FAILED
