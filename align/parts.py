"""Scores on disk: parts that are whole or not there, and a manifest that says whose they are.

    manifest.json              what is scored by what, versions, done ranges of rows, failures, rows a second
    scores/part-00000.parquet  row, id, image (or video, audio), prompt, one column a reward, parts, error; by row

A part is written under another name, flushed and renamed, so that whatever is there is complete, and what is not there is not
done: a run that was killed goes on from its parts alone. The manifest repeats what they say for whoever reads it.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards import Modality
from rewards.files import whole

from .description import differences
from .results import finite, prepare_folder, versions
from .world import World

__all__ = ["MANIFEST", "SCORES", "Parts", "claim"]

logger = logging.getLogger("kilter")
MANIFEST, SCORES = "manifest.json", "scores"
IDENTITY = ("rewards", "source", "settings")  # a run may be gone on with if these are the same
KEY = b"kilter"
REFRESH = 20.0  # seconds between manifests


class Parts:
    """The folder of a run.

    Args:
        folder: made by `claim`.
        manifest: what `claim` found or wrote.
        names: of the rewards.
        modality: of the media.
    """

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], names: Sequence[str], modality: Modality = "image"
    ) -> None:
        self.folder, self.manifest, self.names, self.modality = folder, dict(manifest), list(names), modality
        self.known: dict[int, dict[str, Any]] = {}
        self.refreshed = time.monotonic()
        self.done = self._chunks()

    def write(self, chunk: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Puts the rows of a chunk on the disk, as one part.

        Args:
            rows: {"row", "id", modality, "prompt", "scores": {name: value}, "parts": {name: value}, "error"}, in any order.
        """
        import pyarrow
        from pyarrow import parquet

        text, number = pyarrow.string(), pyarrow.float32()
        pair = pyarrow.struct([("name", text), ("value", number)])
        rows = sorted(rows, key=lambda r: r["row"])
        columns = {"row": pyarrow.array([r["row"] for r in rows], pyarrow.int64())}
        columns |= {k: pyarrow.array([r[k] for r in rows], text) for k in ("id", self.modality, "prompt")}
        columns |= {n: pyarrow.array([r["scores"][n] for r in rows], number) for n in self.names}
        parts = [[{"name": n, "value": v} for n, v in r["parts"].items()] for r in rows]
        columns["parts"] = pyarrow.array(parts, pyarrow.list_(pair))
        columns["error"] = pyarrow.array([r["error"] for r in rows], text)
        failed = Counter(name for r in rows for name, value in r["scores"].items() if value != value)
        reasons = [r["error"] for r in rows if r["error"] is not None]
        fact = {
            "rows": [rows[0]["row"], rows[-1]["row"] + 1],
            "errors": len(reasons),
            "failed": failed,
            "first": reasons[:1],
        }
        table = pyarrow.table(columns).replace_schema_metadata({KEY: json.dumps(fact).encode()})
        whole(self._path(chunk), lambda file: parquet.write_table(table, file))
        self.known[chunk] = fact

    def record(self, **more: Any) -> dict[str, Any]:
        """Writes the manifest as of now."""
        self.refreshed = time.monotonic()
        facts = [self._fact(chunk) for chunk in sorted(self._chunks())]
        ranges: list[list[int]] = []
        for start, stop in sorted(f["rows"] for f in facts):
            if ranges and ranges[-1][1] == start:
                ranges[-1][1] = stop
            else:
                ranges.append([start, stop])
        failed = sum((Counter(f["failed"]) for f in facts), Counter())
        count = {"rows": sum(b - a for a, b in ranges), "errors": sum(f["errors"] for f in facts)}
        first = next((reason for f in facts for reason in f["first"]), None)
        self.manifest |= {"done": ranges, **count, "first_error": first, "failed": dict(failed), **more}
        _json(self.folder / MANIFEST, self.manifest)
        return self.manifest

    def refresh(self) -> None:
        """Writes the manifest if it is old."""
        if time.monotonic() - self.refreshed > REFRESH:
            self.record()

    def _chunks(self) -> set[int]:
        """The chunks that are done."""
        return {int(p.stem.partition("-")[2]) for p in (self.folder / SCORES).glob("part-*.parquet")}

    def _fact(self, chunk: int) -> dict[str, Any]:
        if chunk not in self.known:
            from pyarrow import parquet

            metadata = parquet.read_metadata(self._path(chunk)).metadata or {}
            self.known[chunk] = json.loads(metadata[KEY])
        return self.known[chunk]

    def _path(self, chunk: int) -> Path:
        return self.folder / SCORES / f"part-{chunk:05d}.parquet"


def claim(out: str | Path, identity: Mapping[str, Any], rows: int, world: World) -> tuple[Path, dict[str, Any]]:
    """The folder of a run and its manifest: a new one, or that of the same run, which was cut off.

    Args:
        out: the folder.
        identity: what is scored, by what, and how.
        rows: a part, unless the run that is gone on with has another size.

    Raises:
        ValueError: the folder holds the scores of something else, or by something else.
        FileExistsError: it holds anything else.
        OSError: it cannot be written.
    """
    made: tuple[Path, dict[str, Any]] | Exception | None = None
    if world.first:
        try:
            made = _claimed(Path(out).expanduser(), finite(dict(identity)), rows)
        except (OSError, ValueError) as error:
            made = error
    made = world.objects([made])[0]
    if isinstance(made, Exception):  # in all processes
        raise made
    assert made is not None
    return made


def _claimed(out: Path, identity: dict[str, Any], rows: int) -> tuple[Path, dict[str, Any]]:
    file, again = out / MANIFEST, (out / MANIFEST).is_file()
    bare = out.is_dir() and all(p.name.startswith(".") for p in out.iterdir())  # cut off before it began
    out = prepare_folder(out, again or bare, "choose another out; it holds no scores to go on with")
    now = {"versions": versions(), "part_rows": rows, "complete": False}
    if not again:
        _json(file, {**identity, **now})
        (out / SCORES).mkdir()
        return out, {**identity, **now}
    try:
        manifest = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): choose another out") from error
    recorded = {k: manifest.get(k) for k in IDENTITY}
    if changed := differences(recorded, json.loads(json.dumps(identity))):
        shown = "\n".join(f"  {c[:300]}" for c in changed[:8])
        raise ValueError(
            f"{out} holds other scores, recorded → asked:\n{shown}\nchoose another out, or ask as recorded"
        )
    if moved := differences(manifest.get("versions"), now["versions"]):
        logger.warning("%s was begun with other versions: %s", out, "; ".join(moved))
    (out / SCORES).mkdir(exist_ok=True)
    for left in (out / SCORES).glob(".*.partial"):
        left.unlink(missing_ok=True)
    return out, manifest


def _json(path: Path, value: Any) -> None:
    whole(path, lambda file: file.write_text(json.dumps(finite(value), indent=1)))
