"""Losses of preference learning: how far a head's scores are from what people said.

With D = r_first - r_second of a pair whose first is the better one, l(D) = -log σ(D):

    BradleyTerry    l(D - margin); a tie is l(D)/2 + l(-D)/2, less log 2, so that it is 0 at its best (PickScore, arXiv 2305.01569)
      smoothing e   (1 - e) l(D) + e l(-D)
      flips e       ((1 - e) l(D) - e l(-D)) / (1 - 2e): unbiased for the clean loss if labels are wrong at rate e
                    (Natarajan et al., "Learning with Noisy Labels", 2013)
      centring c    + c (r_first + r_second)², which fixes the constant that preferences leave open (TRL, c = 0.01)
    RaoKupper       wins l(D - log θ); ties l(D - log θ) + l(-D - log θ) - log(θ² - 1)   (VideoAlign, arXiv 2501.13918, θ = 5)
    PlackettLuce    -Σ_i log softmax_i over those not placed before i; equal places by Breslow's rule, the same denominator
    Distributional  -log Φ((μ_1 - μ_2) / sqrt(v_1 + v_2)) + penalty · mean variance          (arXiv 2312.08358)

Deviation: the released code of the last takes σ(sqrt(2π) z) for Φ(z), which is close and not exact; this is Φ itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.base import Configurable
from rewards.heads import Raw

from .data import Comparisons

__all__ = ["BradleyTerry", "Distributional", "Loss", "PlackettLuce", "RaoKupper"]

Ties = Literal["half", "drop"]


class Loss(Configurable, ABC):
    """A loss of scores (K, R) of the rows of comparisons.

    Attributes:
        needs_variance: whether the head must say how sure it is.
    """

    needs_variance: bool = False

    @abstractmethod
    def terms(self, data: Comparisons, raw: Raw) -> tuple[Tensor, Tensor]:
        """(K, T) what each term of the loss is, and (T,) the record it comes from; K members learn by themselves."""

    def _pairs(self, data: Comparisons, ties: bool) -> Tensor:
        """Numbers of the pairs that count."""
        return torch.arange(len(data.pair)) if ties else (~data.tied).nonzero()[:, 0]


class BradleyTerry(Loss):
    """Preferences as the sigmoid of a difference, with margins, ties, smoothing and wrong labels.

    Args:
        margin: by which the better one must lead.
        own_margins: times the margin the record gives, added to that.
        smoothing: the share of certainty taken from labels, 0 to 0.5.
        flips: the known rate at which labels are wrong, 0 to 0.5.
        centring: weight of the squared sum of scores; 0.01 in TRL.
        ties: "half" pulls tied samples together, "drop" leaves them out.
    """

    def __init__(
        self,
        margin: float = 0.0,
        own_margins: float = 0.0,
        smoothing: float = 0.0,
        flips: float = 0.0,
        centring: float = 0.0,
        ties: Ties = "half",
    ) -> None:
        for word, value in (("smoothing", smoothing), ("flips", flips)):
            if not 0 <= value < 0.5:
                raise ValueError(f"{word} must lie in [0, 0.5); got {value}")
        if smoothing and flips:
            raise ValueError("smoothing and flips undo one another: give one of them")
        if ties not in ("half", "drop") or centring < 0:
            raise ValueError(f'ties is "half" or "drop" and centring ≥ 0; got {ties!r} and {centring}')
        self.margin, self.own_margins, self.smoothing = margin, own_margins, smoothing
        self.flips, self.centring, self.ties = flips, centring, ties

    def terms(self, data: Comparisons, raw: Raw) -> tuple[Tensor, Tensor]:
        kept = self._pairs(data, self.ties == "half")
        better, worse = raw.mean[:, data.first[kept]], raw.mean[:, data.second[kept]]
        tied, lead = data.tied[kept], better - worse
        wanted = torch.where(tied, 0.0, self.margin + self.own_margins * data.margin[kept])
        losses = torch.where(tied, _even(lead), self.decided(lead - wanted))
        return losses + self.centring * (better + worse).square(), data.pair[kept]

    def decided(self, lead: Tensor) -> Tensor:
        """The loss of pairs that are no ties."""
        right, wrong = -F.logsigmoid(lead), -F.logsigmoid(-lead)
        if self.flips:
            return ((1 - self.flips) * right - self.flips * wrong) / (1 - 2 * self.flips)
        return (1 - self.smoothing) * right + self.smoothing * wrong


class RaoKupper(Loss):
    """Preferences and ties: within log theta of one another, a tie is likely (Rao and Kupper 1967).

    Args:
        theta: above 1; 5 in VideoAlign.
    """

    def __init__(self, theta: float = 5.0) -> None:
        if not theta > 1:
            raise ValueError(f"theta must be above 1, where ties are possible; got {theta}")
        self.theta = theta

    def terms(self, data: Comparisons, raw: Raw) -> tuple[Tensor, Tensor]:
        lead, wall = raw.mean[:, data.first] - raw.mean[:, data.second], math.log(self.theta)
        win = -F.logsigmoid(lead - wall)
        tie = win - F.logsigmoid(-lead - wall) - math.log(self.theta**2 - 1)
        return torch.where(data.tied, tie, win), data.pair


class PlackettLuce(Loss):
    """Rankings as choices of the best of what is left, one after the other (Plackett 1975, Luce 1959)."""

    def terms(self, data: Comparisons, raw: Raw) -> tuple[Tensor, Tensor]:
        stages = data.staged.nonzero()[:, 0]
        # rows of a record are consecutive: a window of the longest record around each row holds all its rivals
        longest = int(data.record.bincount().max())
        start = torch.searchsorted(data.record, data.record[stages])
        rivals = (start[:, None] + torch.arange(longest)).clamp(max=len(data.record) - 1)  # (T, M)
        inside = (start[:, None] + torch.arange(longest) < len(data.record)) & (
            data.record[rivals] == data.record[stages][:, None]
        )
        left = inside & (data.place[rivals] >= data.place[stages][:, None])
        scores = raw.mean[:, rivals].masked_fill(~left, -torch.inf)  # (K, T, M)
        return scores.logsumexp(dim=-1) - raw.mean[:, stages], data.record[stages]


class Distributional(Loss):
    """Preferences as the probability that one normal variable exceeds another; needs a head with `variance`.

    Args:
        penalty: weight of the mean variance of the two, without which scale and variance may grow together.
        ties: "half" or "drop", as in `BradleyTerry`.
    """

    needs_variance = True

    def __init__(self, penalty: float = 0.01, ties: Ties = "half") -> None:
        if ties not in ("half", "drop") or penalty < 0:
            raise ValueError(f'ties is "half" or "drop" and penalty ≥ 0; got {ties!r} and {penalty}')
        self.penalty, self.ties = penalty, ties

    def terms(self, data: Comparisons, raw: Raw) -> tuple[Tensor, Tensor]:
        if raw.variance is None:
            raise ValueError("Distributional needs a head that says how sure it is: MLP(variance=True)")
        kept = self._pairs(data, self.ties == "half")
        first, second = data.first[kept], data.second[kept]
        both = raw.variance[:, first] + raw.variance[:, second]
        z = (raw.mean[:, first] - raw.mean[:, second]) / both.sqrt()
        right, wrong = -torch.special.log_ndtr(z), -torch.special.log_ndtr(-z)
        losses = torch.where(data.tied[kept], (right + wrong) / 2 - math.log(2), right)
        return losses + self.penalty * both / 2, data.pair[kept]


def _even(lead: Tensor) -> Tensor:
    """The loss of a tie."""
    return -(F.logsigmoid(lead) + F.logsigmoid(-lead)) / 2 - math.log(2)
