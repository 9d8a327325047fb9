"""`kilter train-value`: learn to foretell a reward at noisy states, for steering without decoder."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Optional

from jsonargparse import SUPPRESS, ActionConfigFile, Namespace

from rewards import Reward
from samplers import Kernel

from ..loading import EMBEDDED
from ..parsing import LOADING, Parser, add_loading
from ..results import number
from ..values import ValueConfig, train_value

HELP = "learn to foretell a reward at noisy states"


def parser() -> Parser:
    """The command's options."""
    options = Parser(description="Learn what the reward of a sample will be, judged at its noisy states.")
    options.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    options.add_argument(
        "prompts", nargs="*", type=str, default=SUPPRESS, help="prompts to sample, or .txt / .jsonl files of prompts"
    )
    options.add_argument("--model", type=str, default=str(EMBEDDED), help="folder or hub id of a diffusers pipeline")
    options.add_argument("--lora", type=Optional[str], help="LoRA weights: folder, file or hub id")
    options.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …")
    options.add_argument("--dtype", type=Optional[Literal["float32", "float16", "bfloat16"]], help="of the networks")
    add_loading(options)
    options.add_argument("--reward", type=Optional[Reward], help="what to foretell")
    options.add_argument(
        "--preferences",
        type=Optional[str],
        help="pairs of images to learn from instead of a reward, as train-reward takes them",
    )
    options.add_class_arguments(ValueConfig)
    options.add_argument("--kernel", type=Optional[Kernel], help="noise rule of a step; the model's own by default")
    options.add_argument("--steps", type=Optional[int], help="denoising steps; the model's own by default")
    options.add_argument(
        "--guidance", type=Optional[float], help="classifier-free guidance; the model's own by default"
    )
    options.add_argument("--size", type=Optional[tuple[int, int]], help="[height, width] in pixels")
    options.add_argument(
        "--out", type=Optional[str], help="folder; the next free runs/NNN by default. Cut off, it goes on"
    )
    options.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    options.add_argument("--json", action="store_true", help="print report.json on standard output")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    from .. import load_policy

    built = parser.instantiate(parsed)["train-value"]
    config = ValueConfig(**{f.name: built[f.name] for f in fields(ValueConfig)})
    how = {name: options[name] for name in ("lora", "device", "dtype", *LOADING)}
    policy = load_policy(options.model, **how)
    learned = train_value(
        policy,
        built.reward,
        prompts=options.get("prompts", []),
        preferences=options.preferences,
        config=config,
        kernel=built.kernel,
        steps=options.steps,
        guidance=options.guidance,
        size=options.size,
        out=options.out,
        overwrite=options.overwrite,
        progress=True,
    )
    _summary(learned.report, learned.folder)
    if options.json:
        print((learned.folder / "report.json").read_text())
    return 0


def _summary(report: Mapping[str, Any], folder: Path) -> None:
    """What a user wants to know at a glance, on standard error: how much is foretold, at a few levels from noise to data."""
    columns = {"noise": "noise", "value_within": "value", "estimate_within": "estimate", "accuracy": "pairs"}
    told = {name: column for column, name in columns.items() if column in report}
    print(" ".join(f"{name:>9}" for name in told), file=sys.stderr)
    known = [i for i, v in enumerate(report.get("estimate", report["noise"])) if not math.isnan(v)]
    for i in known or range(len(report["noise"])):
        print(" ".join(number(report[column][i], 9, 2) for column in told.values()), file=sys.stderr)
    if report["unjudged"]:
        print(f"{report['unjudged']} samples could not be judged: they were left out", file=sys.stderr)
    print(
        "value, estimate: correlation with the reward within held-out prompts; pairs: how often the better is foretold\n"
        f"wrote {folder}: kilter steer --steering FeynmanKac --steering.value LatentValue --steering.value.model {folder}",
        file=sys.stderr,
    )
