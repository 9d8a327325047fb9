"""Command line and YAML as `jsonargparse` parsers: a component is its class, its constructor is the schema.

Components are named by their class, their constructor arguments are options: `--reward CLIPScore --steering FeynmanKac
--steering.beta 2`. The same keys make a YAML file for `--config`; `--print_config` prints one.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from typing import Literal, Optional

from jsonargparse import ArgumentParser, Namespace

from rewards import Judge, Reward
from samplers import Kernel, Steering, Value

from .learning import Head, Loss
from .objectives import Objective
from .places import Offload, Quantize
from .sources import Source

__all__ = [
    "BAD_INPUT",
    "COMPONENTS",
    "FAILED",
    "INTERRUPTED",
    "LOADING",
    "Parser",
    "add_loading",
    "build_parser",
    "concrete",
]

LOADING = ("like", "variant", "quantize", "quantize_text", "device_map", "offload", "compile")
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130  # exit codes

COMPONENTS = {
    "rewards": Reward,
    "judges": Judge,
    "steerings": Steering,
    "values": Value,
    "kernels": Kernel,
    "objectives": Objective,
    "sources": Source,
    "heads": Head,
    "losses": Loss,
}


class Parser(ArgumentParser):
    """Names the nearest valid word in errors about unknown ones."""

    def error(self, message: str, ex: Exception | None = None):  # type: ignore[override]
        unknown = re.findall(
            r"unrecognized arguments: --([\w.-]+)|[Oo]ption '([\w.]+)'|import path string: '?([\w.]+)", message
        )
        for *options, name in unknown:
            word = name or "".join(options)
            known = {
                w.lower(): w for w in self._vocabulary() - {word} if w[0].isupper() == bool(name)
            }  # classes, or options
            if near := difflib.get_close_matches(word.lower(), known, 1, 0.6 if name else 0.76):
                message += f"\n  Did you mean {known[near[0]]!r} instead of {word!r}?"
        super().error(message, ex)

    def get_defaults(self, *args, **kwargs) -> Namespace:
        """Components as they were declared: the arguments of a default must not become those of the class chosen instead."""
        found = super().get_defaults(*args, **kwargs)
        for action in self._actions:
            if isinstance(action.default, (dict, Namespace)) and "class_path" in action.default:
                found[action.dest] = copy.deepcopy(action.default)
        return found

    def _vocabulary(self) -> set[str]:
        parsers = [self, *(p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values())]
        options = [o.lstrip("-") for p in parsers for a in getattr(p, "_actions", ()) for o in a.option_strings]
        classes = [cls for base in COMPONENTS.values() for cls in concrete(base)]
        arguments = [name for cls in classes for name in inspect.signature(cls.__init__).parameters if name != "self"]
        prefixed = [
            f"{p}.{name}"
            for p in ("reward", "reward.judge", "steering", "kernel", "objective", "source", "encoder", "head", "loss")
            for name in arguments
        ]
        fields = [o.rpartition(".")[2] for o in options]
        return {*options, *fields, *(cls.__name__ for cls in classes), *arguments, *prefixed}


def add_loading(options: Parser) -> None:
    """The options named in `LOADING`: how `load_policy` reads a model and keeps it."""
    options.add_argument("--like", type=Optional[str], help="whose configuration a model in one .safetensors file has")
    options.add_argument("--variant", type=Optional[str], help="of the files of weights, such as fp16")
    options.add_argument(
        "--quantize", type=Optional[Quantize], help="bits of the network's frozen weights, under a LoRA"
    )
    options.add_argument("--quantize_text", type=bool, default=False, help="quantise the text encoders too")
    options.add_argument("--device_map", type=Optional[str], help="balanced: spread the networks over the GPUs")
    options.add_argument("--offload", type=Optional[Offload], help="weights wait on the CPU; training needs sequential")
    options.add_argument(
        "--compile", type=bool | Literal["regional"], default=False, help="compile the network, or its repeated block"
    )


def concrete(base: type) -> list[type]:
    """Every class one can choose for a base class, by name."""
    found = {cls for cls in _subclasses(base) if not inspect.isabstract(cls) and not cls.__name__.startswith("_")}
    return sorted(
        (cls for cls in found if cls.__module__.split(".")[0] in ("rewards", "samplers", "align")),
        key=lambda c: c.__name__,
    )


def _subclasses(base: type) -> list[type]:
    return [cls for child in base.__subclasses__() for cls in (child, *_subclasses(child))]


def build_parser() -> Parser:
    """The whole command line."""
    from .commands import COMMANDS

    parser = Parser(prog="kilter", description="Align generative models with rewards.")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, command.parser(), help=command.HELP)
    return parser
