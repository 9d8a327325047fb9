"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["flush", "whole"]


def whole(path: Path, write: Callable[[Path], Any], *, durable: bool = True) -> None:
    """Writes a file beside its place and moves it there; one already there is replaced.

    Args:
        path: where it goes, in a folder that is there.
        write: fills the file at the path it is given.
        durable: whether to wait until it is on disk. What can be made again need not be.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        if durable:
            flush(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if durable:
        flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
