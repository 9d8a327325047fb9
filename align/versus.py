"""`align.compare_steerings`: several methods on the same prompts from the same seeds, at one budget.

Of each prompt the sample that a user would take counts: the one its method's reward likes best. Differences are paired: a method's
score minus the first method's, prompt by prompt; intervals are 95 % percentiles of bootstrap samples of the prompts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards import Prompt, Reward
from rewards.files import whole
from samplers import BestOfN, Budget, Policy, Steering

from .pictures import INKS, Block, Tile, is_drawable, resized, sheet, shown, tile_width, to_pil, write_sheet
from .results import Steered, finite, number, versions
from .steering import prepared, steer

__all__ = ["Versus", "bootstrap", "compare_steerings"]

RESAMPLES = 4000
UNSTEERED = "unsteered"
MOST_PROMPTS = 16  # in the picture


def bootstrap(values: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The ends of a 95 % interval for the mean of values, one a prompt; NaN for fewer than two. NaN values are left out."""
    values = values[~values.isnan()].double()
    if len(values) < 2:
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    means = values[torch.randint(len(values), (resamples, len(values)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


@dataclass
class Versus:
    """What every method made of the same budget.

    Attributes:
        runs: by the method's name, in the order given; the first is what others are compared with.
        unsteered: one plain sample a prompt.
        budget: of each method.
        seconds: of each run, everything included.
        config: what was asked for.
    """

    runs: dict[str, Steered]
    unsteered: Steered
    budget: str
    seconds: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def stopped(self) -> str | None:
        """Why a run ended early, or None."""
        return next((f"{name}: {run.stopped}" for name, run in self.runs.items() if run.stopped), None)

    @property
    def interrupted(self) -> bool:
        """Whether it was by Ctrl-C."""
        return any(run.interrupted for run in self.runs.values())

    def scores(self, method: str, score: str) -> Tensor:
        """(P,) of the sample to take, float64; NaN where it was not judged or the run did not get so far."""
        run = self.unsteered if method == UNSTEERED else self.runs[method]
        taken = {s.group: s.scores.get(score) for s in run.best}
        prompts = range(1 + max(s.group for s in self.unsteered.samples))
        return torch.tensor([math.nan if taken.get(g) is None else taken[g] for g in prompts], dtype=torch.float64)

    @property
    def names(self) -> list[str]:
        """The scores there are."""
        return list(dict.fromkeys(name for run in self.runs.values() for s in run.samples for name in s.scores))

    def rows(self) -> list[dict[str, Any]]:
        """One a method: what it spent, and of each score the mean, the difference to the first method's and its interval."""
        baseline, rows = next(iter(self.runs)), []
        for method in (UNSTEERED, *self.runs):
            row: dict[str, Any] = {"method": method}
            if method != UNSTEERED:
                ledger = self.runs[method].ledger["arms"]["steered"]
                row |= {
                    "particles": self.runs[method].config["particles"],
                    "spent": self.runs[method].ledger["budget"]["spent"],
                }
                row |= {"nfe": ledger["network_evaluations"] + 2 * ledger["gradients"], "seconds": self.seconds[method]}
            for score in self.names:
                values = self.scores(method, score)
                row[score] = {"mean": float(values.nanmean())}
                if method != baseline:
                    gap = values - self.scores(baseline, score)
                    row[score] |= {"difference": float(gap.nanmean()), "interval": list(bootstrap(gap))}
            rows.append(row)
        return rows

    def table(self) -> str:
        """The rows as Markdown."""
        first = next(iter(self.runs))
        heads = ["method", "particles", "NFE", "seconds"]
        heads += [head for name in self.names for head in (name, f"− {first} (95 %)")]
        lines = [heads, ["---"] * len(heads)]
        for row in self.rows():
            line = [row["method"], *(f"{row[key]:.6g}" if key in row else "–" for key in ("particles", "nfe"))]
            line.append(f"{row['seconds']:.1f}" if "seconds" in row else "–")
            for name in self.names:
                cell = row[name]
                line.append(number(cell["mean"]))
                line.append("–" if "difference" not in cell else _gap(cell["difference"], *cell["interval"]))
            lines.append(line)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def as_dict(self) -> dict[str, Any]:
        """What `result.json` holds."""
        runs = {name: run.as_dict() for name, run in {UNSTEERED: self.unsteered, **self.runs}.items()}
        samples = [{**s, "method": name, "image": None} for name, run in runs.items() for s in run["samples"]]
        for sample in samples:
            sample["image"] = self._file(sample["method"], sample["group"]) if sample["best"] else None
        told = {
            name: {k: run[k] for k in ("config", "ledger", "groups", "failures", "stopped")}
            for name, run in runs.items()
        }
        result = {"config": self.config, "versions": versions(), "budget": self.budget, "table": self.rows()}
        return finite({**result, "methods": told, "samples": samples})

    @staticmethod
    def _file(method: str, group: int) -> str:
        return f"images/{group:05d}-{method}.png"

    def save(self, folder: str | Path) -> Path:
        """Writes the samples to take, `result.json`, `comparison.md` and `grid.png`."""
        folder = Path(folder)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for method, run in {UNSTEERED: self.unsteered, **self.runs}.items():
            for s in run.best:
                if is_drawable(s.pixels[None]):
                    to_pil(s.pixels).save(folder / self._file(method, s.group))
        text, table = json.dumps(self.as_dict(), indent=1), self.table()
        whole(folder / "result.json", lambda path: path.write_text(text))
        whole(folder / "comparison.md", lambda path: path.write_text(f"{table}\n"))
        if is_drawable(self.unsteered.samples[0].pixels[None]):
            write_sheet(*self.grid(), folder / "grid.png")
        return folder

    def grid(self) -> tuple[Any, list[list[list[int]]]]:
        """Prompts by methods: of each the sample to take, and what it scored; also where the tiles lie."""
        prompts = list({s.group: s.prompt for s in self.unsteered.samples}.items())[:MOST_PROMPTS]
        blocks = []
        for method, run in {UNSTEERED: self.unsteered, **self.runs}.items():
            taken = {s.group: s for s in run.best}
            tiles = [[self._tile(taken[g])] if g in taken else [] for g, _ in prompts]
            blocks.append(Block(tiles, method))
        told = f"the sample to take of each prompt, from the same seeds; a budget of {self.budget} for each method"
        return sheet("Methods at one budget", told, [text for _, text in prompts], blocks)

    @staticmethod
    def _tile(sample: Any) -> Tile:
        inks = {name: INKS["judge" if name == "gold" else "optimised"] for name in sample.scores}
        values = {name: math.nan if value is None else value for name, value in sample.scores.items()}
        image = to_pil(sample.pixels.float().nan_to_num(0.0))
        return Tile(resized(image, tile_width(image.width)), [(n, shown(v), inks[n]) for n, v in values.items()])


def compare_steerings(
    policy: Policy,
    prompts: Sequence[str | Prompt] | str | Prompt,
    steerings: Sequence[Steering] | Mapping[str, Steering],
    *,
    budget: Budget | str,
    rewards: Sequence[Reward] = (),
    **options: Any,
) -> Versus:
    """Steers by several methods at one budget.

    Args:
        steerings: two or more, with their rewards; the first is what others are compared with. Names are their classes'.
        budget: of each method, over all prompts; what `align.steer` takes.
        rewards: more rewards to score by.
        options: as in `align.steer`.

    Returns:
        What each made. An interrupted comparison holds the methods that had begun.

    Raises:
        ValueError: fewer than two methods, or one that cannot run or be paid for; before any of them runs.
    """
    methods = dict(steerings) if isinstance(steerings, Mapping) else _named(steerings)
    if len(methods) < 2:
        raise ValueError(f"a comparison needs two methods or more; got {', '.join(methods) or 'none'}")
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    asked = {k: v for k, v in options.items() if k not in ("progress", "watch", "seen")}
    for name, method in methods.items():
        try:
            run, checked = prepared(policy, prompts, method, rewards=rewards, **asked)
            run.rehearse(budget, checked, options.get("particles"))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    panel = [*{id(r): r for m in methods.values() for r in m.rewards()}.values(), *rewards]
    judge = BestOfN(next(iter(panel), None))
    unsteered = steer(
        policy, prompts, judge, rewards=panel, plain=False, **{**options, "particles": 1, "progress": False}
    )
    result = Versus({}, unsteered, str(budget), config=unsteered.config)
    for name, method in methods.items():
        began = time.perf_counter()
        run = steer(policy, prompts, method, budget=budget, rewards=panel, plain=False, **options)
        result.runs[name], result.seconds[name] = run, time.perf_counter() - began
        if run.interrupted:
            break
    return result


def _named(steerings: Sequence[Steering]) -> dict[str, Steering]:
    """By class; a second one of a class is told apart by a number."""
    named: dict[str, Steering] = {}
    for steering in steerings:
        name, n = type(steering).__name__, 2
        while name in named:
            name, n = f"{type(steering).__name__}-{n}", n + 1
        named[name] = steering
    return named


def _gap(difference: float, low: float, high: float) -> str:
    return number(difference) if math.isnan(low) else f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"
