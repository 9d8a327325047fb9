"""Feedback in parquet files and on the hub, read through `datasets` as the same rows that JSON lines hold.

Without a mapping these columns are looked for:

    prompt       caption (Pick-a-Pic), prompt (HPD)
    images       jpg_0 and jpg_1; or one list column, images or image_path
    labels       label_0 and label_1: 1 and 0, or 0.5 each for a tie; or one list column, human_preference, with a single 1
    rank         one list column of places, smaller is better, equal is a tie (HPD's test split)
    annotator    annotator, user_id
    seeds        seed_0 and seed_1
    labelled     has_label: rows where it is false are not judged yet
    image, label of likes; image of captions

A mapping replaces them by name: {"prompt": "text", "images": ["left", "right"], "labels": ["left_wins", "right_wins"]}. "scores",
"negative", "margin" and "weight" are read only when mapped, save that a column with our own name for it is taken.

Images are bytes, hub image features, or paths relative to the file. Their bytes are fetched when they are needed, so a data set
may be far larger than memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .loading import HUB_ID
from .media import Media
from .rows import Kind, nearest

__all__ = ["Cells", "read_rows"]

Names = str | Sequence[str]
DEFAULTS: Mapping[str, tuple[Names, ...]] = {
    "prompt": ("caption", "prompt"),
    "images": (("jpg_0", "jpg_1"), "images", "image_path"),
    "image": ("image", "jpg"),
    "labels": (("label_0", "label_1"), "human_preference"),
    "rank": ("rank",),
    "scores": ("scores",),
    "label": ("label",),
    "annotator": ("annotator", "user_id"),
    "seeds": (("seed_0", "seed_1"), "seeds"),
    "seed": ("seed",),
    "labelled": ("has_label",),
    "negative": ("negative",),
    "margin": ("margin",),
    "weight": ("weight",),
}
COMMON = ("prompt", "negative", "annotator", "weight", "labelled")
USED = {
    "preferences": (*COMMON, "images", "labels", "rank", "scores", "seeds", "margin"),
    "likes": (*COMMON, "image", "label", "seed"),
    "captions": (*COMMON, "image", "seed"),
}
NEEDED = {"preferences": ("prompt", "images"), "likes": ("prompt", "image"), "captions": ("prompt", "image")}
MEDIA = ("images", "image")


def read_rows(
    path: str | Path, kind: Kind, columns: Mapping[str, Names] | None = None, split: str = "train"
) -> Iterator[tuple[int, Any]]:
    """(line, row) of a parquet file, a folder of them or a hub data set; the row is text where it says what is wrong with it.

    Args:
        kind: what the rows are.
        columns: names of columns; see the module docstring.
        split: of a hub data set, "train[:1000]" for a part of it.

    Raises:
        FileNotFoundError: no such file or data set, or the hub cannot be reached.
        ValueError: columns are missing, or the mapping is wrong.
    """
    data = _plain(_loaded(path, split))
    found = _columns(kind, data.column_names, columns)
    media = {name for field in MEDIA if field in found for name in _names(found[field])}
    sources = {name: data.select_columns([name]) for name in media if not _is_text(data.features[name])}
    rest = sorted({name for names in found.values() for name in _names(names)} - sources.keys())
    for i, cells in enumerate(data.select_columns(rest)):
        row: dict[str, Any] = dict(cells)  # pyright: ignore
        for name, source in sources.items():
            row[name] = _media(source, i, name)
        yield i + 1, _row({field: _pick(row, names) for field, names in found.items()}, kind)


class Cells:
    """A table whose columns are told apart by their meaning elsewhere: its rows without media, and its media one by one.

    Args:
        path: .parquet, .csv, a folder of parquet files or a hub data set.
        split: of a hub data set.

    Raises:
        FileNotFoundError, ValueError: as in `read_rows`.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        place = Path(path).expanduser()
        self.folder = place if place.is_dir() else place.parent
        self.data = _plain(_loaded(path, split))
        self.columns: set[str] = set(self.data.column_names)
        self.sources: dict[str, Any] = {}

    def rows(self, media: Collection[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(number from 0, cells) of each row, without the columns that hold media."""
        kept = [name for name in self.data.column_names if name not in media]
        for i, cells in enumerate(self.data.select_columns(kept)):
            yield i, dict(cells)  # pyright: ignore

    def media(self, i: int, name: str, j: int | None = None) -> Media:
        """The image or video of a cell: a path relative to the table, or bytes; of a list the `j`-th."""
        source = self.sources.setdefault(name, self.data.select_columns([name]))
        if not _is_text(source.features[name]):
            at = "" if j is None else f"[{j}]"
            return Media(f"{name}{at} of row {i + 1}", fetch=partial(_bytes, source, i, name, j))
        cell = source[i][name]
        path = self.folder / (cell if j is None else cell[j])
        return Media(str(path), path)


def _loaded(path: str | Path, split: str):
    """The `datasets.Dataset`."""
    import datasets

    place = Path(path).expanduser()
    files = sorted(str(f) for f in place.rglob("*.parquet")) if place.is_dir() else [str(place)]
    local = place.suffix.lower() in (".parquet", ".csv") or place.is_dir()
    if not local and not (HUB_ID.fullmatch(str(path)) and not place.exists()):
        raise ValueError(
            f"{path} is not feedback: expected .jsonl, .parquet, a folder of parquet files or a hub id owner/name"
        )
    if local and not (files and Path(files[0]).is_file()):
        kind = place.suffix.lower().removeprefix(".")
        raise FileNotFoundError(f"{path} holds no .parquet files" if place.is_dir() else f"no {kind} file {path}")
    try:
        if local:
            kind = place.suffix.lower().removeprefix(".") or "parquet"
            return datasets.load_dataset(kind if kind == "csv" else "parquet", data_files=files, split=split)
        return datasets.load_dataset(str(path), split=split)
    except Exception as error:  # the library raises whatever its readers and the network do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if local:
            raise ValueError(f"{path} could not be read as parquet, it may be truncated: {reason}") from error
        raise FileNotFoundError(
            f"the data set {path} could not be loaded: {reason}. Check its name, the split {split!r} and the network, "
            "or download its parquet files and give their folder"
        ) from error


def _plain(data):
    """The data set with image features as they are stored, so that nothing is decoded on the way."""
    import datasets

    raw = datasets.Image(decode=False)
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Video):
            data = data.cast_column(name, datasets.Video(decode=False))
        elif isinstance(feature, datasets.Image):
            data = data.cast_column(name, raw)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            data = data.cast_column(name, datasets.List(raw))
    return data


def _columns(kind: Kind, have: Sequence[str], given: Mapping[str, Names] | None) -> dict[str, Names]:
    """Which columns hold what."""
    found: dict[str, Names] = {}
    for field in given or ():
        if field not in USED[kind]:
            near = nearest(field, USED[kind])
            raise ValueError(f"columns names {field!r}, but {kind} have {', '.join(USED[kind])}{near}")
    for field in USED[kind]:
        if given and field in given:
            if missing := [name for name in _names(given[field]) if name not in have]:
                raise ValueError(f"columns maps {field!r} to {missing}, but the data has {', '.join(have)}")
            found[field] = given[field]
            continue
        there = [names for names in DEFAULTS[field] if all(name in have for name in _names(names))]
        if len(there) > 1:
            raise ValueError(
                f"the data has {' and '.join(map(str, there))}: say which is {field!r}, columns={{{field!r}: …}}"
            )
        found |= {field: there[0]} if there else {}
    if missing := [field for field in NEEDED[kind] if field not in found]:
        raise ValueError(
            f"no column for {' and '.join(missing)} of {kind} among {', '.join(have)}: name it, "
            f"columns={{{missing[0]!r}: …}}"
        )
    return found


def _row(cells: dict[str, Any], kind: Kind) -> dict[str, Any] | str:
    """The row as JSON lines would hold it, or what is wrong with it."""
    unjudged = cells.pop("labelled", True) in (False, 0)
    row = {key: value for key, value in cells.items() if value is not None and key not in ("labels", "rank")}
    for list_field in ("images", "seeds", "scores"):
        if list_field in row and any(value is None for value in row[list_field]):
            if list_field == "images":
                return "an image is missing"
            del row[list_field]
    answers = {"labels": _of_labels, "rank": _of_ranks}
    for field, answer in answers.items():
        values = cells.get(field)
        if unjudged or values is None or all(v is None for v in values):
            continue
        given = answer(values)
        if isinstance(given, str):
            return given
        row |= given
    if unjudged:
        row = {key: value for key, value in row.items() if key not in ("label", "scores")}
    if kind == "likes" and isinstance(row.get("label"), float):
        row["label"] = int(row["label"]) if row["label"] in (0.0, 1.0) else row["label"]
    return row


def _of_labels(labels: Sequence[Any]) -> dict[str, Any] | str:
    shown = " and ".join("none" if v is None else f"{v:g}" for v in labels)
    values = [math.nan if v is None else float(v) for v in labels]
    if len(set(values)) == 1 and math.isclose(sum(values), 1, abs_tol=1e-3):
        return {"winner": "tie"}
    if sorted(values) == [*[0.0] * (len(values) - 1), 1.0]:
        return {"winner": values.index(1.0)}
    return f"the labels must be a single 1 and 0, or equal and add up to 1 for a tie; got {shown}"


def _of_ranks(ranks: Sequence[Any]) -> dict[str, Any] | str:
    if any(v is None or v != v for v in ranks):
        return f"every rank must be a number; got {list(ranks)}"
    return {"ranking": [[i for i, r in enumerate(ranks) if r == place] for place in sorted(set(ranks))]}


def _media(source, i: int, name: str) -> Media | list[Media] | None:
    """What fetches a cell's image or images; of a list it must look how many there are."""
    if not _is_list(source.features[name]):
        return Media(f"{name} of row {i + 1}", fetch=partial(_bytes, source, i, name))
    cell = source[i][name]
    return None if cell is None else [
        Media(f"{name}[{j}] of row {i + 1}", fetch=partial(_bytes, source, i, name, j)) for j in range(len(cell))
    ]  # fmt: skip


def _bytes(source, i: int, name: str, j: int | None = None) -> bytes | None:
    cell = source[i][name]
    cell = cell if j is None or cell is None else cell[j]
    if isinstance(cell, Mapping):  # the storage of an image feature
        if cell.get("bytes") is None and cell.get("path"):
            return Path(cell["path"]).read_bytes()
        return cell.get("bytes")
    return cell


def _is_list(feature) -> bool:
    import datasets

    return isinstance(feature, datasets.List) or hasattr(feature, "feature")


def _is_text(feature) -> bool:
    """Paths, or lists of them."""
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _names(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _pick(row: Mapping[str, Any], names: Names) -> Any:
    return row[names] if isinstance(names, str) else [row[name] for name in names]
