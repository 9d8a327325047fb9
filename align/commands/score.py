"""`kilter score`: score images, videos or sounds with one reward or several, a few or any number."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any, Literal, Optional

from jsonargparse import ActionConfigFile, Namespace

from rewards import Reward

from ..decoding import FRAMES
from ..loading import best_device, usable
from ..parsing import FAILED, Parser
from ..prompts import read_prompts

HELP = "score images, videos or sounds with rewards"
HOW = (
    "size",
    "frames",
    "columns",
    "split",
    "batch",
    "threads",
)  # options that are arguments of align.score_rows and align.score_set


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        description="Score files, folders, .jsonl, .parquet, .tar shards or hub data sets: images, videos or .wav files, whichever "
        "the rewards look at."
    )
    options.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    options.add_argument("sources", nargs="+", type=str, help="files, folders, .jsonl, .parquet, .tar, or a hub id")
    options.add_argument(
        "--prompts", nargs="+", type=str, default=[], help="one for all, one a file, or a file of prompts"
    )
    options.add_argument("--reward", type=Reward, default={"class_path": "CrossEncoder"}, help="what to score by")
    options.add_argument("--panel", type=Optional[list[Reward]], help="more rewards to score by")
    options.add_argument("--out", type=Optional[str], help="folder for parquet files; called again, a run goes on")
    options.add_argument(
        "--size", type=Optional[tuple[int, int]], help="[height, width] to fit all images or frames to"
    )
    options.add_argument(
        "--frames",
        type=int,
        default=FRAMES,
        help="of a video at most, evenly spread; set the fps of a reward that has it to frames / seconds",
    )
    options.add_argument(
        "--columns",
        type=Optional[dict[str, str | list[str]]],
        help="names of the columns image (or video, audio) and prompt",
    )
    options.add_argument("--split", type=str, default="train", help="of a hub data set")
    options.add_argument("--batch", type=int, default=32, help="rows at a time")
    options.add_argument("--threads", type=Optional[int], help="that decode; one a processor by default")
    options.add_argument("--part", type=Optional[int], help="rows a file in --out; at most 1024 by default")
    options.add_argument(
        "--on_error",
        type=Optional[Literal["nan", "unread", "stop"]],
        help="nan: no score, with the reason; stop; or unread: stop only at what cannot be read (nan with --out, else unread)",
    )
    options.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …; a GPU if there is one")
    options.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    from .. import score_rows, score_set

    if options.out is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes write files: pass --out")
    prompts = read_prompts(options.prompts) if options.prompts else []
    built, device = parser.instantiate(parsed).score, usable(options.device or best_device())
    rewards = [reward.to(device) for reward in (built.reward, *(built.panel or ()))]
    how: dict[str, Any] = {name: options[name] for name in HOW}
    if options.out is None:
        for row in score_rows(rewards, options.sources, prompts=prompts, on_error=options.on_error or "unread", **how):
            _print(row, built.reward.modality, options.json)
        return 0
    files = {"part": options.part, "on_error": options.on_error or "nan", "progress": True}
    scored = score_set(rewards, options.sources, options.out, prompts=prompts, **files, **how)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"scored {scored.scored} of {scored.rows} rows at {scored.rate:.1f} rows/s; {scored.errors} with errors"
            f"{''.join(f', {n} without {name}' for name, n in scored.failed.items())}; wrote {scored.out}"
            f"{f'; the first error: {scored.first_error}' if scored.first_error else ''}",
            file=sys.stderr,
        )
        if options.json:
            print(json.dumps(scored.as_dict()))
    return FAILED if all(scored.failed.get(name) == scored.rows for name in scored.names) else 0


def _print(row: dict[str, Any], media: str, as_json: bool) -> None:
    name, numbers = row[media] or row["id"], row["scores"] | row["parts"]
    if as_json:
        numbers = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        error = {"error": row["error"]} if row["error"] else {}
        print(json.dumps({media: name, "prompt": row["prompt"] or "", **numbers, **error}))
    else:
        values = "  ".join(f"{k} {v:.4f}" for k, v in numbers.items())
        print(f"{name}  {values}  {row['prompt'] or ''}  {row['error'] or ''}".rstrip())
