"""Tables of images, videos or sounds and prompts: parquet files, and data sets of the hub, which are streamed.

An image is bytes, a hub image feature, or a path relative to the file. Where no columns are named, the image is "image" or "jpg",
else the only column of bytes, if it is not called as other media are (COLUMNS); the prompt is "prompt", "caption" or "text".
Columns without bytes are the meta of the prompt. Nothing is copied into a cache: of a parquet file the groups of rows that are
wanted are read, a part at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rewards import Modality

from ..media import Media
from .base import PLURAL, PROMPTS, Columns, Entries, Entry, Wanted, chosen, ends, prompt_of

__all__ = ["HubTable", "ParquetFile"]

COLUMNS = {"image": ("image", "jpg"), "video": ("video", "mp4"), "audio": ("audio", "wav")}  # by modality
PIECE = 32  # rows read at a time
BUFFER = 1 << 20  # bytes; without it a whole column of a row group is read at once


class Table(Entries):
    """Rows of named cells.

    Args:
        folder: that paths are relative to.
        columns: {"image": its column or several, each a row, "prompt": its column}.
        modality: of the media; it names their column.
    """

    def __init__(self, name: str, id: str, folder: Path, columns: Columns | None, modality: Modality) -> None:
        self.name, self.id, self.folder, self.modality = name, id, folder, modality
        self.chosen, self.prompt = chosen(columns, modality)

    def choose(self, kinds: Mapping[str, str]) -> None:
        """Settles which columns are read.

        Args:
            kinds: of each column: "bytes", "text", "other", or "list" of bytes.

        Raises:
            ValueError: a column is missing, or which one holds the media cannot be told.
        """
        self.media = [self.chosen] if isinstance(self.chosen, str) else list(self.chosen or ())
        if missing := [n for n in (*self.media, self.prompt) if n is not None and n not in kinds]:
            raise ValueError(f"{self.name} has no column {', '.join(missing)}; it has {', '.join(kinds)}")
        if not self.media:
            usual = [n for n in COLUMNS[self.modality] if kinds.get(n) in ("bytes", "text")][:1]
            others = {n for names in COLUMNS.values() for n in names}
            self.media = usual or [n for n, kind in kinds.items() if kind == "bytes" and n not in others]
            if len(self.media) != 1:
                found = f"{len(self.media) or 'no'} columns of {PLURAL[self.modality]} among {', '.join(kinds)}"
                raise ValueError(f"{self.name} has {found}: name one, columns={{{self.modality!r}: …}}")
        if wrong := [n for n in self.media if kinds[n] not in ("bytes", "text")]:
            raise ValueError(f"column {wrong[0]} of {self.name} holds no {self.modality} a row, but {kinds[wrong[0]]}")
        self.prompt = self.prompt or next((n for n in PROMPTS if kinds.get(n) == "text"), None)
        self.rest = [n for n, kind in kinds.items() if kind in ("text", "other") and n not in self.media]

    def entries(self, row: int, number: int, cells: Mapping[str, Any], wanted: Wanted) -> Iterator[Entry]:
        """The rows that one row of the table makes."""
        for i, name in enumerate(self.media):
            if wanted(row + i, row + i + 1):
                place = f"{self.id}#{number}" if len(self.media) == 1 else f"{self.id}#{number}.{name}"
                media, own = self._media(cells[name], place)
                others = {n: cells[n] for n in self.rest if cells[n] is not None}
                prompt = partial(prompt_of, others, self.prompt) if self.prompt else None
                problem = "" if media else f"{place} holds no {self.modality} in {name}"
                yield Entry(row + i, place, own, media, prompt, problem)

    def _media(self, cell: Any, place: str) -> tuple[Media | None, str | None]:
        """What reads a cell's media, and their own name."""
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
        if isinstance(data, str):
            data, path = None, data
        if data:
            return Media(place, fetch=lambda: data), path
        return (Media(f"{place} ({path})", self.folder / path), path) if path else (None, None)


class ParquetFile(Table):
    """One parquet file.

    Args:
        path: the file.
        prefix: of the ids.
        columns, modality: see `Table`.

    Raises:
        ValueError: it cannot be read, or which columns to read cannot be told.
    """

    def __init__(
        self, path: Path, prefix: str = "", columns: Columns | None = None, modality: Modality = "image"
    ) -> None:
        super().__init__(str(path), f"{prefix}{path.name}", path.parent, columns, modality)
        self.path = path
        with self._opened() as file:
            self.rows = file.metadata.num_rows
            self.choose({f.name: _kind(f.type) for f in file.schema_arrow})
        self.count = self.rows * len(self.media)

    def read(self, start: int, wanted: Wanted) -> Generator[Entry, None, int]:
        number, each = 0, len(self.media)
        with self._opened() as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                begin = start + number * each
                if wanted(begin, begin + size * each):
                    yield from self._group(file, group, start, number, wanted)
                number += size
        return start + number * each

    def fingerprint(self) -> str:
        return ends(self.path)

    def _group(self, file: Any, group: int, start: int, number: int, wanted: Wanted) -> Iterator[Entry]:
        names, each = [*self.media, *self.rest], len(self.media)
        for piece in file.iter_batches(PIECE, row_groups=[group], columns=names):
            begin = start + number * each
            if wanted(begin, begin + piece.num_rows * each):
                for i, cells in enumerate(piece.to_pylist()):
                    yield from self.entries(begin + i * each, number + i, cells, wanted)
            number += piece.num_rows

    def _opened(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path, buffer_size=BUFFER)
        except (pyarrow.ArrowException, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{self.path} could not be read as parquet, it may be truncated: {reason}") from error


class HubTable(Table):
    """A split of a data set on the hub, streamed from its start; every process streams all of it.

    Args:
        name: owner/name.
        split: such as "train".
        columns, modality: see `Table`.

    Raises:
        FileNotFoundError: it cannot be had.
        ValueError: which columns to read cannot be told.
    """

    def __init__(
        self, name: str, split: str = "train", columns: Columns | None = None, modality: Modality = "image"
    ) -> None:
        import datasets

        super().__init__(name, name, Path(), columns, modality)
        try:
            builder = datasets.load_dataset_builder(name)
            self.data: Any = builder.as_streaming_dataset(split=split)
            features = self.data.features or self.data._resolve_features().features
        except Exception as error:  # the library raises whatever its readers and the network do
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FileNotFoundError(
                f"the data set {name} could not be opened: {reason}. Check its name, the split {split!r} and the network, or "
                "download its files and give their folder"
            ) from error
        self.choose({n: _feature_kind(f) for n, f in features.items()})
        for column in self.media:
            if isinstance(features[column], (datasets.Image, datasets.Video, datasets.Audio)):
                self.data = self.data.cast_column(column, type(features[column])(decode=False))
        splits, files = builder.info.splits or {}, builder.config.data_files or {}
        self.count = splits[split].num_examples * len(self.media) if split in splits else None
        self.files = [
            str(builder.hash),
            split,
            *map(str, files.get(split, ())),
        ]  # names of files on the hub end in their revision

    def read(self, start: int, wanted: Wanted) -> Generator[Entry, None, int]:
        number, each = 0, len(self.media)
        for number, cells in enumerate(self.data.select_columns([*self.media, *self.rest]), 1):
            yield from self.entries(start + (number - 1) * each, number - 1, cells, wanted)
        return start + number * each

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.files).encode()).hexdigest()


def _kind(type: Any) -> str:
    """What a column of an Arrow type can be."""
    from pyarrow import types

    if types.is_binary(type) or types.is_large_binary(type):
        return "bytes"
    if types.is_struct(type):
        names = [type.field(i).name for i in range(type.num_fields)]
        return "bytes" if "bytes" in names else "other"
    if types.is_string(type) or types.is_large_string(type):
        return "text"
    if types.is_list(type) or types.is_large_list(type):
        return "list" if _kind(type.value_type) == "bytes" else "other"
    return "other"


def _feature_kind(feature: Any) -> str:
    import datasets

    if isinstance(feature, (datasets.Image, datasets.Video, datasets.Audio)) or (
        isinstance(feature, dict) and "bytes" in feature
    ):
        return "bytes"
    if isinstance(feature, datasets.Value):
        return {"binary": "bytes", "large_binary": "bytes", "string": "text", "large_string": "text"}.get(
            feature.dtype, "other"
        )
    inner = getattr(feature, "feature", None)
    return "list" if inner is not None and _feature_kind(inner) == "bytes" else "other"
