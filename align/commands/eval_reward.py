"""`kilter eval-reward`: how well a reward agrees with what people prefer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Optional

from jsonargparse import ActionConfigFile, Namespace

from rewards import Reward
from rewards.files import whole

from ..loading import best_device, usable
from ..pairs import read_pairs
from ..parsing import Parser
from ..results import number, prepare_folder
from ..verdicts import MEASURES, Verdicts, eval_reward

HELP = "say how well a reward agrees with preferences"


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        description="Accuracy of a reward on pairs that people judged: preference files, Pick-a-Pic, HPD, ImageRewardDB, "
        "VL-RewardBench, GenAI-Bench, MJ-Bench, VideoGen-RewardBench."
    )
    options.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    options.add_argument("pairs", type=str, help=".jsonl, .parquet, .csv, a folder of parquet files or a hub id")
    options.add_argument("--reward", type=Reward, default={"class_path": "CrossEncoder"}, help="what to judge")
    options.add_argument("--group", type=Optional[str], help="a column to count by; the format's own by default")
    options.add_argument("--columns", type=Optional[dict[str, str | list[str]]], help="names of columns of preferences")
    options.add_argument("--split", type=str, default="train", help="of a hub data set")
    options.add_argument("--threshold", type=float, default=0.0, help="differences up to this foretell a tie")
    options.add_argument("--batch", type=int, default=32, help="pictures at a time")
    options.add_argument("--frames", type=int, default=16, help="of a video")
    options.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    options.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    options.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …; a GPU if there is one")
    options.add_argument("--out", type=Optional[str], help="folder for verdicts.json, pairs.jsonl and verdicts.png")
    options.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    options.add_argument("--json", action="store_true", help="print verdicts.json on standard output")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    pairs = read_pairs(options.pairs, group=options.group, columns=options.columns, split=options.split)
    out = None if options.out is None else prepare_folder(options.out, options.overwrite)
    reward = parser.instantiate(parsed)[parsed.command].reward.to(usable(options.device or best_device()))
    how = {name: options[name] for name in ("threshold", "batch", "frames", "resamples", "seed")}
    found = eval_reward(reward, pairs, **how)
    if out is not None:
        from ..charts import draw_verdicts

        whole(out / "verdicts.json", lambda file: file.write_text(json.dumps(found.as_dict(), indent=1)))
        rows = zip(pairs, found.differences.tolist(), strict=True)
        whole(out / "pairs.jsonl", lambda file: file.write_text("".join(_line(pair, d) for pair, d in rows)))
        draw_verdicts(Path(out) / "verdicts.png", found)
        print(f"wrote {out}/verdicts.json, {out}/pairs.jsonl, {out}/verdicts.png", file=sys.stderr)
    print(json.dumps(found.as_dict()) if options.json else _table(found))
    return 0


def _line(pair, difference: float) -> str:
    row = {"prompt": pair.a.prompt.text, "a": pair.a.media.name, "b": pair.b.media.name, "label": pair.label}
    row |= {"group": pair.group, "difference": difference if difference == difference else None}
    return json.dumps(row) + "\n"


def _table(found: Verdicts) -> str:
    """One line a group, and what there is to say about confidence."""
    width = max(map(len, found.values))
    heads = "".join(f"{m.replace('_', ' '):>24}" for m in MEASURES)
    lines = [f"{found.reward}\n{'':<{width}}{heads}  pairs  ties"]
    for name, row in found.values.items():
        cells = ""
        for measure in MEASURES:
            low, high = found.intervals.get(name, {}).get(measure, (float("nan"),) * 2)
            cells += f"{number(row[measure], 8)} ({number(low)} … {number(high)})"
        counts = f"{row['pairs']:7d} {row['ties']:5d}" if "pairs" in row else ""
        lines.append(f"{name:<{width}}{cells}{counts}")
    swap = "" if found.swap is None else f"; both orders agree on {found.swap:.3f}"
    left_out = f"; {found.unjudged} pairs could not be judged" if found.unjudged else ""
    lines.append(
        f"temperature {found.temperature:.4g}, {number(found.nll, digits=4)} nats a pair, calibration error "
        f"{number(found.ece, digits=4)}; ties up to "
        f"{found.threshold:g}, calibrated {found.best_threshold:.4g}; {found.scored} pictures scored{swap}{left_out}"
    )
    return "\n".join(lines)
