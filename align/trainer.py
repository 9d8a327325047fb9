"""The trainer: the only training loop in kilter. It never names a method.

An iteration collects samples from the source; each update takes a minibatch of their items, in micro-batches whose gradients add
up to exactly the gradient of the mean over the minibatch. Everything random is a function of the run's seed and counters, so a run
resumes exactly and its global batches do not depend on the number of processes.

Minibatches of an epoch are stratified: with n updates an epoch, every n consecutive items are a stratum, and each update takes one
random item of each stratum without replacement. So every update sees all prompts evenly, each item is used once an epoch, and a
process's share of any minibatch lies in its own share of the collection.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplers import Ledger, Policy
from samplers.noise import mix

from . import checkpoints
from .adaptation import Adaptation
from .adapters import digest, named_tensors, prepare_trainable, save_adapter
from .batches import Batch, concat
from .card import plain_use
from .config import FREE_TO_CHANGE, TrainConfig
from .description import build, build_policy, describe, describe_policy, differences
from .evaluation import Evaluation, Evaluator, judged_prompts
from .fitting import check_parts, optimised_reward
from .guard import best, hacked, held_out
from .objectives.base import Objective
from .panel import gold_of, panel_of
from .reports import Report, TrainResult
from .results import versions
from .sampling import Sampling
from .sharding import shard
from .signals import Stop, StopRequested
from .sources import Run, Source
from .stepper import Stepper
from .world import World

__all__ = ["Trainer"]

logger = logging.getLogger("kilter")


class Trainer:
    """Trains a policy's adapter.

    Args:
        policy: what to train. If nothing in it requires a gradient, `config.lora` says what will.
        objective: how a batch becomes a loss.
        source: where batches come from.
        config: everything else.
        resumed: continue in a folder that already holds a run.

    Raises:
        ValueError: the parts do not fit together; raised before anything is sampled or written.
        FileExistsError: `config.out` holds another run.
    """

    def __init__(
        self, policy: Policy, objective: Objective, source: Source, config: TrainConfig, *, resumed: bool = False
    ) -> None:
        self.world = World(cpu=all(p.device.type == "cpu" for p in (policy, *policy.parameters())))
        self.policy, self.config = policy, config
        self.reward = reward = optimised_reward(objective, source)
        self.objective, self.source = objective.bind(reward), source.bind(reward)
        self.sampling = Sampling.of(
            policy, config.kernel, config.steps, config.guidance, config.size, config.sample_rows
        )
        config.memory.apply(policy)
        policy.uncond_grad = config.uncond_grad
        self.ledger = Ledger()
        self.stop = Stop(at_once=self.world.size == 1)
        self.run = Run(policy, self.sampling, self.world, config.seed, config.batch, self.ledger, self.stop.check)
        check_parts(self.run, self.objective, self.source, config.panel)
        policy.voices.clear()  # of an earlier run
        prepare_trainable(policy, config.lora, mix(config.seed, 0))
        shard(policy, self.world)
        self.stepper = Stepper(policy, config, self.world)
        prompts = judged_prompts(config.eval_prompts, policy.world, source.prompts_for_evaluation())
        self.evaluator = Evaluator(
            prompts, config.eval_samples,
            panel_of([None if reward is None or reward.compares else reward, *config.panel], gold_of(policy, prompts)),
            replace(self.sampling, shifted=self.objective.shifts), mix(config.seed, 5),
        )  # fmt: skip
        self.optimised = next((n for n, r in self.evaluator.panel.items() if r is reward), None)
        self.judge = held_out(self.optimised, list(self.evaluator.panel))
        self.adaptation = Adaptation(reward, self.world)
        self.description = {
            "policy": describe_policy(policy),
            "objective": describe(objective),
            "source": describe(source),
            "reward": describe(reward),
            "train": describe(config),
        }
        self.update = self.iteration = self.position = self.skipped_in_a_row = 0
        self.batch: Batch | None = None
        self.collected: dict[str, float] = {}
        self.log: list[dict[str, float]] = []
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.stopped: str | None = None
        self.out = checkpoints.claim(config.out, resumed, self.world)
        self.report = None
        if self.world.first:
            known = {"judge": self.judge, "optimised": self.optimised}
            known["pipeline"] = plain_use(policy, self.sampling, prompts[0]) if prompts else {}
            self.report = Report(self.out, config.tracker, self.description, **known)
        self.unsaved = False
        # the update and evaluations of the newest checkpoint in the run's folder
        self.saved: tuple[int, int] | None = None
        if self.report and not resumed:
            self.report.rewind([], [])

    # Running

    def fit(self) -> TrainResult:
        """Trains until `config.updates`, evaluating and saving on the way; picks up where a resumed run stopped.

        Ctrl-C and SIGTERM save and return; so does anything else that goes wrong, before it is raised.
        """
        failure: Exception | None = None
        if self.world.first:
            checkpoints.tidy(self.out, self.update)
        with self.stop.listening(), self.ledger.watching(network=self.policy.network, reward=self.reward):
            try:
                if not self.evaluations:
                    self.objective.begin(self.policy)
                self._after_update()  # what a run that was cut off left undone
                while self.update < self.config.updates and self.stopped is None:
                    self._one_update()
                    self._after_update()
            except StopRequested as stop:
                self.stopped = str(stop)
            except Exception as error:
                self.stopped, failure = f"{type(error).__name__}: {error}", error
            self.stepper.optimizer.zero_grad(set_to_none=True)
            if failure is None or (self.world.size == 1 and not self.stepper.changing):  # other processes may be gone
                self._checkpoint(required=failure is None)
        if failure is not None:
            raise failure
        return self._finish()

    def _one_update(self) -> None:
        """Collects if need be, then one optimiser step."""
        began = time.perf_counter()
        if self.batch is None:
            with self.adaptation.following():
                self.batch, self.position = self._collect(), 0
            self.collected = dict(self.source.metrics())
        epoch, part = divmod(self.position, self.source.updates)
        seed = mix(self.run.seed, 8, self.iteration, epoch)
        chosen = self.source.choose(self.batch.take(self._stratum(epoch, part)), seed)
        with self.adaptation.following():
            metrics = self.stepper.step(self.objective, self.policy, chosen, self.update, self.stop.check)
        self._noticed(metrics)
        self.update, self.position = self.update + 1, self.position + 1
        if self.position == self.source.updates * self.source.epochs:
            self.batch, self.iteration = None, self.iteration + 1
        spent = {f"{on}_calls": count for on, count in self._spent().counts.items() if on in ("network", "reward")}
        seconds = time.perf_counter() - began
        moved = self.adaptation.worth_watching()
        row = {"update": self.update, **metrics, **self.collected, **moved, **spent, "seconds": seconds}
        self.log.append(row)
        if self.report:
            self.report.row(row, self.config.updates)

    def _spent(self) -> Ledger:
        """What all processes have spent."""
        total = Ledger()
        for counts in self.world.objects([self.ledger.counts]):
            total.counts = {on: count + counts[on] for on, count in total.counts.items()}
        return total

    def _collect(self) -> Batch:
        before = self.source.state()
        try:
            batch = self.source.collect(self.run, self.iteration)
            items = self.world.share(batch.items * self.world.size)
            index = torch.arange(items.start, items.stop).repeat_interleave(batch.members)
            with self.policy.acting_as(self.source.speaker):
                return self.objective.annotate(
                    self.policy, batch.having(item=index), mix(self.run.seed, 6, self.iteration)
                )
        except Exception:  # it is collected again when the run is resumed
            self.source.restore(before)
            raise

    def _noticed(self, metrics: Mapping[str, float]) -> None:
        """Counts skipped updates, and gives up after too many in a row."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics.get("skipped") else 0
        if metrics.get("skipped"):
            logger.warning("update %d was skipped: its loss or gradient was not finite", self.update + 1)
        if self.skipped_in_a_row >= self.config.max_skipped:
            self.stopped = (
                f"{self.skipped_in_a_row} updates in a row had a loss or gradient that was not finite: lower the "
                "learning rate, or look at the reward"
            )

    def _stratum(self, epoch: int, part: int) -> Tensor:
        """The local items of one minibatch; see the module docstring."""
        assert self.batch is not None
        n = self.source.updates
        strata = self.batch.items // n
        places = []
        for stratum in range(strata):
            seed = mix(self.run.seed, 9, self.iteration, epoch, self.world.rank * strata + stratum)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            places.append(stratum * n + order[part])
        return torch.stack(places)

    # Looking and saving

    @property
    def speaker(self) -> str:
        """Whose weights are judged and kept."""
        return "ema" if "ema" in self.policy.voices else "policy"

    def _after_update(self) -> None:
        c, u = self.config, self.update
        due = u in (0, c.updates) or (c.eval_every > 0 and u % c.eval_every == 0)
        judged = bool(self.evaluations) and self.evaluations[-1][0] == u
        improved = due and not judged and self._evaluate()
        if improved or self.unsaved or u % c.save_every == 0:
            self._checkpoint(required=False)
        if self.world.size > 1 and self.world.any(self.stop.reason is not None):
            raise StopRequested(self.stop.reason or "another process was asked to stop")

    def _evaluate(self) -> bool:
        """Judges the weights; returns whether they are the best so far, in which case they become the run's adapter."""
        spent = dict(self.ledger.counts)
        with self.adaptation.as_begun():
            evaluation = self.evaluator(self.policy, self.world, self.speaker, self.stop.check)
        self.ledger.counts.update(spent)  # judging is not part of a method's cost
        self.evaluations.append((self.update, evaluation))
        times = hacked(self.evaluations, self.optimised, self.judge, self.config.eval_samples)
        if times >= self.config.patience:
            message = (
                f"{self.optimised} rises while the held-out {self.judge} falls: the reward is being over-optimised"
            )
            logger.warning("%s", message)
            if self.config.stop_on_hacking:
                self.stopped = message
        if self.report:
            self.report.evaluation(self.update, evaluation, self.evaluator)
        improved = best(self.evaluations, self.judge) == self.update
        if improved and self.world.first:
            self._export()
        return improved

    def _export(self) -> None:
        """Writes the adapter a user takes; an older one is replaced at once, or stays if this one cannot be written."""
        partial = self.out / f"{checkpoints.PARTIAL}adapter"
        try:
            for file in save_adapter(self.policy, partial, self.speaker):
                checkpoints.flush(file)
                file.replace(self.out / file.name)
        except OSError as error:
            logger.warning("the best adapter so far, of update %d, could not be kept: %s", self.update, error)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _checkpoint(self, required: bool) -> None:
        """Saves into the run's folder and prunes. A save that fails is tried again after the next update unless `required`."""
        folder = self.out / checkpoints.CHECKPOINTS / f"{self.update:06d}"
        try:
            if self.saved != (now := (self.update, len(self.evaluations))):
                self.save(folder)
                self.saved = now
            self.unsaved = False
        except OSError as error:
            if required:
                raise
            self.unsaved = True
            logger.warning("%s; training goes on and tries again after the next update", error)
            return
        if self.world.first:
            kept = {self.update} | ({best(self.evaluations, self.judge)} if self.evaluations else set())
            for old in checkpoints.complete(self.out)[: -self.config.keep]:
                if int(old.stem) not in kept:
                    checkpoints.remove(old)

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint at `path`, whole or not at all: everything from which `resume` goes on.

        Raises:
            OSError: it could not be written; nothing is left behind.
        """
        state = {
            "weights": named_tensors(self.policy),
            "voices": {who: {n: w.cpu() for n, w in voice.items()} for who, voice in self.policy.voices.items()},
            "stepper": self.stepper.state(),
            "counters": {name: getattr(self, name) for name in COUNTERS},
            "source": self.source.state(),
            "reward": self.adaptation.state(),
            "log": self.log,
            "evaluations": [
                (u, {"scores": e.scores, "kl": e.kl, "diversity": e.diversity}) for u, e in self.evaluations
            ],
            "ledger": self._spent().counts,
            "digest": digest(self.policy),
        }
        mine = {"batch": self.batch and self.batch.state(), "generators": checkpoints.generators()}
        config = {"description": self.description, "versions": versions(), "processes": self.world.size}
        extra = lambda folder: save_adapter(self.policy, folder, self.speaker)  # noqa: E731
        checkpoints.write(Path(path), config, state, mine, extra, self.world)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        *,
        policy: Policy | None = None,
        objective: Objective | None = None,
        source: Source | None = None,
        **changes: Any,
    ) -> Trainer:
        """Continues a run bit for bit from its newest complete checkpoint, or from the given one.

        Args:
            path: the run's folder, or a checkpoint.
            policy, objective, source: needed only where the recorded ones cannot be made again from their description.
            changes: fields of `TrainConfig` that may differ: `updates`, `save_every`, `keep`, `eval_every`, `tracker`, …

        Raises:
            FileNotFoundError, ValueError: nothing to resume from, or a change that would make it another run.
        """
        folder = checkpoints.latest(Path(path).expanduser())
        config, state, shards = checkpoints.read(folder)
        recorded = config["description"]
        if wrong := sorted(set(changes) - FREE_TO_CHANGE):
            raise ValueError(
                f"{', '.join(wrong)} cannot change when a run is resumed; free are {sorted(FREE_TO_CHANGE)}"
            )
        for name, part in (("objective", objective), ("source", source)):
            if part is not None and (wrong := differences(recorded[name], describe(part), name)):
                raise ValueError(f"{folder} was made with another {name}: {'; '.join(wrong)}")
        inside = folder.parent.name == checkpoints.CHECKPOINTS
        own = str(folder.parent.parent) if inside else recorded["train"]["init_args"]["out"]
        out = changes["out"] = changes.get("out") or own
        same = None not in (out, own) and Path(out).expanduser().resolve() == Path(own).expanduser().resolve()
        if other := differences(config["versions"], versions()):
            logger.warning("resuming under other versions, so not bit for bit: %s", "; ".join(other))
        train = replace(build(recorded["train"]), **changes)
        learns: Objective = objective or build(recorded["objective"])
        takes: Source = source or build(recorded["source"])
        reward = optimised_reward(learns, takes) or build(recorded["reward"])
        policy = policy or build_policy(recorded["policy"])
        trainer = cls(policy, learns.bind(reward), takes.bind(reward), train, resumed=same)
        trainer.description = {**recorded, "train": describe(train)}
        trainer._restore(state, shards)
        trainer.saved = (trainer.update, len(trainer.evaluations)) if same and inside else None
        if trainer.update >= train.updates:
            logger.warning("%s has made its %d updates: to go on, resume with more updates", path, trainer.update)
        elif train.schedule != "constant" and train.updates != (before := recorded["train"]["init_args"]["updates"]):
            logger.warning("the %s learning rate now ends at update %d, not %d", train.schedule, train.updates, before)
        return trainer

    def _restore(self, state: Mapping[str, Any], shards: list[dict[str, Any]]) -> None:
        mine = self.policy.trainable
        if mine.keys() != state["weights"].keys():
            raise ValueError(
                "the checkpoint trains other weights than this policy: was it made with another model or LoRA?"
            )
        for name, p in mine.items():
            p.data.copy_(state["weights"][name])
        device = self.policy.device
        self.policy.voices = {who: {n: w.to(device) for n, w in v.items()} for who, v in state["voices"].items()}
        self.stepper.restore(state["stepper"])
        for name in COUNTERS:
            setattr(self, name, state["counters"][name])
        self.source.restore(state["source"])
        self.adaptation.restore(state.get("reward", {}))
        self.log = list(state["log"])
        self.evaluations = [(u, Evaluation(**e, media=torch.empty(0))) for u, e in state["evaluations"]]
        if self.world.first:  # it is that of all processes
            self.ledger.counts.update(state["ledger"])
        how = self.source.sampling(self.run, self.iteration)
        batches = [
            Batch.restored(s["batch"], how.kernel, how.levels, how.shape, device)
            for s in shards if s["batch"] is not None
        ]  # fmt: skip
        if batches:
            whole = concat(batches)
            share = self.world.share(whole.items)
            self.batch = whole.take(torch.arange(share.start, share.stop))
        if self.world.rank < len(shards):
            checkpoints.restore_generators(shards[self.world.rank]["generators"])
        if self.report:
            self.report.rewind(self.log, self.evaluations)

    def _finish(self) -> TrainResult:
        spent = self._spent()
        if self.report is not None:
            self.report.finish(
                self.log, self.evaluations, self.evaluator, self.judge, self.optimised, spent, self.stopped
            )
        self.world.wait()
        return TrainResult(
            self.out, self.log, self.evaluations, self.judge, best(self.evaluations, self.judge) if self.evaluations else 0,
            self.stopped, digest(self.policy),
        )  # fmt: skip


COUNTERS = ("update", "iteration", "position", "skipped_in_a_row", "collected")
