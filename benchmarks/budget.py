"""What is the best use of a budget: proxy and gold against network evaluations, for every method, on both embedded models.

Every method steers by the embedded reward (the proxy) on the same held-out prompts from the same seeds, at the same budgets. Of
each prompt the sample with the highest proxy is taken, as a user would; gold is the exact detector, which nothing optimises.
Samplers (PCN) give their last sample instead. Intervals are 95 % bootstraps over prompts; differences are paired with best of N.
Then proxy and gold against iterations for noise optimisation on the few-step model, with more and less to hold it back: where
gold falls while the proxy rises, the proxy is over-optimised.

Each cell is written as soon as it is measured; a run that was stopped goes on where it was.

    python benchmarks/budget.py [--prompts 24] [--only ReNO Auto] [--fresh]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import align
import samplers
from align.results import number
from align.versus import bootstrap
from rewards import CrossEncoder, Reward, Shapes
from rewards.files import whole
from samplers import Auto, BestOfN, Compose, FeynmanKac, Guided, Policy, Steering

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BASE = "BestOfN"
Method = Callable[[Reward], Steering]
# Network evaluations a prompt: 4, 10 and 24 samples of the many-step model, 10, 40 and 120 of the few-step one.
BUDGETS = {"tiny-sd": (160, 400, 960), "tiny-turbo": (40, 160, 480)}
ROUNDS, CLIMBED = 60, 16  # of noise optimisation, and on how many prompts
STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9}


def given(name: str, **arguments) -> Method:
    """A steering by its class's name."""
    return lambda reward: getattr(samplers, name)(reward, **arguments)


def guided(reward: Reward) -> Steering:
    """Twisted Feynman–Kac steering with the gradient of the proxy."""
    return Compose(Guided(reward, 10.0, tempering="linear"), FeynmanKac(reward, 0.1, tempering="linear"))


def methods(model: str) -> dict[str, Method]:
    """The methods that are compared on a model, the baseline first; a new one is a line."""
    found: dict[str, Method] = {
        BASE: BestOfN,
        "Auto": Auto,
        "FeynmanKac": lambda reward: FeynmanKac(reward, 0.1, "max", every=4, start=0.2, stop=0.8),
        "ZeroOrder": given("ZeroOrder", rounds=999),
        "PCN": given("PCN", rounds=999),
    }
    if model == "tiny-turbo":
        return found | {"ReNO": given("ReNO", rounds=999), "DNO": given("DNO", rounds=999)}
    found |= {"guided FK": guided, "SVDD": given("SVDD"), "PathSearch": given("PathSearch")}
    found |= {"TreeSampling": given("TreeSampling", rounds=999, walk="ucb"), "RolloverBudget": given("RolloverBudget")}
    return found | {"DNO": given("DNO", rounds=999)}


def climbs() -> dict[str, Method]:
    """Noise optimisation as published; ReNO without its penalty and ten times its clip, DNO with the penalty it suggests."""
    return {
        "ReNO": given("ReNO", rounds=ROUNDS),
        "ReNO, unregularised": given("ReNO", rounds=ROUNDS, weight=0.0, clip=1.0),
        "DNO": given("DNO", rounds=ROUNDS),
        "DNO, regularised": given("DNO", rounds=ROUNDS, weight=1.0),
        "DNO, ten times as fast": given("DNO", rounds=ROUNDS, rate=0.1),
    }


class Cells:
    """What has been measured, on disk after every cell."""

    def __init__(self, path: Path, options: dict) -> None:
        self.path = path
        held = json.loads(path.read_text()) if path.is_file() else {}
        self.cells = held.get("cells", {}) if held.get("options") == options else {}
        self.options = options

    def measure(self, key: str, make: Callable[..., dict], *how: Any) -> None:
        """Measures a cell unless it is there."""
        if key in self.cells:
            return
        try:
            self.cells[key] = make(*how)
        except (AttributeError, ValueError) as error:  # a method that this model or budget does not allow
            print(f"{key}: {error}")
            return
        print(f"{key}: {' '.join(f'{k} {mean(v):.3f}' for k, v in self.cells[key].items() if k in ('proxy', 'gold'))}")
        text = json.dumps({"options": self.options, "cells": self.cells})
        whole(self.path, lambda path: path.write_text(text + "\n"))


def weights_of(folder: Path) -> str:
    """Tells models apart: what was measured on other weights is measured again."""
    return hashlib.sha256((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:16]


def mean(values) -> float:
    """Of whatever is not missing."""
    return float(torch.tensor(values, dtype=torch.float64).nanmean())


def spend(policy: Policy, prompts: list[str], make: Method, reward: Reward, budget: int, seed: int) -> dict:
    """One method at one budget: proxy and gold of the sample taken, by prompt, and what it cost."""
    began = time.perf_counter()
    result = align.steer(policy, prompts, make(reward), budget=f"{budget * len(prompts)}nfe", plain=False, seed=seed)
    taken = {s.group: s.scores for s in result.best}
    table = {
        name: [taken[g][key] for g in range(len(prompts))] for name, key in (("proxy", reward.name), ("gold", "gold"))
    }
    spent = result.ledger["budget"]["spent"] / len(prompts)
    return {**table, "nfe": spent, "particles": result.config["particles"], "seconds": time.perf_counter() - began}


def climb(policy: Policy, prompts: list[str], make: Method, reward: Reward, seed: int) -> dict:
    """Proxy and gold of every iterate, one chain a prompt: (iterates, prompts) each."""
    proxy, gold, judge = [], [], Shapes()

    def seen(iterate) -> None:
        proxy.append(iterate.rewards.flatten().tolist())
        gold.append(judge(iterate.found.last[2], prompts).tolist())

    how = {"particles": 1, "plain": False, "seed": seed, "seen": seen, "batch": len(prompts), "gold": None}
    align.steer(policy, prompts, make(reward), **how)
    return {"proxy": proxy, "gold": gold}


def table(cells: dict[str, dict]) -> str:
    """Markdown: one line a model, budget and method."""
    heads = ["model", "NFE a prompt", "method", "spent", "proxy", f"− {BASE} (95 %)", "gold", f"− {BASE} (95 %)"]
    lines = [heads, ["---"] * len(heads)]
    for model, budgets in BUDGETS.items():
        for budget in budgets:
            for method in methods(model):
                cell, base = (cells.get(f"{model}|{budget}|{name}") for name in (method, BASE))
                if cell is None or base is None:
                    continue
                line = [model, f"{budget}", method, f"{cell['nfe']:.0f}"]
                for score in ("proxy", "gold"):
                    values, others = (torch.tensor(c[score], dtype=torch.float64) for c in (cell, base))
                    low, high = bootstrap(values - others)
                    gap = f"{float((values - others).mean()):+.3f} [{low:+.3f}, {high:+.3f}]"
                    line += [number(float(values.mean())), "–" if method == BASE else gap]
                lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(cells: dict[str, dict], path: Path) -> None:
    """Proxy and gold against the budget, a row a model."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10.8, 7.0), layout="constrained", sharex="row")
        for (model, budgets), row in zip(BUDGETS.items(), axes, strict=True):
            for i, method in enumerate(methods(model)):
                there = [b for b in budgets if f"{model}|{b}|{method}" in cells]
                if there:
                    draw(row, [cells[f"{model}|{b}|{method}"] for b in there], there, method, i)
            for ax, score in zip(row, ("proxy (optimised)", "gold (not optimised)"), strict=True):
                ax.set(xscale="log", xlabel="network evaluations a prompt", ylabel=score)
                ax.set_xticks(budgets, [str(b) for b in budgets], minor=False)
                ax.minorticks_off()
            row[0].set_title(model, loc="left", fontweight="bold")
            row[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
        figure.savefig(path, dpi=130)
        plt.close(figure)


def draw(row, cells: list[dict], budgets: list[int], method: str, i: int) -> None:
    """One method in both panels of a model, a little beside the others."""
    width = 3.0 if method == "Auto" else 2.4 if method == BASE else 1.1
    colour = {"Auto": "#C04E00", BASE: "black"}.get(method, f"C{i}")
    for ax, score in zip(row, ("proxy", "gold"), strict=True):
        values = [torch.tensor(cell[score], dtype=torch.float64) for cell in cells]
        means = [float(v.mean()) for v in values]
        ends = [bootstrap(v) for v in values]
        low, high = (
            [m - e[0] for m, e in zip(means, ends, strict=True)],
            [e[1] - m for m, e in zip(means, ends, strict=True)],
        )
        x = [b * 1.03 ** (i - 4) for b in budgets]
        ax.errorbar(x, means, yerr=[low, high], label=method, lw=width, elinewidth=0.7, marker="o", ms=3, color=colour)


def plot_climbs(cells: dict[str, dict], path: Path) -> None:
    """Proxy and gold against iterations, with 95 % bands over prompts."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
        for i, name in enumerate(climbs()):
            cell = cells.get(f"climb|{name}")
            for ax, score in zip(axes, ("proxy", "gold"), strict=True):
                if cell is None:
                    continue
                values = torch.tensor(cell[score], dtype=torch.float64)
                ends = torch.tensor([bootstrap(row, 500) for row in values], dtype=torch.float64)
                ax.plot(values.nanmean(1), label=name, color=f"C{i}")
                ax.fill_between(range(len(values)), ends[:, 0], ends[:, 1], alpha=0.12, lw=0, color=f"C{i}")
        for ax, score in zip(axes, ("proxy (optimised)", "gold (not optimised)"), strict=True):
            ax.set(xlabel="iterations", ylabel=score)
        axes[0].set_title(
            "Noise optimisation of tiny-turbo: every iterate, not the best", loc="left", fontweight="bold"
        )
        axes[1].legend()
        figure.savefig(path, dpi=130)
        plt.close(figure)


def last_of(cells: dict[str, dict]) -> str:
    """Markdown: where the climbs began, where gold was highest, and where they ended."""
    lines = [
        ["method", "proxy at first", "gold at first", "highest gold (iterate)", "last proxy", "last gold"],
        ["---"] * 6,
    ]
    for name in climbs():
        if (cell := cells.get(f"climb|{name}")) is not None:
            proxy, gold = (torch.tensor(cell[score], dtype=torch.float64).nanmean(1) for score in ("proxy", "gold"))
            peak = f"{float(gold.max()):.3f} ({int(gold.argmax())})"
            ends = [number(float(values[at])) for at in (0, -1) for values in (proxy, gold)]
            lines.append([name, *ends[:2], peak, *ends[2:]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--models", nargs="*", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--most", type=int, default=10**9, help="the largest budget")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    options = parser.parse_args()
    rows = [json.loads(line) for line in (ROOT / "assets/prompts/heldout.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rows[:: len(rows) // options.prompts]][: options.prompts]
    options.out.mkdir(exist_ok=True)
    path = options.out / "budget.json"
    if options.fresh:
        path.unlink(missing_ok=True)
    models = {model: weights_of(ROOT / "assets" / model) for model in BUDGETS}
    cells, reward = Cells(path, {"prompts": prompts, "seed": options.seed, "models": models}), CrossEncoder()
    for model in reversed(options.models):  # the quick one first
        policy = align.load_policy(ROOT / "assets" / model)
        asked = prompts if policy.few_step else [p for i, p in enumerate(prompts) if i % 3 < 2]  # they take longer
        for budget in (b for b in BUDGETS[model] if b <= options.most):
            for name, make in methods(model).items():
                if not options.only or name in options.only:
                    how = (policy, asked, make, reward, budget, options.seed)
                    cells.measure(f"{model}|{budget}|{name}", spend, *how)
        for name, make in climbs().items() if model == "tiny-turbo" else ():
            if not options.only or name in options.only:
                cells.measure(f"climb|{name}", climb, policy, prompts[:CLIMBED], make, reward, options.seed)
    (options.out / "budget.md").write_text(f"{table(cells.cells)}\n\n{last_of(cells.cells)}\n")
    plot(cells.cells, options.out / "budget.png")
    plot_climbs(cells.cells, options.out / "overoptimisation.png")


if __name__ == "__main__":
    main()
