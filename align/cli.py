"""The command line: `kilter steer | train | score | list`, a thin map onto `align.steer`, `align.train` and `align.score`.

Exit codes: 0 done; 1 the run failed midway and its partial results were saved; 2 bad input; 130 interrupted, likewise saved.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from jsonargparse import Namespace

from rewards import Prompt
from samplers.families import FAMILIES

from .adapters import set_scale
from .description import describe
from .loading import usable
from .parsing import COMPONENTS, Parser, build_parser, concrete, train_parser
from .prompts import read_prompts
from .results import Steered, prepare_folder
from .world import World

__all__ = ["main"]

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    argv = _config_first(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"] and not {"-h", "--help", "--print_config"} & set(argv):
            return _train(argv[1:])
        parser = build_parser()
        parsed = parser.parse_args(argv)
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
    if rest[:1] == ["train"] and len(rest) > 1 and not rest[1].startswith("-"):
        given.config, rest = [*given.config, rest[1]], [rest[0], *rest[2:]]  # kilter train CONFIG
    return [*rest[:1], *(f"--config={file}" for file in given.config), *rest[1:]]


def _train(argv: list[str]) -> int:
    from .training import make_trainer

    parser = train_parser()
    trainer = make_trainer(parser, lambda defaults: parser.parse_args(argv, defaults=defaults))
    try:
        result = trainer.fit()
    except Exception as error:
        logging.getLogger("kilter").debug("", exc_info=True)
        print(f"kilter: error: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    if trainer.world.first:
        for name in trainer.evaluator.panel:
            gain, error = result.gain(name)
            known = (
                f"{gain:+.3f} ± {f'{error:.3f}' if error == error else '–'}" if gain == gain else "could not be judged"
            )
            print(f"{name:>16} {known}", file=sys.stderr)
        print(f"wrote {result.folder}", file=sys.stderr)
    if result.stopped is None:
        return 0
    print(f"stopped: {result.stopped}; go on with: kilter train --resume {result.folder}", file=sys.stderr)
    return INTERRUPTED if result.stopped in ("interrupted", "terminated") else FAILED


def _steer(parser: Parser, parsed: Namespace, options: Namespace) -> int:
    if options.particles < 1:
        raise ValueError(f"particles must be ≥ 1; got {options.particles}")
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
    if options.lora_scale != 1:
        set_scale(policy, options.lora_scale)
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
    reward = built.reward.to(usable(options.device)) if options.device else built.reward
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
