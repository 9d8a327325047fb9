"""Pairs that people have judged, from our own preference files and from the row formats of published benchmarks.

    preferences            our JSON lines, Pick-a-Pic, HPD: whatever `data.py` reads; lists become all their pairs
    imagerewarddb          prompt, image, prompt_id, rank: one image a row; or lists of image and rank; or img_better, img_worse
    vl-rewardbench         query, response (two), image, human_ranking: [0, 1] if the first response is better; the groups are the
                           benchmark's, by the beginning of the id
    genai-bench            prompt, left_image, right_image, vote_type; tievote (both good) and bothbad_vote are ties
    genai-bench editing    the same with instruct_prompt, left_output_image, right_output_image
    mj-bench               caption, image0, image1, label: the number of the better one; groups by info
    videogen-rewardbench   prompt, path_A, path_B; VQ, MQ, TA, Overall: A, B or same, one pair and one group each; .csv or .parquet

The format is told by the columns. Files are .jsonl, .parquet, .csv, folders of parquet files, or hub data sets. In VL-RewardBench
the two sides are one image and two answers: each side's prompt is the question and the answer, also apart in `meta`.

Videos are files that Pillow can read (GIF, WebP, PNG) or, with the extra `video`, any others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from rewards import Prompt

from .data import read_feedback
from .media import Media
from .parquet import Cells
from .rows import Record

__all__ = ["Pair", "Side", "read_pairs"]

logger = logging.getLogger("kilter")
Label = Literal["a", "b", "tie"]
ALL = "all"
BENCHES = {  # VL-RewardBench's own groups, by the beginning of the id
    "general": ("vlfeedback", "wildvision"),
    "hallucination": ("povid", "rlhfv", "rlaifv"),
    "reasoning": ("mathverse", "mmmu"),
}
VOTES: Mapping[str, Label] = {"leftvote": "a", "rightvote": "b", "tievote": "tie", "bothbad_vote": "tie"}
ASPECTS = ("VQ", "MQ", "TA", "Overall")


@dataclass(frozen=True)
class Side:
    """What one side of a pair shows: a picture or video, and what it should show."""

    prompt: Prompt
    media: Media


@dataclass(frozen=True)
class Pair:
    """Two sides that somebody has compared.

    Attributes:
        a, b: the sides.
        label: which is preferred.
        group: what it is counted under.
        aspect: which part of a reward is asked, where it has such a part; its total otherwise.
        weight: how much it counts.
    """

    a: Side
    b: Side
    label: Label
    group: str = ALL
    aspect: str = ""
    weight: float = 1.0


def read_pairs(
    path: str | Path,
    *,
    group: str | None = None,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    split: str = "train",
) -> list[Pair]:
    """The pairs of a file, folder or hub data set.

    Args:
        path: see the module docstring.
        group: a column to count by, instead of the format's own; "annotator" of preferences.
        columns, split: of preferences in parquet; see `parquet.read_rows`.

    Raises:
        FileNotFoundError: no such file or data set.
        ValueError: a format that is not known, or rows that cannot be used.
    """
    place = Path(path).expanduser()
    if place.suffix.lower() == ".jsonl" or columns is not None:
        return _preferences(path, group, columns, split)
    cells = Cells(path, split)
    reader = next((read for needed, read in FORMATS if needed <= cells.columns), None)
    if reader is None:
        return _preferences(path, group, columns, split)
    if group is not None and group not in cells.columns:
        raise ValueError(f"no column {group!r} to group by; there are {', '.join(sorted(cells.columns))}")
    pairs = list(reader(cells, group))
    if not pairs:
        raise ValueError(f"{path} holds no pairs")
    return pairs


def _preferences(path: str | Path, group: str | None, columns: Any, split: str) -> list[Pair]:
    if group not in (None, "annotator"):
        raise ValueError(f'preferences can be grouped by "annotator"; got {group!r}')
    pairs = []
    for record in read_feedback(path, "preferences", columns=columns, split=split, verify=False):
        if not record.images:
            raise ValueError(f"line {record.line} of {path} has no images, only latents")
        pairs += [_pair(record, i, j, group) for i, j in record.pairs()]
    return pairs


def _pair(record: Record, better: int, worse: int, group: str | None) -> Pair:
    """In the order of the record, so that which side is preferred says nothing."""
    i, j = sorted((better, worse))
    label: Label = "tie" if record.tied(i, j) else "a" if i == better else "b"
    a, b = (Side(record.prompt, record.images[k]) for k in (i, j))
    return Pair(a, b, label, (record.annotator or "none") if group else ALL, weight=record.weight)


def _imagerewarddb(cells: Cells, group: str | None) -> Iterator[Pair]:
    """One image a row, or a list of them."""
    lists: dict[str, list[tuple[int, Mapping[str, Any], int | None]]] = {}
    for i, row in cells.rows(SHOWN):
        if isinstance(row["rank"], list):
            lists[f"row {i}"] = [(i, {**row, "rank": rank}, j) for j, rank in enumerate(row["rank"])]
        else:
            lists.setdefault(row["prompt_id"], []).append((i, row, None))
    for images in lists.values():
        for (i, one, k), (j, other, m) in combinations(images, 2):
            label: Label = "tie" if one["rank"] == other["rank"] else "a" if one["rank"] < other["rank"] else "b"
            media = (cells.media(n, "image", place) for n, place in ((i, k), (j, m)))
            a, b = (Side(Prompt(one["prompt"]), m) for m in media)
            yield Pair(a, b, label, _group(one, group or "classification"))


def _imagerewarddb_pairs(cells: Cells, group: str | None) -> Iterator[Pair]:
    """Rows of a better and a worse image; every other pair is turned round."""
    for i, row in cells.rows(SHOWN):
        names = ("img_worse", "img_better") if i % 2 else ("img_better", "img_worse")
        a, b = (Side(Prompt(row["prompt"]), cells.media(i, name)) for name in names)
        yield Pair(a, b, "b" if i % 2 else "a", _group(row, group or "classification"))


def _vl_rewardbench(cells: Cells, group: str | None) -> Iterator[Pair]:
    unusable = 0
    for i, row in cells.rows(SHOWN):
        if sorted(row["human_ranking"]) != [0, 1] or len(row["response"]) != 2:
            unusable += 1
            continue
        media = cells.media(i, "image")
        texts = [
            (f"{row['query']}\n{answer}", {"query": row["query"], "response": answer}) for answer in row["response"]
        ]
        a, b = (Side(Prompt(text, meta=meta), media) for text, meta in texts)
        begun = "".join(c for c in str(row.get("id", "")).lower() if c.isalnum())
        bench = next((name for name, heads in BENCHES.items() if begun.startswith(heads)), "other")
        yield Pair(a, b, "a" if row["human_ranking"][0] == 0 else "b", _group(row, group) if group else bench)
    _told(unusable, "rows without a ranking of two responses")


def _genai_bench(cells: Cells, group: str | None) -> Iterator[Pair]:
    sides = next(s for s in SIDES if set(s) <= cells.columns)
    unusable = 0
    for i, row in cells.rows(SHOWN):
        if row["vote_type"] not in VOTES:
            unusable += 1
            continue
        text = row["instruct_prompt"] if sides[0] == "left_output_image" else row["prompt"]
        a, b = (Side(Prompt(text), cells.media(i, name)) for name in sides)
        yield Pair(a, b, VOTES[row["vote_type"]], _group(row, group) if group else ALL)
    _told(unusable, "rows with another vote")


def _mj_bench(cells: Cells, group: str | None) -> Iterator[Pair]:
    labels: Mapping[str, Label] = {"0": "a", "1": "b", "tie": "tie"}
    unusable = 0
    for i, row in cells.rows(SHOWN):
        if str(row["label"]) not in labels:
            unusable += 1
            continue
        a, b = (Side(Prompt(row["caption"]), cells.media(i, name)) for name in ("image0", "image1"))
        yield Pair(a, b, labels[str(row["label"])], _group(row, group or "info"))
    _told(unusable, "rows with another label")


def _videogen_rewardbench(cells: Cells, group: str | None) -> Iterator[Pair]:
    labels: Mapping[str, Label] = {"A": "a", "B": "b", "same": "tie"}
    unusable = 0
    for i, row in cells.rows(SHOWN):
        a, b = (Side(Prompt(row["prompt"]), cells.media(i, name)) for name in ("path_A", "path_B"))
        for aspect in (name for name in ASPECTS if name in row):
            if row[aspect] not in labels:
                unusable += 1
                continue
            yield Pair(a, b, labels[row[aspect]], _group(row, group) if group else aspect, aspect)
    _told(unusable, "labels other than A, B and same")


SIDES = (("left_output_image", "right_output_image"), ("left_image", "right_image"), ("left_video", "right_video"))
FORMATS = (
    ({"query", "response", "image", "human_ranking"}, _vl_rewardbench),
    *(({*sides, "vote_type"}, _genai_bench) for sides in SIDES),
    ({"caption", "image0", "image1", "label"}, _mj_bench),
    ({"prompt", "path_A", "path_B", "Overall"}, _videogen_rewardbench),
    ({"prompt", "image", "prompt_id", "rank"}, _imagerewarddb),
    ({"prompt", "img_better", "img_worse"}, _imagerewarddb_pairs),
)
SHOWN = {name for needed, _ in FORMATS for name in needed if any(word in name for word in ("image", "video", "img"))}


def _group(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    return ALL if value is None or value == "" else str(value)


def _told(unusable: int, what: str) -> None:
    if unusable:
        logger.warning("left out %d %s", unusable, what)
