"""One row of feedback: its keys, what may be wrong with them, and the `Record` it becomes.

`data.py` describes the format. A row is what JSON holds, except that media may also be `Media` already, as the parquet reader
makes them. Nothing here opens a file.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, get_args

from rewards import Prompt

from .media import Media

__all__ = ["ANSWERS", "KEYS", "Kind", "Record", "Unlabelled", "nearest", "parse"]

Kind = Literal["preferences", "likes", "captions"]
COMMON = ("prompt", "negative", "annotator", "weight", "settings")
ANSWERS = ("winner", "ranking", "scores")
KEYS: Mapping[str, tuple[str, ...]] = {
    "preferences": (*COMMON, "images", "latents", *ANSWERS, "seeds", "margin"),
    "likes": (*COMMON, "image", "latent", "label", "seed"),
    "captions": (*COMMON, "image", "latent", "seed"),
}
TIE = (None, "tie")


class Unlabelled(ValueError):
    """A row that nobody has judged yet."""


@dataclass(frozen=True)
class Record:
    """A judged row.

    Attributes:
        prompt: with the negative prompt.
        images, latents: the media; one, but two or more in preferences. Equally many where both are given.
        answer: the judgement as the row says it.
        quality: one number a medium in [0, 1], higher is preferred, equal is a tie; of preferences.
        scores: of preferences that are given as scores.
        label: whether it is liked; of likes.
        annotator: who judged, or None.
        seeds: from which the media were sampled.
        margin: one number a medium, what it is worth by other criteria; only differences matter.
        weight: of the row, ≥ 0.
        settings: how the media were sampled.
        line: where the row stands, counted from 1.
    """

    prompt: Prompt
    images: tuple[Media, ...] = ()
    latents: tuple[Media, ...] = ()
    answer: Mapping[str, Any] = field(default_factory=dict)
    quality: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    label: bool | None = None
    annotator: str | None = None
    seeds: tuple[int, ...] = ()
    margin: tuple[float, ...] = ()
    weight: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    line: int = field(default=0, compare=False)

    @property
    def media(self) -> tuple[Media, ...]:
        """What identifies the row: the images, or the latents where there are none."""
        return self.images or self.latents

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) for every two media the answer compares; ties in file order. A winner among three or more says
        nothing about the others."""
        known = list(combinations(range(len(self.quality)), 2))
        if self.answer.get("winner") not in TIE:
            known = [(i, j) for i, j in known if self.answer["winner"] in (i, j)]
        return [(j, i) if self.quality[j] > self.quality[i] else (i, j) for i, j in known]

    def tied(self, i: int, j: int) -> bool:
        """Whether neither is preferred."""
        return self.quality[i] == self.quality[j]

    def row(self, folder: Path) -> dict[str, Any]:
        """The row of a JSONL file in `folder`.

        Raises:
            ValueError: the media have no files.
        """
        row: dict[str, Any] = {"prompt": self.prompt.text}
        if self.prompt.negative:
            row["negative"] = self.prompt.negative
        single = not self.quality
        for name, media in (("images", self.images), ("latents", self.latents)):
            if bare := [m.name for m in media if m.path is None]:
                raise ValueError(f"{', '.join(bare)} of row {self.line} have no files: save them first")
            paths = [Path(os.path.relpath(m.path, folder)).as_posix() for m in media if m.path is not None]
            if paths:
                row |= {name[:-1]: paths[0]} if single else {name: paths}
        row |= self.answer if self.label is None else {"label": int(self.label)}
        if self.annotator is not None:
            row["annotator"] = self.annotator
        if self.margin:
            row["margin"] = list(self.margin)
        if self.weight != 1:
            row["weight"] = self.weight
        if self.seeds:
            row |= {"seed": self.seeds[0]} if single else {"seeds": list(self.seeds)}
        return row | ({"settings": dict(self.settings)} if self.settings else {})


def parse(row: Any, kind: Kind, folder: Path | None, line: int = 0) -> Record:
    """The record of a row.

    Args:
        row: a JSON object.
        folder: what paths are relative to.

    Raises:
        Unlabelled: all is well, but nobody has judged it.
        ValueError: everything that is wrong with it, in one message.
    """
    if kind not in get_args(Kind):
        raise TypeError(f"kind must be one of {', '.join(get_args(Kind))}; got {kind!r}")
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be a JSON object; got {type(row).__name__}")
    reader = _Reader(row, kind, folder)
    record = reader.record(line)
    if reader.reasons:
        raise ValueError("; ".join(reader.reasons))
    if kind == "preferences" and not record.answer:
        raise Unlabelled("no choice yet: give it one of winner, ranking, scores")
    if kind == "likes" and record.label is None:
        raise Unlabelled("no label yet: give it label 1 or 0")
    return record


def nearest(word: str, known: Iterable[str]) -> str:
    """A question that names the nearest valid word, or nothing."""
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f", did you mean {near[0]!r}?" if near else ""


class _Reader:
    """Reads a row key by key and remembers every reason why it cannot be used."""

    def __init__(self, row: Mapping[str, Any], kind: Kind, folder: Path | None) -> None:
        self.row, self.kind, self.folder = row, kind, folder
        self.reasons: list[str] = []

    def record(self, line: int) -> Record:
        row = self.row
        for key in row:
            if key not in KEYS[self.kind]:
                self.reasons.append(self._unknown(key))
        text, negative = row.get("prompt"), row.get("negative", "")
        if not isinstance(text, str) or not text.strip():
            self.reasons.append(f'needs a "prompt"; got {text!r}' if "prompt" in row else 'has no "prompt"')
            text = ""
        if not isinstance(negative, str):
            self.reasons.append(f'"negative" must be text; got {negative!r}')
            negative = ""
        images, latents = self._media("image"), self._media("latent")
        if not images and not latents and not self.reasons:
            many = "two or more paths" if self.kind == "preferences" else "a path"
            self.reasons.append(f"has no {self._key('image')}: {many} relative to the file")
        if images and latents and len(images) != len(latents):
            self.reasons.append(f"has {len(images)} images but {len(latents)} latents")
        count = len(images or latents)
        answer, quality, scores = self._answer(count)
        return Record(
            Prompt(text, negative), images, latents, answer, quality, scores, self._label(), self._annotator(),
            self._seeds(count), self._margin(quality), self._weight(), self._settings(), line,
        )  # fmt: skip

    def _unknown(self, key: Any) -> str:
        for other, keys in KEYS.items():
            if key in keys:
                return f'"{key}" belongs to {other}, but the file is read as {self.kind}'
        return f'unknown key "{key}"{nearest(str(key), KEYS[self.kind])}'

    def _key(self, name: str) -> str:
        return f'"{name}s"' if self.kind == "preferences" else f'"{name}"'

    def _media(self, name: str) -> tuple[Media, ...]:
        key = self._key(name).strip('"')
        value = self.row.get(key)
        if value is None:
            return ()
        if self.kind == "preferences":
            if not _is_list(value) or len(value) < 2:
                self.reasons.append(f'"{key}" must list two or more paths; got {_short(value)}')
                return ()
        else:
            value = [value]
        found = [self._one(key, v) for v in value]
        names = [m.key if m.path else id(m) for m in found if m is not None]
        if len(set(names)) < len(names):
            self.reasons.append(f'"{key}" lists the same file twice')
        return tuple(m for m in found if m is not None)

    def _one(self, key: str, value: Any) -> Media | None:
        if isinstance(value, Media):
            return value
        if not isinstance(value, str) or not value.strip():
            self.reasons.append(f'"{key}" must hold paths; got {value!r}')
        elif "://" in value:
            self.reasons.append(f"{value} is an address: download the file and give its path")
        elif PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith("~"):
            self.reasons.append(f"{value} is absolute: paths are relative to the folder of the file")
        elif self.folder is None:
            self.reasons.append(f"{value} is a path, but this source has no folder: give a local copy")
        else:
            return Media(value, Path(os.path.normpath(self.folder / value)))
        return None

    def _answer(self, count: int) -> tuple[dict[str, Any], tuple[float, ...], tuple[float, ...]]:
        given = [name for name in ANSWERS if name in self.row]
        if self.kind != "preferences" or not given or count < 2:
            return {}, (), ()
        qualities = {name: getattr(self, f"_{name}")(self.row[name], count) for name in given}
        if len(given) > 1:
            self.reasons.append(f"has {' and '.join(given)}: keep one of them")
            known = [q for q in qualities.values() if q]
            if any(_contradict(a, b) for a, b in combinations(known, 2)):
                self.reasons.append(f"{' and '.join(given)} contradict each other")
        name = given[0]
        scores = tuple(float(s) for s in self.row["scores"]) if name == "scores" and qualities[name] else ()
        return {name: self.row[name]}, tuple(qualities[name] or ()), scores

    def _winner(self, winner: Any, count: int) -> list[float] | None:
        if winner in TIE:
            return [0.5] * count
        if isinstance(winner, bool) or not isinstance(winner, int) or not 0 <= winner < count:
            self.reasons.append(f'winner must be an index 0 … {count - 1}, or null or "tie" for a tie; got {winner!r}')
            return None
        return [float(i == winner) for i in range(count)]

    def _ranking(self, ranking: Any, count: int) -> list[float] | None:
        places = [place if _is_list(place) else [place] for place in ranking] if _is_list(ranking) else []
        flat = [i for place in places for i in place]
        if not all(type(i) is int for i in flat) or sorted(flat) != list(range(count)) or not all(places):
            self.reasons.append(
                f"ranking must hold each of 0 … {count - 1} once, best first, inner lists for ties; got {_short(ranking)}"
            )
            return None
        quality = {
            i: 1 - p / (len(places) - 1) if len(places) > 1 else 0.5 for p, place in enumerate(places) for i in place
        }
        return [quality[i] for i in range(count)]

    def _scores(self, scores: Any, count: int) -> list[float] | None:
        if not _is_list(scores) or len(scores) != count or not all(_is_number(s) for s in scores):
            self.reasons.append(f"scores must be {count} finite numbers, one a medium; got {_short(scores)}")
            return None
        low, high = min(scores), max(scores)
        return [(s - low) / (high - low) if high > low else 0.5 for s in scores]

    def _label(self) -> bool | None:
        label = self.row.get("label")
        if label is not None and not (_is_number(label, booleans=True) and label in (0, 1)):
            self.reasons.append(f"label must be 1 (liked) or 0; got {label!r}")
            return None
        return None if label is None else bool(label)

    def _annotator(self) -> str | None:
        who = self.row.get("annotator")
        if who is not None and (isinstance(who, bool) or not isinstance(who, (str, int))):
            self.reasons.append(f"annotator must be a name or a number; got {who!r}")
            return None
        return None if who is None else str(who)

    def _seeds(self, count: int) -> tuple[int, ...]:
        name = "seeds" if self.kind == "preferences" else "seed"
        value = self.row.get(name)
        seeds = [] if value is None else value if name == "seeds" else [value]
        if not _is_list(seeds) or not all(type(s) is int for s in seeds) or (seeds and count and len(seeds) != count):
            self.reasons.append(f'"{name}" must hold {count} whole numbers, one a medium; got {_short(value)}')
            return ()
        return tuple(seeds)

    def _margin(self, quality: tuple[float, ...]) -> tuple[float, ...]:
        margin = self.row.get("margin")
        if margin is None or not quality:
            return ()
        values = margin if _is_list(margin) else [margin]
        if not all(_is_number(v) for v in values) or (_is_list(margin) and len(values) != len(quality)):
            self.reasons.append(
                f"margin must be a finite number, or {len(quality)} of them, one a medium; got {_short(margin)}"
            )
        elif not _is_list(margin) and (len(quality) != 2 or quality[0] == quality[1]):
            self.reasons.append("one margin is the winner's over the loser's: in lists and ties give one a medium")
        elif not _is_list(margin):
            values = [margin if q == max(quality) else 0 for q in quality]
        return tuple(float(v) for v in values if _is_number(v))

    def _weight(self) -> float:
        weight = self.row.get("weight", 1.0)
        if not _is_number(weight) or weight < 0:
            self.reasons.append(f"weight must be a number ≥ 0; got {weight!r}")
            return 1.0
        return float(weight)

    def _settings(self) -> Mapping[str, Any]:
        settings = self.row.get("settings", {})
        if not isinstance(settings, Mapping):
            self.reasons.append(f"settings must be an object; got {_short(settings)}")
            return {}
        return settings


def _contradict(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two qualities order any two media in opposite ways."""
    return any((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in combinations(range(len(a)), 2))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_number(value: Any, booleans: bool = False) -> bool:
    return isinstance(value, (int, float)) and (booleans or not isinstance(value, bool)) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
