"""`kilter list`: what can be chosen."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Literal, Optional

from jsonargparse import Namespace

from samplers.families import FAMILIES

from ..parsing import COMPONENTS, Parser, concrete

HELP = "list components and model families"


def parser() -> Parser:
    """The command's options."""
    options = Parser(description="List what can be chosen.")
    options.add_argument("kind", nargs="?", type=Optional[Literal[(*COMPONENTS, "families")]], help="list only these")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    for kind, base in COMPONENTS.items():
        if options.kind in (None, kind):
            print(f"{kind}:")
            for cls in concrete(base):
                print(f"  {cls.__name__:<16} {(inspect.getdoc(cls) or '').splitlines()[0]}")
    if options.kind in (None, "families"):
        print("families:")
        for pipeline, adapter in FAMILIES.items():
            module, name = adapter.split(":")
            print(f"  {pipeline:<32} {(inspect.getdoc(getattr(import_module(module), name)) or '').splitlines()[0]}")
    return 0
