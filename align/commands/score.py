"""`kilter score`: score images with a reward."""

from __future__ import annotations

import json
from typing import Optional

from jsonargparse import ActionConfigFile, Namespace

from rewards import Reward

from ..loading import usable
from ..parsing import Parser
from ..prompts import read_prompts

HELP = "score images with a reward"


def parser() -> Parser:
    """The command's options."""
    options = Parser(description="Score image files.")
    options.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    options.add_argument("images", nargs="+", type=str, help="image files")
    options.add_argument(
        "--prompts", nargs="+", type=str, default=[], help="one for all, one an image, or a file of prompts"
    )
    options.add_argument("--reward", type=Reward, default={"class_path": "CrossEncoder"}, help="what to score by")
    options.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …")
    options.add_argument("--batch", type=int, default=32, help="images at a time")
    options.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    from .. import score
    from ..scoring import load_image

    images = [load_image(path) for path in options.images]
    prompts = read_prompts(options.prompts) if options.prompts else []
    built = parser.instantiate(parsed).score
    reward = built.reward.to(usable(options.device)) if options.device else built.reward
    scores = score(reward, images, prompts, batch=options.batch)
    texts = [p.text for p in prompts] * (len(images) if len(prompts) == 1 else 1) or [""] * len(images)
    for i, path in enumerate(options.images):
        row = {"image": path, "prompt": texts[i], reward.name: scores.total[i].item()}
        row |= {name: values[i].item() for name, values in scores.parts.items()}
        if options.json:
            print(json.dumps({k: None if v != v else v for k, v in row.items()}))
        else:
            values = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
            print(f"{path}  {values}  {texts[i]}".rstrip())
    return 0
