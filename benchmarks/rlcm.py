"""Is reinforcement faster on a consistency model? RLCM on tiny-turbo against DDPO on tiny-sd, side by side.

Both learn compressibility, the first task of both papers, as configs/tiny/rlcm.yaml and configs/tiny/ddpo.yaml say but for the
reward and the number of updates: the pictures of the two models are alike, so both begin at nearly the same value, and what it
costs to reach another can be compared. Both take equally many samples an update and are judged as they go, from the same seeds,
on every fourth held-out prompt; one seed each. Gold shows what compression does to the pictures.

The published comparison is of 8 steps with 50. Here it is of 2 with 4: DDPO's configuration takes four guidance-free steps
where tiny-sd's own are twenty with guidance, which would make it more than ten times as costly.

    python benchmarks/rlcm.py [--only rlcm]     # the other is read from the results

Seconds are those of one CPU thread in the updates, evaluations left out: a busy machine does not lengthen them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import yaml
from train_shapes import COSTS, HELDOUT, RESULTS, ROOT, Curve, cost_of

from align.commands.train import parser as train_parser
from align.evaluation import paired_gain
from align.training import make_trainer

ARMS = {"rlcm": "RLCM on tiny-turbo", "ddpo": "DDPO on tiny-sd"}
COLOURS = {"rlcm": "#1f5fa8", "ddpo": "#b3261e"}
SAMPLES, UPDATES, POINTS, SHARE = 2, 32, 8, 0.95


def run(name: str, folder: Path) -> Curve:
    """Trains a configuration; one point an evaluation."""
    given = yaml.safe_load((ROOT / "configs" / "tiny" / f"{name}.yaml").read_text())
    judged = [json.loads(line)["prompt"] for line in HELDOUT.read_text().splitlines()][::4]
    given |= {"reward": "JPEGSize", "out": str(folder), "updates": UPDATES, "eval_every": UPDATES // POINTS}
    given |= {"eval_prompts": judged, "eval_samples": SAMPLES, "tracker": None, "save_every": 10**6}
    options = train_parser()
    trainer = make_trainer(options, lambda defaults: options.parse_object(given, defaults=defaults))
    seconds, update = [0.0], trainer._one_update

    def timed() -> None:
        began = time.process_time()
        update()
        seconds.append(seconds[-1] + time.process_time() - began)

    trainer._one_update = timed
    result = trainer.fit()
    first, points = result.evaluations[0][1], []
    for done, evaluation in result.evaluations:
        row = result.log[done - 1] if done else {}
        spent = {cost: row.get(f"{cost}_calls", 0.0) for cost in ("reward", "network")}
        point = {"update": done, "seconds": seconds[done], **spent}
        for column, short in (("JPEGSize", "proxy"), ("gold", "gold")):
            gain, error = paired_gain(first.scores[column], evaluation.scores[column], SAMPLES)
            mean = float(evaluation.scores[column].nanmean())
            point |= {short: mean, f"{short}_gain": gain, f"{short}_error": error}
        points.append({**point, "kl": evaluation.kl, "diversity": evaluation.diversity})
    return points


def table(curves: dict[str, Curve]) -> str:
    """Markdown: both arms before and after."""
    head = ["", "updates", "seconds", "reward queries", "network evaluations", "reward", "gold", "gold gain ± s.e."]
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for name, points in curves.items():
        first, last = points[0], points[-1]
        cells = [ARMS[name], *(f"{last[c]:.0f}" for c in ("update", "seconds", "reward", "network"))]
        cells += [f"{first[s]:.3f} → {last[s]:.3f}" for s in ("proxy", "gold")]
        cells.append(f"{last['gold_gain']:+.3f} ± {last['gold_error']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(curves: dict[str, Curve]) -> list[str]:
    """What each arm needs to reach one reward, and for one gain: nearly all of what the lesser arm reaches."""
    value = min(max(p["proxy"] for p in points) for points in curves.values())
    begins = {name: points[0]["proxy"] for name, points in curves.items()}
    gain = SHARE * min(max(p["proxy"] for p in points) - begins[name] for name, points in curves.items())
    lines = []
    for what, wanted in (
        (f"To a reward of {value:.3f} kB", dict.fromkeys(curves, value)),
        (f"For a gain of {gain:.3f} kB", {name: start + gain for name, start in begins.items()}),
    ):
        lines.append(f"{what}:")
        for name, points in curves.items():
            if begins[name] >= wanted[name]:
                lines.append(f"  {ARMS[name]}: begins above it, at {begins[name]:.3f}")
            elif (spent := cost_of(points, wanted[name])) is None:
                lines.append(f"  {ARMS[name]}: does not reach it")
            else:
                parts = ", ".join(f"{spent[cost]:.0f} {label}" for cost, label in COSTS.items())
                lines.append(f"  {ARMS[name]}: {parts}")
    return lines


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Reward and gold against seconds and reward queries."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharey="row", sharex="col")
    for row, score in enumerate(("proxy", "gold")):
        for column, cost in enumerate(("seconds", "reward")):
            axis = axes[row, column]
            for name, points in curves.items():
                y = [p[score] for p in points]
                bars = [p[f"{score}_error"] for p in points]
                x = [p[cost] for p in points]
                axis.errorbar(x, y, bars, color=COLOURS[name], marker="o", markersize=3, capsize=2, label=ARMS[name])
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[row, 0].set_ylabel({"proxy": "minus the size, kB (optimised)", "gold": "gold (not optimised)"}[score])
    axes[1, 0].set_xlabel("seconds of one CPU thread")
    axes[1, 1].set_xlabel(COSTS["reward"])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(ARMS), help="arms to run again")
    wanted = parser.parse_args().only
    path = RESULTS / "rlcm.json"
    for name in ARMS if wanted is None else wanted:
        with tempfile.TemporaryDirectory() as folder:
            points = run(name, Path(folder) / "run")
        known = json.loads(path.read_text()) if path.is_file() else {}
        known[name] = [{k: round(v, 5) for k, v in p.items()} for p in points]
        path.write_text(json.dumps(known) + "\n")
        print(table({name: points}).splitlines()[-1], flush=True)
    known = json.loads(path.read_text())
    curves = {name: known[name] for name in ARMS if name in known}
    text = table(curves) + "\n" + ("\n" + "\n".join(costs(curves)) + "\n" if len(curves) == len(ARMS) else "")
    print(text)
    path.with_suffix(".md").write_text(text)
    plot(curves, path.with_suffix(".png"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
