"""Pictures of what rewards are like: how far apart they are, and how well they agree with preferences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from rewards.files import whole

from .comparing import Comparison
from .curves import STYLE
from .pictures import INK, INKS, LINE, SOFT, clipped, font
from .verdicts import MEASURES, Verdicts

__all__ = ["draw_comparison", "draw_verdicts"]

LABEL = 150  # pixels of a reward's name
SHADES = ("#0072B2", "#56B4E9", "#C04E00", "#B8860B")  # of the measures


@contextmanager
def page(path: Path, title: str, below: str, size: tuple[float, float], panels: int) -> Iterator[Any]:
    """The axes of a picture, which is written whole or not at all."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # pyright: ignore
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.18, h_pad=0.16, wspace=0.06)  # pyright: ignore
        figure.suptitle(clipped(title, font(15, True), 90 * size[0]), x=0.02, ha="left", fontsize=14, fontweight="bold")
        figure.supxlabel(below, x=0.02, ha="left", fontsize=8.5, color=SOFT)
        yield figure.subplots(1, panels, squeeze=False)[0]
        whole(path, lambda file: figure.savefig(file, format="png", facecolor="white"), durable=False)


def draw_comparison(path: Path, found: Comparison) -> None:
    """Distances and rank correlations of all pairs; of two rewards, every sample instead of the latter."""
    side = 2.1 + 0.75 * len(found.names)
    below = (
        f"{found.samples} samples of {found.prompts} prompts; small: 95% bootstrap intervals over prompts. "
        f"Top-1 agreement by chance: {found.chance:.2f}."
    )
    with page(path, "How far apart the rewards are", below, (2 * max(side, 4.2) + 0.6, max(side, 4.2)), 2) as axes:
        names = [clipped(name, font(9), LABEL) for name in found.names]
        _matrix(axes[0], "STARC distance, 0 same … 2 opposite", names, found, "distance", ("Blues", 0.0, 2.0))
        if len(names) == 2:
            _samples(axes[1], found)
        else:
            _matrix(axes[1], "Spearman correlation within prompts", names, found, "spearman", ("RdBu", -1.0, 1.0))


def _matrix(
    axis: Any, title: str, names: list[str], found: Comparison, measure: str, colours: tuple[str, float, float]
) -> None:
    """One measure of all pairs, in words and colours."""
    name, low, high = colours
    values, interval = found.values[measure], found.intervals[measure]
    axis.set_title(title)
    axis.imshow(values.clone().fill_diagonal_(float("nan")).numpy(), cmap=name, vmin=low, vmax=high, alpha=0.75)
    for i in range(len(names)):
        for j in range(len(names)):
            if i == j:
                continue
            dark = abs(float(values[i, j]) - (0 if low else 0.5)) > (0.7 if low else 1.0)
            ink = "white" if dark else INK
            axis.text(j, i - 0.08, _number(values[i, j]), ha="center", va="center", color=ink, fontsize=11)
            ends = f"{_number(interval[0, i, j])} … {_number(interval[1, i, j])}"
            if values[i, j] == values[i, j]:
                axis.text(j, i + 0.25, ends, ha="center", va="center", color=ink, fontsize=6)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _samples(axis: Any, found: Comparison) -> None:
    """Every sample by both rewards, minus their means within its prompt, in standard deviations."""
    x, y = (found.canonical * found.samples**0.5).tolist()
    ends = [min(*x, *y, 0.0), max(*x, *y, 0.0)]
    axis.plot(ends, ends, color=LINE, linewidth=1.2, zorder=1)
    axis.scatter(x, y, s=10, color=INKS["optimised"], alpha=0.45, linewidths=0, zorder=2)
    axis.set_title("Samples, relative to those of their prompt")
    axis.set_xlabel(f"{clipped(found.names[0], font(9), 220)}, standard deviations")
    axis.set_ylabel(clipped(found.names[1], font(9), 220))


def draw_verdicts(path: Path, found: Verdicts) -> None:
    """Accuracy by group with intervals, and accuracy against confidence."""
    whole = found.values["micro"]
    below = (
        f"{whole['pairs']} pairs, {whole['ties']} of them ties"
        + (f", {found.unjudged} more could not be judged" if found.unjudged else "")
        + ". Bars: 95% bootstrap intervals over prompts. Ties are foretold "
        + f"up to |D| = {found.threshold:g} (with ties) or {found.best_threshold:.3g} (calibrated)."
    )
    height = max(4.6, 1.6 + 0.42 * len(found.values))
    with page(path, f"How well {found.reward} agrees with preferences", below, (10.4, height), 2) as axes:
        _by_group(axes[0], found)
        _confidence(axes[1], found)


def _by_group(axis: Any, found: Verdicts) -> None:
    names = list(found.values)[::-1]
    axis.set_title("Accuracy")
    for k, measure in enumerate(MEASURES):
        at = [i + 0.18 * (1.5 - k) for i in range(len(names))]
        values = [found.values[name][measure] for name in names]
        ends = [found.intervals.get(name, {}).get(measure, (v, v)) for name, v in zip(names, values, strict=True)]
        bars = [[max(0.0, v - e[0]) for v, e in zip(values, ends, strict=True)]]
        bars += [[max(0.0, e[1] - v) for v, e in zip(values, ends, strict=True)]]
        axis.errorbar(
            values,
            at,
            xerr=bars,
            fmt="o",
            color=SHADES[k],
            markersize=4.5,
            linewidth=1.2,
            label=measure.replace("_", " "),
        )
    axis.axvline(0.5, color=SOFT, linewidth=0.8, zorder=1)
    axis.set_yticks(range(len(names)), [clipped(name, font(9), LABEL) for name in names])
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.tick_params(length=0)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, handlelength=1.0, columnspacing=1.2)


def _confidence(axis: Any, found: Verdicts) -> None:
    confidence, right, count = found.reliability
    axis.set_title("Accuracy against confidence")
    axis.plot([0.5, 1], [0.5, 1], color=LINE, linewidth=1.2, zorder=1)
    error = (right * (1 - right) / count).sqrt()
    if len(count):
        axis.errorbar(
            confidence.tolist(),
            right.tolist(),
            yerr=error.tolist(),
            fmt="o-",
            color=INKS["optimised"],
            markersize=4.5,
            linewidth=1.4,
        )
    told = f"T = {found.temperature:.3g}, expected calibration error {found.ece:.3f}, {found.nll:.3f} nats a pair"
    axis.text(0.02, 0.97, told.replace("nan", "–"), transform=axis.transAxes, va="top", color=SOFT, fontsize=8.5)
    axis.set_xlabel("confidence, sigmoid(|D| / T); bars are one standard error")
    axis.set_ylabel("accuracy")
    axis.set_xlim(0.48, 1.02)
    axis.set_ylim(min([0.45, *(right - error - 0.02).tolist()]), 1.1)


def _number(value: Tensor) -> str:
    return "–" if value != value else f"{float(value):.2f}".replace("-", "−")
