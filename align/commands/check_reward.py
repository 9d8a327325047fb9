"""`kilter check-reward`: put a reward, one's own included, to the test of the laws that all rewards here obey."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Optional

import torch
from jsonargparse import ActionConfigFile, Namespace
from torch import Tensor

from rewards import Reward

from ..decoding import Decoder, as_float
from ..loading import best_device, usable
from ..media import Media
from ..parsing import FAILED, Parser
from ..prompts import read_prompts

HELP = "check a reward against the laws all rewards obey"
SIGNS = {True: "holds", False: "BROKEN", None: "-"}


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        description="Check a reward: invariances, gradients, errors, cost. Exit code 1 if a law is broken."
    )
    options.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    options.add_argument(
        "--reward", type=Reward, required=True, help="name or dotted path; may stand alone as first word"
    )
    options.add_argument("--images", nargs="+", type=str, default=[], help="image files to try it on")
    options.add_argument("--prompts", nargs="+", type=str, default=[], help="one an image, or a file of prompts")
    options.add_argument("--tolerance", type=float, default=1e-4, help="by which equal scores may differ")
    options.add_argument(
        "--size", type=Optional[float], help="allowed move of enlarged images, in spreads of the scores"
    )
    options.add_argument(
        "--rounding", type=Optional[float], help="allowed move of 8-bit images, in spreads of the scores"
    )
    options.add_argument("--trained", type=bool, default=True, help="whether the weights mean anything")
    options.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …; a GPU if there is one")
    options.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    from rewards.contract import check, example

    if bool(options.images) != bool(options.prompts):
        raise ValueError("give --images and --prompts together: the prompts say what is in the images")
    reward = parser.instantiate(parsed)[parsed.command].reward
    media, prompts = example(reward)
    if options.images:
        media, prompts = _stacked(options.images), read_prompts(options.prompts)
    allowed = {name: options[name] for name in ("tolerance", "size", "rounding", "trained")}
    findings = check(reward, media.to(usable(options.device or best_device())), prompts, **allowed)
    for finding in findings:
        if options.json:
            print(json.dumps(asdict(finding)))
        else:
            print(f"{finding.law:<15} {SIGNS[finding.holds]:<7} {finding.detail}")
    broken = sum(f.holds is False for f in findings)
    print(f"{reward.name}: {sum(f.holds is True for f in findings)} laws hold, {broken} are broken")
    return FAILED if broken else 0


def _stacked(paths: list[str]) -> Tensor:
    """Images of one size: (B, 3, H, W)."""
    images = [as_float(Decoder()(Media(path, Path(path)))) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            sizes = " and ".join("{2} x {1}".format(*i.shape) for i in (images[0], image))
            raise ValueError(f"--images must be of one size; {paths[0]} and {path} are {sizes}")
    return torch.stack(images)
