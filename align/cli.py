"""The command line: `kilter steer | score | list`, a thin map onto `align.steer` and `align.score`.

Components are named by their class, their constructor arguments are options: `--reward CLIPScore --steering FeynmanKac
--steering.beta 2`. The same keys make a YAML file for `--config`; `--print_config` prints one.

Exit codes: 0 done; 1 the run failed midway and its partial results were saved; 2 bad input; 130 interrupted, likewise saved.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import json
import logging
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal, Optional

from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentParser, Namespace

from rewards import Prompt, Reward
from samplers import Kernel, Steering
from samplers.families import FAMILIES

from .description import describe
from .loading import EMBEDDED
from .prompts import read_prompts
from .results import Steered, prepare_folder

__all__ = ["main"]

COMPONENTS = {"rewards": Reward, "steerings": Steering, "kernels": Kernel}
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class Parser(ArgumentParser):
    """Names the nearest valid word in errors about unknown ones."""

    def error(self, message: str, ex: Exception | None = None):  # type: ignore[override]
        unknown = re.findall(
            r"unrecognized arguments: --([\w.-]+)|Option '([\w.]+)'|import path string: '?([\w.]+)", message
        )
        words = [word for groups in unknown for word in groups if word]
        for word in words:
            if near := difflib.get_close_matches(word, self._vocabulary(), 1, 0.6):
                message += f"\n  Did you mean {near[0]!r} instead of {word!r}?"
        super().error(message, ex)

    def _vocabulary(self) -> list[str]:
        parsers = [self, *(p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values())]
        options = [o.lstrip("-") for p in parsers for a in getattr(p, "_actions", ()) for o in a.option_strings]
        classes = [cls for base in COMPONENTS.values() for cls in concrete(base)]
        arguments = [name for cls in classes for name in inspect.signature(cls.__init__).parameters if name != "self"]
        prefixed = [f"{p}.{name}" for p in ("reward", "steering", "kernel") for name in arguments]
        return [*options, *(cls.__name__ for cls in classes), *arguments, *prefixed]


def concrete(base: type) -> list[type]:
    """Every class one can choose for a base class, by name."""
    found = {cls for cls in _subclasses(base) if not inspect.isabstract(cls) and not cls.__name__.startswith("_")}
    return sorted(
        (cls for cls in found if cls.__module__.split(".")[0] in ("rewards", "samplers")), key=lambda c: c.__name__
    )


def _subclasses(base: type) -> list[type]:
    return [cls for child in base.__subclasses__() for cls in (child, *_subclasses(child))]


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

    listing = Parser(description="List what can be chosen.")
    listing.add_argument("kind", nargs="?", type=Optional[Literal["rewards", "steerings", "kernels", "families"]])
    commands.add_subcommand("list", listing, help="list rewards, steerings, kernels and model families")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    parser = build_parser()
    try:
        parsed = parser.parse_args(_config_first(sys.argv[1:] if argv is None else argv))
        options = parsed[parsed.command]
        return {"steer": _steer, "score": _score, "list": _list}[parsed.command](parser, parsed, options)
    except (ValueError, TypeError, OSError) as error:
        print(f"kilter: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("kilter: interrupted", file=sys.stderr)
        return INTERRUPTED


def _config_first(argv: Sequence[str]) -> list[str]:
    """Moves --config right behind the command: whatever else is said on the line, in any order, overrides the file."""
    pick = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pick.add_argument("--config", action="append", default=[])
    given, rest = pick.parse_known_args(argv)
    return [*rest[:1], *(f"--config={file}" for file in given.config), *rest[1:]]


def _steer(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    if options.particles < 1:
        raise ValueError(f"particles must be ≥ 1; got {options.particles}")
    prompts = read_prompts(options.get("prompts", []))
    out = prepare_folder(options.out, options.overwrite)
    try:
        result = _sampled(parser, parsed, options, prompts)
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmdir()  # only if nothing is in it
        raise
    asked = {k: v for k, v in options.as_dict().items() if k not in ("out", "overwrite", "json", "config")}
    result.config = {**describe(asked), "resolved": result.config}
    result.save(out)
    _summary(result, out)
    if options.json:
        print(json.dumps(result.as_dict()))
    if result.stopped is None:
        return 0
    return INTERRUPTED if result.interrupted else FAILED


def _sampled(parser: Parser, parsed: Namespace, options: Namespace, prompts: list[Prompt]) -> Steered:
    from . import load_policy, steer

    built = parser.instantiate(parsed).steer
    policy = load_policy(
        options.model, lora=options.lora, device=options.device, dtype=options.dtype, preview_vae=options.preview_vae
    )
    return steer(
        policy,
        prompts,
        built.steering.bind(built.reward),
        kernel=built.kernel,
        steps=options.steps,
        particles=options.particles,
        guidance=options.guidance,
        seed=options.seed,
        size=options.size,
        rewards=[built.reward, *(built.panel or ())],
        plain=options.plain,
        batch=options.batch,
        progress=True,
    )


def _summary(result: Steered, out: Path) -> None:
    """What a user wants to know at a glance, on standard error: each score's mean, and its mean over the samples to take."""
    print(
        f"{'':>16} {'unsteered':>19} {'steered':>19}\n{'':>16} {'mean':>9} {'best':>9} {'mean':>9} {'best':>9}",
        file=sys.stderr,
    )
    for name in dict.fromkeys(name for s in result.samples for name in s.scores):
        row = [result.mean(name, arm, best) for arm in ("plain", "steered") for best in (False, True)]
        print(f"{name:>16} " + " ".join(f"{value:9.3f}" for value in row), file=sys.stderr)
    for name, count in result.failures.items():
        print(f"{name} could not judge {count} samples: they were left out", file=sys.stderr)
    print(f"wrote {out}/grid.png, {out}/result.json", file=sys.stderr)


def _score(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    from . import score
    from .scoring import load_image

    images = [load_image(path) for path in options.images]
    prompts = read_prompts(options.prompts) if options.prompts else []
    built = parser.instantiate(parsed).score
    reward = built.reward.to(options.device) if options.device else built.reward
    scores = score(reward, images, prompts, batch=options.batch)
    texts = [p.text for p in prompts] * (len(images) if len(prompts) == 1 else 1) or [""] * len(images)
    for i, path in enumerate(options.images):
        row = {"image": path, "prompt": texts[i], reward.name: scores.total[i].item()}
        row |= {name: values[i].item() for name, values in scores.parts.items()}
        if options.json:
            print(json.dumps({k: None if v != v else v for k, v in row.items()}))
        else:
            values = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
            print(f"{path}  {values}  {texts[i]}".rstrip())
    return 0


def _list(parser: Parser, parsed: Namespace, options: Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
