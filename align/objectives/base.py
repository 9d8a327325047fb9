"""The `Objective` noun: how a batch becomes a loss.

An objective never samples training data and never steps an optimiser. It returns the mean loss over the batch's items, so that
micro-batches and devices can be averaged by their size, and whatever is worth watching. Reference and earlier weights speak
through `policy.acting_as`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from rewards import Reward
from rewards.base import Configurable
from samplers import Policy

from ..batches import Batch, Rows

if TYPE_CHECKING:
    from ..sampling import Sampling
    from ..sources import Source

__all__ = ["Metrics", "Objective"]

Metrics = Mapping[str, Tensor]


class Objective(Configurable, ABC):
    """A loss.

    Attributes:
        source: where its batches come from by nature: "prompts" (rollouts it makes itself, with gradient), "rollouts" (samples of
            the current policy) or "data".
        takes: the kinds of rows it can read.
        needs: columns it reads.
        members: rows an item must have; 0 for any number above one.
        reward: what is optimised, for the objectives that ask a reward themselves.
        remembers: earlier weights it keeps from the start, by the names under which they may speak for a source.
        shifts: whether what it trains moves the initial noise of the reference, instead of being what samples.
    """

    source: Literal["prompts", "rollouts", "data"]
    takes: tuple[type[Rows], ...]
    needs: tuple[str, ...] = ()
    members: int = 1
    reward: Reward | None = None
    remembers: tuple[str, ...] = ()
    shifts: bool = False

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        """The mean loss over the items of a batch, with its graph, and detached scalars to watch (means over items)."""

    def bind(self, reward: Reward | None) -> Objective:
        """A copy that uses `reward` where none was given."""
        bound = copy.copy(self)
        bound.reward = self.reward or reward
        return bound

    def check(self, policy: Policy) -> None:
        """Raises before any work if this objective cannot train this policy."""

    def check_source(self, source: Source, sampling: Sampling) -> None:
        """Raises before any work if what this source collects, sampled like this, cannot be trained on."""

    def begin(self, policy: Policy) -> None:
        """Called once before the first update of a run, not after a resume: remembers voices it will need."""

    def annotate(self, policy: Policy, batch: Batch, seed: int) -> Batch:
        """What must be computed once for freshly collected samples, with the weights that collected them.

        Args:
            seed: for the random decisions of this collection.
        """
        return batch

    def shared(self, policy: Policy, batch: Batch) -> Mapping[str, Tensor]:
        """Per-item quantities (items,) whose mean over the whole update each micro-batch needs; without a graph."""
        return {}

    def updated(self, policy: Policy, update: int) -> None:
        """Called after every optimiser step; `update` counts from 1."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"
