"""`kilter train-reward`: learn a reward from preferences, or teach one about more people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional

from jsonargparse import ActionConfigFile, Namespace

from rewards import Reward

from ..learning import FitConfig, Head, Loss, adapt_reward, train_reward
from ..loading import best_device, usable
from ..parsing import Parser

HELP = "learn a reward from preferences"


def parser() -> Parser:
    """The command's options."""
    options = Parser(description="Learn a reward from preferences, or teach one about more people.")
    options.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    options.add_argument(
        "--preferences", type=str, required=True, help=".jsonl, .parquet, a folder of them, or a hub data set"
    )
    options.add_argument(
        "--encoder", type=Reward, default={"class_path": "CrossEncoder"}, help="whose features the head reads"
    )
    options.add_argument("--head", type=Head, default={"class_path": "MLP"}, help="how features become a score")
    options.add_argument(
        "--loss", type=Loss, default={"class_path": "BradleyTerry"}, help="how far scores are from preferences"
    )
    options.add_class_arguments(FitConfig)
    options.add_argument(
        "--heldout", type=Optional[str], help="preferences on other prompts to judge by, when all is decided"
    )
    options.add_argument("--gold", type=Optional[Reward], help="a reward known to be right, for the best-of-n curve")
    options.add_argument(
        "--adapt",
        type=Optional[str],
        help="folder of a learned reward that is to know more people; nothing else is trained",
    )
    options.add_argument(
        "--columns", type=Optional[dict[str, str | list[str]]], help="of parquet; see align/parquet.py"
    )
    options.add_argument(
        "--device", type=Optional[str], help="of the encoder: cpu, cuda, cuda:1, mps, …; a GPU if there is one"
    )
    options.add_argument(
        "--out", type=Optional[str], help="folder; the next free runs/NNN by default. Cut off, it goes on"
    )
    options.add_argument("--cache", type=Optional[str], help="folder that keeps what the encoder sees for other runs")
    options.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    options.add_argument("--json", action="store_true", help="print report.json on standard output")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    how: dict[str, Any] = {"out": options.out, "columns": options.columns, "overwrite": options.overwrite}
    device = usable(options.device) if options.device else best_device()
    if options.adapt:
        folder = adapt_reward(options.adapt, options.preferences, device=str(device), progress=True, **how)
        users = json.loads((folder / "config.json").read_text())["users"]
        print(f"wrote {folder}, which knows {len(users)} people", file=sys.stderr)
        return 0
    built = parser.instantiate(parsed)["train-reward"]
    learned = train_reward(
        options.preferences,
        built.encoder.to(device),
        head=built.head,
        loss=built.loss,
        config=FitConfig(**{f.name: built[f.name] for f in fields(FitConfig)}),
        heldout=options.heldout,
        gold=built.gold and built.gold.to(device),
        cache=options.cache,
        progress=True,
        **how,
    )
    _summary(learned.report, learned.folder)
    if options.json:
        print((learned.folder / "report.json").read_text())
    return 0


def _summary(report: Mapping[str, Any], folder: Path) -> None:
    """What a user wants to know at a glance, on standard error."""
    print(
        f"accuracy {report['accuracy']:.3f} ({report['accuracy_ties_half']:.3f} with ties as half) on {report['pairs']} pairs held "
        f"out, nll {report['nll_calibrated']:.3f}, ece {report['ece_calibrated']:.3f}; epoch {report['kept']} kept\n"
        f"wrote {folder}: kilter steer --reward Learned --reward.model {folder}",
        file=sys.stderr,
    )
