"""`kilter list`: what can be chosen."""

from __future__ import annotations

import inspect
import json
from typing import Literal, Optional

from jsonargparse import Namespace

from ..catalogue import Entry, Family, catalogue, families
from ..parsing import COMPONENTS, Parser, concrete

HELP = "list components and model families"


def parser() -> Parser:
    """The command's options."""
    options = Parser(description="List what can be chosen.")
    options.add_argument("kind", nargs="?", type=Optional[Literal[(*COMPONENTS, "families")]], help="list only these")
    options.add_argument("--json", action="store_true", help="rewards, or families, as JSON lines")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    if options.kind == "families":
        for family in families():
            print(json.dumps(family.as_dict()) if options.json else _of_family(family))
        return 0
    if options.kind == "rewards" or options.json:
        for entry in catalogue():
            print(json.dumps(entry.as_dict()) if options.json else _told(entry))
        return 0
    for kind, base in COMPONENTS.items():
        if options.kind in (None, kind):
            print(f"{kind}:")
            for cls in concrete(base):
                print(f"  {cls.__name__:<24} {(inspect.getdoc(cls) or '').splitlines()[0]}")
    if options.kind is None:
        print("families:")
        for family in families():
            for pipeline in family.pipelines:
                print(f"  {pipeline:<36} {family.title}")
    return 0


def _told(entry: Entry) -> str:
    """All that is known about a reward, in three lines."""
    looks_at = f"{entry.looks_at} and prompt" if entry.reads_prompt else entry.looks_at
    weights = f"{entry.weights}; {entry.licence}; " if entry.weights else ""
    return (
        f"{entry.name:<18} {entry.title}\n"
        f"{'':<18} {looks_at}; gradient: {entry.gradient}; range: {entry.range}; size: {entry.size}\n"
        f"{'':<18} {weights}{len(entry.proven)} laws proven"
    )


def _of_family(family: Family) -> str:
    """All that is known about a family, in three lines."""
    proven = f"{len(family.proven)} laws proven: {'; '.join(family.kinds)}"
    return f"{', '.join(family.pipelines)}\n    {family.title}\n    {proven}"
