"""Images, videos and sounds in files of their own: given one by one, in a folder, or named by JSON lines."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rewards import Modality, Prompt

from ..data import Problem, json_lines
from ..media import SUFFIXES, Media
from .base import Columns, Entries, Entry, Wanted, chosen, prompt_of, sidecar

__all__ = ["LISTS", "Files", "Folder", "Lines", "walk"]

LISTS = ("metadata.jsonl", "captions.jsonl")  # in a folder: says which of its files to take, with which prompts
BESIDE = (".json", ".txt")


class Files(Entries):
    """Files given one by one.

    Args:
        paths: the files.
        prompts: one each, or none.
    """

    def __init__(self, paths: Sequence[str], prompts: Sequence[Prompt] = ()) -> None:
        self.paths, self.prompts = list(paths), list(prompts)
        self.name, self.count = f"{len(self.paths)} files", len(self.paths)

    def read(self, start: int, wanted: Wanted) -> Generator[Entry, None, int]:
        for i, path in enumerate(self.paths):
            if wanted(start + i, start + i + 1):
                prompt = self.prompts[i] if self.prompts else partial(_beside, path, None)
                yield Entry(start + i, path, path, Media(path, Path(path).expanduser()), prompt)
        return start + len(self.paths)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(f"{path}\0{Path(path).expanduser().stat().st_size}\n".encode())
        digest.update(repr(self.prompts).encode())
        return digest.hexdigest()


class Folder(Entries):
    """The images, videos or sounds in a folder and the folders in it, by name; prompts in .json or .txt files beside them.

    Args:
        folder: the folder; what begins with a dot is left out, and links to folders are not followed.
        prefix: of the ids.
        modality: which files to take.
    """

    def __init__(self, folder: Path, prefix: str = "", modality: Modality = "image") -> None:
        self.folder, self.prefix, self.name = folder, prefix, str(folder)
        digest, self.kinds, self.suffixes = hashlib.sha256(), Counter[str](), SUFFIXES[modality]
        for relative, file, _ in walk(folder):
            kind = os.path.splitext(file.name)[1].lower()
            self.kinds[kind] += 1
            if kind in self.suffixes or kind in BESIDE:
                digest.update(f"{relative}\0{file.stat().st_size}\n".encode())
        self.count = sum(n for kind, n in self.kinds.items() if kind in self.suffixes)
        self.digest = digest.hexdigest()

    def read(self, start: int, wanted: Wanted) -> Generator[Entry, None, int]:
        row = start
        for relative, file, names in walk(self.folder):
            if os.path.splitext(file.name)[1].lower() not in self.suffixes:
                continue
            if wanted(row, row + 1):
                media = Media(f"{self.prefix}{relative}", Path(file.path))
                yield Entry(row, media.name, media.name, media, partial(_beside, file.path, names))
            row += 1
        return row

    def fingerprint(self) -> str:
        return self.digest


class Lines(Entries):
    """JSON lines: {"image": path, "prompt": …}, paths relative to the file; what else a row holds is meta of the prompt.

    "images", a list, is as many rows of the same prompt. "file_name" is read as "image", "caption" and "text" as "prompt". Rows of
    videos have "video" or "videos", those of sounds "audio" or "audios".

    Args:
        path: the file.
        prefix: of the ids.
        columns: which keys to take for "image" and "prompt".
        modality: of the media; it names their key.
    """

    def __init__(
        self, path: Path, prefix: str = "", columns: Columns | None = None, modality: Modality = "image"
    ) -> None:
        self.path, self.name, self.media, self.prompt = path, str(path), *chosen(columns, modality)
        self.id, self.keys = f"{prefix}{path.name}", (modality, "file_name", f"{modality}s")
        digest, self.count = hashlib.sha256(), 0
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                self.count += block.count(b"\n")
        self.digest = digest.hexdigest()

    def read(self, start: int, wanted: Wanted) -> Generator[Entry, None, int]:
        row = start
        for line, cells in json_lines(self.path):
            place = f"{self.id}#{line}"
            found = cells.reason if isinstance(cells, Problem) else self._paths(cells)
            paths = [found] if isinstance(found, str) else found
            for i, path in enumerate(paths):
                if wanted(row, row + 1):
                    one = place if len(paths) == 1 else f"{place}.{i}"
                    yield (
                        Entry(row, one, problem=found) if isinstance(found, str) else self._entry(row, one, cells, path)
                    )
                row += 1
        return row

    def fingerprint(self) -> str:
        return self.digest

    def _paths(self, cells: Any) -> list[str] | str:
        """The paths of a row's media, or what is wrong, as text."""
        keys = self.media or next((k for k in self.keys if k in cells), None)
        if keys is None:
            return f"no {self.keys[0]}: a row needs one of {', '.join(self.keys)}; it has {', '.join(cells)}"
        found = cells.get(keys) if isinstance(keys, str) else [cells.get(k) for k in keys]
        values = [v for v in (found if isinstance(found, list) else [found]) if isinstance(v, str) and v]
        if not values or (isinstance(found, list) and len(values) < len(found)):
            return f"{keys} must be the path of a file, or a list of them; got {found!r}"[:200]
        return values

    def _entry(self, row: int, place: str, cells: Any, path: str) -> Entry:
        media = Media(f"{place} ({path})", self.path.parent / Path(path).expanduser())
        return Entry(row, place, path, media, partial(prompt_of, cells, self.prompt, self.keys))


def walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str], set[str]]]:
    """(path relative to the folder, file, names in its folder) of every file, by name."""
    with os.scandir(folder) as found:
        entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    names = {e.name for e in entries}
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield f"{prefix}{entry.name}", entry, names


def _beside(path: str, names: set[str] | None) -> Prompt | None:
    """The prompt in the files beside another; `names`, where it is known, says which there are."""
    stem = os.path.splitext(os.path.expanduser(path))[0]
    files = [stem + suffix for suffix in BESIDE]
    record, text = (
        Path(f).read_bytes if (os.path.basename(f) in names if names is not None else os.path.isfile(f)) else None
        for f in files
    )
    return sidecar(record, text)
