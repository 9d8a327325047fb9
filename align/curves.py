"""The curves of a run: rewards on held-out prompts, the training reward, divergence and diversity against updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.files import whole

from .evaluation import Evaluation, paired_gain
from .pictures import INK, INKS, LINE, SOFT, clipped, font, shown

__all__ = ["draw_curves"]

OTHERS = ("#009E73", "#CC79A7", "#B8860B", "#56B4E9")  # further rewards, after Okabe and Ito
MOST_OTHERS = len(OTHERS)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 8.5,
}


def draw_curves(
    path: Path,
    title: str,
    log: Sequence[Mapping[str, float]],
    evaluations: Sequence[tuple[int, Evaluation]],
    samples: int,
    judge: str,
    optimised: str | None,
    best: int,
) -> None:
    """Draws four panels and writes them, whole or not at all.

    Args:
        samples: a prompt, in each evaluation.
        best: the update whose weights are kept.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):  # pyright: ignore
        figure = Figure(figsize=(10.4, 7.2), dpi=120, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.16, h_pad=0.14, wspace=0.04, hspace=0.04)  # pyright: ignore
        figure.suptitle(clipped(title, font(15, True), 900), x=0.022, ha="left", fontsize=14, fontweight="bold")
        axes = figure.subplots(2, 2)
        _rewards(axes[0, 0], evaluations, samples, judge, optimised, best)
        _training(axes[0, 1], log)
        _line(
            axes[1, 0], "Divergence from the reference", "KL, nats a sample", evaluations, "kl",
            "the sampler has no density",
        )  # fmt: skip
        _line(
            axes[1, 1], "Diversity of a prompt's samples", "distance a pixel", evaluations, "diversity",
            "needs two samples a prompt",
        )  # fmt: skip
        last = max([u for u, _ in evaluations] + [int(row["update"]) for row in log] + [1])
        for axis in axes.flat:
            axis.set_xlim(-0.02 * last, 1.02 * last)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.tick_params(length=0)
            if evaluations:
                axis.axvline(best, color=SOFT, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1.5)
        for axis in axes[1]:
            axis.set_xlabel("updates")
        if evaluations:
            figure.text(
                0.985, 0.985, f"dotted: update {best}, whose weights are kept", ha="right", va="top", color=SOFT
            )
        whole(path, lambda file: figure.savefig(file, format="png", facecolor="white"), durable=False)


def _rewards(
    axis: Any, evaluations: Sequence[tuple[int, Evaluation]], samples: int, judge: str, optimised: str | None, best: int
) -> None:
    """Each reward with its standard error over prompts: one in its own unit, several as gains in standard deviations."""
    axis.set_title("Rewards on the evaluation prompts")
    names = list(evaluations[0][1].scores) if evaluations else []
    leading = [n for n in dict.fromkeys((optimised, judge)) if n in names]
    names = leading + [n for n in names if n not in leading][:MOST_OTHERS]
    drawn = False
    for i, name in enumerate(names):
        ink = INKS["judge"] if name == judge else INKS["optimised"] if name == optimised else OTHERS[i - len(leading)]
        points = _means(evaluations, name, samples) if len(names) == 1 else _gains(evaluations, name, samples)
        points = [(u, m, e) for u, m, e in points if math.isfinite(m)]
        if not points:
            continue
        drawn = True
        updates, middle, error = zip(*points, strict=True)
        error = [e if math.isfinite(e) else 0.0 for e in error]
        low, high = ([m + s * e for m, e in zip(middle, error, strict=True)] for s in (-1, 1))
        axis.fill_between(updates, low, high, color=ink, alpha=0.16, linewidth=0, zorder=2)
        if len(points) == 1:  # a band needs two
            axis.errorbar(updates, middle, error, color=ink, alpha=0.4, capsize=4, zorder=2)
        axis.plot(
            updates, middle, color=ink, marker="o", markersize=4, zorder=3, label=_label(evaluations, name, judge, optimised, best),
            linewidth=2.2 if name in leading else 1.3,
        )  # fmt: skip
    axis.set_ylabel(names[0] if len(names) == 1 else "gain, standard deviations")
    if drawn:
        _room(axis, 0.12 * len(names))
        axis.legend(loc="upper left", borderaxespad=0.2, handlelength=1.4, labelspacing=0.3)
        if len(names) > 1:
            axis.axhline(0, color=SOFT, linewidth=0.8, zorder=1)
    else:
        _empty(axis, "nothing was judged")


def _label(
    evaluations: Sequence[tuple[int, Evaluation]], name: str, judge: str, optimised: str | None, best: int
) -> str:
    """A reward's name, its part in the run, and its mean at first and at the update that is kept."""
    parts = [part for part, of in (("optimised", optimised), ("judge", judge)) if of == name]
    first, kept = (float(e.scores[name].nanmean()) for e in (evaluations[0][1], dict(evaluations)[best]))
    role = f" ({', '.join(parts)})" if parts else ""
    return f"{name}{role}  {shown(first)}" + (f" → {shown(kept)}" if best != evaluations[0][0] else "")


def _means(evaluations: Sequence[tuple[int, Evaluation]], name: str, samples: int) -> list[tuple[int, float, float]]:
    """(update, mean, its standard error over prompts)."""
    return [(u, *paired_gain(torch.zeros_like(e.scores[name]), e.scores[name], samples)) for u, e in evaluations]


def _gains(evaluations: Sequence[tuple[int, Evaluation]], name: str, samples: int) -> list[tuple[int, float, float]]:
    """(update, paired gain over the first evaluation, its standard error), in standard deviations of all scores of the run."""
    every = torch.cat([e.scores[name].double() for _, e in evaluations])
    every = every[every.isfinite()]
    unit = float(every.std(unbiased=False)) if len(every) else 1.0
    before: Tensor = evaluations[0][1].scores[name]
    gains = [(u, *paired_gain(before, e.scores[name], samples)) for u, e in evaluations]
    return [(u, m / (unit or 1.0), e / (unit or 1.0)) for u, m, e in gains]


def _training(axis: Any, log: Sequence[Mapping[str, float]]) -> None:
    """What each update saw: the reward of its samples, or the loss of a method that asks no reward."""
    name = "reward" if any(math.isfinite(row.get("reward", math.nan)) for row in log) else "loss"
    axis.set_title(f"Training {name}")
    axis.set_ylabel(f"{name}, mean of an update")
    points = [(row["update"], row[name]) for row in log if math.isfinite(row.get(name, math.nan))]
    if not points:
        return _empty(axis, "no updates")
    updates, values = zip(*points, strict=True)
    ink = INKS["optimised"]
    window = max(1, len(values) // 20)
    if window == 1:
        axis.plot(updates, values, color=ink, linewidth=1.8, marker="o", markersize=4)
    else:
        axis.plot(updates, values, color=ink, alpha=0.3, linewidth=0.9)
        smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
        axis.plot(updates, smooth, color=ink, linewidth=2.2, label=f"mean of {window} updates")
        _room(axis, 0.1)
        axis.legend(loc="upper left", borderaxespad=0.2, handlelength=1.4)


def _line(
    axis: Any,
    title: str,
    label: str,
    evaluations: Sequence[tuple[int, Evaluation]],
    name: str,
    otherwise: str,
) -> None:
    """One number of each evaluation, from 0."""
    axis.set_title(title)
    axis.set_ylabel(label)
    points = [(u, getattr(e, name)) for u, e in evaluations if math.isfinite(getattr(e, name))]
    if not points:
        return _empty(axis, otherwise)
    axis.plot(*zip(*points, strict=True), color=INK, marker="o", markersize=4, linewidth=1.8, zorder=3, clip_on=False)
    low, high = min(0.0, *(v for _, v in points), 0.0), max(v for _, v in points)
    axis.set_ylim(low * 1.1, high * 1.15 if high > 0 else 1.0)


def _room(axis: Any, share: float) -> None:
    """Makes room for a legend above the lines."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + (high - low) * share)


def _empty(axis: Any, why: str) -> None:
    axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", va="center", color=SOFT)
    axis.set_yticks([])
    axis.set_ylabel("")
    axis.grid(False)
