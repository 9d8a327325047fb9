"""How much reward every training method buys on the embedded model, at what cost, and whether it is real.

Each training configuration of configs/tiny trains by the embedded reward (or by preferences made with it), for at most three
minutes on two cores (rlcm-reward: two minutes of an H100), and is judged as it goes on all held-out prompts, twice each, from the
same seeds. No method optimises gold or diversity.

    gains       gold and proxy after training against before, paired over prompts; a gain counts beyond three standard errors
    matched     the headline methods where their KL to the base first reaches the same value, by linear interpolation
    claim       backpropagation needs about 25 times fewer samples than policy gradients (AlignProp, 2310.03739, over DDPO)

    python benchmarks/train_shapes.py [--only alignprop ddpo] [--kl 140]     # others are read from the results
    python benchmarks/train_shapes.py --time                                # seconds alone, from a few updates on an idle machine

Seconds are wall-clock seconds of the updates, evaluations left out; where a run shared its machine, `--time` measures them again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import itertools

import matplotlib.pyplot as plt
import torch
import yaml

import align
from align.evaluation import paired_gain

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CONFIGS = {
    path.stem: path
    for path in sorted((ROOT / "configs" / "tiny").glob("*.yaml"))
    if "objective" in (config := yaml.safe_load(path.read_text())) and config.get("reward") != "JPEGSize"  # see rlcm.py
}
HEADLINE = ("alignprop", "draft-1", "refl", "ddpo", "grpo", "d3po", "online-dpo", "rwr")
GRADIENT = ("alignprop", "draft-1", "refl")
COLOURS = ("#1f5fa8", "#56a0d8", "#0b3954", "#b3261e", "#e6a100", "#2a7d2a", "#8bc34a", "#8e44ad")
COSTS = {"reward": "reward queries", "network": "network evaluations", "seconds": "seconds"}
HELDOUT = ROOT / "assets" / "prompts" / "heldout.jsonl"
SAMPLES, POINTS = 2, 3

Curve = list[dict[str, float]]


def run(config: Path, folder: Path) -> Curve:
    """Trains a configuration as it stands; one point an evaluation."""
    updates = yaml.safe_load(config.read_text())["updates"]
    how = {"eval_prompts": [str(HELDOUT)], "eval_samples": SAMPLES, "eval_every": max(1, updates // POINTS)}
    result = align.train(config, out=str(folder), save_every=10**6, tracker=None, **how)
    first, points = result.evaluations[0][1], []
    for update, evaluation in result.evaluations:
        row = result.log[update - 1] if update else {}
        point = {"update": update, "reward": row.get("reward_calls", 0.0), "network": row.get("network_calls", 0.0)}
        point["seconds"] = sum(r["seconds"] for r in result.log[:update])
        for name, short in (("CrossEncoder", "proxy"), ("gold", "gold")):
            scores = evaluation.scores.get(name, torch.full_like(first.scores["gold"], torch.nan))
            before = first.scores.get(name, scores)
            gain, error = paired_gain(before, scores, SAMPLES) if scores.isfinite().any() else (math.nan, math.nan)
            point |= {short: float(scores.nanmean()), f"{short}_gain": gain, f"{short}_error": error}
        points.append({**point, "kl": evaluation.kl, "diversity": evaluation.diversity})
    return points


def update_seconds(config: Path) -> float:
    """Mean seconds of an update, over whole collections, after one that warms up."""
    collection = 4  # at most, in configs/tiny
    with tempfile.TemporaryDirectory() as folder:
        how = {
            "eval_prompts": ["a red circle"],
            "eval_samples": 1,
            "eval_every": 0,
            "tracker": None,
            "updates": 3 * collection,
        }
        log = align.train(config, out=f"{folder}/run", save_every=10**6, **how).log
    return sum(row["seconds"] for row in log[collection:]) / (2 * collection)


def gains(curves: dict[str, Curve]) -> str:
    """Markdown: every configuration, after training against before."""
    head = [
        "configuration",
        "updates",
        "seconds",
        "reward queries",
        "network evaluations",
        "proxy",
        "gold",
        "gold gain ± s.e.",
    ]
    lines = [
        f"| {' | '.join([*head, 'in s.e.', 'KL', 'diversity'])} |",
        "| " + " | ".join(["---"] * (len(head) + 3)) + " |",
    ]
    for method, points in sorted(curves.items(), key=lambda item: -item[1][-1]["gold_gain"]):
        first, last = points[0], points[-1]
        cells = [method, *(f"{last[c]:.0f}" for c in ("update", "seconds", "reward", "network"))]
        cells += [f"{first[s]:.3f} → {last[s]:.3f}" for s in ("proxy", "gold")]
        cells += [
            f"{last['gold_gain']:+.3f} ± {last['gold_error']:.3f}",
            f"{last['gold_gain'] / last['gold_error']:+.1f}",
        ]
        cells += [f"{last['kl']:.0f}", f"{first['diversity']:.3f} → {last['diversity']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def at_kl(points: Curve, kl: float) -> tuple[dict[str, float], bool]:
    """The point of a curve where its KL first reaches a value, and whether it ever does."""
    for before, after in itertools.pairwise(points):
        if after["kl"] >= kl:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return {k: before[k] + share * (after[k] - before[k]) for k in after}, True
    return points[-1], False


def matched(curves: dict[str, Curve], kl: float) -> str:
    """Markdown: the headline methods at one KL."""
    head = [
        "method",
        "KL",
        "proxy",
        "gold",
        "gold gain",
        "diversity",
        "reward queries",
        "network evaluations",
        "seconds",
    ]
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for method in (m for m in HEADLINE if m in curves):
        p, reached = at_kl(curves[method], kl)
        cells = [method, f"{p['kl']:.1f}{'' if reached else ' (end)'}", f"{p['proxy']:.3f}", f"{p['gold']:.3f}"]
        cells += [f"{p['gold_gain']:+.3f} ± {p['gold_error']:.3f}", f"{p['diversity']:.3f}"]
        lines.append(
            "| " + " | ".join([*cells, f"{p['reward']:.0f}", f"{p['network']:.0f}", f"{p['seconds']:.0f}"]) + " |"
        )
    return "\n".join(lines)


def cost_of(points: Curve, proxy: float) -> dict[str, float] | None:
    """What a curve has spent where its proxy first reaches a value, by linear interpolation; None if it never does."""
    for before, after in itertools.pairwise(points):
        if after["proxy"] >= proxy:
            share = (proxy - before["proxy"]) / (after["proxy"] - before["proxy"])
            return {c: before[c] + share * (after[c] - before[c]) for c in COSTS}
    return None


def claim(curves: dict[str, Curve], reference: str = "ddpo", share: float = 0.95) -> list[str]:
    """What each method that uses gradients needs for nearly all of the proxy gain of one that does not."""
    points = curves[reference]
    gain = share * (max(p["proxy"] for p in points) - points[0]["proxy"])
    theirs = cost_of(points, points[0]["proxy"] + gain)
    assert theirs is not None
    lines = [f"For {share:.0%} of the proxy gain of {reference} (+{gain:.3f}, {theirs['reward']:.0f} reward queries):"]
    for method in (m for m in GRADIENT if m in curves):
        mine = cost_of(curves[method], points[0]["proxy"] + gain)
        if mine is None:
            lines.append(f"  {method}: does not reach it")
            continue
        ratios = ", ".join(f"{theirs[c] / mine[c]:.1f} × fewer {name}" for c, name in COSTS.items())
        lines.append(f"  {method}: {mine['reward']:.0f} queries: {ratios}")
    return lines


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Proxy and gold against each cost, and against KL."""
    panels = {**COSTS, "kl": "KL to the base (nats)"}
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.4), layout="constrained", sharey="row")
    for column, (cost, label) in enumerate(panels.items()):
        for row, score in enumerate(("proxy", "gold")):
            axis = axes[row, column]
            for method, colour in zip(HEADLINE, COLOURS, strict=True):
                points = curves.get(method, [])
                x, y = [p[cost] for p in points], [p[score] for p in points]
                axis.plot(x, y, color=colour, marker="o", markersize=3, label=method)
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
    parser.add_argument("--kl", type=float, default=140.0, help="the distance at which methods are compared, in nats")
    parser.add_argument("--only", nargs="*", help="configurations to run again")
    parser.add_argument("--time", action="store_true", help="measure seconds alone")
    options = parser.parse_args()
    path = RESULTS / "train_shapes.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    for method, config in CONFIGS.items():
        wanted = options.only is None or method in options.only
        if options.time and wanted and method in known:
            seconds = update_seconds(config)
            for point in known[method]:
                point["seconds"] = round(seconds * point["update"], 2)
            path.write_text(json.dumps(known) + "\n")
            print(f"{method}: {seconds:.2f} s an update", flush=True)
        elif wanted and not options.time:
            with tempfile.TemporaryDirectory() as folder:
                points = run(config, Path(folder) / "run")
            latest = (
                json.loads(path.read_text()) if path.is_file() else {}
            )  # another process may have written meanwhile
            known = {**latest, method: [{k: round(v, 5) for k, v in p.items()} for p in points]}
            path.write_text(json.dumps(known) + "\n")
            print(gains({method: points}).splitlines()[-1], flush=True)
    curves = {method: known[method] for method in CONFIGS if method in known}
    text = gains(curves) + f"\n\nAt a KL of {options.kl:.0f} nats:\n\n" + matched(curves, options.kl) + "\n"
    if "ddpo" in curves:
        text += "\n" + "\n".join(claim(curves)) + "\n"
    print(text)
    path.with_suffix(".md").write_text(text)
    plot(curves, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
