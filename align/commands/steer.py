"""`kilter steer`: sample prompts with and without steering, and score both."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, Optional

from jsonargparse import SUPPRESS, ActionConfigFile, Namespace

from rewards import Prompt, Reward
from samplers import Budget, Kernel, Policy, Steering
from samplers.unets import UNetPolicy

from ..adapters import set_scale
from ..description import describe
from ..loading import EMBEDDED, Student
from ..media import Media, fitted, load_rgb
from ..parsing import FAILED, INTERRUPTED, LOADING, Parser, add_loading
from ..prompts import read_prompts
from ..results import Steered, prepare_folder
from ..versus import Versus
from ..world import World

HELP = "sample with a reward steering the way"
PARTICLES, STRENGTH = 8, 0.8


def parser() -> Parser:
    """The command's options."""
    options = Parser(description="Sample prompts with and without steering, and score both.")
    options.add_argument("--config", action=ActionConfigFile, help="YAML with any of these options")
    options.add_argument(
        "prompts", nargs="*", type=str, default=SUPPRESS, help="prompts, or .txt / .jsonl files of prompts"
    )
    options.add_argument("--model", type=str, default=str(EMBEDDED), help="folder or hub id of a diffusers pipeline")
    options.add_argument("--lora", type=Optional[str], help="LoRA weights: folder, file or hub id")
    options.add_argument(
        "--student", type=Optional[Student], help="schedule of a few-step LoRA over a plain checkpoint"
    )
    options.add_argument(
        "--lora_scale", type=float, default=1.0, help="strength of the LoRA: 0 is the base, 1 as trained"
    )
    options.add_argument("--controlnet", type=Optional[str], help="a ControlNet: folder or hub id")
    options.add_argument("--control", type=Optional[str], help="picture for the ControlNet, where a prompt has none")
    options.add_argument("--control_scale", type=float, default=1.0, help="strength of the ControlNet: 0 is without")
    options.add_argument("--preview_vae", type=Optional[str], help="AutoencoderTiny for intermediate rewards")
    options.add_argument("--device", type=Optional[str], help="cpu, cuda, cuda:1, mps, …")
    options.add_argument("--dtype", type=Optional[Literal["float32", "float16", "bfloat16"]], help="of the networks")
    add_loading(options)
    options.add_argument("--reward", type=Reward, default={"class_path": "CrossEncoder"}, help="what to steer by")
    options.add_argument("--steering", type=Steering, default={"class_path": "FeynmanKac"}, help="how to steer")
    options.add_argument(
        "--compare",
        type=Steering,
        nargs="+",
        help="two or more ways to steer, compared at one --budget; write them last",
    )
    options.add_argument("--kernel", type=Optional[Kernel], help="noise rule of a step; the model's own by default")
    options.add_argument("--panel", type=Optional[list[Reward]], help="more rewards to score the results by")
    options.add_argument("--particles", type=Optional[int], help="samples a prompt; 8, or what the budget pays for")
    options.add_argument(
        "--budget", type=Optional[str], help="what steering may spend in all: 20s, 400nfe or 64rewards"
    )
    options.add_argument("--steps", type=Optional[int], help="denoising steps; the model's own by default")
    options.add_argument(
        "--guidance", type=Optional[float], help="classifier-free guidance; the model's own by default"
    )
    options.add_argument("--seed", type=int, default=0, help="of the first sample")
    options.add_argument("--size", type=Optional[tuple[int, int]], help="[height, width] in pixels")
    options.add_argument("--image", type=Optional[str], help="picture to begin from instead of pure noise")
    options.add_argument("--strength", type=float, default=STRENGTH, help="share of the steps walked from --image")
    options.add_argument("--plain", type=bool, default=True, help="also sample without steering")
    options.add_argument("--batch", type=int, default=32, help="samples in flight at a time")
    options.add_argument("--out", type=Optional[str], help="result folder; the next free runs/NNN by default")
    options.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    options.add_argument("--json", action="store_true", help="print result.json on standard output")
    return options


def run(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    if options.particles is not None and options.particles < 1:
        raise ValueError(f"particles must be ≥ 1; got {options.particles}")
    if options.budget is not None:
        Budget.parse(options.budget)
    elif options.compare:
        raise ValueError("methods are compared at one budget: pass --budget, such as 20s, 400nfe or 64rewards")
    if options.image is None and options.strength != STRENGTH:
        raise ValueError("--strength is how far samples go from a picture: pass --image")
    prompts = read_prompts(options.get("prompts", []))
    world = World(cpu=options.device == "cpu")
    if not world.first:  # the first process writes what all found
        _sampled(parser, parsed, options, prompts)
        return 0
    out = prepare_folder(options.out, options.overwrite)
    try:
        result = _sampled(parser, parsed, options, prompts)
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmdir()  # only if nothing is in it
        raise
    asked = {k: v for k, v in options.as_dict().items() if k not in ("out", "overwrite", "json", "config")}
    if options.budget is None:
        asked["particles"] = result.config["particles"]
    result.config = {**describe(asked), "resolved": result.config}
    result.save(out)
    if isinstance(result, Versus):
        print(f"{result.table()}\nwrote {out}/grid.png, {out}/comparison.md, {out}/result.json", file=sys.stderr)
    else:
        _summary(result, out)
    if options.json:
        print(json.dumps(result.as_dict()))
    if result.stopped is None:
        return 0
    return INTERRUPTED if result.interrupted else FAILED


def _sampled(parser: Parser, parsed: Namespace, options: Namespace, prompts: list[Prompt]) -> Steered | Versus:
    from .. import compare_steerings, load_policy, steer

    built = parser.instantiate(parsed).steer
    how = {name: options[name] for name in ("device", "dtype", "preview_vae", "controlnet", *LOADING)}
    policy = load_policy(options.model, lora=options.lora, student=options.student, **how)
    if options.lora_scale != 1:
        set_scale(policy, options.lora_scale)
    prompts = _controlled(policy, prompts, options)
    names = ("steps", "budget", "guidance", "seed", "size", "image", "strength", "batch")
    how = {name: options[name] for name in names}
    how |= {"kernel": built.kernel, "rewards": [built.reward, *(built.panel or ())], "progress": True}
    how["particles"] = options.particles or (PARTICLES if options.budget is None else None)
    if built.compare:
        return compare_steerings(policy, prompts, [method.bind(built.reward) for method in built.compare], **how)
    return steer(policy, prompts, built.steering.bind(built.reward), plain=options.plain, **how)


def _controlled(policy: Policy, prompts: list[Prompt], options: Namespace) -> list[Prompt]:
    """The prompts, each with a picture for the ControlNet if there is one."""
    if not isinstance(policy, UNetPolicy) or not policy.controlled:
        if options.control is not None or options.control_scale != 1:
            raise ValueError("--control and --control_scale need a ControlNet: pass --controlnet")
        return prompts
    policy.conditioning_scale = options.control_scale
    if options.control is None:
        return prompts
    file = Media(options.control, Path(options.control).expanduser())
    picture = fitted(load_rgb(file), options.size or policy.size)
    return [p if "control" in p.meta else replace(p, meta={**p.meta, "control": picture}) for p in prompts]


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
