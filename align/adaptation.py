"""The moving numbers of a run's reward: multipliers of constraints, running statistics.

A collection is scored by the numbers at its start; then they take what all processes have measured. So they are a function of the
samples, whatever the number of processes, and a resumed run moves them as it would have. Evaluations are made with the numbers the
run began with: what a run is judged by does not change along the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from rewards import Reward
from rewards.composite import Adaptive

from .world import World

__all__ = ["Adaptation"]


class Adaptation:
    """Moves the adaptive parts of a reward.

    Args:
        reward: of the run; None and rewards without such parts are fine.
        world: whose samples count together.
    """

    def __init__(self, reward: Reward | None, world: World) -> None:
        modules = dict(reward.named_modules()) if reward is not None else {}
        self.parts = {path: part for path, part in modules.items() if isinstance(part, Adaptive)}
        self.world = world
        self.begun = self._states()

    @contextmanager
    def following(self) -> Iterator[None]:
        """What is scored inside moves the numbers at the end, unless an exception cuts it short."""
        for part in self.parts.values():
            part.seen = []
        try:
            yield
            for part in self.parts.values():
                self._learn(part)
        finally:
            for part in self.parts.values():
                part.seen = None

    @contextmanager
    def as_begun(self) -> Iterator[None]:
        """The numbers the run began with, for a while."""
        now = self._states()
        self._put(self.begun)
        try:
            yield
        finally:
            self._put(now)

    def worth_watching(self) -> dict[str, float]:
        """The numbers for the log; names that several parts share are numbered."""
        found: dict[str, float] = {}
        for part in self.parts.values():
            for name, value in part.worth_watching().items():
                count = sum(known.partition("-")[0] == name for known in found)
                found[f"{name}-{count + 1}" if count else name] = value
        return found

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"begun": self.begun, "now": self._states()} if self.parts else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts `state()` back."""
        if self.parts:
            self.begun = state["begun"]
            self._put(state["now"])

    def _learn(self, part: Adaptive) -> None:
        seen = [values.double().cpu() for values in part.seen or ()]
        rows = self.world.objects(torch.cat(seen).tolist() if seen else [])
        if rows:
            part.learn(torch.tensor(rows, dtype=torch.float64))

    def _states(self) -> dict[str, Any]:
        return {path: part.state() for path, part in self.parts.items()}

    def _put(self, states: Mapping[str, Any]) -> None:
        for path, part in self.parts.items():
            part.restore(states[path])
