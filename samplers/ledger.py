"""What a run spent: network evaluations, decodes, reward calls, gradients, and the seconds of each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

__all__ = ["Ledger", "Spending"]

Spending = Literal["network", "decode", "reward", "gradient"]


class Ledger:
    """Counts samples put through each part. A guided network evaluation counts both of its branches, and so does a gradient:
    "gradient" counts network evaluations that were differentiated.

    On a GPU the seconds come from events on the stream, read once at the end, so that counting never waits for the device.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {"network": 0, "decode": 0, "reward": 0, "gradient": 0}
        self._seconds: dict[str, float] = dict.fromkeys(self.counts, 0.0)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def spend(self, on: Spending, samples: int, device: torch.device) -> Iterator[None]:
        """Counts `samples` and times the block."""
        self.counts[on] += samples
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((on, begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[on] += time.perf_counter() - begin

    @contextmanager
    def watching(self, **modules: nn.Module | None) -> Iterator[None]:
        """Counts the samples that modules see, whoever calls them, recomputation in backward passes included.

        Args:
            modules: by what is spent: network=…, reward=….
        """

        def count(on: str) -> Any:
            def seen(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                self.counts[on] += len(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)))

            return seen

        hooks = [m.register_forward_hook(count(on), with_kwargs=True) for on, m in modules.items() if m is not None]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def evaluations(self) -> int:
        """Network evaluations and what their backward passes cost, which is two more each."""
        return self.counts["network"] + 2 * self.counts["gradient"]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each part so far; waits for the device."""
        for on, begin, end in self._events:
            end.synchronize()
            self._seconds[on] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)

    def add(self, other: Ledger) -> None:
        """Takes over what another ledger counted, without waiting for the device."""
        for on in self.counts:
            self.counts[on] += other.counts[on]
            self._seconds[on] += other._seconds[on]
        self._events += other._events

    def __add__(self, other: Ledger) -> Ledger:
        total = Ledger()
        mine, theirs = self.seconds, other.seconds
        for on in total.counts:
            total.counts[on] = self.counts[on] + other.counts[on]
            total._seconds[on] = mine[on] + theirs[on]
        return total

    def as_dict(self) -> dict[str, Any]:
        """For result files."""
        names = {
            "network": "network_evaluations",
            "decode": "decodes",
            "reward": "reward_calls",
            "gradient": "gradients",
        }
        return {**{names[on]: n for on, n in self.counts.items()}, "seconds": self.seconds}
