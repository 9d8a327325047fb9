"""One image, video or sound and its prompt as a row of something larger, and what any reader of such rows must answer.

A reader walks its rows in an order that does not change while the files do not, so a row's number is the same in every process and
after every restart. Rows nobody wants are passed over as cheaply as the format allows. Reading a row touches no pixels: its
`Media` is decoded later, elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards import Modality, Prompt

from ..media import Media

__all__ = ["PLURAL", "PROMPTS", "Columns", "Entries", "Entry", "Wanted", "chosen", "ends", "prompt_of", "sidecar"]

PLURAL = {"image": "images", "video": "videos", "audio": "sounds"}
PROMPTS = ("prompt", "caption", "text")  # the first of them that a row has
END = 1 << 16  # bytes of a large file's head and tail that stand for it: the tail holds parquet's index

Columns = Mapping[str, "str | list[str]"]
Wanted = Callable[[int, int], bool]  # whether any of the rows start … stop - 1 is needed


@dataclass(frozen=True)
class Entry:
    """One row.

    Attributes:
        row: its number in the source, from 0.
        id: where it stands, relative to the source: a file's path, or a container's path, "#" and the place in it.
        name: that of the media themselves, if they have one.
        media: what is scored; None if there is a problem.
        prompt: the prompt, or what reads it when it is needed; None if there is none.
        problem: why the row cannot be scored.
    """

    row: int
    id: str
    name: str | None = None
    media: Media | None = None
    prompt: Prompt | Callable[[], Prompt | None] | None = None
    problem: str = ""

    def asked(self) -> Prompt | None:
        """The prompt.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        return self.prompt if self.prompt is None or isinstance(self.prompt, Prompt) else self.prompt()


class Entries(ABC):
    """Rows of media and a prompt in a fixed order.

    Attributes:
        name: as it was given.
        count: about how many rows there are, if that is known beforehand.
    """

    name: str
    count: int | None = None

    @abstractmethod
    def read(self, start: int, wanted: Wanted) -> Generator[Entry, None, int]:
        """Yields the wanted rows, numbered from `start`, and perhaps some more; returns the number after the last row."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the rows do."""


def chosen(columns: Columns | None, modality: Modality = "image") -> tuple[list[str] | str | None, str | None]:
    """What was chosen for the media, named by modality, and for "prompt".

    Raises:
        ValueError: something else was.
    """
    columns = columns or {}
    prompt = columns.get("prompt")
    if set(columns) - {modality, "prompt"} or isinstance(prompt, list):
        raise ValueError(f"columns names one or more for {modality}, and one for prompt; got {dict(columns)}")
    return columns.get(modality), prompt


def prompt_of(row: Mapping[str, Any], name: str | None = None, leave: tuple[str, ...] = ()) -> Prompt | None:
    """The prompt of a row of named values: its text, "negative", and the rest as meta.

    Args:
        name: of the text; the first of PROMPTS that there is by default.
        leave: keys that are no meta.

    Raises:
        ValueError: the text is no text.
    """
    key = name or next((k for k in PROMPTS if row.get(k) is not None), None)
    text, negative = row.get(key) if key else None, row.get("negative")
    if text is None:
        return None
    if not isinstance(text, str) or not isinstance(negative, str | None):
        raise ValueError(f"{key} must be text; got {text!r}, negative {negative!r}"[:200])
    return Prompt(text, negative or "", {k: v for k, v in row.items() if k not in (key, "negative", *leave)})


def sidecar(record: Callable[[], bytes] | None, text: Callable[[], bytes] | None) -> Prompt | None:
    """The prompt in the files beside media: that of the .json, else the .txt with the .json as meta.

    Raises:
        ValueError, OSError: they cannot be read.
    """
    meta: Any = {} if record is None else json.loads(record().decode("utf-8-sig"))
    if not isinstance(meta, dict):
        raise ValueError(f"the .json beside media must hold an object; got {type(meta).__name__}")
    if (prompt := prompt_of(meta)) is not None or text is None:
        return prompt
    words = text().decode("utf-8-sig").strip()
    return Prompt(words, meta=meta) if words else None


def ends(path: Path) -> str:
    """The size, head and tail of a file, as one hash."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size}\n".encode() + file.read(END))
        file.seek(max(0, size - END))
        digest.update(file.read(END))
    return digest.hexdigest()
