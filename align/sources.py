"""Sources: where an update's batches come from.

A source collects the samples of one *iteration*, from which one or more updates are made. What it collects is a function of the
run's seed, the iteration and the policy alone, and each process makes its own consecutive share of the global collection: so
the global batch does not depend on how many processes there are, and a resumed run needs no generator state.

    Prompts     where rollouts with gradient begin            (backpropagation)
    Rollouts    the current policy's own samples, scored      (policy gradients, online preferences, weighted regression)

Sources of given data are in `feedback.py`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Optional, get_args

import torch
from torch import Tensor

from rewards import Prompt, Reward
from rewards.base import Configurable
from samplers import Ledger, Levels, Policy, RewardFailed
from samplers.noise import mix

from .advantages import Advantage, PromptStatistics, advantages, best_and_worst, normalised
from .batches import Batch, Noised, Paths, Rows, Starts, Steps, concat
from .drawing import LevelLaw, noised, pick, trainable_steps, unfolded
from .prompts import given_prompts, world_prompts
from .sampling import Sampling
from .windows import Window
from .world import World

__all__ = ["Prompts", "Rollouts", "Run", "Source"]

Watch = Callable[[Any], None] | None


@dataclass
class Run:
    """What a source needs to know of the run it serves.

    Attributes:
        policy, sampling, world, seed: of the run.
        batch: items an update takes, over all processes.
        ledger: where the cost of collecting is counted.
        watch: called at every denoising step; may raise to stop the run.
    """

    policy: Policy
    sampling: Sampling
    world: World
    seed: int
    batch: int
    ledger: Ledger
    watch: Watch = None


class Source(Configurable, ABC):
    """Collects samples.

    Attributes:
        kind: "prompts", "rollouts" or "data".
        makes: the kind of rows an update sees.
        columns: the columns of its batches.
        members: rows an item.
        epochs: how often the updates go over one collection.
        updates: updates one epoch makes of a collection.
        reward: what scores rollouts.
        speaker: whose samples they are: "policy", or weights that a method remembers.
    """

    kind: Literal["prompts", "rollouts", "data"]
    makes: type[Rows]
    columns: tuple[str, ...] = ()
    members: int = 1
    epochs: int = 1
    updates: int = 1
    reward: Reward | None = None
    speaker: str = "policy"

    @abstractmethod
    def collect(self, run: Run, iteration: int) -> Batch:
        """This process's share of an iteration: `run.batch` × `updates` / world size items, in global order.

        Raises:
            RewardFailed: no sample could be judged.
        """

    def check(self, run: Run) -> None:
        """Raises, before any network runs, if this source cannot serve this run."""

    def choose(self, batch: Batch, seed: int) -> Batch:
        """The rows of an update, unfolded for training."""
        return batch

    def sampling(self, run: Run, iteration: int) -> Sampling:
        """How an iteration's samples are made: as the run says, unless the source varies it."""
        return run.sampling

    def metrics(self) -> dict[str, float]:
        """What is worth watching about the latest collection; the same in every process."""
        return {}

    def prompts_for_evaluation(self) -> list[Prompt]:
        """Prompts to judge the policy on when the run names none."""
        return []

    def bind(self, reward: Reward | None) -> Source:
        """A copy that uses `reward` where none was given."""
        bound = copy.copy(self)
        bound.reward = self.reward or reward
        return bound

    def state(self) -> dict[str, Any]:
        """Whatever outlives an iteration, as tensors, strings and numbers."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Puts `state()` back."""


class Prompts(Source):
    """Prompts and seeds from which an objective rolls out itself, with gradient.

    Args:
        prompts: texts, or .txt / .jsonl files of them; those of the model's own world, if it has one, by default.
    """

    kind = "prompts"
    makes = Starts

    def __init__(self, prompts: Sequence[str] | str = ()) -> None:
        self.prompts = given_prompts(prompts)

    def check(self, run: Run) -> None:
        run.world.share(run.batch)
        self.prompts = _some(self, self.prompts, run)

    def collect(self, run: Run, iteration: int) -> Batch:
        mine = range(run.batch)[run.world.share(run.batch)]
        chosen = pick(run.batch, iteration * run.batch, len(self.prompts), mix(run.seed, 1))
        prompts = [self.prompts[chosen[i]] for i in mine]
        seeds = torch.tensor([mix(run.seed, 2, iteration, i) for i in mine])
        s = run.sampling
        draw = mix(run.seed, 3, iteration)
        return Batch(Starts(seeds, s.cond(run.policy, prompts), s.kernel, s.levels, s.shape, draw), {}, tuple(prompts))

    def prompts_for_evaluation(self) -> list[Prompt]:
        return self.prompts


class Rollouts(Source):
    """The current policy's own samples in groups of one prompt, scored by a reward.

    Args:
        prompts: texts, or .txt / .jsonl files of them; those of the model's own world, if it has one, by default.
        group: samples a prompt.
        evidence: "steps" are single steps of trajectories, "paths" whole trajectories, "clean" the final samples with `draws`
            noise draws each.
        updates: optimiser steps one epoch makes of a collection; batch × updates items are collected an iteration.
        epochs: passes over a collection.
        advantage: how rewards become advantages; see `advantages.advantages`. "running" is DDPO's per-prompt memory.
        eps: added to the standard deviation.
        clip: advantages are clamped to ± this.
        buffer, least: of "running".
        pairs: None for single samples; "best_worst" makes a (winner, loser) item of each group, "all" an item of every two
            samples of a group that the reward tells apart or not (ties keep equal quality), "list" one item of the whole group.
        shared_start: the samples of a group share their initial latent, as D3PO and DanceGRPO do.
        timestep_fraction: the share of each trajectory's stochastic steps that is trained, drawn anew for each item and epoch.
        skip_last: leave this many last steps out of training.
        window: the steps that are stochastic, and trained, where not all are; see `Window`.
        drop_zero: leave samples with advantage 0 out of the mean, not only out of the work.
        draws: noise draws a sample for "clean" evidence.
        t: how the levels of "clean" evidence are drawn: "uniform", "logit_normal", or "sampled", those of the rollout's steps.
        guided: whether "clean" evidence uses guidance; published denoising losses do not.
        speaker: who samples: "policy", or "old" for methods that roll out with earlier weights (DiffusionNFT).
        reward: what scores; the run's by default.
    """

    kind = "rollouts"

    def __init__(
        self,
        prompts: Sequence[str] | str = (),
        group: int = 4,
        evidence: Literal["steps", "paths", "clean"] = "steps",
        updates: int = 1,
        epochs: int = 1,
        advantage: Advantage = "group",
        eps: float = 1e-4,
        clip: float = 5.0,
        buffer: int = 16,
        least: int = 16,
        pairs: Literal["best_worst", "all", "list"] | None = None,
        shared_start: bool = False,
        timestep_fraction: float = 1.0,
        skip_last: int = 0,
        window: Optional[Window] = None,
        drop_zero: bool = False,
        draws: int = 1,
        t: LevelLaw = "uniform",
        guided: bool = False,
        speaker: str = "policy",
        reward: Reward | None = None,
    ) -> None:
        counts = {
            "group": group,
            "updates": updates,
            "epochs": epochs,
            "draws": draws,
            "buffer": buffer,
            "least": least,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be ≥ 1; got {value}")
        words = {"evidence": (evidence, ("steps", "paths", "clean")), "advantage": (advantage, get_args(Advantage))}
        words |= {"pairs": (pairs, (None, "best_worst", "all", "list")), "t": (t, get_args(LevelLaw))}
        for name, (word, known) in words.items():
            if word not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {word!r}")
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction must lie in (0, 1]; got {timestep_fraction}")
        if skip_last < 0 or not clip > 0:
            raise ValueError(f"skip_last must be ≥ 0 and clip > 0; got {skip_last} and {clip}")
        if evidence != "clean" and (draws != 1 or t != "uniform" or guided):
            raise ValueError('draws, t and guided are for evidence="clean": steps are taken as they were sampled')
        if evidence != "steps" and (timestep_fraction != 1 or skip_last):
            raise ValueError(f'timestep_fraction and skip_last are for evidence="steps"; got evidence="{evidence}"')
        if group == 1 and (pairs is not None or advantage not in ("none", "global", "running")):
            what = f"pairs={pairs!r}" if pairs is not None else f"advantage={advantage!r}"
            raise ValueError(f"{what} compares the samples of a prompt, so group must be ≥ 2; got 1")
        self.prompts = given_prompts(prompts)
        self.group, self.evidence, self.updates, self.epochs = group, evidence, updates, epochs
        self.advantage: Advantage = advantage
        self.eps, self.clip, self.pairs = eps, clip, pairs
        self.shared_start, self.timestep_fraction, self.skip_last = shared_start, timestep_fraction, skip_last
        self.window = window
        self.drop_zero, self.draws, self.guided, self.speaker = drop_zero, draws, guided, speaker
        self.t: LevelLaw = t
        self.reward = reward
        self.statistics = PromptStatistics(buffer, least)
        self.makes = {"steps": Steps, "paths": Paths, "clean": Noised}[evidence]
        self.members = {None: 1, "best_worst": 2, "all": 2, "list": group}[pairs]
        self.columns = ("reward", "advantage", "quality", "group", "keep") + (("old",) if evidence != "clean" else ())
        self._metrics: dict[str, float] = {}

    def groups(self, batch: int) -> int:
        """How many prompts an iteration takes, over all processes."""
        items = {None: self.group, "best_worst": 1, "all": self.group * (self.group - 1) // 2, "list": 1}[self.pairs]
        items *= self.draws if self.evidence == "clean" else 1
        if batch * self.updates % items:
            raise ValueError(
                f"batch × updates = {batch * self.updates} items must be whole groups of {items} "
                f"(group={self.group}, pairs={self.pairs}, draws={self.draws}): choose a multiple of {items}"
            )
        return batch * self.updates // items

    def check(self, run: Run) -> None:
        self.prompts = _some(self, self.prompts, run)
        if self.reward is None:
            raise ValueError("Rollouts needs a reward: pass reward=…")
        if self.reward.modality != run.policy.modality:
            raise ValueError(
                f"{self.reward.name} scores {self.reward.modality}, but the model makes {run.policy.modality}"
            )
        run.world.share(self.groups(run.batch))
        run.world.share(run.batch)
        s = run.sampling
        kernels = [s.kernel] if self.window is None else list(self.window.kernels(s.kernel, s.levels))
        if self.evidence != "clean" and not all(len(trainable_steps(k, s.levels, self.skip_last)) for k in kernels):
            raise ValueError(
                f"{run.sampling.kernel} with steps={run.sampling.levels.steps} leaves no stochastic step to train on: use a "
                "stochastic kernel such as DDIM(eta=1), more steps (the last one of Consistency has no noise), fewer skip_last, "
                "or another window"
            )

    def sampling(self, run: Run, iteration: int) -> Sampling:
        s = run.sampling
        if self.window is None:
            return s
        return replace(s, kernel=self.window.on(s.kernel, s.levels, iteration, mix(run.seed, 7)))

    def collect(self, run: Run, iteration: int) -> Batch:
        groups, world = self.groups(run.batch), run.world
        chosen = pick(groups, iteration * groups, len(self.prompts), mix(run.seed, 1))
        mine = range(groups)[world.share(groups)]
        prompts = [self.prompts[chosen[g]] for g in mine for _ in range(self.group)]
        rows = range(mine.start * self.group, mine.stop * self.group)
        seeds = [mix(run.seed, 2, iteration, row) for row in rows]
        starts = [mix(run.seed, 3, iteration, row // self.group) for row in rows] if self.shared_start else None
        batch = self._sampled(run, self.sampling(run, iteration), prompts, seeds, starts)
        return self._judged(run, batch, torch.tensor([row // self.group for row in rows]), seeds)

    def _sampled(
        self, run: Run, sampling: Sampling, prompts: list[Prompt], seeds: list[int], starts: list[int] | None
    ) -> Batch:
        """Trajectories or final samples with their rewards, a few rows at a time."""
        assert self.reward is not None
        size, parts = max(1, sampling.rows), []
        if self.reward.compares:  # whole groups
            size = max(1, size // self.group) * self.group
        for first in range(0, len(seeds), size):
            part = slice(first, first + size)
            with run.policy.acting_as(self.speaker):
                path = sampling.roll(
                    run.policy, prompts[part], seeds[part], starts=starts and starts[part],
                    record="final" if self.evidence == "clean" else "path", watch=run.watch,
                )  # fmt: skip
            with torch.no_grad():
                columns = {"reward": self.reward(run.policy.decode(path.x0), prompts[part]).cpu()}
            run.ledger.counts["decode"] += len(path.x0)
            if self.evidence != "clean":
                assert path.latents is not None and path.log_prob is not None
                rows: Rows = Paths(path.latents, path.cond, sampling.kernel, sampling.levels)
                columns["old"] = path.log_prob.detach()
            else:
                blank = torch.zeros(len(path.x0), dtype=torch.float64)
                rows = Noised(path.x0, path.x0, Levels(blank, blank + 1, blank), path.cond)  # noise is drawn below
            parts.append(Batch(rows, columns, tuple(prompts[part])))
        return concat(parts)

    def _judged(self, run: Run, batch: Batch, group: Tensor, seeds: list[int]) -> Batch:
        """Advantages, qualities and items from the rewards of all processes."""
        world, reward = run.world, batch.columns["reward"]
        rewards, groups = world.gather(reward), world.gather(group)
        failed = rewards.isnan()
        if bool(failed.all()):
            raise RewardFailed(f"{self.reward.name} could judge none of {len(rewards)} samples")  # pyright: ignore
        if self.advantage == "running":
            texts = world.objects([p.text for p in batch.prompts])
            advantage = self.statistics(rewards, texts, self.clip)
        else:
            advantage = advantages(self.advantage, rewards, groups, self.eps, self.clip)
        quality = normalised(rewards, groups)
        mine = world.share(len(rewards))
        self._metrics = {
            "reward": float(rewards.nanmean()),
            "reward_std": float((rewards - rewards.nanmean()).square().nanmean().sqrt()),
            "reward_failed": float(failed.float().mean()),
            "zero_advantage": float((advantage == 0).float().mean()),
        }
        keep = ~failed & ((advantage != 0) | (not self.drop_zero))
        batch = batch.having(advantage=advantage[mine], quality=quality[mine], group=group, keep=keep[mine])
        batch, order = self._paired(batch)
        if self.evidence == "clean":
            batch = self._noised(run, batch, [mix(seeds[i], 4) for i in order.tolist()])
        return batch

    def _paired(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The items, and for each the row whose seed it takes."""
        count, k = len(batch), self.group
        if self.pairs is None:
            return batch, torch.arange(count)
        if self.pairs == "list":
            return replace(batch, members=k), torch.arange(0, count, k)
        if self.pairs == "best_worst":
            first, second = best_and_worst(batch.columns["reward"], k)
        else:
            above = torch.triu_indices(k, k, 1)
            start = torch.arange(0, count, k)[:, None]
            first, second = (start + above[0]).flatten(), (start + above[1]).flatten()
        reward = batch.columns["reward"]
        told_apart = (reward[first] != reward[second]) & batch.columns["keep"][first] & batch.columns["keep"][second]
        rows = torch.stack([first, second], 1).flatten()
        paired = replace(batch[rows], members=2)
        return paired.having(keep=told_apart.repeat_interleave(2)), first

    def _noised(self, run: Run, batch: Batch, seeds: list[int]) -> Batch:
        rows = batch.rows
        assert isinstance(rows, Noised)
        cond = rows.cond if self.guided else rows.cond.with_guidance(1.0)
        levels = run.sampling.levels
        drawn, origin = noised(run.policy, rows.x0, cond, seeds, batch.members, self.draws, self.t, levels)
        return replace(batch[origin], rows=drawn)

    def choose(self, batch: Batch, seed: int) -> Batch:
        return unfolded(batch, seed, self.timestep_fraction, self.skip_last) if self.evidence == "steps" else batch

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def prompts_for_evaluation(self) -> list[Prompt]:
        return self.prompts

    def state(self) -> dict[str, Any]:
        return {"statistics": self.statistics.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.statistics.restore(state["statistics"])


def _some(source: Source, prompts: list[Prompt], run: Run) -> list[Prompt]:
    prompts = prompts or world_prompts(run.policy.world, "train")
    if not prompts:
        raise ValueError(f"{type(source).__name__} needs prompts: texts, or a .txt or .jsonl file that holds some")
    return prompts
