"""Preferences within items: the better sample must gain more likelihood, relative to the reference, than the worse.

Every row has a score, β times its log-ratio: on `Steps` l_θ − l_ref of the step's log-density; on `Noised` rows (e_ref
− e_θ)/2 of the denoising error, so that published β of Diffusion-DPO keep their meaning. With h = s_w − s_l of a pair,

    logistic   −(1 − a)·log σ(h) − a·log σ(−h)      DPO; a is the label smoothing
    hinge      max(0, 1 − h)                        SLiC
    ipo        (h/β − 1/2β)²                        IPO

on steps this is D3PO, each step of both trajectories being one item; on noised rows Diffusion-DPO, and Flow-DPO where
the network predicts velocities. A tie has h = 0: a constant, log 2 for "logistic", and no gradient.

Refinements, alone or together:

    clamp             log-ratios are held in [log(1 − c), log(1 + c)], where their gradient ends              D3PO
    sft               + η·(−l_w), or + η·e_w                                                                  RPO
    margin_weight     h ← (h − (m_w − m_l))/w with the column `margin`, Σ of the other weighted rewards        MODPO
    dynamic (w, k)    h ← h·(1 + w·(1 − exp(−k·δ))), δ = r_w − r_l of the column `reward`, at least 0         MM-RLHF
    schedule          "one_minus_t_sq": s ← s·(1 − t)², which turns a loss on velocities into one on noise    Flow-DPO
    safeguard         the loser's gradient is scaled by min(1, |g_w|²/⟨g_w, g_l⟩) where the gradients of the
                      two errors with respect to the outputs agree, so that, to first order in the outputs,
                      learning from the pair does not raise the winner's error                                SDPO

Items of more than two members are lists: every pair with ψ_i > ψ_j counts Δ_ij = |2^ψ_i − 2^ψ_j|·|1/log(1 + τ_i) −
1/log(1 + τ_j)| times, ψ the quality in [0, 1] and τ the rank of the score, highest first (LiPO-λ).

Sources: DPO, 2305.18290; D3PO, 2311.13231; Diffusion-DPO, 2311.12908; Flow-DPO, 2501.13918; SLiC-HF, 2305.10425; IPO,
2310.12036; label smoothing, cDPO (Mitchell 2023, a note); RPO, 2405.16436; LiPO, 2402.01878; MODPO, 2310.03708;
MM-RLHF, 2502.10391; Diffusion-SDPO (SDPO), 2511.03317.

Deviations: log σ where D3PO takes the logarithm of a sigmoid. Ties in LiPO's ranks, as between all members before the
first update, go to the worse member: with any order independent of ψ a list of equal scores could not begin to learn
alike from every arrangement. δ has no upper limit besides the factor's own, 1 + w. A margin_weight below 0.05 is an
error, not a floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from samplers import Policy
from samplers.levels import at_least_float32

from ..batches import Batch, Noised, Steps
from ..evidence import Reduction, evidence, reduced, reference_evidence, target
from .base import Metrics, Objective

__all__ = ["Comparison", "Pairwise", "compared", "lambda_weights", "safe_share"]

Comparison = Literal["logistic", "hinge", "ipo"]


def compared(kind: Comparison, h: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The loss of score differences h, elementwise; see the module docstring."""
    if kind == "logistic":
        return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
    return torch.relu(1 - h) if kind == "hinge" else ((h - 0.5) / beta).square()


def lambda_weights(score: Tensor, quality: Tensor) -> Tensor:
    """(N, K, K) LiPO's Δ_ij where quality_i > quality_j, 0 elsewhere.

    Args:
        score: (N, K), by which members are ranked.
        quality: (N, K) in [0, 1], NaN for members to leave out.
    """
    (s_i, s_j), (q_i, q_j) = ((v[:, :, None], v[:, None, :]) for v in (score, quality))
    tied = s_i == s_j
    ahead = (s_j > s_i) | (tied & (q_j < q_i))
    rank = 0.5 + ahead.to(score).sum(2) + 0.5 * (tied & (q_i == q_j)).to(score).sum(2)  # (N, K) from 1
    gain, discount = torch.exp2(quality), 1 / torch.log1p(rank)
    weight = (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()
    return weight.masked_fill(~(q_i > q_j), 0.0)


def safe_share(winner: Tensor, loser: Tensor) -> Tensor:
    """(N,) the largest share in [0, 1] of the loser's ascent that does not raise the winner's error.

    Args:
        winner, loser: (N, …) gradients of the two errors with respect to the outputs, up to one factor.
    """
    own, cross = (winner * winner).flatten(1).sum(1), (winner * loser).flatten(1).sum(1)
    return torch.where(cross > own, own / cross.where(cross > own, torch.ones_like(cross)), 1.0)


class Pairwise(Objective):
    """Learns from preferences: DPO on steps (D3PO), on noise (Diffusion-DPO, Flow-DPO), on lists (LiPO).

    Args:
        kind: the loss of a pair.
        beta: sharpness; None is the published value under "mean": 0.1 on steps (D3PO), 5000 on noised rows
            (Diffusion-DPO). Flow-DPO's users take 100 to 8000.
        reduction: over the elements of a sample; see `align.evidence`.
        clamp: D3PO's half-width of the band for ratios, published 0.1; None for no band.
        sft: η, weight of the winner's own evidence; RPO's users take 0.2 to 1. A tie has no winner.
        margin_weight: w in [0.05, 1], the weight of this preference among several rewards; None without margins.
        dynamic: (w, k), published (0.5, 0.5); None for one β.
        schedule: how β depends on t; "one_minus_t_sq" needs noised rows of a network that predicts velocities.
        label_smoothing: a in [0, 0.5), the chance that a preference is told the wrong way round.
        safeguard: whether the loser's gradient is limited; needs noised pairs.
    """

    source = "data"
    takes = (Steps, Noised)
    members = 0

    def __init__(
        self,
        kind: Comparison = "logistic",
        beta: float | None = None,
        reduction: Reduction = "mean",
        clamp: float | None = None,
        sft: float = 0.0,
        margin_weight: float | None = None,
        dynamic: tuple[float, float] | None = None,
        schedule: Literal["constant", "one_minus_t_sq"] = "constant",
        label_smoothing: float = 0.0,
        safeguard: bool = False,
    ) -> None:
        if kind not in get_args(Comparison) or schedule not in ("constant", "one_minus_t_sq"):
            raise ValueError(
                f"kind must be one of {', '.join(get_args(Comparison))} and schedule constant or one_minus_t_sq; "
                f"got {kind!r} and {schedule!r}"
            )
        if beta is None and reduction != "mean":
            raise ValueError("published beta belong to reduction='mean': pass beta, the published one divided by D")
        ranges = {
            "beta > 0": beta is None or beta > 0,
            "0 ≤ clamp < 1": clamp is None or 0 <= clamp < 1,
            "sft ≥ 0": sft >= 0,
            "0.05 ≤ margin_weight ≤ 1": margin_weight is None or 0.05 <= margin_weight <= 1,
            "dynamic ≥ 0": dynamic is None or min(dynamic) >= 0,
            "0 ≤ label_smoothing < 0.5": 0 <= label_smoothing < 0.5,
            "label_smoothing = 0 unless logistic": label_smoothing == 0 or kind == "logistic",
        }
        if broken := [rule for rule, kept in ranges.items() if not kept]:
            raise ValueError(f"Pairwise needs {' and '.join(broken)}; got {self.arguments}")
        self.kind: Comparison = kind
        self.reduction: Reduction = reduction
        self.beta, self.clamp, self.sft = beta, clamp, sft
        self.margin_weight, self.dynamic, self.schedule = margin_weight, dynamic, schedule
        self.label_smoothing, self.safeguard = label_smoothing, safeguard
        self.needs = ("quality", *["margin"] * (margin_weight is not None), *["reward"] * (dynamic is not None))

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        rows, members = batch.rows, batch.members
        assert isinstance(rows, (Steps, Noised))
        beta = self.beta or (0.1 if isinstance(rows, Steps) else 5000.0)
        quality = self._quality(batch)
        best = quality.nan_to_num(-torch.inf).argmax(1, keepdim=True)
        worst = quality.nan_to_num(torch.inf).argmin(1, keepdim=True)  # the same as the best in a tie
        now = self._evidence(policy, rows, best)
        before = reference_evidence(policy, rows, self.reduction)

        log_ratio = (now - before) if isinstance(rows, Steps) else (now - before) / 2
        if self.clamp is not None:
            band = torch.tensor([-self.clamp, self.clamp], dtype=torch.float64).log1p().tolist()
            log_ratio = log_ratio.clamp(*band)
        score = (beta * self._schedule(policy, rows) * log_ratio).reshape(-1, members)

        def apart(values: Tensor) -> Tensor:
            """(N,) best minus worst; (N, K, K) all differences in a list."""
            if members > 2:
                return values[:, :, None] - values[:, None, :]
            return (values.gather(1, best) - values.gather(1, worst)).squeeze(1)

        def told(name: str) -> Tensor:
            """Differences of a column; what it says of members that were not judged is not read."""
            return apart(batch.column(name).to(score).reshape(-1, members).masked_fill(quality.isnan(), 0.0))

        h = self._refined(apart(score), told)
        each = compared(self.kind, h, beta, self.label_smoothing)
        if members > 2:
            weights = lambda_weights(score.detach(), quality)
            each = torch.where(weights > 0, weights * each, 0.0).sum((1, 2))
        winner, loser = (now.reshape(-1, members).gather(1, which).squeeze(1) for which in (best, worst))
        loss = batch.mean(each)
        if self.sft:
            loss = loss - self.sft * batch.mean((best != worst).squeeze(1).to(now) * winner)
        margin = (score.gather(1, best) - score.gather(1, worst)).detach()
        return loss, {
            "accuracy": ((margin > 0).to(now) + 0.5 * (margin == 0).to(now)).mean(),
            "margin": margin.mean(),
            **self._watched(rows, winner.detach(), loser.detach(), before.reshape(-1, members), best, worst),
        }

    def _quality(self, batch: Batch) -> Tensor:
        """(N, K); raises if the items are no pairs or lists this loss can read."""
        if batch.members < 2:
            raise ValueError("preferences compare the members of an item, so an item needs at least 2; got 1")
        if self.safeguard and batch.members > 2:
            raise ValueError(f"the safeguard limits the loser of a pair; got items of {batch.members}: leave it out")
        quality = batch.column("quality").reshape(-1, batch.members)
        if batch.members > 2 and bool(((quality < 0) | (quality > 1)).any()):
            raise ValueError(
                f"qualities in lists must lie in [0, 1]; got [{float(quality.min()):g}, {float(quality.max()):g}]: "
                "rescale each list, as align.advantages.normalised does"
            )
        return quality

    def _evidence(self, policy: Policy, rows: Steps | Noised, best: Tensor) -> Tensor:
        if not self.safeguard:
            return evidence(policy, rows, self.reduction)
        if not isinstance(rows, Noised):
            raise ValueError("the safeguard compares denoising errors: it needs noised rows, not steps")
        gap = at_least_float32(policy.output(rows.x.to(policy.dtype), rows.at, rows.cond)) - target(policy, rows)
        now = reduced(-gap.square().flatten(1).sum(1), rows.x0, self.reduction)
        pair, won = gap.detach().unflatten(0, (-1, 2)), best.squeeze(1)
        which = torch.arange(len(pair), device=won.device)
        share = torch.ones_like(now).reshape(-1, 2)
        share[which, 1 - won] = safe_share(pair[which, won], pair[which, 1 - won])
        share = share.flatten()
        return share * now + (1 - share) * now.detach()

    def _schedule(self, policy: Policy, rows: Steps | Noised) -> Tensor | float:
        if self.schedule == "constant":
            return 1.0
        if not isinstance(rows, Noised) or policy.prediction != "flow":
            raise ValueError(
                f"schedule='one_minus_t_sq' belongs to noised rows of a network that predicts velocities; got "
                f"{type(rows).__name__} of one that predicts {policy.prediction!r}: choose schedule='constant'"
            )
        return (1 - rows.at.sigma).square().to(at_least_float32(rows.x0))

    def _refined(self, h: Tensor, column: Callable[[str], Tensor]) -> Tensor:
        """Scaled by the rewards' differences, and cleared of the other rewards' margin."""
        if self.dynamic is not None:
            most, rate = self.dynamic
            h = h * (1 + most * (1 - torch.exp(-rate * column("reward").clamp(min=0))))
        return h if self.margin_weight is None else (h - column("margin")) / self.margin_weight

    @staticmethod
    def _watched(rows, winner: Tensor, loser: Tensor, before: Tensor, best: Tensor, worst: Tensor) -> Metrics:
        """Evidence of the best and the worst. A `winner_drift` above 1.1 says that margins grow by unlearning both."""
        then, then_loser = before.gather(1, best).squeeze(1), before.gather(1, worst).squeeze(1)
        if isinstance(rows, Steps):
            return {"winner_log_ratio": (winner - then).mean(), "loser_log_ratio": (loser - then_loser).mean()}
        return {"winner_error": -winner.mean(), "loser_error": -loser.mean(), "winner_drift": (winner / then).mean()}
