"""The sub-commands of `kilter`, one module each: `HELP`, `parser()` and `run(parser, parsed, options) -> exit code`."""

from . import list as listing
from . import score, steer, train

COMMANDS = {"steer": steer, "train": train, "score": score, "list": listing}
