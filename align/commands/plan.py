"""`kilter plan`: what a run will hold in memory, and what to change so that it fits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Optional

from jsonargparse import Namespace

from ..parsing import FAILED, Parser

HELP = "foresee the memory of a run, and make it fit"


def parser() -> Parser:
    """The command's options."""
    options = Parser(description="Foresee the peak memory of steering and training, without weights, and make it fit.")
    options.add_argument(
        "--of",
        type=str,
        required=True,
        help="a configuration of kilter steer or train, or a model's folder or hub id; may stand alone as first word",
    )
    options.add_argument("--gpu", type=Optional[str], help="24GB, 16GiB, a100-80, h100 …; the device here by default")
    options.add_argument(
        "--set",
        nargs="+",
        type=str,
        default=[],
        help="keys of the configuration to replace: micro_batch=2 dtype=bfloat16 …",
    )
    options.add_argument("--write", type=Optional[str], help="file for the settings that fit; of a model, two")
    options.add_argument("--json", action="store_true", help="print everything on standard output as JSON")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    from ..planning.plan import plan

    overrides = _overrides(options.set)
    plans = plan(options.of, options.gpu, seen=lambda line: print(line, file=sys.stderr), **overrides)
    if options.json:
        print(json.dumps([one.as_dict() for one in plans]))
    else:
        print("\n\n".join(one.table() for one in plans))
    if options.write:
        for one in [one for one in plans if one.fits]:
            path = Path(options.write)
            path = path if len(plans) == 1 else path.with_stem(f"{path.stem}-{one.what}")
            path.write_text(f"# for kilter {one.what}, a --config after the others\n" + (one.yaml() or "{}\n"))
            print(f"wrote {path}", file=sys.stderr)
    return 0 if all(one.fits for one in plans) else FAILED


def _overrides(given: list[str]) -> dict[str, object]:
    """Values by key; a dotted key reaches inside."""
    import yaml

    found: dict[str, object] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes key=value, such as micro_batch=2; got {item!r}")
        found[name] = yaml.safe_load(value)
    return found
