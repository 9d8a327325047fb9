"""Weighted denoising: fine-tuning on samples, more on the better ones.

With e the denoising error of a row and r its reward,

    L = mean w·e,     w = exp(r/τ) / mean exp(r/τ)      ("softmax")
                      w = 1[best of its group] / mean    ("top")
                      w = 1                              ("none")

"softmax" is reward-weighted regression; without the cap its optimum over all models is the data's law tilted by
exp(r/τ), and τ → ∞ is "none". "top" distils best-of-N sampling into the weights. "none" is supervised fine-tuning and
needs no column.

The means in w run over the whole update, so that w is the same however an update is cut into micro-batches and devices.
A maximum cannot be averaged, so exp is kept in range by one fixed shift instead: exp((r − reference)/τ) in float64,
which holds 700 temperatures either side of `reference`. The shift cancels; rewards out of range are an error.

Sources: reward-weighted regression, Peters & Schaal 2007; for diffusion, 2302.12192; Flow-RWR, 2501.13918, which takes
τ = 1 without normalisation; the cap, advantage-weighted regression 1910.00177.

Deviations: weights are normalised to mean 1, so that the learning rate does not depend on the level of the rewards; the
cap applies to normalised weights, which are not normalised again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from samplers import Policy

from ..batches import Batch, Noised
from ..evidence import Reduction, errors
from .base import Metrics, Objective

__all__ = ["Weighted", "Weighting"]

Weighting = Literal["softmax", "top", "none"]
RANGE = 650.0  # temperatures; exp of 709 overflows float64, and sums need room


class Weighted(Objective):
    """Fine-tunes on samples weighted by reward: RWR, Flow-RWR, best-of-N distillation, plain SFT.

    Args:
        kind: how samples are weighted; see the module docstring. "softmax" reads the column `reward`, "top" the column
            `quality`, which is 1 for the best of a group (several may tie).
        temperature: τ, in units of the reward.
        cap: no weight exceeds this many times the mean; None for no cap.
        reference: a typical reward, which changes no weight but keeps them computable.
        reduction: over the elements of a sample; see `align.evidence`.
    """

    takes = (Noised,)

    def __init__(
        self,
        kind: Weighting = "softmax",
        temperature: float = 1.0,
        cap: float | None = 20.0,
        reference: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        if kind not in get_args(Weighting):
            raise ValueError(f"kind must be one of {', '.join(get_args(Weighting))}; got {kind!r}")
        if not temperature > 0 or (cap is not None and cap < 1):
            raise ValueError(f"temperature must be > 0 and cap ≥ 1 or None; got {temperature} and {cap}")
        self.kind: Weighting = kind
        self.reduction: Reduction = reduction
        self.temperature, self.cap, self.reference = temperature, cap, reference
        self.source = "data" if kind == "none" else "rollouts"
        self.needs = {"softmax": ("reward",), "top": ("quality",), "none": ()}[kind]

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        assert isinstance(batch.rows, Noised)
        error = errors(policy, batch.rows, self.reduction)
        weight = self._weights(batch).to(error)
        return batch.mean(weight * error), {
            "error": error.detach().mean(),
            "weight": weight.mean(),
            "weight_squared": weight.square().mean(),  # 1 where all weigh the same; its inverse is the effective share
        }

    def shared(self, policy: Policy, batch: Batch) -> Mapping[str, Tensor]:
        return {} if self.kind == "none" else {"weight": self._raw(batch)}

    def _weights(self, batch: Batch) -> Tensor:
        """(B,) with mean 1 over the update, before the cap; all 0 where no sample is the best of its group."""
        if self.kind == "none":
            return torch.ones(len(batch), dtype=torch.float64)
        raw = self._raw(batch)
        mean = batch.shared["weight"].to(raw) if "weight" in batch.shared else raw.mean()
        if self.kind == "softmax" and mean < math.exp(-RANGE):
            raise ValueError(
                f"rewards lie more than {RANGE:g} temperatures below reference={self.reference:g}: "
                "pass a typical reward as reference, or raise the temperature"
            )
        weights = raw / mean if mean > 0 else raw
        return weights if self.cap is None or self.kind == "top" else weights.clamp(max=self.cap)

    def _raw(self, batch: Batch) -> Tensor:
        """(B,) float64 weights before normalisation."""
        if self.kind == "top":
            return (batch.column("quality").cpu() == 1).double()
        reward = batch.column("reward").cpu().double()
        exponent = (reward - self.reference) / self.temperature
        if not bool((exponent <= RANGE).all()):
            raise ValueError(
                f"expected finite rewards at most {RANGE:g} temperatures above reference={self.reference:g}; "
                f"got {float(reward.max()):g}: pass a typical reward as reference, or raise the temperature"
            )
        return exponent.exp()
