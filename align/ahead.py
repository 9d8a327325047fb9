"""Work done ahead of whoever consumes it: decoding in threads, batches of equal shape, always a bounded number of them.

    entries → decoded in `threads` threads, in order → buckets of equal shape → batches → a queue of READY → the consumer

A batch holds rows of one chunk. Rows of a chunk leave in another order than they came: a bucket goes when it is full, the fullest
when WINDOW batches of rows wait, and all at the end of the chunk.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import TypeVar

import torch
from torch import Tensor

from rewards import Prompt

from .decoding import Decoder
from .entries import Entry

__all__ = ["Batch", "Item", "ahead", "alike", "batches", "cut", "cut_whole", "decode", "in_threads"]

READY, WINDOW = 2, 2  # batches that wait for the consumer, and to become full
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Item:
    """A row whose media were decoded.

    Attributes:
        chunk: the chunk it belongs to.
        entry: the row.
        prompt: what they should show; None if nothing is said.
        media: what the `Decoder` makes of them; None if there is a problem.
        problem: why it cannot be scored.
    """

    chunk: int
    entry: Entry
    prompt: Prompt | None = None
    media: Tensor | None = None
    problem: str = ""


@dataclass(frozen=True)
class Batch:
    """Rows to score together, with their media stacked; rows that cannot be scored have none."""

    chunk: int
    items: list[Item]
    media: Tensor | None = None


def alike(kinds: Iterable[Hashable], batch: int) -> Iterator[list[int]]:
    """Numbers of things of one kind, such as media of one shape, at most `batch` together."""
    waiting: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        rows = waiting.setdefault(kind, [])
        rows.append(i)
        if len(rows) == batch:
            yield waiting.pop(kind)
    yield from waiting.values()


def cut(entries: Iterable[Entry], rows: int) -> Iterator[tuple[int, Entry]]:
    """(chunk, entry): a chunk is `rows` consecutive rows."""
    return ((entry.row // rows, entry) for entry in entries)


def cut_whole(entries: Iterable[Entry], rows: int, most: int) -> Iterator[tuple[int, Entry]]:
    """(chunk, entry): a chunk ends with the prompt that fills its `rows`.

    Args:
        entries: all of them, so that chunks are the same in every process.
        most: rows of one prompt.

    Raises:
        ValueError: rows of a prompt are not together, or are too many.
    """
    chunk = filled = size = 0
    current, seen = None, set[int]()
    for entry in entries:
        try:
            prompt = entry.asked()
            key = prompt and (prompt.text, prompt.negative)
            entry = replace(entry, prompt=prompt)
        except (ValueError, OSError) as error:
            entry, key = replace(entry, media=None, prompt=None, problem=str(error)), current
        if key is None or key != current:
            if key is not None and hash(key) in seen:
                raise ValueError(
                    f"the rows of {key[0][:60]!r} are not together (again at {entry.id}), and a reward compares "
                    "those of one prompt: sort the source by prompt"
                )
            seen |= set() if key is None else {hash(key)}
            chunk, filled = (chunk + 1, 0) if filled >= rows else (chunk, filled)
            current, size = key, 0
        filled, size = filled + 1, size + 1
        if size > most:
            raise ValueError(
                f"more than batch = {most} rows have the prompt {entry.prompt}, and a reward compares them: raise batch"
            )
        yield chunk, entry


def decode(chunk: int, entry: Entry, decoder: Decoder) -> Item:
    """Reads a row's prompt and media; what is wrong with them becomes its problem."""
    if entry.problem or entry.media is None:
        return Item(chunk, entry, problem=entry.problem)
    prompt = None
    try:
        prompt = entry.asked()
        return Item(chunk, entry, prompt, decoder(entry.media))
    except (ValueError, OSError) as error:
        return Item(chunk, entry, prompt, problem=str(error) or type(error).__name__)


def in_threads(work: Callable[[T], R], things: Iterable[T], threads: int, most: int) -> Iterator[R]:
    """Results in the order of the things, at most `most` of them begun and not yet taken.

    A thread is given several at a time, where there are enough: to hand over one costs as much as to decode a small one.
    """
    pool, begun = ThreadPoolExecutor(threads), deque[Future[list[R]]]()
    each = max(1, min(8, most // (2 * threads)))
    things = iter(things)
    try:
        while given := list(islice(things, each)):
            begun.append(pool.submit(lambda some: [work(one) for one in some], given))
            if len(begun) * each >= most:
                yield from begun.popleft().result()
        while begun:
            yield from begun.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batches(
    items: Iterable[Item], batch: int, whole: bool, finish: Callable[[Tensor], Tensor]
) -> Generator[Batch, None, None]:
    """Puts rows of equal shape together, chunk by chunk.

    Args:
        batch: rows at most.
        whole: keep consecutive rows of one prompt together.
        finish: turns stacked media into what the consumer takes.
    """
    for chunk, rows in groupby(items, key=lambda item: item.chunk):
        buckets: dict[tuple[int, ...], list[Item]] = {}
        for unit in _units(rows, whole):
            first = unit[0].media
            if first is None:
                yield Batch(chunk, unit)
                continue
            bucket = buckets.setdefault(tuple(first.shape), [])
            if bucket and len(bucket) + len(unit) > batch:
                yield _batch(chunk, bucket, finish)
                bucket.clear()
            bucket += unit
            if len(bucket) >= batch or sum(map(len, buckets.values())) > WINDOW * batch:
                fullest = max(buckets, key=lambda shape: len(buckets[shape]))
                yield _batch(chunk, buckets.pop(fullest), finish)
        for bucket in buckets.values():
            if bucket:
                yield _batch(chunk, bucket, finish)


def ahead(things: Generator[T, None, None], most: int = READY) -> Iterator[T]:
    """Runs a generator in a thread of its own, at most `most` things ahead; what it raises is raised here."""
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(most)
    stop = threading.Event()

    def put(more: bool, thing: T | BaseException | None) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((more, thing), timeout=0.1)
                return True
        return False

    def run() -> None:
        try:
            for thing in things:
                if not put(True, thing):
                    break
            put(False, None)
        except BaseException as error:
            put(False, error)
        finally:
            things.close()

    thread = threading.Thread(target=run, daemon=True, name="kilter-ahead")
    thread.start()
    try:
        while True:
            more, thing = ready.get()
            if not more:
                if isinstance(thing, BaseException):
                    raise thing
                return
            yield thing  # pyright: ignore
    finally:
        stop.set()
        thread.join()


def _batch(chunk: int, bucket: list[Item], finish: Callable[[Tensor], Tensor]) -> Batch:
    media = finish(torch.stack([item.media for item in bucket if item.media is not None]))
    return Batch(chunk, [replace(item, media=None) for item in bucket], media)


def _units(rows: Iterable[Item], whole: bool) -> Iterator[list[Item]]:
    """Rows that must be scored in one call; broken ones by themselves."""
    if not whole:
        yield from ([item] for item in rows)
        return
    for _, group in groupby(rows, key=lambda item: item.prompt and (item.prompt.text, item.prompt.negative)):
        group = list(group)
        good = [item for item in group if item.media is not None]
        shapes = {tuple(item.media.shape) for item in good if item.media is not None}
        yield from ([item] for item in group if item.media is None)
        if len(shapes) > 1:
            sizes = " and ".join("×".join(map(str, shape[len(shape) == 3 :])) for shape in sorted(shapes))
            problem = f"the media of one prompt, which are compared, have different sizes {sizes}: give one size"
            yield from ([replace(item, media=None, problem=problem)] for item in good)
        elif good:
            yield good
