"""How good a learned reward is on pairs held out: in numbers and in a picture.

accuracy    of decided pairs ("ties out"), and with tied pairs counting half ("ties half"); equal scores count half
nll         -mean log σ(slope · D) of decided pairs, D the lead of the better one, with slope 1 on raw scores and as fitted
ece         Σ_b n_b/n |share right in b - mean confidence in b|, over bins of equal numbers by |D|
slopes      how much the score rises with what should not matter: a word of the prompt, and from black to white within pairs
best of n   of N samples of a prompt, sorted by the learned reward, the expected gold score of the best of n drawn without
            repetition is Σ_{i≥n} C(i-1, n-1) / C(N, n) gold_(i): unbiased over the draws (Gao et al. 2022, arXiv 2210.10760)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Comparisons

__all__ = ["accuracy", "best_of", "curve", "draw", "ece", "judged", "nll", "slope_of"]

BINS = 10
STEEPEST = 1e3  # the slope given to pairs that are all in order, whose likelihood has no maximum


def accuracy(lead: Tensor, tied: Tensor) -> dict[str, float]:
    """Shares of pairs whose better one scores higher."""
    right = (lead > 0).double() + (lead == 0).double() / 2
    out = right[~tied].mean() if bool((~tied).any()) else torch.tensor(math.nan)
    return {"accuracy": float(out), "accuracy_ties_half": float(torch.where(tied, 0.5, right).mean())}


def nll(lead: Tensor, slope: float = 1.0) -> float:
    """Mean negative log-likelihood of decided pairs, in nats."""
    return float(F.softplus(-slope * lead.double()).mean())


def slope_of(lead: Tensor) -> float:
    """The slope, 0 to 1000, by which leads of decided pairs are best explained: the inverse of a temperature."""
    lead = lead.double()
    low, high = 0.0, STEEPEST / max(1e-12, float(lead.abs().mean()))

    def rising(slope: float) -> bool:  # whether the likelihood still grows; it is concave
        return float((lead * torch.sigmoid(-slope * lead)).mean()) > 0

    if not rising(low):
        return 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) else (low, middle)
    return high


def reliability(lead: Tensor, slope: float) -> list[tuple[float, float, int]]:
    """(confidence, share right, number) of bins of decided pairs, of equal numbers, by |D|."""
    order = lead.abs().argsort(stable=True)
    bins = [part for part in order.tensor_split(min(BINS, len(order))) if len(part)]
    sure = torch.sigmoid(slope * lead.double().abs())
    right = (lead > 0).double() + (lead == 0).double() / 2
    return [(float(sure[b].mean()), float(right[b].mean()), len(b)) for b in bins]


def ece(lead: Tensor, slope: float = 1.0) -> float:
    """Expected calibration error of decided pairs."""
    bins = reliability(lead, slope)
    return sum(n * abs(right - sure) for sure, right, n in bins) / max(1, sum(n for *_, n in bins))


def best_of(proxy: Tensor, gold: Tensor, n: int) -> float:
    """The expected gold score of the one of n that the proxy puts first, from N samples of one prompt, (N,) each."""
    total = len(proxy)
    if not 1 <= n <= total:
        raise ValueError(f"n must be 1 to the {total} samples there are; got {n}")
    gold = gold.double()[proxy.argsort(stable=True)]
    places = torch.arange(n, total + 1).double()
    log_share = _log_choose(places - 1, n - 1) - _log_choose(torch.tensor(float(total)).double(), n)
    return float((log_share.exp() * gold[n - 1 :]).sum())


def curve(proxy: Tensor, gold: Tensor, prompt: Tensor) -> dict[str, list[float]]:
    """Proxy and gold score of the best of n, and the most KL it can cost, averaged over prompts; n doubles.

    Args:
        proxy, gold: (N,) of samples; prompt: (N,) which prompt each is of. Samples gold could not judge are left out.
    """
    kept = gold.isfinite() & proxy.isfinite()
    groups = [(kept & (prompt == p)).nonzero()[:, 0] for p in prompt.unique()]
    fewest = min((len(g) for g in groups if len(g)), default=0)
    groups = [g for g in groups if len(g)]
    ns = [2**k for k in range(fewest.bit_length())]
    ns += [fewest] if ns and ns[-1] != fewest else []
    rows = [(n, *(sum(best_of(proxy[g], of[g], n) for g in groups) / len(groups) for of in (proxy, gold))) for n in ns]
    return {
        "n": [float(n) for n, _, _ in rows],
        "kl": [math.log(n) - (n - 1) / n for n, _, _ in rows],
        "proxy": [p for _, p, _ in rows],
        "gold": [g for _, _, g in rows],
    }


def judged(scores: Tensor, raw: Tensor, data: Comparisons, brightness: Tensor) -> dict[str, Any]:
    """Everything that comparisons say about scores.

    Args:
        scores: (R,) calibrated, of the rows, for whoever judged them.
        raw: (R,) before calibration.
        brightness: (R,) mean pixel.
    """
    lead, raw_lead = (s[data.first] - s[data.second] for s in (scores, raw))
    decided = lead[~data.tied]
    if not len(decided):
        raise ValueError("every pair held out is a tie: hold out more, or give a file of preferences as heldout")
    slope = slope_of(decided)
    words = torch.tensor([len(data.samples[i].prompt.text.split()) for i in data.rows.tolist()])
    pale = brightness[data.first] - brightness[data.second]
    return {
        "pairs": len(lead),
        "ties": int(data.tied.sum()),
        **accuracy(lead, data.tied),
        "nll": nll(raw_lead[~data.tied]),
        "nll_calibrated": nll(decided, slope),
        "ece": ece(raw_lead[~data.tied]),
        "ece_calibrated": ece(decided, slope),
        "slope": slope,
        "reliability": reliability(decided, slope),
        "slopes": {"prompt_word": _slope(words, scores), "brightness_in_pairs": _slope(pale, lead)},
    }


def _slope(x: Tensor, y: Tensor) -> float:
    """Of the least-squares line; NaN where x does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((x * y).sum() / x.square().sum()) if float(x.abs().max()) > 0 else math.nan


def _log_choose(n: Tensor, k: int) -> Tensor:
    return torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma(n - k + 1)


def draw(path: Path, report: Mapping[str, Any], losses: Sequence[tuple[float, float]], best: int) -> None:
    """Writes three panels, whole or not at all: the fit, reliability, and best of n where a gold reward was asked."""
    import matplotlib
    from matplotlib.figure import Figure

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
            axes[2].plot(
                points["n"], points["proxy"], color=INKS["optimised"], marker="o", markersize=4, label="learned reward"
            )
            axes[2].set(title="Best of n", xlabel="n", xscale="log", ylabel="learned reward")
            axes[2].set_xticks(points["n"], [f"{n:g}" for n in points["n"]], minor=False)
            axes[2].minorticks_off()
            gold = axes[2].twinx()
            gold.plot(points["n"], points["gold"], color=INKS["judge"], marker="s", markersize=4, label="gold")
            gold.set_ylabel("gold reward", color=INKS["judge"])
            gold.grid(False)
        for axis in axes:
            axis.tick_params(length=0)
        partial = path.with_name(f"{path.name}.partial")
        figure.savefig(partial, format="png", facecolor="white")
    partial.replace(path)
