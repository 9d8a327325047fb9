"""What is to be scored, read row by row from files of any number and size."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

from rewards import Modality, Prompt

from ..loading import HUB_ID
from ..media import SUFFIXES
from .base import PLURAL, Columns, Entries, Entry, Wanted, chosen
from .files import LISTS, Files, Folder, Lines, walk
from .shards import Shard
from .tables import HubTable, ParquetFile

__all__ = ["PLURAL", "Columns", "Entries", "Entry", "Wanted", "entries_of"]

CONTAINERS = (".jsonl", ".parquet", ".tar")
ANY = frozenset.union(*SUFFIXES.values())
PACKED = (".gz", ".tgz", ".zip", ".zst", ".xz", ".bz2")


class Together(Entries):
    """Several after one another.

    Args:
        parts: what to read, in order.
        prompt: replaces all prompts.
    """

    def __init__(self, parts: Sequence[Entries], prompt: Prompt | None = None) -> None:
        self.parts, self.prompt = list(parts), prompt
        self.name = ", ".join(p.name for p in self.parts)
        counts = [p.count for p in self.parts]
        self.count = None if None in counts else sum(c or 0 for c in counts)

    def read(self, start: int, wanted: Wanted) -> Generator[Entry, None, int]:
        for part in self.parts:
            reader = part.read(start, wanted)
            start = yield from (reader if self.prompt is None else self._asked(reader, self.prompt))
        return start

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(p.fingerprint() for p in self.parts).encode()).hexdigest()

    @staticmethod
    def _asked(reader: Generator[Entry, None, int], prompt: Prompt) -> Generator[Entry, None, int]:
        while True:
            try:
                entry = next(reader)
            except StopIteration as end:
                return end.value
            yield replace(entry, prompt=prompt)


def entries_of(
    sources: Sequence[str | Path] | str | Path,
    prompts: Sequence[Prompt] = (),
    columns: Columns | None = None,
    split: str = "train",
    modality: Modality = "image",
) -> Entries:
    """What reads the rows of any source.

    Args:
        sources: image files; folders of images, of parquet files or of tar shards; .jsonl, .parquet and .tar files; or hub ids of
            data sets. Their rows follow one another.
        prompts: one for all rows, in place of their own; or, where all sources are image files, one each.
        columns: which columns or keys hold "image" and "prompt", where they have other names.
        split: of a hub data set.
        modality: "video" or "audio" for files, keys, members and columns of these in place of images.

    Raises:
        FileNotFoundError: a source that is not there.
        ValueError: one that is not understood, or prompts that do not match.
    """
    given = [str(s) for s in ([sources] if isinstance(sources, (str, Path)) else sources)]
    if not given:
        raise ValueError(
            f"nothing to score: pass {modality} files, a folder, .jsonl, .parquet or .tar files, or a hub id"
        )
    chosen(columns, modality)
    if packed := [s for s in given if Path(s).suffix.lower() in PACKED]:
        raise ValueError(
            f"{packed[0]} is compressed, so no row can be read by itself: unpack it, or repack it as a plain .tar"
        )
    loose = [s for s in given if not Path(s).expanduser().is_dir() and not _container(s) and not _on_hub(s)]
    if len(prompts) > 1 and (len(loose) < len(given) or len(prompts) != len(given)):
        rows = (
            f"{len(loose)} {PLURAL[modality]}"
            if len(loose) == len(given)
            else f"a source that is no list of {modality} files"
        )
        raise ValueError(f"got {len(prompts)} prompts for {rows}: pass one for each {modality} file, or one for all")
    if missing := [s for s in loose if not Path(s).expanduser().is_file()]:
        raise FileNotFoundError(f"no {modality} file {missing[0]}")
    if len(loose) == len(given):
        return Together([Files(given, prompts if len(prompts) > 1 else ())], prompts[0] if len(prompts) == 1 else None)
    alone = len(given) == 1
    parts = [part for s in given for part in _opened(s, "" if alone else f"{s}/", columns, split, modality)]
    return Together(parts, prompts[0] if prompts else None)


def _container(source: str) -> bool:
    return Path(source).suffix.lower() in CONTAINERS


def _on_hub(source: str) -> bool:
    return bool(HUB_ID.fullmatch(source)) and not Path(source).exists() and Path(source).suffix.lower() not in ANY


def _opened(source: str, prefix: str, columns: Columns | None, split: str, modality: Modality) -> list[Entries]:
    """What reads one source."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, prefix, columns, modality)
    if _container(source):
        if not path.is_file():
            raise FileNotFoundError(f"no file {source}")
        return [_file(path, prefix and source.removesuffix(path.name), columns, modality)]
    return [HubTable(source, split, columns, modality) if _on_hub(source) else Files([source])]


def _folder(path: Path, prefix: str, columns: Columns | None, modality: Modality) -> list[Entries]:
    """What a folder holds decides how it is read."""
    if lists := [path / name for name in LISTS if (path / name).is_file()]:
        return [Lines(lists[0], prefix, columns, modality)]
    folder = Folder(path, prefix, modality)
    found = {kind: n for kind, n in folder.kinds.items() if kind in (".parquet", ".tar") and n}
    if len(found) + bool(folder.count) > 1:
        kinds = ", ".join(f"{n} {kind} files" for kind, n in found.items())
        raise ValueError(
            f"{path} holds {kinds} and {folder.count} {PLURAL[modality]}: give the one or the other by name"
        )
    if not found:
        if not folder.count:
            films = 0 if modality != "image" else sum(folder.kinds[suffix] for suffix in SUFFIXES["video"])
            raise FileNotFoundError(
                f"{path} holds no {PLURAL[modality]}, no {' or '.join(LISTS)}, no .parquet and no .tar files"
                + (f", but {films} videos: wrap the reward in Framewise" if films else "")
            )
        return [folder]
    names = [name for name, file, _ in walk(path) if Path(file.name).suffix.lower() in found]
    return [_file(path / name, f"{prefix}{name.removesuffix(Path(name).name)}", columns, modality) for name in names]


def _file(path: Path, prefix: str, columns: Columns | None, modality: Modality) -> Entries:
    if path.suffix.lower() == ".tar":
        return Shard(path, prefix, modality)
    return (Lines if path.suffix.lower() == ".jsonl" else ParquetFile)(path, prefix, columns, modality)
