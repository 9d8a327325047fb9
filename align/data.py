"""Human feedback on disk: reading, checking and writing it.

The format is JSON lines, UTF-8, one object a line, beside the files it names. Paths are relative to the folder of the file.

    preferences  {"prompt": …, "images": ["a.png", "b.png", …], and one answer:
                     "winner": 0             an index, or null or "tie" for a tie; says nothing about the order of the others
                     "ranking": [2, [0, 1]]  indices, best first, inner lists for ties
                     "scores": [3.5, 4, 1]   numbers, higher is better, equal is a tie}
                 optional "seeds": [ints], "margin": what each is worth by other criteria, or by how much the winner of a pair leads
    likes        {"prompt": …, "image": "a.png", "label": 1 or 0}       optional "seed": int
    captions     {"prompt": …, "image": "a.png"}                        optional "seed": int

All take "negative" (prompt), "annotator" (name or number), "weight" (≥ 0, by which the row's loss is multiplied) and "settings"
(how the media were sampled). "latents" or "latent" name .safetensors files, instead of images or beside them; `media.py` says what
they and images may be. A preference without an answer key, or a like without a label, is not judged yet: it is left out and
counted, not broken.

Pick-a-Pic and HPD style parquet files, folders of them and hub data sets are read as the same records by `parquet.py`.

No row is repaired or guessed at: `validate` lists what is wrong with every row, and `read_feedback` raises it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from rewards.files import whole

from .media import Media, image_size, latent_shapes
from .rows import ANSWERS, Kind, Record, Unlabelled, parse

__all__ = [
    "Feedback",
    "Kind",
    "Problem",
    "Record",
    "append_feedback",
    "json_lines",
    "read_feedback",
    "validate",
    "write_feedback",
]

logger = logging.getLogger("kilter")
SHOWN = 50  # broken rows an error lists
Status = Literal["broken", "torn", "unlabelled"]
Columns = Mapping[str, "str | Sequence[str]"]


class Problem(NamedTuple):
    """Why a row cannot be used.

    Attributes:
        line: counted from 1; 0 for the file as a whole.
        reason: in words.
        status: "broken"; "torn", the end of a file whose last write did not finish; or "unlabelled", nobody has judged it yet.
    """

    line: int
    reason: str
    status: Status = "broken"


@dataclass(frozen=True)
class Feedback:
    """Usable records in file order, and the rows that were left out on request."""

    records: tuple[Record, ...]
    skipped: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __getitem__(self, i: int) -> Record:
        return self.records[i]

    @property
    def unlabelled(self) -> int:
        """How many rows still wait for a judgement."""
        return sum(problem.status == "unlabelled" for problem in self.skipped)


def validate(
    path: str | Path, kind: Kind, *, columns: Columns | None = None, split: str = "train", verify: bool = True
) -> list[Problem]:
    """Everything that keeps rows from being used, in file order; an empty list means that all can be.

    Args:
        path: .jsonl, .parquet, a folder of parquet files, or the hub id of a data set.
        kind: what the rows are.
        columns, split: of parquet; see `parquet.read_rows`.
        verify: decode every image and read every latent. Without it only headers are looked at, which is quick but misses
            truncated images, NaN, and, in parquet, repeated and contradicting rows.

    Raises:
        FileNotFoundError: no such file or data set.
        ValueError: the file as a whole is not of this format.
    """
    return _scan(path, kind, columns, split, verify)[1]


def read_feedback(
    path: str | Path,
    kind: Kind,
    *,
    columns: Columns | None = None,
    split: str = "train",
    verify: bool = True,
    skip: Collection[Status] = ("unlabelled",),
) -> Feedback:
    """The usable records.

    Args:
        path, kind, columns, split, verify: as in `validate`.
        skip: kinds of unusable rows to leave out, with a warning, rather than to raise.

    Raises:
        FileNotFoundError: no such file or data set.
        ValueError: rows that cannot be used, each with its line and reason; or none that can.
    """
    if wrong := set(skip) - {"broken", "torn", "unlabelled"}:
        raise ValueError(f"skip takes broken, torn and unlabelled; got {sorted(wrong)}")
    records, problems = _scan(path, kind, columns, split, verify)
    fatal = [p for p in problems if p.status not in skip or p.line == 0]
    total = len(records) + len({p.line for p in problems if p.line})
    if fatal:
        raise ValueError(_listing(path, kind, fatal, total))
    if not records:
        raise ValueError(f"none of the {total} rows of {path} can be used: {_counts(problems)}; judge or mend some")
    if problems:
        logger.warning(
            "%s: left out %s of %d rows: %s", path, len({p.line for p in problems}), total, _counts(problems)
        )
    return Feedback(tuple(records), tuple(problems))


def write_feedback(path: str | Path, rows: Sequence[Mapping[str, Any] | Record]) -> Path:
    """Writes a JSONL file whole or not at all; a file already there is replaced.

    Args:
        rows: objects of the format, or records; unlabelled rows are fine. The media are not looked at.

    Raises:
        ValueError: a row that could not be read back, by its number.
    """
    path = Path(path)
    lines = [_line(row, path, number) for number, row in enumerate(rows, 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    whole(path, lambda file: file.write_bytes(b"".join(lines)))
    return path


def append_feedback(path: str | Path, row: Mapping[str, Any] | Record, *, repair: bool = False) -> None:
    """Adds one row, which is on the disk when this returns.

    Args:
        repair: cut off a torn last line, which an interrupted write left, instead of raising.

    Raises:
        ValueError: a row that could not be read back, or a torn last line.
    """
    path = Path(path)
    line = _line(row, path, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        tail = _last_line(file)
        if tail.strip() and isinstance(_decoded(tail), str):
            if not repair:
                raise ValueError(
                    f"the last line of {path} is torn: finish or remove it, or pass repair=True to cut it off"
                )
            file.truncate(file.seek(0, os.SEEK_END) - len(tail))
            tail = b""
        file.write(b"\n" + line if tail else line)
        file.flush()
        os.fsync(file.fileno())


def _last_line(file: BinaryIO) -> bytes:
    """What follows the last newline: nothing in a file that was written whole."""
    end, tail = file.seek(0, os.SEEK_END), b""
    while end and b"\n" not in tail:
        start = max(0, end - 65536)
        file.seek(start)
        tail, end = file.read(end - start) + tail, start
    return tail.rpartition(b"\n")[2]


def _scan(
    path: str | Path, kind: Kind, columns: Columns | None, split: str, verify: bool
) -> tuple[list[Record], list[Problem]]:
    """Usable records, and what is wrong with all others."""
    if kind not in ("preferences", "likes", "captions"):
        raise ValueError(f'kind must be "preferences", "likes" or "captions"; got {kind!r}')
    records: list[Record] = []
    problems: list[Problem] = []
    for line, row, folder in _rows(path, kind, columns, split):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            records.append(parse(row, kind, folder, line))
        except Unlabelled as reason:
            problems.append(Problem(line, str(reason), "unlabelled"))
        except ValueError as reason:
            problems.append(Problem(line, str(reason)))
    if not records and not problems:
        problems.append(Problem(0, "the file is empty: it holds no rows"))
    problems += _media_problems(records, verify)
    bad = {p.line for p in problems}
    records = [r for r in records if r.line not in bad]
    if verify or all(m.path is not None for r in records for m in r.media):
        problems += _conflicts(records)
        bad = {p.line for p in problems}
        records = [r for r in records if r.line not in bad]
    return records, sorted(problems)


def _rows(path: str | Path, kind: Kind, columns: Columns | None, split: str) -> Iterator[tuple[int, Any, Path | None]]:
    """(line, row or problem, folder of its paths) of any file."""
    place = Path(path).expanduser()
    if place.suffix.lower() == ".jsonl":
        if columns is not None or split != "train":
            raise ValueError(f"columns and split are for parquet files and hub data sets; {path} is JSONL")
        for line, row in json_lines(place):
            yield line, row, place.parent
        return
    from .parquet import read_rows

    for line, row in read_rows(path, kind, columns, split):
        yield line, Problem(line, row) if isinstance(row, str) else row, place if place.is_dir() else place.parent


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, object or problem) of every line that is not blank.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no feedback file {path}")
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if not data.strip():
                continue
            row = _decoded(data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data)
            if not isinstance(row, str):
                yield number, row
            elif data.endswith(b"\n"):
                yield number, Problem(number, row)
            else:
                torn = f"the last line has no end and is {row}: its writing was cut short; finish or remove it"
                yield number, Problem(number, torn, "torn")


def _decoded(data: bytes) -> Any:
    """The JSON value of a line, or why there is none, as text."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno}): {data[:60].decode('utf-8', 'replace').strip()!r}"
    except (ValueError, RecursionError) as error:
        return f"not a row: {error}"
    return value if isinstance(value, dict) else f"a row must be a JSON object; got {type(value).__name__}"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f'the key "{twice[0]}" appears more than once')
    return dict(pairs)


def _media_problems(records: Sequence[Record], verify: bool) -> list[Problem]:
    """Files that are missing or cannot be used, and rows whose media do not match one another."""
    groups = [
        (r, name, media) for r in records for name, media in (("images", r.images), ("latents", r.latents)) if media
    ]
    distinct = {(m.path or id(m), name): (m, name) for _, name, media in groups for m in media}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        facts = dict(zip(distinct, pool.map(lambda one: _fact(one[0], one[1], verify), distinct.values()), strict=True))
    problems = []
    for record, name, media in groups:
        found = [facts[m.path or id(m), name] for m in media]
        wrong = list(dict.fromkeys(fact for fact in found if isinstance(fact, str)))
        if not wrong and len(set(map(str, found))) > 1:
            sizes = ", ".join("×".join(map(str, f)) if name == "images" else str(f) for f in found)
            wrong = [f"its {name} have different sizes: {sizes}"]
        if not wrong and verify and name == "images" and all(m.path is None for m in media):
            wrong = ["the same image twice"] if len({m.digest for m in media}) < len(media) else []
        problems += [Problem(record.line, "; ".join(wrong))] if wrong else []
    return problems


def _fact(media: Media, name: str, verify: bool) -> Any:
    """The size of an image or the shapes of a latent file, or what is wrong with it, as text."""
    try:
        if name == "latents":
            return latent_shapes(media, verify)
        size = image_size(media, verify)
        if verify and media.path is None:
            media.digest  # noqa: B018 — cached here, where it is done in parallel
        return size
    except ValueError as error:
        return str(error)


def _conflicts(records: Sequence[Record]) -> list[Problem]:
    """Rows that repeat or contradict another by the same annotator on the same prompt."""
    repeated: dict[Any, int] = {}
    said: dict[Any, tuple[int, Any]] = {}
    problems: list[Problem] = []
    for record in records:
        keys, about = [m.key for m in record.media], (record.prompt, record.annotator)
        whole = (*about, tuple(sorted(zip(keys, record.quality or [0.0], strict=True))), record.label)
        who = f"annotator {record.annotator!r}" if record.annotator is not None else "an annotator without a name"
        if (first := repeated.setdefault(whole, record.line)) != record.line:
            problems.append(Problem(record.line, f"repeats line {first}, also by {who}"))
            continue
        verdicts: dict[Any, Any] = {(*about, keys[0]): record.label} if record.label is not None else {}
        for better, worse in record.pairs():
            verdict = "tie" if record.tied(better, worse) else keys[better]
            verdicts[(*about, frozenset((keys[better], keys[worse])))] = verdict
        for what, verdict in verdicts.items():
            line, before = said.setdefault(what, (record.line, verdict))
            if before != verdict:
                how = f"labels the same {'pair' if record.quality else 'file'} differently, also by {who}"
                problems += [Problem(record.line, f"contradicts line {line}: it {how}")]
                problems += [Problem(line, f"contradicts line {record.line}: it {how}")]
                break
    return list(dict.fromkeys(problems))


def _line(row: Mapping[str, Any] | Record, path: Path, number: int) -> bytes:
    """A row as a line of the file, after a check that it can be read back."""
    try:
        row = row.row(path.parent) if isinstance(row, Record) else row
        many = {"images", "latents", *ANSWERS} & set(row)
        with contextlib.suppress(Unlabelled):
            parse(row, "preferences" if many else "likes" if "label" in row else "captions", path.parent)
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot write row {number}: {error}") from error


def _counts(problems: Sequence[Problem]) -> str:
    counts = Counter(p.status for p in {p.line: p for p in problems}.values())
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _listing(path: str | Path, kind: Kind, problems: Sequence[Problem], total: int) -> str:
    lines = [f"{len({p.line for p in problems})} of {total} rows of {path} cannot be used as {kind}:"]
    lines += [f"  line {p.line}: {p.reason}" if p.line else f"  {p.reason}" for p in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  … and {len(problems) - SHOWN} more")
    statuses = sorted({p.status for p in problems})
    return "\n".join([*lines, f"mend them, or leave them out with skip={statuses}"])
