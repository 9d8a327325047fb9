"""Command line and YAML as `jsonargparse` parsers: a component is its class, its constructor is the schema.

Components are named by their class, their constructor arguments are options: `--reward CLIPScore --steering FeynmanKac
--steering.beta 2`. The same keys make a YAML file for `--config`; `--print_config` prints one.
"""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Literal, Optional

from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentParser

from rewards import Reward
from samplers import Kernel, Steering

from . import feedback  # noqa: F401 (its sources can be named)
from .config import TrainConfig
from .loading import EMBEDDED
from .objectives import Objective
from .sources import Source

__all__ = ["COMPONENTS", "Parser", "build_parser", "concrete", "train_parser"]


COMPONENTS = {
    "rewards": Reward,
    "steerings": Steering,
    "kernels": Kernel,
    "objectives": Objective,
    "sources": Source,
}


class Parser(ArgumentParser):
    """Names the nearest valid word in errors about unknown ones."""

    def error(self, message: str, ex: Exception | None = None):  # type: ignore[override]
        unknown = re.findall(
            r"unrecognized arguments: --([\w.-]+)|[Oo]ption '([\w.]+)'|import path string: '?([\w.]+)", message
        )
        words = [word for groups in unknown for word in groups if word]
        for word in words:
            if near := difflib.get_close_matches(word, self._vocabulary() - {word}, 1, 0.6):
                message += f"\n  Did you mean {near[0]!r} instead of {word!r}?"
        super().error(message, ex)

    def _vocabulary(self) -> set[str]:
        parsers = [self, *(p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values())]
        options = [o.lstrip("-") for p in parsers for a in getattr(p, "_actions", ()) for o in a.option_strings]
        classes = [cls for base in COMPONENTS.values() for cls in concrete(base)]
        arguments = [name for cls in classes for name in inspect.signature(cls.__init__).parameters if name != "self"]
        prefixed = [
            f"{p}.{name}" for p in ("reward", "steering", "kernel", "objective", "source") for name in arguments
        ]
        fields = [o.rpartition(".")[2] for o in options]
        return {*options, *fields, *(cls.__name__ for cls in classes), *arguments, *prefixed}


def concrete(base: type) -> list[type]:
    """Every class one can choose for a base class, by name."""
    found = {cls for cls in _subclasses(base) if not inspect.isabstract(cls) and not cls.__name__.startswith("_")}
    return sorted(
        (cls for cls in found if cls.__module__.split(".")[0] in ("rewards", "samplers", "align")),
        key=lambda c: c.__name__,
    )


def _subclasses(base: type) -> list[type]:
    return [cls for child in base.__subclasses__() for cls in (child, *_subclasses(child))]


def train_parser() -> Parser:
    """The options of `kilter train`, which are the keys of its YAML files."""
    train = Parser(description="Change a model's weights by a reward, or by preferences.")
    train.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    train.add_argument("--resume", type=Optional[str], help="a run's folder: continue it, with its own configuration")
    train.add_argument("--model", type=str, default=str(EMBEDDED), help="folder or hub id of a diffusers pipeline")
    train.add_argument("--adapter", type=Optional[str], help="LoRA weights to go on from: folder, file or hub id")
    train.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …")
    train.add_argument(
        "--dtype", type=Optional[Literal["float32", "float16", "bfloat16"]], help="of the frozen weights"
    )
    train.add_argument("--reward", type=Optional[Reward], help="what to optimise; data needs none")
    train.add_argument("--objective", type=Objective, help="how a batch becomes a loss")
    train.add_argument("--source", type=Source, help="where batches come from")
    train.add_class_arguments(TrainConfig)
    return train


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="kilter", description="Align generative models with rewards.")
    commands = parser.add_subcommands(required=True, dest="command")

    steer = Parser(description="Sample prompts with and without steering, and score both.")
    steer.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    steer.add_argument(
        "prompts", nargs="*", type=str, default=SUPPRESS, help="prompts, or .txt / .jsonl files of prompts"
    )
    steer.add_argument("--model", type=str, default=str(EMBEDDED), help="folder or hub id of a diffusers pipeline")
    steer.add_argument("--lora", type=Optional[str], help="LoRA weights: folder, file or hub id")
    steer.add_argument(
        "--lora_scale", type=float, default=1.0, help="strength of the LoRA: 0 is the base, 1 as trained"
    )
    steer.add_argument("--preview_vae", type=Optional[str], help="AutoencoderTiny for intermediate rewards")
    steer.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …")
    steer.add_argument("--dtype", type=Optional[Literal["float32", "float16", "bfloat16"]], help="of the networks")
    steer.add_argument("--reward", type=Reward, default={"class_path": "CrossEncoder"}, help="what to steer by")
    steer.add_argument("--steering", type=Steering, default={"class_path": "FeynmanKac"}, help="how to steer")
    steer.add_argument("--kernel", type=Optional[Kernel], help="noise rule of a step; the model's own by default")
    steer.add_argument("--panel", type=Optional[list[Reward]], help="more rewards to score the results by")
    steer.add_argument("--particles", type=int, default=8, help="samples a prompt")
    steer.add_argument("--steps", type=Optional[int], help="denoising steps; the model's own by default")
    steer.add_argument("--guidance", type=Optional[float], help="classifier-free guidance; the model's own by default")
    steer.add_argument("--seed", type=int, default=0, help="of the first sample")
    steer.add_argument("--size", type=Optional[tuple[int, int]], help="[height, width] in pixels")
    steer.add_argument("--plain", type=bool, default=True, help="also sample without steering")
    steer.add_argument("--batch", type=int, default=32, help="samples in flight at a time")
    steer.add_argument("--out", type=Optional[str], help="result folder; the next free runs/NNN by default")
    steer.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    steer.add_argument("--json", action="store_true", help="print result.json on standard output")
    commands.add_subcommand("steer", steer, help="sample with a reward steering the way")

    score = Parser(description="Score image files.")
    score.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    score.add_argument("images", nargs="+", type=str, help="image files")
    score.add_argument(
        "--prompts", nargs="+", type=str, default=[], help="one for all, one an image, or a file of prompts"
    )
    score.add_argument("--reward", type=Reward, default={"class_path": "CrossEncoder"}, help="what to score by")
    score.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …")
    score.add_argument("--batch", type=int, default=32, help="images at a time")
    score.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    commands.add_subcommand("score", score, help="score images with a reward")

    commands.add_subcommand("train", train_parser(), help="change the weights by a reward or by preferences")

    listing = Parser(description="List what can be chosen.")
    listing.add_argument("kind", nargs="?", type=Optional[Literal[(*COMPONENTS, "families")]], help="list only these")
    commands.add_subcommand("list", listing, help="list components and model families")
    return parser
