"""`align.compare_rewards`: how far apart rewards are, on the samples of a reference policy.

Making a sample in one go is a decision process of one step: the prompt is the state, the sample the action, and what a state is
worth under the reference policy is the mean of its samples' rewards. So the canonical form of a reward r is r minus the mean over
the reference samples of the same prompt, which is the same for r + f(prompt); scaled to length one, it is the same for a r, a > 0.
The STARC distance is the Euclidean one between the canonical forms of two rewards,

    d = sqrt(2 - 2 rho)        rho the correlation within prompts, pooled over them

0 for rewards that order all policies alike, sqrt(2) for unrelated ones, 2 for opposite ones; EPIC's distance is d / 2. A reward
that is constant within every prompt has the canonical form 0, at distance 1 from all others.

Rank correlations (Spearman; Kendall's tau-b) are taken within each prompt and averaged over the prompts where both rewards tell
samples apart. Top-1 agreement is the chance that both pick the same best sample of a prompt, ties broken at random. Intervals are
percentiles of bootstrap samples of the prompts.

Sources: Skalse et al., "STARC: A General Framework For Quantifying Differences Between Reward Functions", 2023, arXiv 2309.15257.
Gleave et al., "Quantifying Differences in Reward Functions" (EPIC), 2020, arXiv 2006.13900. The reduction to one step is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rewards import Prompt, Reward, as_prompts

from .panel import panel_of
from .scoring import Shown, score

__all__ = ["MEASURES", "Comparison", "compare_rewards", "compare_scores"]

MEASURES = ("distance", "epic", "spearman", "kendall", "top1")
TAILS = (0.025, 0.975)
MOST = 1_000_000  # numbers in memory, of pairs of samples or of a bootstrap


@dataclass(frozen=True)
class Comparison:
    """How far apart R rewards are.

    Attributes:
        names: of the rewards.
        values: (R, R) float64 of each of `MEASURES`, NaN where it is not defined.
        intervals: (2, R, R) of each, the ends of a 95% interval; NaN for a single prompt.
        prompts: with two samples or more that all rewards judged.
        samples: of those prompts.
        left_out: samples that some reward could not judge, or that are alone with their prompt.
        chance: top-1 agreement of unrelated rewards.
        canonical: (R, N) rewards minus their means within prompts, each of length one.
    """

    names: tuple[str, ...]
    values: Mapping[str, Tensor]
    intervals: Mapping[str, Tensor]
    prompts: int
    samples: int
    left_out: int
    chance: float
    canonical: Tensor

    def __getitem__(self, measure: str) -> Tensor:
        return self.values[measure]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: one entry a pair of rewards."""
        pairs = []
        for i, j in combinations(range(len(self.names)), 2):
            row: dict[str, Any] = {"rewards": [self.names[i], self.names[j]]}
            for measure in MEASURES:
                numbers = [self.values[measure][i, j], *self.intervals[measure][:, i, j]]
                value, low, high = (None if x != x else float(x) for x in numbers)
                row[measure] = {"value": value, "interval": [low, high]}
            pairs.append(row)
        counts = {"prompts": self.prompts, "samples": self.samples, "left_out": self.left_out, "chance": self.chance}
        return {"rewards": list(self.names), **counts, "pairs": pairs}


def compare_rewards(
    rewards: Sequence[Reward],
    media: Shown,
    prompts: Sequence[str | Prompt] | str | Prompt,
    *,
    batch: int = 32,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Scores samples by every reward and compares the scores.

    Args:
        rewards: two or more.
        media: as in `align.score`: several samples of each prompt, by the policy that is to be steered or trained.
        prompts: one a sample, or one for all.
        batch: samples at a time.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: fewer than two rewards, one that compares samples itself, or no prompt with two samples that all could judge.
    """
    panel = panel_of(list(rewards), None)
    if ranking := [name for name, reward in panel.items() if reward.compares]:
        raise ValueError(
            f"{', '.join(ranking)} must see all samples of a prompt at once: score a folder by kilter score, and compare the tables"
        )
    scores = {name: score(reward, media, prompts, batch=batch).total for name, reward in panel.items()}
    texts = [p.text for p in as_prompts(prompts)]
    count = len(next(iter(scores.values()), ()))
    return compare_scores(scores, texts * count if len(texts) == 1 else texts, resamples=resamples, seed=seed)


def compare_scores(
    scores: Mapping[str, Tensor], prompts: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> Comparison:
    """Compares scores of the same samples.

    Args:
        scores: (N,) by name, NaN where not judged.
        prompts: of the samples.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: fewer than two rewards, or no prompt with two samples that all could judge.
    """
    if len(scores) < 2:
        raise ValueError(f"a comparison needs two rewards or more; got {', '.join(scores) or 'none'}")
    if resamples < 1:
        raise ValueError(f"resamples must be ≥ 1; got {resamples}")
    table = torch.stack([s.double() for s in scores.values()])  # (R, N)
    if table.shape[1] != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts for {table.shape[1]} samples")
    groups: dict[str, list[int]] = {}
    for i, (text, judged) in enumerate(zip(prompts, table.isfinite().all(0).tolist(), strict=True)):
        if judged:
            groups.setdefault(text, []).append(i)
    parts = [table[:, rows] for rows in groups.values() if len(rows) > 1]
    if not parts:
        raise ValueError("no prompt has two samples that every reward could judge: rewards are compared within prompts")
    sums = _Sums.of(parts)
    values = {name: v[0] for name, v in sums.measures(torch.ones(1, len(parts), dtype=torch.float64)).items()}
    tails = torch.tensor(TAILS, dtype=torch.float64)
    alone = math.nan if len(parts) == 1 else 1.0  # one prompt says nothing about others
    intervals = {name: v.nanquantile(tails, dim=0) * alone for name, v in sums.resampled(resamples, seed).items()}
    centred = torch.cat([_centred(part) for part in parts], dim=1)
    length = centred.norm(dim=1, keepdim=True)
    canonical = torch.where(length > 0, centred / length, 0.0)
    # exact where rewards are equal, which the square root of a difference is not
    values["distance"] = torch.cdist(canonical, canonical, compute_mode="donot_use_mm_for_euclid_dist")
    values["epic"] = values["distance"] / 2
    samples = sum(part.shape[1] for part in parts)
    chance = sum(1 / part.shape[1] for part in parts) / len(parts)
    left_out = len(prompts) - samples
    return Comparison(tuple(scores), values, intervals, len(parts), samples, left_out, chance, canonical)


@dataclass(frozen=True)
class _Sums:
    """What each prompt adds to the measures: (P, R, R) each. A measure of some prompts is a function of sums over them.

    Attributes:
        products: sums of products of canonical rewards.
        ranks, orders: Spearman's and Kendall's correlations within the prompt, NaN where a reward is constant.
        top: the chance that two rewards pick the same sample.
    """

    products: Tensor
    ranks: Tensor
    orders: Tensor
    top: Tensor

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> _Sums:
        rules: tuple[Callable[[Tensor], Tensor], ...] = (_products, _spearman, _kendall, _top)
        return cls(*(torch.stack([rule(part) for part in parts]) for rule in rules))

    def measures(self, counts: Tensor) -> dict[str, Tensor]:
        """(W, R, R) of each measure, where prompt p is taken counts[:, p] times: (W, P)."""
        products = torch.einsum("wp,prs->wrs", counts, self.products)
        length = products.diagonal(dim1=1, dim2=2).sqrt()
        unit = (length > 0).double()  # the squared length of the canonical form, once scaled
        rho = torch.where(products != 0, products / (length[:, :, None] * length[:, None, :]), 0.0).clamp(-1, 1)
        distance = (unit[:, :, None] + unit[:, None, :] - 2 * rho).clamp(min=0).sqrt()
        same = torch.arange(distance.shape[1])
        distance[:, same, same] = 0.0
        found = {"distance": distance, "epic": distance / 2}
        for name, each in (("spearman", self.ranks), ("kendall", self.orders), ("top1", self.top)):
            known = ~each.isnan()
            total = torch.einsum("wp,prs->wrs", counts, each.nan_to_num(0.0))
            found[name] = total / torch.einsum("wp,prs->wrs", counts, known.double())
        return found

    def resampled(self, resamples: int, seed: int) -> dict[str, Tensor]:
        """(W, R, R) of each measure over bootstrap samples of the prompts."""
        prompts, generator = len(self.top), torch.Generator().manual_seed(seed)
        size, found = max(1, MOST // prompts), []
        for first in range(0, resamples, size):
            drawn = torch.randint(prompts, (min(size, resamples - first), prompts), generator=generator)
            counts = torch.zeros(drawn.shape, dtype=torch.float64)
            found.append(self.measures(counts.scatter_add_(1, drawn, torch.ones_like(counts))))
        return {name: torch.cat([part[name] for part in found]) for name in MEASURES}


def _centred(part: Tensor) -> Tensor:
    """(R, K) minus the mean over the samples; exactly 0 for a reward that is constant."""
    return torch.where(part.amax(1, keepdim=True) > part.amin(1, keepdim=True), part - part.mean(1, keepdim=True), 0.0)


def _products(part: Tensor) -> Tensor:
    centred = _centred(part)
    return centred @ centred.T


def _correlation(products: Tensor) -> Tensor:
    """(R, R) cosines, NaN for a row of zeros."""
    length = products.diagonal().sqrt()
    return products / (length[:, None] * length[None])


def _spearman(part: Tensor) -> Tensor:
    size = part.sort(1).values
    below, to = (torch.searchsorted(size, part, right=right) for right in (False, True))
    ranks = (below + to - part.shape[1]).double()  # twice the rank with ties shared, centred
    return _correlation(ranks @ ranks.T)


def _kendall(part: Tensor) -> Tensor:
    products = part.new_zeros(len(part), len(part))
    for some in part.split(max(1, MOST // part.numel()), dim=1):
        order = (some[:, :, None] - part[:, None, :]).sign_().flatten(1)
        products += order @ order.T
    return _correlation(products)


def _top(part: Tensor) -> Tensor:
    best = (part == part.amax(1, keepdim=True)).double()
    best = best / best.sum(1, keepdim=True)
    return best @ best.T
