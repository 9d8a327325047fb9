"""Tables of scores: what `kilter score` and `kilter steer` leave behind, read as one column a reward.

    .jsonl          one object a line with "prompt", and a number for each reward: `kilter score --json`
    .parquet        the same as columns
    a folder        of `kilter score --out`, of parquet files, or of a steering run
    result.json     of a steering run: the samples of one arm

Several tables are joined by what they have in common of "id", "image" (or "video", "audio") and "prompt", so that rewards scored
one by one can be compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .rows import nearest

__all__ = ["Table", "read_tables"]

KEYS = ("id", "image", "video", "audio", "prompt")
OTHERS = {"row", "seed", "weight", "line", "index", "group"}  # numbers that are no scores


@dataclass(frozen=True)
class Table:
    """Scores of the same samples by several rewards.

    Attributes:
        prompts: one a sample.
        scores: (N,) float64 by name, NaN where not judged.
    """

    prompts: tuple[str, ...]
    scores: Mapping[str, Tensor]


def read_tables(paths: Sequence[str | Path], columns: Sequence[str] = (), arm: str | None = None) -> Table:
    """Reads tables and joins them.

    Args:
        paths: see the module docstring.
        columns: the scores to take; all of them by default.
        arm: of steering runs: "plain" or "steered"; by default "plain" where there is one.

    Raises:
        FileNotFoundError: no such table.
        ValueError: something is no table, has no such scores, or the tables share no samples.
    """
    if not paths:
        raise ValueError("no tables of scores: name at least one")
    tables = [_scores(_rows(Path(path).expanduser(), arm), path) for path in paths]
    rows = tables[0] if len(tables) == 1 else _joined(tables, paths)
    names = list(dict.fromkeys(name for _, scores in rows for name in scores))
    for column in columns:
        if column not in names:
            raise ValueError(f"no score {column!r} among {', '.join(names)}{nearest(column, names)}")
    found = {name: [_number(scores.get(name)) for _, scores in rows] for name in columns or names}
    prompts = tuple(str(key["prompt"]) for key, _ in rows)
    return Table(prompts, {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()})


def _rows(path: Path, arm: str | None) -> list[dict[str, Any]]:
    """The rows of one table."""
    if path.is_dir():
        if (path / "result.json").is_file():
            return _rows(path / "result.json", arm)
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise FileNotFoundError(f"{path} holds neither result.json nor parquet files")
        return [row for file in files for row in _rows(file, arm)]
    if not path.is_file():
        raise FileNotFoundError(f"no table of scores {path}")
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        return ParquetFile(path).read().to_pylist()
    try:
        if path.name.endswith("result.json"):
            return _samples(json.loads(path.read_text("utf-8")), path, arm)
        return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no table of scores: {error}") from error


def _samples(result: Mapping[str, Any], path: Path, arm: str | None) -> list[dict[str, Any]]:
    """The samples of one arm of a steering run."""
    samples = result.get("samples")
    if not isinstance(samples, list) or not samples:
        raise ValueError(f"{path} holds no samples: is it the result of kilter steer?")
    arms = list(dict.fromkeys(s["arm"] for s in samples))
    wanted = arm or ("plain" if "plain" in arms else arms[0])
    if wanted not in arms:
        raise ValueError(f"{path} has no arm {wanted!r}, but {', '.join(arms)}")
    return [{"image": s.get("image"), "prompt": s["prompt"], **s["scores"]} for s in samples if s["arm"] == wanted]


def _scores(rows: list[dict[str, Any]], path: str | Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(what identifies a row, its scores) of a table."""
    if not rows:
        raise ValueError(f"{path} holds no rows")
    if not all(isinstance(row, dict) and isinstance(row.get("prompt"), str) for row in rows):
        held = ", ".join(map(str, list(rows[0])[:6])) if isinstance(rows[0], dict) else type(rows[0]).__name__
        raise ValueError(
            f'{path} is no table of scores, rows with a "prompt" and a column a reward, as kilter score --out writes; '
            f"it holds {held}"
        )
    numeric = [
        name for name in dict.fromkeys(name for row in rows for name in row)
        if name not in OTHERS and any(_is_number(row.get(name)) for row in rows)
    ]  # fmt: skip
    if not numeric:
        raise ValueError(f"{path} holds no scores: it has {', '.join(rows[0])}")
    return [({k: row.get(k) for k in KEYS if row.get(k) is not None}, {n: row.get(n) for n in numeric}) for row in rows]


def _joined(tables: list[list[tuple[dict, dict]]], paths: Sequence[str | Path]) -> list[tuple[dict, dict]]:
    """One row for each sample that all tables have."""
    shared = [k for k in KEYS if all(k in key for rows in tables for key, _ in rows)]
    if shared == ["prompt"]:
        raise ValueError('tables are joined by "image" or "id" beside "prompt", which not all of their rows have')
    by_key = []
    for rows, path in zip(tables, paths, strict=True):
        known = {tuple(key[k] for k in shared): (key, scores) for key, scores in rows}
        if len(known) < len(rows):
            raise ValueError(f"{path} has rows with the same {' and '.join(shared)}: they cannot be joined")
        by_key.append(known)
    names = [name for rows in tables for name in rows[0][1]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} stands in more than one table: rename a column")
    common = [key for key in by_key[0] if all(key in known for known in by_key)]
    if not common:
        raise ValueError(f"the tables share no {' and '.join(shared)}")
    return [(by_key[0][key][0], {n: v for known in by_key for n, v in known[key][1].items()}) for key in common]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan
