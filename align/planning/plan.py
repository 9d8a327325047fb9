"""`align.plan`: what a run will hold in memory, whether that fits, and what to change so that it does.

Peaks are found by walking the run itself on tensors without data (`align.planning`). Where a run does not fit, settings are
changed in order of what they cost: the decoder takes fewer samples at a time, then the sampler, then the optimiser's
micro-batch (the result stays the same), activations are recomputed (slower), gradients reach back fewer steps (another
method), the frozen weights become half precision, wait on the CPU, have fewer bits. Changes are added until the run fits; then
each is taken back, or made as mild as it may be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rewards import Prompt
from rewards.loading import hollow
from samplers import Policy

from ..config import NAMES, TrainConfig
from ..loading import load_policy
from ..memory import Memory
from ..objectives import Backprop
from ..parsing import LOADING
from ..prompts import read_prompts, world_prompts
from .phantom import Phantom
from .targets import Target
from .walks import Walk, steering_walk, training_walk

__all__ = ["Plan", "plan"]

Settings = dict[str, Any]
STAND_IN = "a photo of a cat"
PARTICLES = 8
BY_ITSELF = ("rows_at_once", "decode_chunk")  # what `align.steer` sets where memory is short; see `align.footprint`


@dataclass(frozen=True)
class Plan:
    """What a run holds, and how to make it fit.

    Attributes:
        what: "steer" or "train".
        model: folder or hub id.
        target: what it is planned for.
        walk: the run as it was asked for.
        settings: what to change, by dotted name; nothing if it fits.
        fitting: the run with these changes.
        notes: what was not counted, or is done by the run itself.
    """

    what: str
    model: str
    target: Target
    walk: Walk
    settings: Settings = field(default_factory=dict)
    fitting: Walk | None = None
    notes: tuple[str, ...] = ()

    @property
    def last(self) -> Walk:
        """The run with all changes."""
        return self.fitting or self.walk

    @property
    def fits(self) -> bool:
        """Whether the run fits, with the changes if there are any."""
        return self.last.peak <= self.target.room

    def yaml(self) -> str:
        """The changes as lines of a configuration."""
        import yaml

        nested: dict[str, Any] = {}
        for name, value in self.settings.items():
            if name not in BY_ITSELF:
                _put(nested, name, value)
        return yaml.safe_dump(nested, sort_keys=False) if nested else ""

    def table(self) -> str:
        """For people: what each phase holds, the verdict, the changes."""
        lines = [f"{self.what} {self.model} on {self.target.name}", "", *_rows(self.walk), "", self._verdict(self.walk)]
        if self.fitting is not None:
            able = "fits with" if self.fits else "does not fit even with"
            seen_to = [f"{name} {value}" for name, value in self.settings.items() if name in BY_ITSELF]
            if seen_to:
                lines += ["", f"The run itself takes fewer rows at a time where memory is short: {', '.join(seen_to)}."]
            told = self.yaml().rstrip()
            how = "these settings" if told else "that alone"
            lines += ["", f"It {able} {how}, {_told(self.fitting.peak)} at most{':' if told else '.'}", "", told]
            if not self.fits:
                lines += ["", self._verdict(self.fitting)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _verdict(self, walk: Walk) -> str:
        spare = self.target.room - walk.peak
        held = f"The peak is {_told(walk.peak)}, while it does this: {walk.phase}."
        if spare == float("inf"):
            return held
        return f"{held} {_told(self.target.room)} can be had: " + (
            f"{_told(spare)} to spare." if spare >= 0 else f"{_told(-spare)} too few."
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""

        def told(walk: Walk | None) -> dict[str, Any] | None:
            if walk is None:
                return None
            phases = {name: {"total": walk.held(name), "parts": moment.parts} for name, moment in walk.phases.items()}
            return {"peak": walk.peak, "phase": walk.phase, "weights": walk.weights.bytes, "phases": phases}

        room = None if self.target.room == float("inf") else self.target.room
        asked = {"what": self.what, "model": self.model, "gpu": self.target.name, "room": room, "fits": self.fits}
        return {
            **asked,
            "asked": told(self.walk),
            "settings": self.settings,
            "fitting": told(self.fitting),
            "notes": self.notes,
        }


def plan(
    config: str | Path | Mapping[str, Any],
    gpu: str | None = None,
    *,
    seen: Callable[[str], None] = lambda line: None,
    **overrides: Any,
) -> list[Plan]:
    """Plans the run of a configuration, or steering and training of a model with default settings.

    Args:
        config: a YAML file or a mapping as for `align.train` or `kilter steer --config`; or a model's folder, name or hub id.
        gpu: a size such as "24GB" or a name such as "a100-80"; by default the device that is here.
        seen: called with every set of settings that is tried.
        overrides: keys that replace those of the configuration, dotted to reach inside.

    Returns:
        One plan, or two for a model: steering first.

    Raises:
        ValueError: the configuration cannot work, or there is no such GPU.
        FileNotFoundError: there is neither a file nor a model of that name.
    """
    target = Target.of(gpu)
    if isinstance(config, Mapping) or str(config).endswith((".yaml", ".yml")):
        from ..training import read_yaml

        given = dict(config if isinstance(config, Mapping) else read_yaml(Path(config)))
        given.pop("out", None)
        kinds = [_Train if {"objective", "source"} & given.keys() else _Steer]
    else:
        given, kinds = {"model": str(config)}, [_Steer, _Train]
    for name, value in overrides.items():
        _put(given, name, value)
    return [_planned(kind(given, target), target, seen) for kind in kinds]


def _planned(run: _Run, target: Target, seen: Callable[[str], None]) -> Plan:
    known: dict[str, Walk] = {}

    def walked(settings: Settings) -> Walk:
        if (key := repr(sorted(settings.items()))) not in known:
            seen(f"{run.what}: {', '.join(f'{k} {v}' for k, v in settings.items()) or 'as asked'}")
            known[key] = run.walk(settings)
        return known[key]

    first = walked({})
    plan = Plan(run.what, run.model, target, first, notes=tuple(run.notes))
    if plan.fits:
        return plan
    settings: Settings = {}
    ladders = list(run.ladders())
    for name, rungs in ladders:
        with suppress(ValueError):  # a change that this run or model cannot take is no remedy
            fits = walked({**settings, name: rungs[-1]}).peak <= target.room
            settings[name] = rungs[-1]
            if fits:
                break
    enough = max(target.room, walked(settings).peak)
    for name, rungs in ladders[::-1]:  # each as mild as it may be, the dearest first
        if name in settings:
            milder = [{k: v for k, v in settings.items() if k != name}, *({**settings, name: rung} for rung in rungs)]
            settings = next(one for one in milder if walked(one).peak <= enough)
    return replace(plan, settings=settings, fitting=walked(settings))


class _Run:
    """A run that can be walked with other settings."""

    what: str
    model: str
    options: Any

    def __init__(self, target: Target) -> None:
        self.target, self.notes = target, []
        self._policies: dict[str, Policy] = {}

    def walk(self, settings: Settings) -> Walk:
        raise NotImplementedError

    def ladders(self) -> Iterator[tuple[str, list[Any]]]:
        """Settings that may be changed, in order of what it costs, with their values from mild to strong."""
        raise NotImplementedError

    def policy(self, options: Any, settings: Settings) -> Policy:
        """The model without weights."""
        beside = [name for name in ("controlnet", "preview_vae") if name in options]
        how = {name: settings.get(name, options[name]) for name in ("dtype", *beside, *LOADING)}
        how["dtype"] = how["dtype"] or ("float16" if self.target.cuda else "float32")
        if how["quantize"] and not (settings.get("dtype") or options.dtype):
            how["dtype"] = "bfloat16"
        if (key := repr(how)) not in self._policies:
            self._policies[key] = load_policy(options.model, student=options.student, device="meta", **how)
        return self._policies[key]

    def lighter(self) -> Iterator[tuple[str, list[Any]]]:
        """Weights of less precision, or not all there at a time where no backward pass brings them all back."""
        options = self.options
        if options.dtype == "float32" or (options.dtype is None and not self.target.cuda):
            yield "dtype", ["bfloat16"]
        if self.target.cuda and not (options.offload or options.quantize or options.device_map):
            if self.what == "steer":
                yield "offload", ["model"]
            yield "quantize", ["int8", "nf4"]

    def instantiated(self, parser: Any, options: Any) -> Any:
        """The components, rewards without weights; one that cannot be made here is left out, and that is said."""
        try:
            with hollow(), Phantom(self.target):  # which answers where a constructor looks at a weight
                return parser.instantiate(options)
        except Exception as error:
            if options.get("reward") is None:
                raise
            lines = str(error).splitlines()  # of parsers first, the cause within
            why = next((line.strip(" -") for line in lines if "cannot load" in line or "pip install" in line), lines[0])
            self.notes.append(f"the reward could not be made here, so its memory is not counted: {why}")
            options.reward = {"class_path": "rewards.Brightness"}
            return parser.instantiate(options)


class _Train(_Run):
    """`align.train` of a configuration."""

    what = "train"

    def __init__(self, given: Mapping[str, Any], target: Target) -> None:
        super().__init__(target)
        from ..commands.train import parser as train_parser

        parser = train_parser()
        if not {"objective", "source"} & given.keys():
            default = {"objective": "PolicyGradient", "source": "Rollouts", "reward": "CrossEncoder"}
            given = {**default, "eval_prompts": [STAND_IN], **given}
            prompts = [] if world_prompts(load_policy(given["model"], device="meta").world, "train") else [STAND_IN]
            given["source"] = {"class_path": "Rollouts", "init_args": {"prompts": prompts}}
        self.options = _parsed(parser, given)
        built = self.instantiated(parser, self.options)
        self.config = TrainConfig(**{name: built[name] for name in NAMES})
        self.objective, self.source = built.objective.bind(built.reward), built.source.bind(built.reward)
        self.model = self.options.model
        if self.options.adapter:
            self.notes.append("the adapter is taken to be a new one of the rank that lora asks for")

    def walk(self, settings: Settings) -> Walk:
        config, objective = self.config, self.objective
        for name, value in settings.items():
            head, _, inside = name.partition(".")
            if head == "memory":
                config = replace(config, memory=replace(config.memory, **{inside: value}))
            elif head in ("micro_batch", "sample_rows", "optimizer"):
                config = replace(config, **{head: value})
            elif inside == "init_args.k":
                assert isinstance(objective, Backprop)
                objective = objective.reaching(value)
        policy = self.policy(self.options, settings)
        return training_walk(policy, objective, self.source, config, self.target)

    def ladders(self) -> Iterator[tuple[str, list[Any]]]:
        config, members = self.config, self.source.members
        yield from _halved("memory.decode_chunk", config.memory.decode_chunk)
        yield from _halved("sample_rows", config.sample_rows, config.eval_samples)
        yield from _halved("micro_batch", config.micro_batch, members)
        if stronger := {"none": ["step", "block"], "step": ["block"]}.get(config.memory.checkpointing):
            yield "memory.checkpointing", stronger
        if isinstance(self.objective, Backprop) and self.objective.truncation == "last":
            yield from _halved("objective.init_args.k", self.objective.k)
        if self.target.cuda and config.optimizer == "adamw":
            yield "optimizer", ["adamw8bit"]
        if config.lora is not None:
            yield from self.lighter()


class _Steer(_Run):
    """`kilter steer` of a configuration."""

    what = "steer"

    def __init__(self, given: Mapping[str, Any], target: Target) -> None:
        super().__init__(target)
        from ..commands.steer import parser as steer_parser

        parser = steer_parser()
        self.options = options = _parsed(parser, given)
        self.built = self.instantiated(parser, options)
        self.model, self.particles = options.model, options.particles or PARTICLES
        self.methods = [m.bind(self.built.reward) for m in (self.built.compare or [self.built.steering])]
        prompts = options.get("prompts") or []
        count = max(1, options.batch // self.particles)
        self.prompts = read_prompts(prompts) if prompts else [Prompt(STAND_IN)] * count

    def walk(self, settings: Settings) -> Walk:
        options, built = self.options, self.built
        policy = self.policy(options, settings)
        how = {name: options[name] for name in ("steps", "guidance", "seed", "size")}
        how |= {"kernel": built.kernel, "rewards": [built.reward, *(built.panel or ())], "particles": self.particles}
        how["batch"] = settings.get("batch", options.batch)
        policy.decode_chunk = settings.get("decode_chunk", Memory.decode_chunk)
        policy.rows_at_once = settings.get("rows_at_once")
        prompts = _pictured(policy, self.prompts, options.size)
        walks = [steering_walk(policy, prompts, method, self.target, **how) for method in self.methods]
        return max(walks, key=lambda walk: walk.peak)

    def ladders(self) -> Iterator[tuple[str, list[Any]]]:
        yield from _halved("decode_chunk", min(Memory.decode_chunk, self.options.batch))
        yield from _halved("rows_at_once", self.options.batch)
        yield from _halved("batch", self.options.batch, self.particles)
        yield from self.lighter()


def _pictured(policy: Policy, prompts: list[Prompt], size: tuple[int, ...] | None) -> list[Prompt]:
    """The prompts, each with a picture of the size of the run where a ControlNet is shown one."""
    if not getattr(policy, "controlled", False):
        return prompts
    blank = torch.zeros(3, *(size or policy.size))
    return [replace(p, meta={**p.meta, "control": blank}) for p in prompts]


def _put(given: dict[str, Any], name: str, value: Any) -> None:
    """Sets what a dotted name means; a component that was named by its class alone is opened."""
    *above, last = name.split(".")
    for part in above:
        inside = given.get(part)
        given[part] = {"class_path": inside} if isinstance(inside, str) else dict(inside or {})
        given = given[part]
    given[last] = value


def _halved(name: str, value: int, least: int = 1) -> Iterator[tuple[str, list[Any]]]:
    """A number made smaller by halves."""
    rungs = []
    while value > max(1, least):
        value = max(least, value // 2)
        rungs.append(value)
    if rungs:
        yield name, rungs


def _parsed(parser: Any, given: Mapping[str, Any]) -> Any:
    parser.exit_on_error = False
    try:
        return parser.parse_object(dict(given))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error


def _rows(walk: Walk) -> list[str]:
    """One line a phase: what is held of each part, in the order in which the run comes to it."""
    held = {name: moment for name, moment in walk.phases.items() if moment.total}
    parts = list(dict.fromkeys(part for moment in held.values() for part, size in moment.parts.items() if size > 0))
    width = max(len(name) for name in held)
    table = [f"weights: {', '.join(f'{part} {_told(size)}' for part, size in walk.weights.bytes.items())}", ""]
    table.append(f"{'':<{width}} {'weights':>9}" + "".join(f" {part:>10}" for part in parts) + f" {'in all':>9}")
    for name, moment in held.items():
        cells = "".join(f" {_told(moment.parts.get(part, 0)):>10}" for part in parts)
        table.append(f"{name:<{width}} {_told(walk.weights.during(name)):>9}{cells} {_told(walk.held(name)):>9}")
    return table


def _told(size: float) -> str:
    """Bytes for people."""
    if size < 5e4:
        return "–"
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
