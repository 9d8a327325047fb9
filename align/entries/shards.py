"""WebDataset shards: tar files in which consecutive members of the same name, up to its first dot, are one row.

000012.jpg, 000012.txt and 000012.json are an image, its caption and what else is known of it; so with videos and sounds. A shard is
not unpacked: its headers are read in order, an image when it is decoded. Members of other kinds are passed over.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath

from rewards import Modality

from ..media import SUFFIXES, Media
from .base import Entries, Entry, Wanted, ends, sidecar

__all__ = ["Shard"]

Members = dict[str, "tuple[str, Callable[[], bytes]]"]  # (name, what reads it) by suffix


class Shard(Entries):
    """One tar file.

    Args:
        path: the file, not compressed.
        prefix: of the ids.
        modality: which members to take.

    Raises:
        ValueError: it is no tar file.
    """

    def __init__(self, path: Path, prefix: str = "", modality: Modality = "image") -> None:
        self.path, self.name, self.id, self.modality = path, str(path), f"{prefix}{path.name}", modality
        if path.stat().st_size == 0 or not tarfile.is_tarfile(path):
            raise ValueError(f"{path} is not a .tar file that can be read, it may be truncated")

    def read(self, start: int, wanted: Wanted) -> Generator[Entry, None, int]:
        row = start
        try:
            for key, members in self._rows():
                if wanted(row, row + 1):
                    yield self._entry(row, key, members)
                row += 1
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            yield Entry(
                row, f"{self.id}#{row - start}", problem=f"{self.path} is cut off after {row - start} rows: {error}"
            )
            row += 1
        return row

    def fingerprint(self) -> str:
        return ends(self.path)

    def _rows(self) -> Iterator[tuple[str, Members]]:
        with tarfile.open(self.path, "r:") as archive:
            for key, members in groupby(self._files(archive), key=lambda m: m[0]):
                yield key, {suffix: (name, fetch) for _, suffix, name, fetch in members}

    def _files(self, archive: tarfile.TarFile) -> Iterator[tuple[str, str, str, Callable[[], bytes]]]:
        """(key, suffix, name, what reads it) of every file."""
        for member in archive:
            archive.members = []  # pyright: ignore — or it remembers every header
            base = PurePosixPath(member.name).name
            stem, dot, suffix = base.partition(".")
            if member.isfile() and dot and stem:
                key = member.name[: len(member.name) - len(suffix) - 1]
                yield (
                    key,
                    f".{suffix.lower()}",
                    member.name,
                    partial(_slice, self.path, member.offset_data, member.size),
                )
        if _slice(self.path, archive.offset, tarfile.BLOCKSIZE).strip(b"\0"):  # a cut header reads like the end  # pyright: ignore
            raise EOFError("no end of the archive follows")

    def _entry(self, row: int, key: str, members: Members) -> Entry:
        place = f"{self.id}#{key}"
        media = [suffix for suffix in members if suffix in SUFFIXES[self.modality]]
        if len(media) != 1:
            found = f"it has {', '.join(members)}"
            return Entry(row, place, problem=f"{'more than one' if media else 'no'} {self.modality}: {found}")
        name, fetch = members[media[0]]
        record, text = (members[s][1] if s in members else None for s in (".json", ".txt"))
        return Entry(row, place, name, Media(f"{self.id}#{name}", fetch=fetch), partial(sidecar, record, text))


def _slice(path: Path, offset: int, size: int) -> bytes:
    """Part of a file.

    Raises:
        ValueError: the file ends before it.
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise ValueError(f"{path} is cut off: {size} bytes expected at {offset}, {len(data)} there")
    return data
