"""What steering and training hold, phase by phase: their own code, walked by a `Phantom`.

Only what repeats is left out. A training update is walked for its first micro-batches, after an optimiser step for one.
Steering walks few levels, those of every kind that it treats differently. What grows with the length of a graph over several
steps (noise optimisation, backpropagation through many steps) is walked for two short lengths: it is a straight line from
there on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rewards import Prompt, Reward
from samplers import Kernel, Ledger, Levels, Outer, Policy, Steering, Value

from ..adapters import prepare_trainable
from ..config import TrainConfig
from ..evaluation import Evaluator, judged_prompts
from ..fitting import check_parts, optimised_reward
from ..objectives import Backprop, Objective
from ..panel import panel_of
from ..results import STEERED, Steered
from ..sampling import Sampling
from ..sources import Run, Source
from ..steering import prepared
from ..stepper import Stepper
from ..world import World
from .kept import Kept, kept
from .phantom import Moment, Phantom
from .targets import Target

__all__ = ["Walk", "steering_walk", "training_walk"]

SHORT = 3  # steps of a graph from which on it grows evenly
FEW = 12  # levels of a rollout without gradients, which show all its kinds of steps
MICRO_BATCHES = 2  # from the second on gradients are there already


class _Enough(Exception):
    """The rest of the run repeats what was walked."""


@dataclass(frozen=True)
class Walk:
    """What a run holds.

    Attributes:
        weights: where they are.
        phases: the highest moment of every phase, besides the weights.
    """

    weights: Kept
    phases: dict[str, Moment]

    def held(self, phase: str) -> int:
        """The most bytes in a phase, the weights among them."""
        return self.weights.during(phase) + self.phases[phase].total

    @property
    def peak(self) -> int:
        """The most bytes at any time."""
        return self.held(self.phase)

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=self.held)

    def at(self, further: int, longer: Walk) -> Walk:
        """The walk `further` steps longer, given the walk one step longer."""
        phases = {}
        for name, moment in longer.phases.items():
            before = self.phases.get(name, moment)
            grown: Callable[[int, int], int] = lambda new, old: new + (further - 1) * max(0, new - old)  # noqa: E731
            parts = {part: grown(size, before.parts.get(part, size)) for part, size in moment.parts.items()}
            phases[name] = Moment(grown(moment.total, before.total), parts)
        return Walk(self.weights, phases)


def steering_walk(policy: Policy, prompts: Sequence[Prompt], steering: Steering, target: Target, **how: Any) -> Walk:
    """What `align.steer` holds while it samples one batch of prompts with steering.

    Args:
        policy: without weights; see `load_policy`.
        how: further arguments of `align.steer`.
    """
    graph = isinstance(steering, Outer)
    run, _ = prepared(policy, prompts, steering, gold=None, **how)
    few = _few(steering, run.levels.steps)
    walks = [
        _steered(policy, prompts, steering, target, few + more, how)
        for more in range(1 + (graph and run.levels.steps > few))
    ]
    return walks[0] if len(walks) == 1 else walks[0].at(run.levels.steps - few, walks[1])


def _steered(
    policy: Policy, prompts: Sequence[Prompt], steering: Steering, target: Target, steps: int, how: dict[str, Any]
) -> Walk:
    run, prompts = prepared(policy, prompts, steering, gold=None, **how)
    run.levels, run.kernel = _thinned(run.levels, run.kernel, steps)
    with _walking(policy, [], target):  # language models look at the masks of their texts
        run.check(prompts[0])
    weights = kept(policy, _judges([steering, *run.panel.values()]), target)
    prompts = prompts[: max(1, run.batch // run.particles)]
    iterates: list[Any] = []

    def seen(iterate: Any) -> None:
        iterates.append(iterate)
        if len(iterates) == 2:
            raise KeyboardInterrupt

    with _walking(policy, [steering, *run.panel.values()], target) as phantom:
        phantom.act = "steer"
        try:
            run.add(Steered([], [], {}, {}), prompts, 0, STEERED, steering, (None, seen))
        except Exception as stop:
            if not iterates:
                raise
            del stop
    return Walk(weights, phantom.phases)


def training_walk(policy: Policy, objective: Objective, source: Source, config: TrainConfig, target: Target) -> Walk:
    """What `align.train` holds: evaluation, collection, update.

    Args:
        policy: without weights; it is left as it was.
    """
    if not isinstance(objective, Backprop) or (reach := objective.reach(config.steps or policy.steps)) <= SHORT + 1:
        return _trained(policy, objective, source, config, target)
    short, longer = (_trained(policy, objective.reaching(k), source, config, target) for k in (SHORT, SHORT + 1))
    return short.at(reach - SHORT, longer)


def _trained(policy: Policy, objective: Objective, source: Source, config: TrainConfig, target: Target) -> Walk:
    policy = copy.deepcopy(policy)  # it has no weights; what is added to it is this walk's alone
    reward = optimised_reward(objective, source)
    objective, source = objective.bind(reward), source.bind(reward)
    how = (policy, config.kernel, config.steps, config.guidance, config.size, config.sample_rows)
    sampling, world = Sampling.of(*how), World(cpu=True)
    config.memory.apply(policy)
    policy.uncond_grad = config.uncond_grad
    run = Run(policy, sampling, world, config.seed, config.batch, Ledger())
    check_parts(run, objective, source, config.panel)
    judges = panel_of([None if reward is None or reward.compares else reward, *config.panel], None)
    prompts = judged_prompts(config.eval_prompts, policy.world, source.prompts_for_evaluation())
    prompts = prompts[: max(1, config.sample_rows // config.eval_samples)]
    evaluate = Evaluator(prompts, config.eval_samples, judges, replace(sampling, shifted=objective.shifts), 0)
    weights = kept(policy, _judges([reward, *config.panel]), target)
    with _walking(policy, [reward, *config.panel], target) as phantom:
        phantom.act = "prepare"
        with phantom.doing("adapter"):
            prepare_trainable(policy, config.lora, 0)
            stepper = Stepper(policy, replace(config, optimizer="adamw"), world)
            if config.optimizer == "adamw8bit":
                stepper.optimizer = EightBit(stepper.parameters)
        _as_there(stepper, target)
        speaker = "ema" if config.ema else "policy"
        with phantom.watching(optimiser=(stepper.optimizer, "step")):
            phantom.act = "evaluate"
            evaluate(policy, world)
            phantom.act = "collect"
            objective.begin(policy)
            batch = source.collect(run, 0)
            with policy.acting_as(source.speaker):
                items = torch.arange(batch.items).repeat_interleave(batch.members)
                batch = objective.annotate(policy, batch.having(item=items), 0)
            phantom.act = "update"
            chosen = source.choose(batch.take(torch.arange(0, batch.items, source.updates)), 0)
            _stepped(stepper, objective, policy, chosen)
            del chosen
            if source.updates * source.epochs == 1:
                del batch
            phantom.act = "evaluate"
            evaluate(policy, world, speaker)
    return Walk(weights, phantom.phases)


def _stepped(stepper: Stepper, objective: Objective, policy: Policy, batch: Any) -> None:
    """An update of one micro-batch, which makes the optimiser's state; then the first micro-batches of a whole one."""
    many = max(1, stepper.config.micro_batch // batch.members)
    stepper.step(objective, policy, batch.take(torch.arange(min(many, batch.items))), 0, lambda: None)
    looks = iter(range(MICRO_BATCHES))

    def look() -> None:
        if next(looks, None) is None:
            raise _Enough

    with suppress(_Enough):
        stepper.step(objective, policy, batch, 1, look)
    stepper.optimizer.zero_grad()


class EightBit(torch.optim.Optimizer):
    """Keeps what bitsandbytes' AdamW8bit keeps, and changes nothing: a byte a number, a scale for every 256."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for p in self.param_groups[0]["params"]:
            if not self.state[p] and p.numel() < 4096:
                self.state[p] = {name: torch.empty_like(p, dtype=torch.float32) for name in ("state1", "state2")}
            elif not self.state[p]:
                scales = p.new_empty(-(-p.numel() // 256), dtype=torch.float32)
                for i in "12":
                    self.state[p] |= {f"state{i}": torch.empty_like(p, dtype=torch.uint8), f"absmax{i}": scales.clone()}


def _as_there(stepper: Stepper, target: Target) -> None:
    """The optimiser as it would be on the target, where it steps all weights at once; scaled losses take no more memory."""
    stepper.scaler = torch.amp.GradScaler("cpu", enabled=False)
    for group in stepper.optimizer.param_groups:
        group["foreach"] = target.cuda


@contextmanager
def _walking(policy: Policy, parts: Sequence[Any], target: Target) -> Iterator[Phantom]:
    """A phantom that knows the policy's parts and the rewards, which are moved to where there are no data."""
    phantom = Phantom(target)
    calls: dict[str, Any] = {"text": (policy, "encode"), "network": (policy, "output")}
    calls |= {
        "decoder": (policy, "decode"),
        "decoder__preview": (policy, "preview"),
        "encoder": (policy, "encode_media"),
    }
    judges = _judges(list(parts))
    for judge in judges:
        judge.to("meta")
    calls |= {f"reward__{i}": (judge, "forward") for i, judge in enumerate(judges)}
    readers = [module for name, module in policy.named_children() if name.startswith("text_encoder")]
    with _all([phantom.repeating(module) for module in (policy.network, *readers)]), phantom.watching(**calls), phantom:
        if target.workspace:
            phantom.reserve("cuBLAS", target.workspace)
        yield phantom


@contextmanager
def _all(contexts: Sequence[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _judges(part: Any) -> list[nn.Module]:
    """The rewards and values that a part of a run holds, each once."""
    if isinstance(part, (Reward, Value)):
        return [part]
    inside = part if isinstance(part, (list, tuple)) else vars(part).values() if isinstance(part, Steering) else ()
    return list({id(judge): judge for one in inside for judge in _judges(one)}.values())


def _few(steering: Steering, steps: int) -> int:
    """How many levels show every kind of step that a steering knows."""
    if isinstance(steering, Outer):
        return min(steps, SHORT)

    def kinds(count: int) -> set[Any]:
        done = [i / count for i in range(count)]
        tilts = {(id(tilt.judge), tilt.through) for share in done for tilt in steering.tilting(share)}
        return tilts | {steering.again(share) for share in done}

    tilted = any(isinstance(kind, tuple) for kind in kinds(steps))
    return next(few for few in range(min(steps, SHORT if tilted else FEW), steps + 1) if kinds(few) >= kinds(steps))


def _thinned(levels: Levels, kernel: Kernel, steps: int) -> tuple[Levels, Kernel]:
    """So many levels of a table, evenly, and the kernel for them."""
    places = torch.linspace(0, levels.steps, steps + 1).round().long()
    if kernel.noisy_steps is not None:
        kernel, mask = copy.copy(kernel), kernel.noisy_steps
        kernel.noisy_steps = tuple(mask[i] for i in places[:-1].tolist())
    return levels[places], kernel
