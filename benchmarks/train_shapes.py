"""How much reward a method buys with reward queries, network evaluations and seconds, at the same distance from the base model.

Each method of configs/tiny listed below trains the embedded model by the embedded reward, and is judged on held-out prompts (fixed
seeds) as it goes. The table reads every curve where its KL to the base first reaches the same value, by linear interpolation; a
method that never gets there is read at its end and marked. Gold and diversity are not optimised by any.

The claim under test: backpropagation needs about 25 times fewer samples than policy gradients (AlignProp, 2310.03739, over DDPO).

    python benchmarks/train_shapes.py [--kl 10] [--seconds 150]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import itertools

import matplotlib.pyplot as plt
import numpy as np

import align
from align.evaluation import paired_gain

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
METHODS = ("alignprop", "draft-1", "refl", "ddpo", "grpo", "d3po", "online-dpo", "rwr")
GRADIENT = ("alignprop", "draft-1", "refl")
COLOURS = dict(
    zip(METHODS, ("#1f5fa8", "#56a0d8", "#0b3954", "#b3261e", "#e6a100", "#2a7d2a", "#8bc34a", "#8e44ad"), strict=True)
)
COSTS = {"reward": "reward queries", "network": "network evaluations", "seconds": "seconds"}
SAMPLES, POINTS = 2, 8


def run(method: str, folder: Path, prompts: int) -> list[dict[str, float]]:
    """Trains one configuration; one point an evaluation."""
    rows = (ROOT / "assets" / "prompts" / "heldout.jsonl").read_text().splitlines()
    texts = [json.loads(row)["prompt"] for row in rows[:: max(1, len(rows) // prompts)]][:prompts]
    config = ROOT / "configs" / "tiny" / f"{method}.yaml"
    updates = align.TrainConfig.updates
    for line in config.read_text().splitlines():
        if line.startswith("updates:"):
            updates = int(line.split(":")[1])
    every = max(1, updates // POINTS)
    how = {"eval_prompts": texts, "eval_samples": SAMPLES, "eval_every": every, "save_every": 10**6, "tracker": None}
    result = align.train(config, out=str(folder), **how)
    first, spent, points = result.evaluations[0][1], {"reward": 0.0, "network": 0.0, "seconds": 0.0}, []
    for update, evaluation in result.evaluations:
        if update:
            row = result.log[update - 1]
            spent = {"reward": row["reward_calls"], "network": row["network_calls"]}
            spent["seconds"] = sum(r["seconds"] for r in result.log[:update])
        gain, error = paired_gain(first.scores["gold"], evaluation.scores["gold"], SAMPLES)
        point = {
            "update": update,
            **spent,
            "proxy": evaluation.means()["CrossEncoder"],
            "gold": evaluation.means()["gold"],
        }
        points.append(
            {**point, "gold_gain": gain, "gold_error": error, "kl": evaluation.kl, "diversity": evaluation.diversity}
        )
    return points


def at_kl(points: list[dict[str, float]], kl: float) -> tuple[dict[str, float], bool]:
    """The point of a curve where its KL first reaches a value, and whether it ever does."""
    for before, after in itertools.pairwise(points):
        if after["kl"] >= kl:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return {k: before[k] + share * (after[k] - before[k]) for k in after}, True
    return points[-1], False


def table(curves: dict[str, list[dict[str, float]]], kl: float) -> str:
    """Markdown, at matched KL."""
    head = [
        "method",
        "KL",
        "proxy",
        "gold",
        "gold − base",
        "diversity",
        "reward queries",
        "network evaluations",
        "seconds",
    ]
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join(["---"] * len(head)) + " |"]
    base = curves[METHODS[0]][0]
    lines.append(f"| base | 0 | {base['proxy']:.3f} | {base['gold']:.3f} | – | {base['diversity']:.3f} | 0 | 0 | 0 |")
    for method, points in curves.items():
        p, reached = at_kl(points, kl)
        cells = [method, f"{p['kl']:.1f}{'' if reached else ' (end)'}", f"{p['proxy']:.3f}", f"{p['gold']:.3f}"]
        cells += [f"{p['gold_gain']:+.3f} ± {p['gold_error']:.3f}", f"{p['diversity']:.3f}"]
        lines.append(
            "| " + " | ".join([*cells, f"{p['reward']:.0f}", f"{p['network']:.0f}", f"{p['seconds']:.0f}"]) + " |"
        )
    return "\n".join(lines)


def claim(curves: dict[str, list[dict[str, float]]], reference: str = "ddpo") -> list[str]:
    """Queries each method needs for the proxy gain that the reference ends with."""
    base = curves[reference][0]["proxy"]
    target = max(p["proxy"] for p in curves[reference])
    most = next(p for p in curves[reference] if p["proxy"] == target)
    lines = [
        f"For the proxy gain that {reference} reaches (+{target - base:.3f}, {most['reward']:.0f} reward queries):"
    ]
    for method in GRADIENT:
        for before, after in zip(curves[method], curves[method][1:], strict=False):
            if after["proxy"] >= target:
                share = (target - before["proxy"]) / (after["proxy"] - before["proxy"])
                spent = {c: before[c] + share * (after[c] - before[c]) for c in COSTS}
                ratios = ", ".join(f"{most[c] / max(spent[c], 1e-9):.1f} × fewer {name}" for c, name in COSTS.items())
                lines.append(f"  {method}: {spent['reward']:.0f} queries: {ratios}")
                break
        else:
            lines.append(f"  {method}: does not reach it")
    return lines


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Proxy and gold against each cost, and against KL."""
    panels = {**COSTS, "kl": "KL to the base (nats)"}
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.4), layout="constrained", sharey="row")
    for column, (cost, label) in enumerate(panels.items()):
        for row, score in enumerate(("proxy", "gold")):
            axis = axes[row, column]
            for method, points in curves.items():
                x, y = [p[cost] for p in points], [p[score] for p in points]
                axis.plot(x, y, color=COLOURS[method], marker="o", markersize=3, label=method)
            if cost != "seconds":
                axis.set_xscale("symlog", linthresh=1 if cost == "kl" else 100)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel(label if row else "")
    axes[0, 0].set_ylabel("proxy (optimised)")
    axes[1, 0].set_ylabel("gold (not optimised)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kl", type=float, default=10.0, help="the distance at which methods are compared, in nats")
    parser.add_argument("--prompts", type=int, default=60, help="held-out prompts")
    parser.add_argument("--only", nargs="*", help="methods to run again; the others are read from the results")
    options = parser.parse_args()
    path = RESULTS / "train_shapes.json"
    curves = json.loads(path.read_text())["curves"] if options.only is not None and path.is_file() else {}
    for method in METHODS:
        if options.only is None or method in options.only:
            folder = Path(tempfile.mkdtemp())
            curves[method] = run(method, folder / "run", options.prompts)
            shutil.rmtree(folder)
            print(method, json.dumps(curves[method][-1]), flush=True)
    curves = {method: curves[method] for method in METHODS if method in curves}
    means = {m: [{k: float(np.round(v, 5)) for k, v in p.items()} for p in points] for m, points in curves.items()}
    text = table(curves, options.kl) + "\n\n" + "\n".join(claim(curves)) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"options": vars(options), "curves": means}) + "\n")
    path.with_suffix(".md").write_text(text)
    plot(curves, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
