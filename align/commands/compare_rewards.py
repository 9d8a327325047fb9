"""`kilter compare-rewards`: how far apart rewards are, on the samples of a policy."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Literal, Optional

import torch
from jsonargparse import ActionConfigFile, Namespace

from rewards import Reward
from rewards.files import whole

from ..comparing import Comparison, compare_scores
from ..decoding import FRAMES
from ..loading import best_device, usable
from ..parsing import Parser
from ..prompts import read_prompts
from ..results import number, prepare_folder
from ..tables import Table, read_tables

HELP = "say how far apart rewards are"


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        description="Compare rewards on samples: STARC and EPIC distances, rank correlations, agreement on the best of a prompt."
    )
    options.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    options.add_argument(
        "sources",
        nargs="+",
        type=str,
        help="tables of scores: .jsonl, .parquet, folders of kilter score or kilter steer; with --rewards, what to score",
    )
    options.add_argument(
        "--rewards", type=Optional[list[Reward]], help="score the sources by these, as kilter score does"
    )
    options.add_argument(
        "--prompts", nargs="+", type=str, default=[], help="of sources: one for all, one each, or a file"
    )
    options.add_argument("--scores", nargs="+", type=str, default=[], help="columns of the tables; all by default")
    options.add_argument(
        "--arm", type=Optional[Literal["plain", "steered"]], help="of a steering run; plain by default"
    )
    options.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    options.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options.add_argument("--batch", type=int, default=32, help="rows at a time")
    options.add_argument("--frames", type=int, default=FRAMES, help="of a video, as kilter score takes them")
    options.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …; a GPU if there is one")
    options.add_argument("--out", type=Optional[str], help="folder for comparison.json and comparison.png")
    options.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    options.add_argument("--json", action="store_true", help="print comparison.json on standard output")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    out = None if options.out is None else prepare_folder(options.out, options.overwrite)
    read = (options.sources, options.scores, options.arm)
    table = _scored(parser, parsed, options) if options.rewards else read_tables(*read)
    found = compare_scores(table.scores, table.prompts, resamples=options.resamples, seed=options.seed)
    if out is not None:
        from ..charts import draw_comparison

        whole(out / "comparison.json", lambda file: file.write_text(json.dumps(found.as_dict(), indent=1)))
        draw_comparison(Path(out) / "comparison.png", found)
        print(f"wrote {out}/comparison.json, {out}/comparison.png", file=sys.stderr)
    print(json.dumps(found.as_dict()) if options.json else _table(found))
    return 0


def _scored(parser: Parser, parsed: Namespace, options: Namespace) -> Table:
    """The sources by every reward."""
    from .. import score_rows

    device = usable(options.device or best_device())
    rewards = [reward.to(device) for reward in parser.instantiate(parsed)[parsed.command].rewards]
    prompts = read_prompts(options.prompts) if options.prompts else []
    rows = list(score_rows(rewards, options.sources, prompts=prompts, batch=options.batch, frames=options.frames))
    if bare := [row["image"] or row["id"] for row in rows if row["prompt"] is None]:
        raise ValueError(
            f"{len(bare)} of {len(rows)} samples have no prompt, such as {bare[0]}, and rewards are compared within prompts: "
            "pass --prompts, one for all or one each"
        )
    columns = {name: [row["scores"][name] for row in rows] for name in rows[0]["scores"]}
    scores = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    return Table(tuple(row["prompt"] for row in rows), scores)


def _table(found: Comparison) -> str:
    """One line a pair."""
    pairs = list(combinations(range(len(found.names)), 2))
    names = [f"{found.names[i]} – {found.names[j]}" for i, j in pairs]
    width = max(map(len, names))
    lines = [f"{'':<{width}}  {'distance':>22} {'EPIC':>6} {'Spearman':>9} {'Kendall':>8} {'top-1':>6}"]
    for name, (i, j) in zip(names, pairs, strict=True):
        low, high = found.intervals["distance"][:, i, j].tolist()
        distance, epic, spearman, kendall, top = (float(found.values[m][i, j]) for m in found.values)
        lines.append(
            f"{name:<{width}}  {number(distance, 6)} ({number(low, 5)} … {number(high, 5)}) {number(epic, 6)} "
            f"{number(spearman, 9)} {number(kendall, 8)} {number(top, 6)}"
        )
    left_out = f", {found.left_out} left out" if found.left_out else ""
    lines.append(f"{found.samples} samples of {found.prompts} prompts{left_out}; top-1 by chance {found.chance:.3f}")
    return "\n".join(lines)
