"""`align.score`: media and prompts in, scores out. `align.score_set`: the same for any number of rows, to files.

A set is read row by row (`entries`), cut into chunks of consecutive rows, decoded (`decoding`) ahead in threads (`ahead`), scored
in batches of equal shape (`scorer`), and written chunk by chunk (`parts`). The processes take turns: the k-th chunk that is not
done yet belongs to process k modulo their number, so nothing is exchanged while they score. Only what is decoded ahead is in
memory.

Rewards that compare (`Reward.compares`) are given all rows of a prompt in one call; a chunk then ends where a prompt does.
"""

from __future__ import annotations

import os
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rewards import Prompt, Reward, Scores, as_prompts

from .ahead import ahead, alike, batches, cut, cut_whole, decode, in_threads
from .decoding import FRAMES, Decoder, as_float, pixels
from .description import describe
from .entries import PLURAL, Columns, Entries, Entry, Wanted, entries_of
from .media import Media, as_rgb
from .panel import panel_of
from .parts import Parts, claim
from .scorer import OnError, Scorer, device_of
from .world import World

__all__ = ["ScoredSet", "score", "score_rows", "score_set"]

Shown = Tensor | Sequence[str | Path | Image.Image | Tensor]
Sources = Sequence[str | Path] | str | Path
Prompts = Sequence[str | Prompt] | str | Prompt
Row = dict[str, Any]
PART = 1024  # rows
PATIENCE = timedelta(days=1)  # a slow judge's last part takes hours, and nothing is lost by waiting
PARTS_A_PROCESS = 8  # at least, where there are as many rows


@dataclass(frozen=True)
class ScoredSet:
    """What `score_set` did.

    Attributes:
        out: the folder.
        names: of the rewards, which are columns.
        rows: how many there are.
        scored: how many of them this run scored, in all processes; the others were done.
        errors: rows without some or all of their scores.
        first_error: why the first of them has none.
        failed: rows without a score, by reward.
        seconds: from the first row to the last.
    """

    out: str
    names: tuple[str, ...]
    rows: int
    scored: int
    errors: int
    first_error: str | None = None
    failed: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Rows a second, of all processes together."""
        return self.scored / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows_per_second": self.rate}


def score(reward: Reward, media: Shown, prompts: Prompts = (), *, batch: int = 32, frames: int = FRAMES) -> Scores:
    """Scores images, videos or sounds, or a batch of media.

    Args:
        reward: what to score by, on the device it is on.
        media: a tensor in the reward's layout, or a list of any sizes: files of its modality, PIL images or single tensors.
        prompts: one a sample, or one for all.
        batch: samples at a time.
        frames: of a video file, as in `score_set`.

    Returns:
        Scores in the order of the media, on the CPU, without a graph.

    Raises:
        FileNotFoundError, ValueError: a file is missing or unreadable, prompts do not match, or a reward that compares the samples
            of a prompt cannot have them in one call; raised before anything is scored.
    """
    _check(batch, None, None)
    what = PLURAL.get(reward.modality, "samples")
    in_files = not isinstance(media, Tensor) and any(isinstance(m, (str, Path)) for m in media)
    decoder = Decoder.of([reward], frames=frames) if in_files else None
    images = list(media) if isinstance(media, Tensor) else [_tensor(m, decoder) for m in media]
    if not images:
        raise ValueError(f"no {what} to score")
    prompts = as_prompts(prompts)
    prompts = prompts * len(images) if len(prompts) == 1 else prompts
    if prompts and len(prompts) != len(images):
        raise ValueError(f"got {len(prompts)} prompts for {len(images)} {what}: pass one for each, or one for all")
    if reward.needs_prompt and not prompts:
        raise ValueError(f"{reward.name} needs prompts: pass one for each {reward.modality}, or one for all")
    total = torch.empty(len(images))
    parts: dict[str, Tensor] = {}
    device = device_of([reward])
    with torch.no_grad():
        alone = alike((tuple(image.shape) for image in images), batch)
        for rows in _whole(reward, images, prompts, batch) if reward.compares else alone:
            media = torch.stack([images[i] for i in rows]).to(device)
            scores = reward.score(media, [prompts[i] for i in rows] if prompts else [])
            total[rows] = scores.total.cpu()
            for name, values in scores.parts.items():
                parts.setdefault(name, torch.full((len(images),), torch.nan))[rows] = values.cpu()
    return Scores(total, parts)


def score_set(
    rewards: Reward | Sequence[Reward],
    sources: Sources,
    out: str | Path,
    *,
    prompts: Prompts = (),
    size: tuple[int, int] | None = None,
    frames: int = FRAMES,
    columns: Columns | None = None,
    split: str = "train",
    batch: int = 32,
    threads: int | None = None,
    part: int | None = None,
    on_error: OnError = "nan",
    progress: bool = False,
) -> ScoredSet:
    """Scores any number of images, videos or sounds and writes parquet files, in all processes of `accelerate launch`.

    Rewards of videos see `frames` frames of each. Those that count by the second are not told how long a video is: set their fps to
    frames / seconds, or where they have it the number of frames they take.

    A run that was cut off, however it was, goes on when it is called again: no row is written twice or left out, and what is scored
    again is at most the chunk each process was at.

    Args:
        rewards: one or several of one modality, on the device they are on; each file is decoded once for all.
        sources: what to score; see `entries.entries_of`.
        out: a folder, new or that of the run to go on with; see `parts` for what it holds.
        prompts: one for all in place of their own; or, where sources are single files, one each.
        size: (height, width) that every image or frame is fitted to beforehand, so that they make full batches; as they are by
            default.
        frames: of a video, at most, spread evenly from the first to the last. The default is two seconds at the 8 a second that
            rewards take a video to have, from which they choose themselves.
        columns: {"image": …, "prompt": …}, where they have other names; "video" or "audio" for rewards of these.
        split: of a hub data set.
        batch: rows at a time.
        threads: that decode; as many as there are processors by default.
        part: rows a part, which is what a killed process may have to score again; by default 1024 or, in small sets, an eighth.
        on_error: what to do about a row that cannot be read or judged; see `Scorer`.
        progress: show a progress bar on standard error.

    Raises:
        FileNotFoundError, ValueError: a source that cannot be read at all, rewards that do not fit, or an `out` of other scores;
            raised before anything is scored. Rows of a prompt that are not together, for a reward that compares them.
    """
    _check(batch, threads, part)
    panel, given = panel_of([rewards] if isinstance(rewards, Reward) else rewards, None), as_prompts(prompts)
    scorer, decoder = Scorer(panel, on_error), Decoder.of(panel.values(), size, frames)
    entries = entries_of(sources, given, columns, split, decoder.modality)
    world = World(cpu=scorer.device.type == "cpu", patience=PATIENCE)
    asked = describe(given[0]) if len(given) == 1 else None
    settings = {"size": size, "prompt": asked, "columns": columns, "split": split}
    settings |= {"frames": frames} if decoder.modality == "video" else {}
    identity = {"rewards": describe(panel), "source": {"digest": entries.fingerprint()}, "settings": settings}
    folder, manifest = claim(out, identity, part or _part(entries, world, batch), world)
    parts = Parts(folder, manifest, list(panel), decoder.modality)
    world.wait()  # all have seen the same parts before one of them adds some
    walk, done = _Walk(entries), sorted(parts.done)
    begun, scored = time.monotonic(), 0
    with _bar(progress and world.first, entries, parts, world) as scorer.tick:
        for chunk, rows in _scored(
            walk, scorer, parts.manifest["part_rows"], batch, threads, decoder,
            skip=lambda chunk: chunk in parts.done or (chunk - bisect(done, chunk)) % world.size != world.rank,
        ):  # fmt: skip
            parts.write(chunk, rows)
            scored += len(rows)
            if world.first:
                parts.refresh()
    world.wait()
    scored, seconds = sum(world.objects([scored])), time.monotonic() - begun
    if world.first:
        rate = {"seconds": seconds, "rows_per_second": scored / seconds, "processes": world.size} if scored else {}
        manifest = parts.record(complete=True, source_name=entries.name, **rate)
    manifest = world.objects([manifest])[0]
    if not walk.total:
        raise ValueError(f"{entries.name} holds no rows")
    if manifest["rows"] != walk.total:
        raise ValueError(
            f"{entries.name} changed while it was scored: {walk.total} rows, {manifest['rows']} in {folder}"
        )
    found = {name: manifest[name] for name in ("errors", "first_error", "failed")}
    return ScoredSet(str(folder), tuple(panel), walk.total, scored, seconds=seconds, **found)


def score_rows(
    rewards: Reward | Sequence[Reward],
    sources: Sources,
    *,
    prompts: Prompts = (),
    size: tuple[int, int] | None = None,
    frames: int = FRAMES,
    columns: Columns | None = None,
    split: str = "train",
    batch: int = 32,
    threads: int | None = None,
    on_error: OnError = "unread",
) -> Iterator[Row]:
    """The rows that `score_set` would write, in order, one after another; arguments as there."""
    _check(batch, threads, None)
    panel = panel_of([rewards] if isinstance(rewards, Reward) else rewards, None)
    scorer, decoder = Scorer(panel, on_error), Decoder.of(panel.values(), size, frames)
    entries = entries_of(sources, as_prompts(prompts), columns, split, decoder.modality)
    walk = _Walk(entries)
    for _, rows in _scored(walk, scorer, PART, batch, threads, decoder, skip=lambda chunk: False):
        yield from sorted(rows, key=lambda row: row["row"])
    if not walk.total:
        raise ValueError(f"{entries.name} holds no rows")


class _Walk:
    """One reading of all entries; afterwards `total` says how many there are."""

    def __init__(self, entries: Entries) -> None:
        self.entries, self.total = entries, 0

    def read(self, wanted: Wanted) -> Iterator[Entry]:
        self.total = yield from self.entries.read(0, wanted)


def _scored(
    walk: _Walk,
    scorer: Scorer,
    part: int,
    batch: int,
    threads: int | None,
    decoder: Decoder,
    skip: Callable[[int], bool],
) -> Iterator[tuple[int, list[Row]]]:
    """(chunk, its rows) of every chunk that is not skipped."""

    def wanted(start: int, stop: int) -> bool:
        return not all(skip(chunk) for chunk in range(start // part, (stop - 1) // part + 1))

    everything = walk.read((lambda start, stop: True) if scorer.whole else wanted)
    chunks = cut_whole(everything, part, batch) if scorer.whole else cut(everything, part)
    threads = threads or max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    mine = (found for found in chunks if not skip(found[0]))
    items = in_threads(lambda found: decode(found[0], found[1], decoder), mine, threads, batch + threads)
    ready = ahead(batches(items, batch, scorer.whole, scorer.finish))
    for chunk, group in groupby(ready, key=lambda made: made.chunk):
        yield chunk, [row for made in group for row in scorer.rows(made)]


def _check(batch: int, threads: int | None, part: int | None) -> None:
    if wrong := [n for n in (batch, threads, part) if n is not None and n < 1]:
        raise ValueError(f"batch, threads and part must be ≥ 1; got {wrong[0]}")


def _part(entries: Entries, world: World, batch: int) -> int:
    """Rows a part: whole batches, and so few that every process gets several parts."""
    rows = PART if entries.count is None else min(PART, entries.count // (PARTS_A_PROCESS * world.size))
    return max(1, -(-rows // batch)) * batch


@contextmanager
def _bar(show: bool, entries: Entries, parts: Parts, world: World) -> Iterator[Callable[[int, int], None]]:
    """What counts rows and errors of this process on standard error."""
    from tqdm import tqdm

    total, done = entries.count, len(parts.done) * parts.manifest["part_rows"]
    if total is not None:
        total, done = -(-total // world.size), min(total, done)
    errors = 0
    with tqdm(total=total, initial=done // world.size, disable=not show, unit="row", dynamic_ncols=True) as bar:

        def tick(rows: int, wrong: int) -> None:
            nonlocal errors
            errors += wrong
            bar.update(rows)
            if wrong:
                bar.set_postfix(errors=errors)

        yield tick


def _tensor(item: str | Path | Image.Image | Tensor, decoder: Decoder | None) -> Tensor:
    if isinstance(item, Tensor):
        return item
    if isinstance(item, Image.Image):
        return as_float(pixels(as_rgb(item)))
    assert decoder is not None
    if not Path(item).is_file():
        raise FileNotFoundError(f"no {decoder.modality} file {item}")
    return as_float(decoder(Media(str(item), Path(item))))


def _whole(reward: Reward, images: list[Tensor], prompts: list[Prompt], batch: int) -> list[list[int]]:
    """Indices of all samples of each prompt, for a reward that compares them."""
    by_prompt: dict[tuple[str, str] | None, list[int]] = {}
    for i in range(len(images)):
        by_prompt.setdefault((prompts[i].text, prompts[i].negative) if prompts else None, []).append(i)
    for rows in by_prompt.values():
        if len(rows) > batch:
            raise ValueError(f"{reward.name} compares the {len(rows)} samples of a prompt: raise batch, now {batch}")
        if len(shapes := {tuple(images[i].shape) for i in rows}) > 1:
            raise ValueError(f"{reward.name} compares the samples of a prompt, which have different sizes {shapes}")
    return list(by_prompt.values())
