"""Adjoint matching: the policy's steps regress the control that tilts the base by exp(scale·r).

With μ_base(x_k) the mean of the reference's step k and s_k its standard deviation, the lean adjoint of a trajectory is

    a_T = −scale·∇r(decode(x_T)),        a_k = (∂μ_base/∂x_k)ᵀ a_{k+1},

one product with the transposed Jacobian of the reference a step, backwards, and the loss of a step of a trajectory of the current
policy is

    L = |(μ_θ(x_k) − μ_base(x_k))/s_k + s_k·a_{k+1}|².

Under a memoryless kernel, one that forgets where it began, its optimum samples p_base(x)·exp(scale·r(x)), unbiased by the first
state. DDIM(eta=1) is memoryless, and on flows so is FlowSDE(eta=√2), whose diffusion coefficient squared is 2t/(1 − t); others
are refused. A deterministic last step is not trained, but the adjoint passes through it exactly.

Source: Adjoint Matching, 2409.08861, and its code for Stable Diffusion.

Deviations. Step k is paired with a_{k+1}, which is exact for discrete steps; the code pairs it with a_k, the same in the limit of
many steps. Guidance serves to sample only, as the authors advise, unless `guided`. Which steps are trained is the source's
choice, uniform and not stratified (`timestep_fraction`; theirs is 4 of 50). Steps of unusually large loss are not dropped, and
the reward's gradient is not smoothed over noisy copies: both would need what outlives an update, or many more calls of the
reward. Adjoints are propagated at unit size, since in half precision their true size can leave the range of numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rewards import Reward
from samplers import DDIM, FlowSDE, Kernel, Policy
from samplers.levels import at_least_float32
from samplers.transitions import Gaussian

from ..batches import Batch, Paths, Steps
from ..evidence import Reduction, law, reduced
from .backprop import check_reward, judged
from .base import Metrics, Objective

if TYPE_CHECKING:
    from ..sampling import Sampling
    from ..sources import Source

__all__ = ["AdjointMatching", "lean_adjoint"]


class AdjointMatching(Objective):
    """Regresses each step's mean on the lean adjoint of a differentiable reward (Adjoint Matching).

    Args:
        scale: λ; the optimum is the base tilted by exp(λ·r). Published: 100 with ImageReward.
        guided: whether adjoint and regression use guidance; sampling follows the run.
        rows: trajectories whose adjoints are computed at a time, which bounds memory and changes no result.
        reduction: of the loss over the elements of a sample; published is "sum".
        reward: what is maximised; the run's by default.
    """

    source = "rollouts"
    takes = (Steps,)

    def __init__(
        self,
        scale: float = 100.0,
        guided: bool = False,
        rows: int = 4,
        reduction: Literal["mean", "sum"] = "sum",
        reward: Reward | None = None,
    ) -> None:
        if not scale > 0 or rows < 1:
            raise ValueError(f"scale must be > 0 and rows ≥ 1; got {scale} and {rows}")
        self.scale, self.guided, self.rows, self.reward = scale, guided, rows, reward
        self.reduction: Reduction = reduction

    def check(self, policy: Policy) -> None:
        check_reward(self, policy)

    def check_source(self, source: Source, sampling: Sampling) -> None:
        _need_memoryless(sampling.kernel)

    def annotate(self, policy: Policy, batch: Batch, seed: int) -> Batch:
        """Adds `adjoint` (B, T, …), a_{k+1} for step k, and leaves out rows that have none."""
        paths = batch.rows
        assert isinstance(paths, Paths) and self.reward is not None
        _need_memoryless(paths.kernel)
        parts, ok = [], []
        for some in torch.arange(len(batch)).split(self.rows):
            part = batch[some]
            assert isinstance(part.rows, Paths)
            x = at_least_float32(part.rows.latents[:, -1]).detach().requires_grad_()
            with torch.enable_grad():
                reward, given = judged(self.reward, policy.decode(x), part.prompts)
                (last,) = torch.autograd.grad(-self.scale * reward.sum(), x)
            parts.append(lean_adjoint(policy, self._conditioned(part.rows), last))
            ok.append(given & parts[-1].flatten(1).isfinite().all(1))
        keep = torch.cat(ok).cpu()
        if "keep" in batch.columns:
            keep = keep & batch.columns["keep"].cpu()
        return batch.having(adjoint=torch.cat(parts), keep=keep)

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        assert isinstance(batch.rows, Steps)
        rows = self._conditioned(batch.rows)
        mine = law(policy, rows)
        with torch.no_grad(), policy.acting_as("reference"):
            base = law(policy, rows)
        assert isinstance(mine, Gaussian) and isinstance(base, Gaussian)
        control = (mine.mean - base.mean) / mine.std
        wanted = -mine.std * batch.column("adjoint").to(control)
        return self._size(control - wanted, rows), {
            "control": self._size(control.detach(), rows),
            "wanted": self._size(wanted, rows),
        }

    def _size(self, values: Tensor, rows: Steps) -> Tensor:
        """The mean over rows of a squared norm."""
        return reduced(values.square().flatten(1).sum(1), rows.x, self.reduction).mean()

    def _conditioned(self, rows):
        return rows if self.guided else replace(rows, cond=rows.cond.with_guidance(1.0))


def lean_adjoint(policy: Policy, paths: Paths, last: Tensor) -> Tensor:
    """(B, T, …) the adjoints a_1 … a_T of trajectories under the reference's steps.

    Args:
        last: (B, …) a_T.
    """
    adjoints = [last]
    with policy.acting_as("reference"):
        for k in reversed(range(1, paths.levels.steps)):
            adjoints.append(_pulled_back(policy, paths, k, adjoints[-1]))
    return torch.stack(adjoints[::-1], 1)


def _pulled_back(policy: Policy, paths: Paths, k: int, adjoint: Tensor) -> Tensor:
    """(B, …) the adjoint before step k, given the one after it."""
    x = at_least_float32(paths.latents[:, k]).detach().requires_grad_()
    size = adjoint.flatten(1).abs().amax(1)
    size = torch.where(size > 0, size, 1).reshape(-1, *[1] * (x.ndim - 1))
    with torch.enable_grad():
        mean = paths.kernel(policy.denoise(x, paths.levels[k], paths.cond), x, paths.levels, k).mean  # pyright: ignore
        return torch.autograd.grad(mean, x, adjoint / size)[0] * size


def _need_memoryless(kernel: Kernel) -> None:
    eta, wanted = getattr(kernel, "eta", None), {DDIM: 1.0, FlowSDE: math.sqrt(2)}.get(type(kernel))
    if (
        wanted is None
        or eta is None
        or not math.isclose(eta, wanted, rel_tol=1e-3)
        or not all(kernel.noisy_steps or ())
    ):
        raise ValueError(
            f"adjoint matching needs a memoryless kernel, stochastic at every step; got {kernel}: "
            "use DDIM(eta=1), or on flows also FlowSDE(eta=1.41421)"
        )
