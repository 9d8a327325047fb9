"""Resampling: from the log-weights of a population to the ancestors of the next one.

A population is P groups (prompts) of K particles with log-weights `log_w` (P, K), unnormalised and carried since the
last resampling. Groups never meet: functions work along the last axis and a group draws from its own generator. With
W = softmax(log_w), particle i gets c_i >= 0 offspring, Σ c_i = K:

| scheme | offspring | law |
|---|---|---|
| multinomial | K independent draws | unbiased |
| stratified | one point in each [m, m+1) of the cumulated K·W | unbiased, −2 < c − KW < 2 |
| systematic | the same with one shared uniform | unbiased, −1 < c − KW < 1 |
| residual | ⌊KW⌋ copies, the rest multinomial on the fractions | unbiased, c >= ⌊KW⌋ |
| ssp | fractions paired off until each is 0 or 1 | unbiased, −1 < c − KW < 1, ordering consistent |
| killing | i survives with probability W_i / max W, else is redrawn | unbiased |
| single | one draw, replicated K times (SVDD's soft selection) | unbiased, maximal variance |
| argmax | the best particle K times, ties to the lowest index | biased: log_z means nothing after it |
| none | each particle once, whatever the weights | leaves the weights to the caller |

Unbiased means E[c_i] = K·W_i, which keeps exp(log_z) unbiased. Equal weights give the identity exactly with stratified,
systematic, residual, ssp and killing. Survivors keep their slot and copies fill the slots of the dead.

K·W, or its cumulated sum, within `SNAP` of an integer is taken to be that integer: else round-off decides ⌊K·(1/K)⌋,
which is 0 at K = 49 in float64 and at K = 41 in float32. The bias this allows is at most `SNAP` copies.

Sources: Chopin & Papaspiliopoulos, An Introduction to Sequential Monte Carlo (2020), ch. 9; for ssp Gerber, Chopin &
Whiteley (2019, arXiv:1707.01845); for single Li
et al. (2024, arXiv:2408.08252). Multinomial points are left unsorted: only the counts matter here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["UNBIASED", "Degenerate", "Scheme", "ess", "log_mean_exp", "normalise", "offspring"]
__all__ += ["place", "resample", "soft_mean", "temper"]

Scheme = Literal["multinomial", "stratified", "systematic", "residual", "ssp", "killing", "single", "argmax", "none"]
UNBIASED: frozenset[str] = frozenset(get_args(Scheme)) - {"argmax", "none"}
SNAP = 1e-9


class Degenerate(ValueError):
    """Every particle of some group has weight zero. `groups` lists their indices."""

    def __init__(self, groups: Sequence[int]) -> None:
        self.groups = tuple(groups)
        super().__init__(f"no particle is left to draw from: all log-weights are -inf in group(s) {list(self.groups)}")


def log_mean_exp(log_w: Tensor) -> Tensor:
    """What a resampling adds to log_z: log (1/K) Σ exp(log_w), (P,) float64; -inf where no particle lives."""
    return _checked(log_w).logsumexp(dim=1) - math.log(log_w.shape[1])


def soft_mean(values: Tensor, beta: float) -> Tensor:
    """β·log mean exp(v/β) over the first axis: the soft value of draws. Their maximum at β = 0, their mean at infinity."""
    if beta == 0:
        return values.amax(0)
    if math.isinf(beta):
        return values.mean(0)
    return beta * (torch.logsumexp(values / beta, 0) - math.log(len(values)))


def normalise(log_w: Tensor) -> Tensor:
    """Weights (P, K), float64, that sum to one in each group; a log-weight of -inf is a dead particle.

    Raises:
        ValueError: a log-weight is NaN or +inf, or the shape is not (P, K).
        Degenerate: a group has no living particle.
    """
    w = _relative(_checked(log_w))
    return w / w.sum(dim=1, keepdim=True)


def ess(log_w: Tensor) -> Tensor:
    """Effective sample size (Σw)² / Σw² of accumulated weights: (P,) float64 in [1, K]; exactly K for equal weights."""
    w = _relative(_checked(log_w))
    return w.sum(dim=1).square() / w.square().sum(dim=1)


def temper(
    log_w: Tensor,
    increment_at: Callable[[Tensor], Tensor],
    floor: float | Tensor,
    target_ess: float | Tensor,
    halvings: int = 50,
) -> Tensor:
    """The largest tempering exponent the population can bear, per group.

    Bisection between `floor` and 1 for ESS(log_w + increment_at(gamma)) = target_ess. ESS falls along gamma when
    `log_w` is flat; on accumulated weights it may not be monotone, and the result is then one crossing among several.

    Args:
        log_w: (P, K) accumulated log-weights.
        increment_at: maps gamma (P, 1), float64, to the increments (P, K) that gamma would add.
        floor: the exponent reached so far, in [0, 1]: a number or (P,).
        target_ess: the effective sample size to keep, in [1, K]: a number or (P,).
        halvings: steps of the bisection; 30 give 1e-9.

    Returns:
        (P,) float64 in [floor, 1]: 1 where the target holds there, `floor` where it holds at neither end.
    """
    log_w = _checked(log_w)
    low = torch.as_tensor(floor, dtype=torch.float64, device=log_w.device).expand(len(log_w))
    high = torch.ones_like(low)
    if not ((low >= 0) & (low <= 1)).all():
        raise ValueError(f"floor must be in [0, 1]; got {floor}")

    def bears(gamma: Tensor) -> Tensor:
        return ess(log_w + increment_at(gamma[:, None])) >= target_ess

    low = torch.where(bears(high), high, low)
    for _ in range(halvings):
        middle = (low + high) / 2
        good = bears(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return low


def resample(log_w: Tensor, scheme: Scheme, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws the ancestors of the next population.

    How many numbers a generator gives depends on the scheme and K only, never on the weights.

    Args:
        log_w: (P, K) log-weights.
        scheme: a row of the module's table.
        generators: P CPU generators, one a group. One object may serve several groups, which then take turns.

    Returns:
        (P, K) int64 on the device of `log_w`: slot k of the next population continues particle ancestors[p, k] of its
        group. A survivor keeps its slot. Weights restart at 0 (except for "none").

    Raises:
        ValueError: NaN or +inf weights, a wrong number of generators, or an unknown scheme.
        Degenerate: a group has no living particle (not for "none").
    """
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be one of {', '.join(get_args(Scheme))}; got {scheme!r}")
    log_weights = _checked(log_w.detach().cpu())
    groups, size = log_weights.shape
    if len(generators) != groups:
        raise ValueError(f"resampling needs one generator a group: got {len(generators)} for {groups} groups")
    weights = torch.ones_like(log_weights) if scheme == "none" else normalise(log_weights)
    draws = {"systematic": 1, "single": 1, "argmax": 0, "none": 0, "killing": 2 * size}.get(scheme, size)
    uniforms = torch.empty(groups, draws, dtype=torch.float64)
    for row, generator in zip(uniforms, generators, strict=True):
        row.uniform_(generator=generator)
    return place(offspring(weights, scheme, uniforms)).to(log_w.device)


def offspring(weights: Tensor, scheme: Scheme, uniforms: Tensor) -> Tensor:
    """Copies of each particle (P, K), int64 with row sums K, from normalised weights (P, K), both on the CPU.

    All randomness is in `uniforms` (P, n), float64 in [0, 1): n is 0 for argmax and none, 1 for systematic and single,
    2K for killing, else K.
    """
    size = weights.shape[1]
    if scheme == "none":
        return torch.ones_like(weights, dtype=torch.int64)
    if scheme in ("single", "argmax"):
        one = weights.argmax(dim=1, keepdim=True) if scheme == "argmax" else _invert(weights, size * uniforms)
        return torch.zeros_like(weights, dtype=torch.int64).scatter_(1, one, size)
    if scheme == "multinomial":
        return _count(weights, size * uniforms)
    if scheme in ("stratified", "systematic"):
        cell = torch.arange(size, dtype=torch.float64)
        points = torch.minimum(cell + uniforms, torch.nextafter(cell + 1, cell))  # m + U may round up to m + 1
        return _count(weights, points)
    if scheme == "killing":
        survive, redraw = uniforms.split(size, dim=1)
        alive = survive < weights / weights.amax(dim=1, keepdim=True)
        return alive + _count(weights, size * redraw, ~alive)
    whole = (size * weights + SNAP).floor()
    fraction = (size * weights - whole).clamp(min=0)
    whole = whole.long()
    if scheme == "residual":
        missing = size - whole.sum(dim=1, keepdim=True)
        mass = torch.where(missing > 0, fraction, weights)  # the second has no say: nothing is missing there
        return whole + _count(mass, size * uniforms, torch.arange(size) < missing)
    return _pair_off(whole, fraction, uniforms)


def place(counts: Tensor) -> Tensor:
    """Ancestors (P, K) with these offspring counts (P, K): survivors in their own slot, copies in the free ones."""
    groups, size = counts.shape
    own = torch.arange(size, device=counts.device).expand(groups, size).contiguous()
    copies = own.flatten().repeat_interleave((counts - 1).clamp(min=0).flatten())
    return own.masked_scatter(counts == 0, copies)  # a group has as many copies as free slots, so rows do not mix


def _pair_off(whole: Tensor, fraction: Tensor, uniforms: Tensor) -> Tensor:
    """Srinivasan's sampling process: merge fractions two at a time, keeping means, until each is 0 or 1."""
    rows = torch.arange(len(whole))
    counts, carrier, held = whole.clone(), torch.zeros_like(rows), fraction[:, 0]
    for j in range(1, whole.shape[1]):
        total = held + fraction[:, j]
        full = total >= 1  # one of the two becomes 1 and the other carries the rest; else one becomes 0
        stays = uniforms[:, j] * torch.where(full, 2 - total, total) < torch.where(full, 1 - fraction[:, j], held)
        # `stays`: the carrier takes what it can. It is then settled where full, and goes on carrying where not.
        winner = torch.where(stays, carrier, j)
        counts[rows, winner] += full.long()
        carrier = torch.where(full & stays, j, torch.where(full, carrier, winner))
        held = torch.where(full, total - 1, total)
    counts[rows, carrier] += whole.shape[1] - counts.sum(dim=1)  # the last fraction is 0 or 1 up to round-off
    return counts


def _count(mass: Tensor, points: Tensor, where: Tensor | None = None) -> Tensor:
    """How many of the points (on [0, K), optionally only those in `where`) fall to each particle."""
    hits = torch.ones_like(points, dtype=torch.int64) if where is None else where.long().expand_as(points)
    return torch.zeros_like(mass, dtype=torch.int64).scatter_add_(1, _invert(mass, points), hits)


def _invert(mass: Tensor, points: Tensor) -> Tensor:
    """Inverse CDF of `mass` (P, K) stretched to [0, K) at `points` (P, n) below K. Never an index without mass."""
    size = mass.shape[1]
    cumulated = mass.cumsum(dim=1)
    cumulated = size * (cumulated / cumulated[:, -1:])  # ends at exactly K from the last living particle on
    cumulated = torch.where((cumulated - cumulated.round()).abs() < SNAP, cumulated.round(), cumulated)
    return torch.searchsorted(cumulated, points, right=True)


def _relative(log_w: Tensor) -> Tensor:
    """Weights relative to the largest of the group."""
    top = log_w.amax(dim=1, keepdim=True)
    if (top == -torch.inf).any():
        raise Degenerate((top[:, 0] == -torch.inf).nonzero()[:, 0].tolist())
    return (log_w - top).exp()


def _checked(log_w: Tensor) -> Tensor:
    """The log-weights in float64, or an error."""
    if log_w.ndim != 2 or log_w.shape[1] == 0:
        raise ValueError(f"log-weights must be (groups, particles); got {tuple(log_w.shape)}")
    wrong = log_w.isnan() | (log_w == torch.inf)
    if wrong.any():
        group, particle = wrong.nonzero()[0].tolist()
        got = f"{log_w[group, particle].item()} at group {group}, particle {particle}"
        raise ValueError(f"log-weights must be finite, or -inf for a dead particle; got {got}")
    return log_w.to(torch.float64)
