"""The processes of a run: which one this is, and how their rows come together. One process is a world of size 1.

`accelerate launch` makes the processes; nothing here starts or configures any.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

__all__ = ["World"]


class World:
    """Rank, size and collective operations.

    Args:
        cpu: run the processes on CPUs (gloo) though there may be GPUs.
        patience: how long one may wait for the others; the library's minutes by default. The first world made decides.

    Raises:
        ValueError: the launcher asks for DeepSpeed.
    """

    def __init__(self, cpu: bool = False, patience: timedelta | None = None) -> None:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
            raise ValueError(
                "DeepSpeed is not supported: its engine owns the backward pass and the step. To train a model too large for one "
                "GPU, shard it: accelerate launch --config_file configs/accelerate/fsdp_8_gpus.yaml …"
            )
        self.rank, self.size = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self.state = PartialState(cpu=cpu, **({} if patience is None else {"timeout": patience}))
            self.rank, self.size = self.state.process_index, self.state.num_processes
            self.device: torch.device = self.state.device  # pyright: ignore

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's consecutive part of `count` things.

        Raises:
            ValueError: they cannot be divided evenly.
        """
        if count % self.size:
            raise ValueError(
                f"{count} cannot be divided evenly among {self.size} processes: choose a multiple of {self.size}"
            )
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes, in rank order; every process must hold equally many."""
        if self.size == 1:
            return values
        from accelerate.utils import gather

        return gather(values.to(self.device).contiguous()).to(values.device)  # pyright: ignore

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, elementwise."""
        if self.size == 1:
            return values
        from accelerate.utils import reduce

        return reduce(values.to(self.device).clone(), "sum").to(values.device)  # pyright: ignore

    def objects(self, values: list[Any]) -> list[Any]:
        """The Python objects of all processes, in rank order."""
        if self.size == 1:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            self.state.wait_for_everyone()
