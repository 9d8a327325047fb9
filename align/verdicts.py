"""`align.eval_reward`: how well a reward agrees with what people prefer.

Every distinct picture is scored once for each of its prompts. Pairs that the reward could not judge are counted and left out. A
reward that compares samples sees both sides of a pair in one call, in both orders: its difference is the mean of the two, and how
often both orders name the same side is its swap consistency.

Micro averages are over pairs, macro averages over groups. Intervals are percentiles of bootstrap samples of the prompts, whose
pairs go together. The temperature is fitted to half of the prompts and judged on the other half, both ways round. `agreement.py`
has the definitions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards import Reward

from .agreement import accuracy, calibrated, calibration_error, fit_temperature, log_loss, reliability, with_ties
from .decoding import Decoder, as_float
from .media import Media
from .pairs import Pair, Side, read_pairs
from .scorer import device_of
from .scoring import score

__all__ = ["MEASURES", "Verdicts", "eval_reward"]

MEASURES = ("accuracy", "strict", "with_ties", "calibrated")
LABELS = {"a": 1.0, "b": -1.0, "tie": 0.0}
TAILS = (0.025, 0.975)
AT_ONCE = 4  # batches of pictures in memory
MOST = 4_000_000  # weights of a bootstrap in memory


@dataclass(frozen=True)
class Verdicts:
    """What a reward says about pairs, and how right it is.

    Attributes:
        reward: its name.
        differences: (N,) the score of side a minus that of side b, NaN where it could not judge.
        labels: (N,) 1 for a, -1 for b, 0 for a tie.
        groups: (N,) what each pair is counted under.
        values: of "micro", and of "macro" and each group where there are several: `MEASURES`, and but for macro "pairs" and "ties".
        intervals: the same for `MEASURES`: the ends of 95% intervals.
        threshold: of `with_ties`.
        best_threshold: of `calibrated`, over all pairs.
        temperature: fitted to all pairs; infinite if chance does no worse.
        nll, ece: in nats and as a share, on prompts the temperature was not fitted to.
        reliability: confidence, accuracy and count, at `temperature`.
        swap: the share of pairs of which both orders name the same side; None for a reward that scores sides by themselves.
        unjudged: pairs left out.
        scored: pictures scored, each once for each of its prompts.
    """

    reward: str
    differences: Tensor
    labels: Tensor
    groups: tuple[str, ...]
    values: Mapping[str, Mapping[str, float]]
    intervals: Mapping[str, Mapping[str, tuple[float, float]]]
    threshold: float
    best_threshold: float
    temperature: float
    nll: float
    ece: float
    reliability: tuple[Tensor, Tensor, Tensor]
    swap: float | None
    unjudged: int
    scored: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the pairs; null where a number is not defined or infinite."""
        table = {
            name: {**row, "intervals": {m: list(ends) for m, ends in self.intervals.get(name, {}).items()}}
            for name, row in self.values.items()
        }
        names = ("threshold", "best_threshold", "temperature", "nll", "ece", "swap", "unjudged", "scored")
        bins = dict(zip(("confidence", "accuracy", "count"), (t.tolist() for t in self.reliability), strict=True))
        told = {"reward": self.reward, "groups": table, "reliability": bins, **{n: getattr(self, n) for n in names}}
        return json.loads(json.dumps(told), parse_constant=lambda _: None)


def eval_reward(
    reward: Reward,
    pairs: Sequence[Pair] | str | Path,
    *,
    threshold: float = 0.0,
    batch: int = 32,
    frames: int = 16,
    resamples: int = 1000,
    seed: int = 0,
) -> Verdicts:
    """Scores pairs and says how well the scores agree with the labels.

    Args:
        reward: of images, or of videos where the pairs are.
        pairs: pairs, or what `read_pairs` reads.
        threshold: differences up to this foretell a tie.
        batch: pictures at a time.
        frames: of a video, spread evenly.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: no pairs, a picture that cannot be read, or no pair that could be judged.
    """
    if threshold < 0 or resamples < 1 or batch < 1 or frames < 1:
        raise ValueError(
            f"threshold must be ≥ 0, resamples, batch and frames ≥ 1; got {threshold}, {resamples}, {batch} and {frames}"
        )
    if reward.modality not in ("image", "video"):
        raise ValueError(f"{reward.name} scores {reward.modality}, but pairs are images or videos")
    given = read_pairs(pairs) if isinstance(pairs, (str, Path)) else list(pairs)
    if not given:
        raise ValueError("no pairs to judge")
    swap = None
    if reward.compares:
        differences, swap = _compared(reward, given, frames)
        scored = 2 * len(given)
    else:
        differences, scored = _scored(reward, given, batch, frames)
    labels = torch.tensor([LABELS[p.label] for p in given], dtype=torch.float64)
    judged = differences.isfinite()
    if not bool(judged.any()):
        raise ValueError(f"{reward.name} could judge none of {len(given)} pairs")
    kept = [p for p, ok in zip(given, judged.tolist(), strict=True) if ok]
    d, y = differences[judged], labels[judged]
    table = _Table(d, y, kept, threshold)
    values, intervals = table.values(), table.intervals(resamples, seed)
    temperature, nll, ece = _calibration(d, y, table.weights[0], kept)
    bins = reliability(d, y, temperature, table.weights)
    best = float(calibrated(d, y, table.weights)[1])
    return Verdicts(
        reward.name, differences, labels, tuple(p.group for p in given), values, intervals, threshold, best, temperature, nll, ece,
        bins, swap, len(given) - len(kept), scored,
    )  # fmt: skip


def _scored(reward: Reward, pairs: Sequence[Pair], batch: int, frames: int) -> tuple[Tensor, int]:
    """(N,) differences, and how many pictures were scored."""
    sides: dict[tuple[str, str], Side] = {}
    keys = []
    for pair in pairs:
        keys.append(tuple((side.prompt.text, side.media.key) for side in (pair.a, pair.b)))
        sides.update(zip(keys[-1], (pair.a, pair.b), strict=True))
    totals: dict[tuple[str, str], tuple[float, dict[str, float]]] = {}
    names = list(sides)
    for first in range(0, len(names), AT_ONCE * batch):
        part = names[first : first + AT_ONCE * batch]
        media = [_shown(reward, sides[name].media, frames) for name in part]
        scores = score(reward, media, [sides[name].prompt for name in part], batch=batch)
        for i, name in enumerate(part):
            totals[name] = (float(scores.total[i]), {k: float(v[i]) for k, v in scores.parts.items()})

    def value(name: tuple[str, str], aspect: str) -> float:
        total, parts = totals[name]
        return parts.get(aspect, total)

    gaps = [value(a, p.aspect) - value(b, p.aspect) for p, (a, b) in zip(pairs, keys, strict=True)]
    return torch.tensor(gaps, dtype=torch.float64), len(names)


def _compared(reward: Reward, pairs: Sequence[Pair], frames: int) -> tuple[Tensor, float]:
    """(N,) differences of a reward that sees both sides, over both orders, and how often the orders agree."""
    device, orders = device_of([reward]), []
    for pair in pairs:
        if pair.a.prompt.text != pair.b.prompt.text:
            raise ValueError(f"{reward.name} compares samples of one prompt, but the sides of a pair have two")
        a, b = (_shown(reward, side.media, frames) for side in (pair.a, pair.b))
        if a.shape != b.shape:
            raise ValueError(f"{reward.name} compares media of one size; got {tuple(a.shape)} and {tuple(b.shape)}")
        both = torch.stack([a, b]).to(device)
        with torch.no_grad():
            one = reward(both, [pair.a.prompt] * 2)
            other = reward(both.flip(0), [pair.a.prompt] * 2)
        orders.append([float(one[0] - one[1]), float(other[1] - other[0])])
    gaps = torch.tensor(orders, dtype=torch.float64)
    judged = gaps.isfinite().all(1)
    same = gaps[judged, 0].sign() == gaps[judged, 1].sign()
    return gaps.mean(1), float(same.double().mean())


def _shown(reward: Reward, media: Media, frames: int) -> Tensor:
    """(3, H, W), or (F, 3, H, W) for a reward of videos."""
    return as_float(Decoder(reward.modality, frames=frames)(media))


class _Table:
    """The measures of all pairs, of each group, and of the mean over groups."""

    def __init__(self, d: Tensor, y: Tensor, pairs: Sequence[Pair], threshold: float) -> None:
        self.d, self.y, self.threshold = d, y, threshold
        self.weights = torch.tensor([[p.weight for p in pairs]], dtype=torch.float64)
        self.groups = {g: torch.tensor([p.group == g for p in pairs]) for g in dict.fromkeys(p.group for p in pairs)}
        prompts = {text: i for i, text in enumerate(dict.fromkeys(p.a.prompt.text for p in pairs))}
        self.prompt = torch.tensor([prompts[p.a.prompt.text] for p in pairs])
        self.prompts = len(prompts)

    def measures(self, weights: Tensor) -> dict[str, dict[str, Tensor]]:
        """(W,) of each measure for weights (W, N), by "micro", group and "macro"."""

        def of(rows: Tensor) -> dict[str, Tensor]:
            given = (self.d[rows], self.y[rows], weights[:, rows])
            return {
                "accuracy": accuracy(*given),
                "strict": accuracy(*given, tie=0.0),
                "with_ties": with_ties(*given, threshold=self.threshold),
                "calibrated": calibrated(*given)[0],
            }

        found = {"micro": of(torch.ones(len(self.d), dtype=torch.bool))}
        groups = {name: of(rows) for name, rows in self.groups.items()}
        if len(groups) == 1:
            return found
        macro = {m: torch.stack([values[m] for values in groups.values()]).nanmean(0) for m in MEASURES}
        return {**found, "macro": macro, **groups}

    def values(self) -> dict[str, dict[str, float]]:
        found = {n: {m: float(v[0]) for m, v in row.items()} for n, row in self.measures(self.weights).items()}
        for name, rows in {"micro": torch.ones(len(self.d), dtype=torch.bool), **self.groups}.items():
            if name in found:
                found[name] |= {"pairs": int(rows.sum()), "ties": int((self.y[rows] == 0).sum())}
        return found

    def intervals(self, resamples: int, seed: int) -> dict[str, dict[str, tuple[float, float]]]:
        if self.prompts < 2:  # one prompt says nothing about others
            return {}
        generator = torch.Generator().manual_seed(seed)
        size, parts = max(1, MOST // len(self.d)), []
        for first in range(0, resamples, size):
            rows = min(size, resamples - first)
            drawn = torch.randint(self.prompts, (rows, self.prompts), generator=generator)
            counts = torch.zeros(rows, self.prompts, dtype=torch.float64)
            counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
            parts.append(self.measures(counts[:, self.prompt] * self.weights))
        tails = torch.tensor(TAILS, dtype=torch.float64)
        found: dict[str, dict[str, tuple[float, float]]] = {}
        for name in parts[0]:
            for measure in MEASURES:
                low, high = torch.cat([p[name][measure] for p in parts]).nanquantile(tails).tolist()
                found.setdefault(name, {})[measure] = (low, high)
        return found


def _calibration(d: Tensor, y: Tensor, weights: Tensor, pairs: Sequence[Pair]) -> tuple[float, float, float]:
    """The temperature of all pairs; loss and calibration error where half of the prompts are judged by that of the others."""
    half = torch.tensor([hashlib.sha256(p.a.prompt.text.encode()).digest()[0] % 2 == 0 for p in pairs])
    if not (bool(half.any()) and bool((~half).any())):
        return fit_temperature(d, y, weights), math.nan, math.nan
    losses, errors, shares = [], [], []
    for test in (half, ~half):
        temperature = fit_temperature(d[~test], y[~test], weights[~test])
        losses.append(log_loss(d[test], y[test], temperature, weights[test]))
        errors.append(calibration_error(d[test], y[test], temperature, weights[test]))
        shares.append(float(weights[test].sum() / weights.sum()))
    nll, ece = (sum(s * v for s, v in zip(shares, values, strict=True)) for values in (losses, errors))
    return fit_temperature(d, y, weights), nll, ece
