"""Footprints: how many bytes a run holds at its peak, and how to make it fit.

The live bytes of a network call are measured on one sample and on two, at the first level, counting every tensor storage that
comes to life and is still referenced; they are fixed + rows · row. The same for the decoder. Weights are there already, and
what kernels and libraries keep for themselves is not seen: the room left free is for them.

Where a run would not fit, the network takes its rows a few at a time, which changes no sample, only the speed.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from samplers import Cond, Levels, Policy, Size

__all__ = ["Footprint", "LiveBytes", "fitting", "free_bytes", "measured_bytes"]

logger = logging.getLogger("kilter")
ROOM = 0.8  # of the free memory may be planned for
PLENTY = 2000  # live bytes a byte of media: a generous guess, and runs that fit by it are not measured


def stored(thing: Any) -> TypeGuard[torch.Tensor]:
    """Whether something is a tensor with a storage of its own, and not made of others, as quantised weights are."""
    return isinstance(thing, torch.Tensor) and not is_traceable_wrapper_subclass(thing)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside the context and still referenced; `peak` is their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if stored(t)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if stored(t):
                self._count(t.untyped_storage(), given)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self.known or key in given:
            return
        self._live(storage, key, storage.nbytes())

    def _live(self, storage: torch.UntypedStorage, key: int, size: int) -> None:
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Footprint:
    """Live bytes of a call: `fixed`, and `row` more for every row."""

    fixed: float
    row: float

    def of(self, rows: int) -> float:
        """Of a call with so many rows."""
        return self.fixed + rows * self.row

    def fits(self, room: float) -> int:
        """How many rows fit."""
        return max(0, math.floor((room - self.fixed) / self.row))


def measured_bytes(call: Callable[[int], object]) -> Footprint:
    """The footprint of a call, made with one row and with two."""
    peaks = []
    for rows in (1, 2):
        with LiveBytes() as live:
            call(rows)
        peaks.append(live.peak)
    row = max(1, peaks[1] - peaks[0])
    return Footprint(max(0, peaks[0] - row), row)


def of_network(
    policy: Policy, cond: Cond, levels: Levels, shape: Sequence[int], differentiates: bool
) -> tuple[Footprint, Footprint]:
    """The footprints of a network call, with its graph if the run differentiates, and of the decoder."""

    def state(rows: int) -> torch.Tensor:
        return torch.zeros(rows, *shape, device=policy.device, dtype=policy.dtype)

    def network(rows: int) -> object:
        with torch.set_grad_enabled(differentiates):
            return policy.denoise(state(rows).requires_grad_(differentiates), levels[0], cond[[0]].repeat(rows))

    with torch.no_grad():
        decoder = measured_bytes(lambda rows: policy.decode(state(rows)))
    return measured_bytes(network), decoder


def free_bytes(device: torch.device) -> float:
    """What can still be allocated on a device; infinite where nobody can tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return math.inf
    free = [math.inf]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        free.append(float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # another system, or no limit
    return min(free)


@contextmanager
def fitting(
    policy: Policy,
    cond: Cond,
    levels: Levels,
    shape: Sequence[int],
    size: Size,
    rows: int,
    differentiates: Callable[[], bool],
) -> Iterator[None]:
    """Lets the network and the decoder take so few rows at a time that they fit, and says so.

    Args:
        cond: of one prompt.
        shape, size: of one latent, and of one sample.
        rows: samples in flight.
        differentiates: whether the run takes gradients through the network; asked only if it matters.

    Raises:
        ValueError: not even one row fits; before the run.
    """
    free, before = free_bytes(policy.device), (policy.rows_at_once, policy.decode_chunk)
    if policy.prediction == "logits" or rows * PLENTY * 12 * math.prod(size) < ROOM * free:  # 3 float32 channels
        yield
        return
    network, decoder = of_network(policy, cond, levels, shape, differentiates())
    room, peak = ROOM * free, max(network.of(rows), decoder.of(min(rows, policy.decode_chunk)))
    try:
        if peak > room:
            at_once, decoded = network.fits(room), decoder.fits(room)
            if min(at_once, decoded) < 1:
                raise ValueError(
                    f"one sample needs {_gigabytes(max(network.of(1), decoder.of(1)))}, and {_gigabytes(free)} are free: "
                    "make smaller samples, use --dtype float16 or bfloat16, or another device"
                )
            policy.rows_at_once = min(at_once, policy.rows_at_once or at_once)
            policy.decode_chunk = min(decoded, policy.decode_chunk)
            logger.warning(
                "%d samples at once need %s, and %s are free: the network takes %d at a time and the decoder %d",
                *(rows, _gigabytes(peak), _gigabytes(free), policy.rows_at_once, policy.decode_chunk),
            )
        yield
    finally:
        policy.rows_at_once, policy.decode_chunk = before


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
