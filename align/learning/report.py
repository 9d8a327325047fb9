"""How good a learned reward is on pairs held out, in numbers and in a picture.

`agreement.py` defines accuracy, temperature and calibration error, `bestofn.py` the curve of over-optimisation. Besides, two slopes
tell how much the score rises with what should not matter: a word of the prompt, and from black to white within pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.files import whole

from ..agreement import accuracy, calibration_error, fit_temperature, log_loss, reliability
from ..bestofn import best_of_n
from .data import Comparisons

__all__ = ["curve", "draw", "judged", "temperature_of"]


def curve(proxy: Tensor, gold: Tensor, prompt: Tensor) -> dict[str, list[float]]:
    """Learned and gold score of the best of n by the learned one, and the most KL it can cost, averaged over prompts.

    Args:
        proxy, gold: (N,) of samples; prompt: (N,) which prompt each is of. Samples gold could not judge are left out.
    """
    kept = gold.isfinite() & proxy.isfinite()
    groups = [rows for p in prompt.unique() if len(rows := (kept & (prompt == p)).nonzero()[:, 0])]
    most = min(map(len, groups), default=0)
    if not most:
        return {"n": [], "kl": [], "proxy": [], "gold": []}
    n = torch.arange(1, most + 1).double()
    own, true = (torch.stack([best_of_n(proxy[g], of[g])[:most] for g in groups]).mean(0) for of in (proxy, gold))
    return {"n": n.tolist(), "kl": (n.log() - (n - 1) / n).tolist(), "proxy": own.tolist(), "gold": true.tolist()}


def temperature_of(scores: Tensor, data: Comparisons) -> float:
    """The temperature at which scores (R,) explain comparisons best."""
    return fit_temperature(scores[data.first] - scores[data.second], (~data.tied).double(), data.weight[data.pair])


def judged(scores: Tensor, raw: Tensor, data: Comparisons, brightness: Tensor, temperature: float) -> dict[str, Any]:
    """Everything that comparisons, by the weights of their records, say about scores.

    Args:
        scores: (R,) calibrated, of the rows, for whoever judged them.
        raw: (R,) before calibration.
        brightness: (R,) mean pixel.
        temperature: of the scores, from other comparisons where there are any.
    """
    lead, raw_lead = (s[data.first] - s[data.second] for s in (scores, raw))
    label, weights = (~data.tied).double(), data.weight[data.pair].double()
    sure, right, count = reliability(lead, label, temperature, weights)
    words = torch.tensor([len(data.samples[i].prompt.text.split()) for i in data.rows.tolist()])
    out, sided = float(accuracy(lead, label, weights)), float((weights * label).sum() / weights.sum())
    return {
        "pairs": len(lead),
        "ties": int(data.tied.sum()),
        "accuracy": out,
        "accuracy_ties_half": out * sided + (1 - sided) / 2,
        "nll": log_loss(raw_lead, label, 1.0, weights),
        "nll_calibrated": log_loss(lead, label, temperature, weights),
        "ece": calibration_error(raw_lead, label, 1.0, weights),
        "ece_calibrated": calibration_error(lead, label, temperature, weights),
        "temperature": temperature,
        "reliability": list(zip(sure.tolist(), right.tolist(), count.tolist(), strict=True)),
        "slopes": {
            "prompt_word": _slope(words, scores),
            "brightness_in_pairs": _slope(brightness[data.first] - brightness[data.second], lead),
        },
    }


def _slope(x: Tensor, y: Tensor) -> float:
    """Of the least-squares line; NaN where x does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((x * y).sum() / x.square().sum()) if float(x.abs().max()) > 0 else math.nan


def draw(path: Path, report: Mapping[str, Any], losses: Sequence[tuple[float, float]], best: int) -> None:
    """Writes three panels, whole or not at all: the fit, reliability, and best of n where a gold reward was asked."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from ..curves import STYLE
    from ..pictures import INKS, SOFT

    with matplotlib.rc_context(STYLE):  # pyright: ignore
        figure = Figure(figsize=(12.4, 4.0) if report.get("best_of_n") else (8.4, 4.0), dpi=120, layout="constrained")
        axes = figure.subplots(1, 3 if report.get("best_of_n") else 2)
        learned, held = zip(*losses, strict=True)
        axes[0].plot(range(1, len(held) + 1), learned, color=SOFT, label="learned from")
        axes[0].plot(range(1, len(held) + 1), held, color=INKS["optimised"], label="held out")
        axes[0].axvline(best + 1, color=SOFT, linestyle=(0, (1, 2)), linewidth=1.2)
        axes[0].set(title="Loss", xlabel="epochs (dotted: kept)")
        axes[0].legend()
        sure, right, _ = zip(*report["reliability"], strict=True)
        axes[1].plot([0.5, 1], [0.5, 1], color=SOFT, linewidth=1)
        axes[1].plot(sure, right, color=INKS["optimised"], marker="o", markersize=5)
        told = f"accuracy {report['accuracy']:.3f}\nECE {report['ece_calibrated']:.3f}"
        axes[1].text(0.97, 0.05, told, transform=axes[1].transAxes, ha="right")
        axes[1].set(title="Reliability on pairs held out", xlabel="how sure it is", ylabel="how often it is right")
        if points := report.get("best_of_n"):
            for name, label, ink in (("proxy", "learned", INKS["optimised"]), ("gold", report["gold"], INKS["judge"])):
                axis = axes[2] if name == "proxy" else axes[2].twinx()
                line, size = ("-", 7) if name == "proxy" else ("--", 4)  # on scales of their own they may coincide
                axis.plot(points["n"], points[name], color=ink, linestyle=line, marker="o", markersize=size)
                axis.set_ylabel(label, color=ink)
                axis.grid(False)
            axes[2].set(title="Best of n by the learned reward", xlabel="n")
        for axis in axes[::2]:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in axes:
            axis.tick_params(length=0)
        whole(path, lambda file: figure.savefig(file, format="png", facecolor="white"), durable=False)
