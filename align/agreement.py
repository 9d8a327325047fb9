"""How well differences of scores agree with preferences: pure functions of differences and labels.

A pair has a difference D = r(a) - r(b) and a label y: 1 if a is preferred, -1 if b is, 0 for a tie. Weights stand for repeated
pairs; with several rows of weights, (W, N), each row gives one value, which is how intervals are made.

    accuracy      among pairs with a preference: sign(D) = y, and 1/2 where D = 0
    strict        the same, and wrong where D = 0
    with_ties     among all pairs: a tie is foretold where |D| ≤ threshold
    calibrated    the same at the threshold where it is highest

Tie calibration: Deutsch et al., "Ties Matter", 2023, arXiv 2305.14324, over all thresholds in O(N log N): pairs are sorted by |D|
once, and accuracy changes by whole groups of equal |D|. (VideoAlign's code moves pairs of equal |D| one by one, which can report a
value that no threshold reaches, and never tries to foretell no tie at all.)

A temperature T makes D a log-odds: P(a preferred) = sigmoid(D / T). It is fitted by cross-entropy, in which a tie counts half for
each and a preference (n + 1) / (n + 2) for its side, n the weight of all preferences: the targets of Platt, "Probabilistic Outputs
for Support Vector Machines", 1999, where each pair stands in both orders. With targets of 1 the best T of pairs that are all right
would be 0, at which a wrong pair elsewhere costs infinitely much. The log-likelihood that is reported has no such targets. The
expected calibration error is the mean gap between sigmoid(|D| / T) and accuracy over bins of equal weight by |D|.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "accuracy",
    "calibrated",
    "calibration_error",
    "fit_temperature",
    "log_loss",
    "reliability",
    "with_ties",
]


def accuracy(difference: Tensor, label: Tensor, weights: Tensor | None = None, *, tie: float = 0.5) -> Tensor:
    """(W,) the share of preferences that scores agree with; NaN where there are none.

    Args:
        tie: what a pair counts for that the scores do not tell apart.
    """
    weights = _rows(difference, weights)
    right = torch.where(difference == 0, tie, (difference.sign() == label).double())
    return _mean(right, weights * (label != 0))


def with_ties(difference: Tensor, label: Tensor, weights: Tensor | None = None, *, threshold: float = 0.0) -> Tensor:
    """(W,) the share of pairs, ties included, whose label is foretold, where |D| ≤ threshold foretells a tie."""
    told = torch.where(difference.abs() <= threshold, 0.0, difference.sign())
    return _mean((told == label).double(), _rows(difference, weights))


def calibrated(difference: Tensor, label: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(W,) the highest `with_ties` over all thresholds from 0, and the least threshold that reaches it."""
    weights = _rows(difference, weights)
    size, order = difference.abs().sort()
    right = (difference.sign() == label).double()
    gain = (label == 0).double() - right  # of foretelling a tie
    gained = (weights * gain)[:, order].cumsum(1)
    last = torch.cat([size[1:] != size[:-1], torch.ones(1, dtype=torch.bool)])  # of its group of equals
    gained = torch.cat([gained.new_zeros(len(weights), 1), gained[:, last]], dim=1)
    most, best = gained.max(1)
    return _mean(right, weights) + most / weights.sum(1), torch.cat([size.new_zeros(1), size[last]])[best]


def fit_temperature(difference: Tensor, label: Tensor, weights: Tensor | None = None) -> float:
    """The temperature, above 0, that minimises the loss against Platt's targets; infinite if chance does no worse.

    The loss is convex in 1 / T, whose slope is followed to 0 by bisection.
    """
    mine = _rows(difference, weights)[0]
    scale = float(difference.abs().max()) if len(difference) else 0.0
    if scale == 0:
        return math.inf
    n = (mine * (label != 0)).sum()
    d, target = difference.double() / scale, (label.double() * n / (n + 2) + 1) / 2

    def slope(k: float) -> float:
        return float((mine * d * (torch.sigmoid(k * d) - target)).sum())

    if slope(0.0) >= 0:
        return math.inf
    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return scale / high


def log_loss(difference: Tensor, label: Tensor, temperature: float, weights: Tensor | None = None) -> float:
    """The mean negative log-likelihood in nats: 0.693 by chance."""
    logit = difference.double() / temperature
    target = (label.double() + 1) / 2
    terms = torch.nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
    return float(_mean(terms, _rows(difference, weights)))


def reliability(
    difference: Tensor, label: Tensor, temperature: float, weights: Tensor | None = None, bins: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """Of pairs with a preference, in at most `bins` bins of equal weight by |D|: mean confidence, accuracy and count."""
    return _binned(difference, label, temperature, weights, bins)[:3]


def calibration_error(
    difference: Tensor, label: Tensor, temperature: float, weights: Tensor | None = None, bins: int = 10
) -> float:
    """The mean gap of confidence and accuracy over pairs with a preference; NaN where there are none."""
    confidence, right, _, weight = _binned(difference, label, temperature, weights, bins)
    return float((weight * (confidence - right).abs()).sum() / weight.sum())


def _binned(
    difference: Tensor, label: Tensor, temperature: float, weights: Tensor | None, bins: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reliability`, and the weight of each bin. A pair is in the bin that the middle of its weight falls into."""
    weights = _rows(difference, weights)[0]
    kept = (label != 0) & (weights > 0)
    logit, order = (difference[kept].double().abs() / temperature).sort(stable=True)
    difference, label, weights = (of[kept][order] for of in (difference, label, weights))
    right = torch.where(difference == 0, 0.5, (difference.sign() == label).double())
    middle = (weights.cumsum(0) - weights / 2) / weights.sum()
    place = (middle * min(bins, len(logit))).long().unique_consecutive(return_inverse=True)[1]
    weight = place.bincount(weights)
    confidence, accurate = (place.bincount(weights * of) / weight for of in (torch.sigmoid(logit), right))
    return confidence, accurate, place.bincount(), weight


def _rows(difference: Tensor, weights: Tensor | None) -> Tensor:
    """(W, N)"""
    weights = torch.ones(len(difference)) if weights is None else weights
    return weights.double().reshape(-1, len(difference))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (weights * values).sum(1) / weights.sum(1)
