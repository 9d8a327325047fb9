"""Phantoms: a run walked on tensors that have shapes and no data, with every byte accounted for.

The code of the run itself runs, on the meta device: so what is alive when is decided by the run, by autograd and by the
reference counts of Python, not by a formula of ours. Each storage is counted from the operation that makes it until nothing refers
to it, under the part that made it (network, decoder, reward …), and the highest sum of every phase is kept.

Where the run asks for a number, every number is about one half: a comparison has the answer that it has for halves, so that
nothing is NaN, nothing is infinite and everything lies in [0, 1]. Only what follows from integers alone, such as the masks that
say how long texts are, is known and kept beside the tensor. A network called again without a graph on equal shapes holds what
it held the first time, and is not walked again.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from ..footprint import LiveBytes
from .targets import Attention, Target

__all__ = ["Moment", "Phantom"]

COMPARE = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
BOTH = {"logical_and": operator.and_, "bitwise_and": operator.and_, "mul": operator.and_, "logical_or": operator.or_}
BOTH["bitwise_or"] = operator.or_
HALF = 0.5
COPIES, COPIED = ("_to_copy", "index"), 4096  # such as labels, of at most so many rows
KNOWN = WeakTensorKeyDictionary()  # the values of tensors without data, where they follow from integers


@dataclass
class Moment:
    """A phase at its highest: what was alive, by the part that made it.

    Attributes:
        total: bytes.
        parts: bytes by part.
    """

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Phantom(LiveBytes):
    """Walks a run without data and counts its bytes.

    Args:
        target: whose memory and attention it has.

    Attributes:
        phases: the highest moment of every phase, by name, in the order in which they came.
        act: what the run is about at the moment, the first half of a phase's name.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target, self.act = target, ""
        self.phases: dict[str, Moment] = {}
        self._doing: list[str] = []
        self._parts: Counter[str] = Counter()
        self._made_by: dict[int, str] = {}
        self._truth: dict[int, bool] = {}
        self._stack = ExitStack()

    def __enter__(self):
        self._stack.enter_context(_replaced(F, "scaled_dot_product_attention", Attention(self.target)))
        return super().__enter__()

    def __exit__(self, *how):
        super().__exit__(*how)
        self._stack.close()

    # What is running

    @contextmanager
    def doing(self, part: str) -> Iterator[None]:
        """Counts what is made inside under a part."""
        self._doing.append(part)
        try:
            yield
        finally:
            self._doing.pop()

    @contextmanager
    def watching(self, **calls: tuple[Any, str]) -> Iterator[None]:
        """Counts what methods make under parts.

        Args:
            calls: (object, name of its method), by part; a double underscore and what follows is not part of the name.
        """
        with ExitStack() as stack:
            for part, (owner, name) in calls.items():
                stack.enter_context(self._patched(owner, name, part.partition("__")[0]))
            yield

    @contextmanager
    def _patched(self, owner: Any, name: str, part: str) -> Iterator[None]:
        call = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.doing(part):
                return call(*args, **kwargs)

        with _replaced(owner, name, counted):
            yield

    @contextmanager
    def repeating(self, network: nn.Module) -> Iterator[None]:
        """Walks a network without a graph once for each set of shapes; see the module docstring."""
        forward, known = network.forward, {}

        def again(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return forward(*args, **kwargs)
            key = tuple(
                (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None for t in tree_leaves((args, kwargs))
            )
            if key not in known:
                before, peak, self.peak = self.now, self.peak, self.now
                out = forward(*args, **kwargs)
                known[key] = self.peak - before, tree_map(_outline, out)
                self.peak = max(peak, self.peak)
                return out
            rise, shapes = known[key]
            self._rise(rise)
            return tree_map(lambda one: one() if callable(one) else one, shapes)

        with _replaced(network, "forward", again):
            yield

    # Counting

    @property
    def phase(self) -> str:
        """The act and what it is doing."""
        if torch._C._current_graph_task_id() != -1:
            return f"{self.act}: backward"
        return f"{self.act}: {self._doing[-1]}" if self._doing else self.act

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if storage.device.type != "meta" or key in self.known or key in given:
            return
        size = self.target.rounded(storage.nbytes())
        part = self._doing[-1] if self._doing else "states"
        if not self._doing and torch._C._current_graph_task_id() != -1:
            part = "gradients"
        self._made_by[key] = part
        self._parts[part] += size
        self._live(storage, key, size)
        self._notice()

    def _gone(self, key: int, size: int) -> None:
        super()._gone(key, size)
        self._parts[self._made_by.pop(key, "states")] -= size
        self._truth.pop(key, None)

    def _rise(self, size: int) -> None:
        """Counts bytes that come and go at once."""
        part = self._doing[-1] if self._doing else "states"
        self.now, self._parts[part] = self.now + size, self._parts[part] + size
        self.peak = max(self.peak, self.now)
        self._notice()
        self.now, self._parts[part] = self.now - size, self._parts[part] - size

    def reserve(self, part: str, size: int) -> None:
        """Counts bytes that a library keeps from now on."""
        self.now, self._parts[part] = self.now + size, self._parts[part] + size
        self.peak = max(self.peak, self.now)

    def _notice(self) -> None:
        best = self.phases.setdefault(self.phase, Moment())
        if self.now > best.total:
            best.total, best.parts = self.now, dict(self._parts)

    # Answering

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_meta), None)
        if first is None:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            _learn(func, args, kwargs, out)
            return out
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return self._value(first)
        if name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type != "meta":
            return self._numbers(first, kwargs.get("dtype") or first.dtype)
        if name == "copy_" and not args[0].is_meta:
            return args[0].copy_(self._numbers(first, args[0].dtype).expand_as(args[0]))
        if name == "nonzero":
            return first.new_empty(self._count_of(first), first.ndim, dtype=torch.long)
        if name in ("index", "index_put", "index_put_"):
            args = (args[0], [place for i in args[1] for place in self._places(i)], *args[2:])
        out = super().__torch_dispatch__(func, types, args, kwargs)
        _learn(func, args, kwargs, out)
        if isinstance(out, Tensor) and out.is_meta and out.dtype is torch.bool:
            self._truth[out.untyped_storage()._cdata] = (
                bool(KNOWN[out].all()) if out in KNOWN else self._holds(name, args)
            )
        return out

    def _value(self, asked: Tensor) -> bool | float | int:
        if asked in KNOWN and asked.numel() == 1:
            return KNOWN[asked].item()
        if asked.dtype is torch.bool:
            return self._true(asked)
        return HALF if asked.is_floating_point() else 0

    def _numbers(self, asked: Tensor, dtype: torch.dtype) -> Tensor:
        """Tensors on the CPU for those that a run looks at: numbers about a half, no two the same."""
        if asked in KNOWN:
            return KNOWN[asked].clone().to(dtype)
        if asked.dtype is torch.bool:
            return torch.full(asked.shape, self._true(asked)).to(dtype)
        if not asked.is_floating_point():
            return torch.zeros(asked.shape, dtype=dtype)
        return torch.linspace(HALF - 0.1, HALF + 0.1, asked.numel()).reshape(asked.shape).to(dtype)

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """A mask as an index an axis, of the rows that it has, or of all or none; what is no mask as it is."""
        if index is None or index.dtype is not torch.bool:
            return [index]
        where = index if index.is_meta else index.to("meta")
        return [where.new_empty(self._count_of(where), dtype=torch.long) for _ in range(index.ndim)]

    def _count_of(self, asked: Tensor) -> int:
        """How many elements are not zero."""
        if asked in KNOWN:
            return int(KNOWN[asked].count_nonzero())
        return asked.numel() if self._true(asked) else 0

    def _true(self, asked: Tensor) -> bool:
        return self._truth.get(asked.untyped_storage()._cdata, False)

    def _holds(self, name: str, args: tuple) -> bool:
        """Whether a result is true where every number is a half."""
        name, (one, other, *_) = name.rstrip("_"), (*args, None, None)
        of: Callable[[Any], Any] = lambda v: self._value(v) if isinstance(v, Tensor) and v.is_meta else v  # noqa: E731
        if name in ("isnan", "isinf", "isneginf", "isposinf"):
            return False
        if name in COMPARE and isinstance(other, (Tensor, int, float)):
            same = isinstance(other, Tensor) and not other.is_meta
            return COMPARE[name](of(one), HALF if same else of(other))
        if name in BOTH and isinstance(other, Tensor):
            return BOTH[name](bool(of(one)), bool(of(other)))
        if name in ("logical_not", "bitwise_not"):
            return not of(one)
        known = next(
            (t for t in tree_leaves(args) if isinstance(t, Tensor) and t.dtype is torch.bool and t.is_meta), None
        )
        return known is not None and self._true(known)


def _learn(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
    """Makes a result known if it is of integers or truths and follows from nothing else, or a copy of a few numbers of data."""
    if not isinstance(out, Tensor) or not out.is_meta:
        return
    exact = not (out.is_floating_point() or out.is_complex())
    if not exact and (func.overloadpacket.__name__ not in COPIES or out.numel() > COPIED):
        return
    unknown = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_meta and t not in KNOWN]
    if unknown or torch.Tag.nondeterministic_seeded in func.tags:
        KNOWN.pop(out, None)
        return
    args, kwargs = tree_map(lambda v: KNOWN[v] if isinstance(v, Tensor) and v.is_meta else v, (args, kwargs))
    KNOWN[out] = func(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))


def _outline(value: Any) -> Any:
    """What makes a tensor like this one; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    shape, dtype = value.shape, value.dtype
    return lambda: torch.empty(shape, dtype=dtype, device="meta")


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of one object, replaced for a while."""
    own = vars(owner).get(name)
    vars(owner)[name] = value
    try:
        yield
    finally:
        if own is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = own
