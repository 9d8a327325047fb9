"""The command line: `kilter COMMAND`, a thin map onto the functions of `align`; see `align/commands/`.

Exit codes: 0 done; 1 the run failed midway and its partial results were saved; 2 bad input; 130 interrupted, likewise saved.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence

from .commands import COMMANDS, train
from .parsing import BAD_INPUT, INTERRUPTED, build_parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    argv = _config_first(_named(sys.argv[1:] if argv is None else argv))
    try:
        code = _run(argv)
        _leave()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"kilter: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("kilter: interrupted", file=sys.stderr)
        return INTERRUPTED


def _leave() -> None:
    """Parts from the other processes in order: one that just ends can take another's connection down with an abort."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["train"] and not {"-h", "--help", "--print_config"} & set(argv):
        return train.run(argv[1:])  # what a resumed run is told depends on its folder
    parser = build_parser()
    parsed = parser.parse_args(argv)
    code = COMMANDS[parsed.command].run(parser, parsed, parsed[parsed.command])
    sys.stdout.flush()
    return code


def _named(argv: Sequence[str]) -> list[str]:
    """Lets the one thing a command is about stand without its option: kilter train CONFIG, kilter check-reward NAME.

    The one component that is as much a word as a class may be written small: --steering auto.
    """
    if argv and argv[0] == "steer":
        said = list(zip(["", *argv], argv, strict=False))
        argv = ["Auto" if pair == ("--steering", "auto") else pair[1] for pair in said]
        argv = [re.sub(r"^--steering=auto$", "--steering=Auto", word) for word in argv]
    option = (
        {
            "train": "--config",
            "check-model": "--model",
            "check-reward": "--reward",
            "train-reward": "--preferences",
            "plan": "--of",
        }.get(argv[0])
        if argv
        else None
    )
    if option and len(argv) > 1 and not argv[1].startswith("-"):
        return [argv[0], f"{option}={argv[1]}", *argv[2:]]
    return list(argv)


def _config_first(argv: Sequence[str]) -> list[str]:
    """Moves --config right behind the command: whatever else is said on the line, in any order, overrides the file."""
    pick = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pick.add_argument("--config", action="append", default=[])
    given, rest = pick.parse_known_args(argv)
    return [*rest[:1], *(f"--config={file}" for file in given.config), *rest[1:]]


if __name__ == "__main__":
    sys.exit(main())
