"""`kilter check-model`: put a model to the test of the laws that all model families here obey."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Literal, Optional

from jsonargparse import ActionConfigFile, Namespace

from ..conformance import LAWS, Finding, check
from ..loading import Student
from ..parsing import FAILED, LOADING, Parser, add_loading

HELP = "check a model against its own diffusers pipeline and the laws of training"
SIGNS = {True: "holds", False: "BROKEN", None: "-"}


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        description="Check a model: samples, images, guidance, gradients and LoRA against its own diffusers pipeline. Exit code 1 "
        "if a law is broken."
    )
    options.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    options.add_argument(
        "--model",
        type=str,
        required=True,
        help="folder or hub id of a diffusers pipeline; may stand alone as first word",
    )
    options.add_argument("--laws", type=Optional[list[str]], help="only these: " + ", ".join(LAWS))
    options.add_argument(
        "--student", type=Optional[Student], help="schedule of a few-step LoRA over a plain checkpoint"
    )
    options.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …; a GPU if there is one")
    options.add_argument(
        "--dtype",
        type=Literal["float32", "float16", "bfloat16"],
        default="float32",
        help="of the networks; what is equal is equal to 5e-5 in float32 only",
    )
    add_loading(options)
    options.add_argument(
        "--sizes",
        type=Optional[list[tuple[int, int]]],
        help="[[height, width], …] in pixels, one not square; two near an eighth of the model's own by default",
    )
    options.add_argument("--steps", type=int, default=4, help="of a sample: a divisor of 1000, at least 2")
    options.add_argument("--guidance", type=Optional[float], help="above 1; the model's own by default")
    options.add_argument("--seed", type=int, default=0, help="of the first sample")
    options.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    from .. import load_policy

    def load(dtype: str):
        how = {name: options[name] for name in ("student", "device", *LOADING)}
        return load_policy(options.model, dtype=dtype, **how)

    policy = load(options.dtype)
    how = {"steps": options.steps, "guidance": options.guidance, "seed": options.seed, "reload": load}
    how["sizes"] = options.sizes and tuple(tuple(size) for size in options.sizes)
    findings = list(_told(check(policy, laws=options.laws or (), **how), len(options.laws or LAWS)))
    for finding in findings:
        print(json.dumps(asdict(finding)) if options.json else _row(finding))
    counts = {holds: sum(f.holds is holds for f in findings) for holds in SIGNS}
    seconds = sum(f.seconds for f in findings)
    print(
        f"{type(policy).__name__} ({type(policy.pipe).__name__}, {options.dtype}, {policy.device}): {counts[True]} laws hold, "
        f"{counts[False]} are broken, {counts[None]} do not apply; {seconds:.0f} s",
        file=sys.stderr,
    )
    return FAILED if counts[False] else 0


def _told(findings: Iterator[Finding], laws: int) -> Iterator[Finding]:
    """The findings, each said on standard error as it comes."""
    for i, finding in enumerate(findings):
        print(
            f"{i + 1}/{laws} {finding.law}: {SIGNS[finding.holds]}, {finding.seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
        yield finding


def _row(finding: Finding) -> str:
    """A line of the table; below a broken law, what it means."""
    row = f"{finding.law:<14} {SIGNS[finding.holds]:<7} {finding.detail}"
    return f"{row}\n{'':<22} {finding.remedy}" if finding.remedy else row
