"""The `Value` noun: what the reward of the final sample will be, judged at a noisy state, without decoder.

At state x_t the value that makes sequential Monte Carlo and guidance exact is the soft value

    V_t(x_t) = β·log E[exp(r(x0)/β) | x_t],

expectations being over what the sampler goes on to do. As a twist of `FeynmanKac` or `SVDD` any value is sound, since the last
weighting is by the reward itself; the nearer to V_t, the less the weights vary. `Guided` follows its gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rewards.base import Configurable, Prompt

if TYPE_CHECKING:
    from .levels import Levels
    from .policy import Cond, Policy

__all__ = ["Value"]


class Value(Configurable, nn.Module, ABC):
    """An estimate of the final reward at a noisy state; frozen, higher is better, in units of the reward.

    Attributes:
        differentiable: whether a gradient with respect to the state exists.
    """

    differentiable: bool = True

    @abstractmethod
    def forward(self, x: Tensor, at: Levels, cond: Cond, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) estimates in at least float32, part of the graph if `x` requires a gradient; NaN where there is none.

        Args:
            x: (B, …) noisy states.
            at: their level: a scalar level, or one a row.
            cond: (B,) conditions of the policy.
            prompts: one a row, or none.
        """

    def attach(self, policy: Policy) -> None:
        """Makes ready for states of this policy; called before any network runs.

        Raises:
            ValueError: they cannot be judged.
        """

    @property
    def name(self) -> str:
        """How messages call this value."""
        return type(self).__name__
