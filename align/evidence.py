"""Evidence: how well a policy explains a row, one number a row.

    Steps    log p(x_s | x_t), the transition's log-density under the run's kernel
    Noised   minus the denoising error |output − target|² in the network's own prediction (eps, v, velocity or x0)

The denoising error at a shared (t, eps) estimates the log-likelihood up to a constant and a weight (Diffusion-DPO, 2311.12908).
`reduction` "sum" gives the true sums over the D elements of a sample; "mean", which all published diffusion RL code uses,
divides them by D, so that a ratio of densities is the D-th root of the true one. To keep a loss the same when switching from
"mean" to "sum", multiply its clip range by D and divide its beta or KL weight by D.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from samplers import Policy, Transition
from samplers.levels import at_least_float32

from .batches import Noised, Steps

__all__ = ["Reduction", "errors", "evidence", "law", "reduced", "reference_evidence", "target"]

Reduction = Literal["mean", "sum"]


def evidence(policy: Policy, rows: Steps | Noised, reduction: Reduction = "mean") -> Tensor:
    """(B,) how well the weights that speak explain each row; see the module docstring."""
    if isinstance(rows, Steps):
        return reduced(law(policy, rows).log_prob(rows.following), rows.x, reduction)
    return -errors(policy, rows, reduction)


def law(policy: Policy, rows: Steps) -> Transition:
    """The law of each row's next state under the weights that speak.

    Raises:
        ValueError: a step is deterministic: it has no density.
    """
    std = rows.kernel.stds(rows.levels)[rows.step]
    if bool((std <= 0).any()):
        raise ValueError(
            "a deterministic step has no log-probability: train only stochastic steps (kernel DDIM(eta=1), CPS, FlowSDE …)"
        )
    clean = policy.denoise(rows.x, rows.levels[rows.step], rows.cond)
    return rows.kernel(clean, rows.x, rows.levels, rows.step)


def errors(policy: Policy, rows: Noised, reduction: Reduction = "mean") -> Tensor:
    """(B,) squared error of the network's output against its target, reduced over elements, in at least float32."""
    output = policy.output(rows.x.to(policy.dtype), rows.at, rows.cond)
    gap = (at_least_float32(output) - target(policy, rows)).square().flatten(1)
    return gap.mean(1) if reduction == "mean" else gap.sum(1)


def target(policy: Policy, rows: Noised) -> Tensor:
    """(B, …) what a perfect network would put out for each row, in at least float32."""
    x0, eps = at_least_float32(rows.x0), at_least_float32(rows.eps)
    alpha, sigma = rows.at.like(x0)
    if policy.prediction == "v":
        return alpha * eps - sigma * x0
    return {"eps": eps, "consistency": eps, "flow": eps - x0, "x0": x0}[policy.prediction]


def reduced(log_density: Tensor, x: Tensor, reduction: Reduction) -> Tensor:
    """A sum over the elements of x, as it is or divided by their number."""
    return log_density / x[0].numel() if reduction == "mean" else log_density


def reference_evidence(policy: Policy, rows: Steps | Noised, reduction: Reduction = "mean") -> Tensor:
    """(B,) the evidence under the reference weights, without a graph."""
    with torch.no_grad(), policy.acting_as("reference"):
        return evidence(policy, rows, reduction)
