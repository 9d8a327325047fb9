"""`align.steer`: sample with and without steering, score both, and account for every network call."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rewards import Prompt, Reward, as_prompts
from rewards.preprocess import sharing
from samplers import (
    Budget,
    Cond,
    Context,
    Interrupted,
    Iterate,
    Kernel,
    Ledger,
    Outer,
    Policy,
    Problem,
    SeededNoise,
    Size,
    Steering,
    Trajectory,
    price,
)
from samplers import run as run_problem
from samplers.rollout import check
from samplers.steering import FREE

from .begin import beginning, left_out
from .budget import Purse, opened
from .controls import check_controls, shown
from .description import describe
from .footprint import fitting
from .panel import gold_of, panel_of
from .results import PLAIN, STEERED, Sample, Steered
from .world import World

__all__ = ["row_seed", "steer"]

logger = logging.getLogger("kilter")
PARTICLES = 4
PROMPT_STRIDE = 1 << 16  # seeds between prompts: more than the particles of any run


def row_seed(seed: int, prompt: int, particle: int) -> int:
    """The seed of one sample. The first particle of the first prompt has the run's own seed."""
    return seed + PROMPT_STRIDE * prompt + particle


def steer(
    policy: Policy,
    prompts: Sequence[str | Prompt] | str | Prompt,
    steering: Steering,
    *,
    kernel: Kernel | None = None,
    steps: int | None = None,
    particles: int | None = None,
    budget: Budget | str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    image: Tensor | str | Path | None = None,
    strength: float = 0.8,
    rewards: Sequence[Reward] = (),
    gold: Reward | Literal["auto"] | None = "auto",
    plain: bool = True,
    batch: int = 32,
    progress: bool = False,
    watch=None,
    seen: Callable[[Iterate], None] | None = None,
) -> Steered:
    """Samples each prompt with and without steering, from the same seeds.

    Args:
        policy: what to sample from.
        prompts: one or more.
        steering: how to steer, such as `FeynmanKac(reward, beta=0.1)`.
        kernel: the noise rule of a step; the policy's own by default.
        steps: denoising steps; the policy's own by default.
        particles: K, samples a prompt; by default 4, or what the budget pays for.
        budget: what the steered arm may spend over all prompts, such as "20s", "400nfe" or "64rewards"; see `align.budget`.
        guidance: classifier-free guidance scale; the policy's own by default.
        seed: of the first sample; see `row_seed`.
        size: (height, width) in pixels; the policy's own by default.
        image: a picture to begin from instead of pure noise, for all prompts: a file, or (3, H, W) with values in [0, 1].
        strength: the share of the steps, in (0, 1], that is walked from there: how far samples may go from it.
        rewards: more rewards to score the results by.
        gold: a reward that is not optimised, reported as "gold". "auto" takes the exact detector of the model's world, if it
            has one that understands every prompt.
        plain: also sample without steering, for comparison.
        batch: samples in flight at a time; whole prompts, so at least `particles`.
        progress: show a progress bar on standard error.
        watch: called with the `samplers.Context` after every step.
        seen: called with the `samplers.Iterate` after every iterate of a noise optimisation or search.

    Returns:
        Samples, weights, evidence and the ledger. If a run is interrupted (Ctrl-C), a reward fails for all samples of a
        prompt, or anything else goes wrong once samples exist, what there was is returned and `stopped` says why.

    Raises:
        ValueError: arguments that cannot work, before any network runs.
    """
    how = {"kernel": kernel, "steps": steps, "particles": particles, "guidance": guidance, "seed": seed, "size": size}
    how |= {"image": image, "strength": strength}
    run, prompts = prepared(policy, prompts, steering, rewards=rewards, gold=gold, batch=batch, **how)
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    world = World(cpu=policy.device.type == "cpu")
    if budget is None:
        run.check(prompts[0])
    else:
        run.plan(budget, prompts, particles, world, progress and world.first)
    config = {
        "policy": f"{type(policy).__module__}.{type(policy).__qualname__}",
        "model": policy.source,
        "steering": describe(steering),
        "kernel": describe(run.kernel),
        "steps": run.levels.steps,
        "particles": run.particles,
        "budget": None if budget is None else str(budget),
        "guidance": run.guidance,
        "seed": seed,
        "size": list(size or policy.size),
    }
    if image is not None:
        config |= {"image": None if isinstance(image, Tensor) else str(image), "strength": strength}
    result = Steered([], [], {}, config)
    per_chunk = max(1, batch // run.particles)
    arms = [(PLAIN, FREE)] * plain + [(STEERED, steering)]
    bar = _bar(progress and world.first, len(prompts), per_chunk * world.size, run.levels.steps, arms, watch, seen)
    with run.fitting(prompts, per_chunk), bar as tick:
        run.all(result, prompts, arms, per_chunk, tick, world)
    if world.size > 1:
        run.merge(result, per_chunk, world)
    spent = {arm: run.ledgers[arm] for arm, _ in arms}
    result.ledger = {
        **sum(spent.values(), Ledger()).as_dict(),
        "arms": {arm: one.as_dict() for arm, one in spent.items()},
    }
    if run.purse is not None:
        result.ledger["budget"] = run.purse.as_dict(world)
    return result


def prepared(
    policy: Policy,
    prompts: Sequence[str | Prompt] | str | Prompt,
    steering: Steering,
    *,
    kernel: Kernel | None = None,
    steps: int | None = None,
    particles: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    image: Tensor | str | Path | None = None,
    strength: float = 0.8,
    rewards: Sequence[Reward] = (),
    gold: Reward | Literal["auto"] | None = "auto",
    batch: int = 32,
) -> tuple[Run, list[Prompt]]:
    """A run that `steer` would make of these arguments, not yet checked, and its prompts."""
    prompts = _checked(prompts, particles, batch)
    kernel = kernel or policy.kernel
    pixels: Size = size or policy.size
    shape, levels = policy.shape(pixels), policy.levels(policy.steps if steps is None else steps, pixels)
    check_controls(policy, prompts, pixels)
    begin = None
    if image is not None:
        skipped = left_out(levels.steps, strength)
        kernel, levels, begin = kernel.window(skipped, levels.steps), levels[skipped:], beginning(policy, image, pixels)
    guidance = policy.guidance if guidance is None else guidance
    gold = gold_of(policy, prompts) if gold == "auto" else gold
    panel = panel_of([*steering.rewards(), *rewards], gold)
    how = (policy, kernel, levels, shape, guidance, steering, particles or PARTICLES, seed, panel, batch)
    run = Run(*how)
    run.size, run.begin = pixels, begin
    return run, prompts


class Run:
    """What stays the same over the chunks and arms of one call."""

    size: Size
    begin: Tensor | None = None

    def __init__(self, policy, kernel, levels, shape, guidance, steering, particles, seed, panel, batch) -> None:
        self.policy, self.kernel, self.levels, self.shape, self.guidance = policy, kernel, levels, shape, guidance
        self.steering, self.particles, self.seed, self.panel, self.batch = steering, particles, seed, panel, batch
        self.ledgers = {PLAIN: Ledger(), STEERED: Ledger()}
        self.groups: dict[int, dict[str, Any]] = {}
        self.purse: Purse | None = None

    def plan(self, budget: Budget, prompts: list[Prompt], asked: int | None, world: World, show: bool) -> None:
        """Finds out how many particles the budget pays for; processes share evaluations and calls, but not the clock."""
        self.particles = asked or self.steering.least
        self.check(prompts[0])
        mine = math.ceil(len(prompts) / (world.size if budget.unit == "s" else 1))
        how = (self.steering, self.policy, self.kernel, self.levels, self.encode(prompts[:1]), self.shape)
        self.purse = opened(budget, *how, prompts[:mine], asked, self.batch, show)
        self.particles = self.purse.particles()
        self.check(prompts[0])

    def rehearse(self, budget: Budget, prompts: list[Prompt], asked: int | None) -> None:
        """Raises what the run would raise before its network runs; seconds are not measured for that."""
        if budget.unit != "s":
            return self.plan(budget, prompts, asked, World(cpu=True), False)
        self.particles = asked or self.steering.least
        return self.check(prompts[0])

    def fitting(self, prompts: list[Prompt], per_chunk: int) -> AbstractContextManager[None]:
        """Lets the network take the rows of a chunk a few at a time if they would not fit in memory together."""
        cond = self.encode(prompts[:1])

        def differentiates() -> bool:
            cost = price(self.steering, self.policy, self.kernel, self.levels, cond, self.steering.least, self.shape)
            return cost.first["gradient"] + cost.then["gradient"] > 0

        rows = self.particles * min(per_chunk, len(prompts))
        rows = max(rows, self.batch) if isinstance(self.steering, Outer) else rows  # they fill batches with candidates
        return fitting(self.policy, cond, self.levels, self.shape, self.size, rows, differentiates)

    def check(self, prompt: Prompt) -> None:
        """Raises now what the steered arm would raise only after the plain arm has run."""
        cond = self.encode([prompt]).repeat(self.particles)
        noise = SeededNoise(self.seeds(1, 0), self.shape)
        ctx = Context(self.policy, self.kernel, cond, self.levels, noise, self.particles, [prompt], self.steering)
        check(ctx)
        for reward in self.panel.values():
            if reward.modality != self.policy.modality:
                raise ValueError(f"{reward.name} scores {reward.modality}, but the model makes {self.policy.modality}")

    def encode(self, prompts: list[Prompt]) -> Cond:
        """The conditions of prompts, and what they begin from."""
        cond = self.policy.encode(shown(self.policy, prompts, self.size)).with_guidance(self.guidance)
        return cond if self.begin is None else replace(cond, begin=self.begin.repeat_interleave(len(prompts), 0))

    def all(self, result: Steered, prompts: list[Prompt], arms: list, per_chunk: int, tick, world: World) -> None:
        """Every chunk of prompts in every arm, dealt out to processes; what is finished when something goes wrong is kept."""
        try:
            for first in range(world.rank * per_chunk, len(prompts), world.size * per_chunk):
                if self.purse is not None:
                    self.particles = self.purse.particles()
                for arm, how in arms:
                    self.add(result, prompts[first : first + per_chunk], first, arm, how, tick)
        except (KeyboardInterrupt, Exception) as stop:
            if not result.samples and not isinstance(stop, (KeyboardInterrupt, Interrupted)):
                raise
            result.interrupted = isinstance(
                stop.__cause__ if isinstance(stop, Interrupted) else stop, KeyboardInterrupt
            )
            what = "interrupted" if result.interrupted else f"{type(stop).__name__}: {stop}"
            result.stopped = str(stop) if isinstance(stop, Interrupted) else what
            logger.warning("%s", result.stopped)

    def merge(self, result: Steered, per_chunk: int, world: World) -> None:
        """Makes the result of all processes out of this one's: in the order in which a single process finds it."""
        parts = world.objects(
            [(result.samples, self.groups, result.failures, self.ledgers, result.stopped, result.interrupted)]
        )
        samples = [s for part in parts for s in part[0]]
        result.samples = sorted(samples, key=lambda s: (s.group // per_chunk, s.arm == STEERED))
        groups = {index: group for part in parts for index, group in part[1].items()}
        self.groups, result.groups = groups, [groups[index] for index in sorted(groups)]
        result.failures = dict(sum((Counter(part[2]) for part in parts), Counter()))
        self.ledgers = {arm: sum((part[3][arm] for part in parts), Ledger()) for arm in self.ledgers}
        result.stopped = next((part[4] for part in parts if part[4] is not None), None)
        result.interrupted = any(part[5] for part in parts)

    def seeds(self, prompts: int, first: int) -> list[int]:
        return [row_seed(self.seed, first + p, k) for p in range(prompts) for k in range(self.particles)]

    def add(self, result: Steered, prompts: list[Prompt], first: int, arm: str, steering: Steering, tick) -> None:
        """Samples one chunk of prompts and adds it to the result; an interrupted chunk is added before the interrupt goes on."""
        cond = self.encode(prompts)
        noise = SeededNoise(self.seeds(len(prompts), first), self.shape, device=self.policy.device)
        how = {"particles": self.particles, "prompts": prompts, "batch": self.batch}
        how |= {"seen": tick[1]} if isinstance(steering, Outer) else {"watch": tick[0]}
        purse, began = self.purse if arm == STEERED else None, time.perf_counter()
        if purse is not None:
            how["budget"] = purse.allowance(len(prompts))
        trajectory = stop = None
        try:
            with self.policy.acting_as(self.steering.plain if arm == PLAIN else "policy"):
                trajectory = run_problem(Problem(self.policy, self.kernel, cond, self.levels, noise, **how), steering)
        except Interrupted as interrupted:
            trajectory, stop = interrupted.trajectory, interrupted
        if purse is not None:
            purse.pay(trajectory.ledger, time.perf_counter() - began, len(prompts), self.particles)
        self._collect(result, trajectory, prompts, first, arm)
        if stop is not None:
            raise stop

    def _collect(self, result: Steered, trajectory: Trajectory, prompts: list[Prompt], first: int, arm: str) -> None:
        """Decodes and scores what a rollout made, and adds it to the result at once."""
        k = self.particles
        media = trajectory.media
        if media is None:
            with torch.no_grad(), trajectory.ledger.spend("decode", len(trajectory.x0), trajectory.x0.device):
                media = self.policy.decode(trajectory.x0)
        with sharing():
            scores = self._scores(media, [p for p in prompts for _ in range(k)], trajectory, result)
        chosen = self._best(scores, trajectory, arm)
        weights, seeds, images = trajectory.weights.flatten().tolist(), self.seeds(len(prompts), first), media.cpu()
        result.samples += [
            Sample(
                prompt=prompts[row // k].text,
                seed=seeds[row],
                arm=arm,
                pixels=images[row],
                scores={name: column[row] for name, column in scores.items()},
                weight=weights[row],
                best=row % k == chosen[row // k],
                group=first + row // k,
            )
            for row in range(len(images))
        ]
        self.ledgers[arm] = self.ledgers[arm] + trajectory.ledger
        if arm == STEERED:
            made = {first + p: self._group(trajectory, p, prompt) for p, prompt in enumerate(prompts)}
            self.groups |= made
            result.groups += made.values()

    def _best(self, scores: dict[str, list], trajectory: Trajectory, arm: str) -> list[int]:
        """Which particle of each prompt a user would take: the highest reward of the steering, else of the first of the panel."""
        if arm == STEERED and trajectory.rewards is not None:
            return trajectory.best.tolist()
        column = next((column for name, column in scores.items() if name != "gold"), [0.0] * trajectory.log_w.numel())
        table = torch.tensor([-math.inf if v is None else v for v in column]).reshape(-1, self.particles)
        return table.argmax(1).tolist()

    @staticmethod
    def _group(trajectory: Trajectory, p: int, prompt: Prompt) -> dict[str, Any]:
        return {
            "prompt": prompt.text,
            "log_z": float(trajectory.log_z[p]),
            "ess": trajectory.ess[p].tolist(),
            "unique_ancestors": int(trajectory.unique_ancestors[p]),
            "ancestors": trajectory.ancestors[p].tolist(),
            "selected_at": list(trajectory.selected_at),
        }

    def _scores(self, media: Tensor, prompts: list[Prompt], trajectory: Trajectory, result: Steered) -> dict[str, list]:
        known = self.steering.rewards()
        columns = {}
        for name, reward in self.panel.items():
            if trajectory.rewards is not None and len(known) == 1 and reward is known[0]:
                values = trajectory.rewards.flatten()
            else:
                with torch.no_grad(), trajectory.ledger.spend("reward", len(media), media.device):
                    values = reward(media, prompts)
                failed = int(values.isnan().sum())
                if failed:
                    result.failures[name] = result.failures.get(name, 0) + failed
            columns[name] = [v if math.isfinite(v) else None for v in values.tolist()]
        for name, failed in trajectory.failures.items():
            result.failures[name] = result.failures.get(name, 0) + failed
        return columns


def _checked(prompts: Any, particles: int | None, batch: int) -> list[Prompt]:
    prompts = as_prompts(prompts)
    if not prompts:
        raise ValueError("no prompts: pass at least one")
    empty = [i for i, p in enumerate(prompts) if not p.text.strip()]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty")
    if particles is not None and not 1 <= particles < PROMPT_STRIDE:
        raise ValueError(f"particles must lie in 1 … {PROMPT_STRIDE - 1}; got {particles}")
    if batch < 1:
        raise ValueError(f"batch must be ≥ 1; got {batch}")
    return prompts


@contextmanager
def _bar(show: bool, prompts: int, per_chunk: int, steps: int, arms: list, watch, seen) -> Iterator[tuple]:
    """Callbacks for every step and for every iterate: the progress bar, with the mean reward, and the user's own."""
    from tqdm import tqdm

    ticks = sum(how.rounds if isinstance(how, Outer) else steps for _, how in arms)
    total = math.ceil(prompts / per_chunk) * ticks
    with tqdm(total=total, disable=not show, unit="step", dynamic_ncols=True) as bar:

        def stepped(ctx: Context) -> None:
            if not ctx.final:
                bar.update()
            if show and ctx.ess and "reward" in ctx.rows:
                reward = ctx.rows["reward"].mean().item()
                bar.set_postfix(reward=f"{reward:.3g}", ess=f"{ctx.ess[-1].mean().item():.1f}", refresh=False)
            if watch is not None:
                watch(ctx)

        def iterated(iterate: Iterate) -> None:
            bar.update()
            if show:
                bar.set_postfix(best=f"{iterate.best.mean().item():.3g}", refresh=False)
            if seen is not None:
                seen(iterate)

        yield stepped if show or watch is not None else None, iterated
