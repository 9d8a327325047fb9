"""What a training run leaves behind for people: logs, curves, sample grids, a model card and `result.json`.

log.jsonl           one line an update
evaluations.jsonl   one line an evaluation: means, and the score of every sample
samples/000025.png  the evaluation's samples after 25 updates, same prompts and seeds every time
before_after.png    the reference and the best weights, side by side
curves.png          rewards on the evaluation prompts, the training reward, KL and diversity against updates
README.md           a model card
result.json         configuration, versions, evaluations, ledger
tracker/            what a tracker keeps on this machine

JSON is strict: what is not a finite number is null. Progress goes to standard error. Pictures, the card and trackers never end a
run: what goes wrong with them is a warning.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.files import whole
from samplers import Ledger

from .card import class_name, write_card
from .curves import draw_curves
from .evaluation import Evaluation, Evaluator, paired_gain
from .guard import best, hacked
from .pictures import (
    INKS,
    MOST_PROMPTS,
    Block,
    Tile,
    captions,
    is_drawable,
    read_tiles,
    sheet,
    sheet_of,
    shown,
    write_sheet,
)
from .results import finite, versions
from .trackers import Tracker

__all__ = ["Report", "TrainResult"]

logger = logging.getLogger("kilter")
LOG, EVALUATIONS, RESULT = "log.jsonl", "evaluations.jsonl", "result.json"
COUNTED = ("network_evaluations", "reward_calls")  # what training counts, recomputation in backward passes included
MOST_BESIDE = 4  # samples of a prompt before, and as many after


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        folder: the run; `align.load_policy(model, lora=folder)` and `pipe.load_lora_weights(folder)` use its adapter.
        log: one row an update.
        evaluations: (update, evaluation) pairs, the first before any update.
        judge: the name of the held-out reward that picks the best weights.
        best: the update whose weights are the run's adapter.
        stopped: why the run ended early, or None.
        digest: SHA-256 of the last weights.
    """

    folder: Path
    log: list[dict[str, float]]
    evaluations: list[tuple[int, Evaluation]]
    judge: str
    best: int
    stopped: str | None
    digest: str

    def gain(self, name: str | None = None) -> tuple[float, float]:
        """How much a reward rose from the first evaluation to that of the best weights, and the standard error over prompts.

        Args:
            name: of the reward; the judge by default.

        Returns:
            NaN where nothing was judged.

        Raises:
            KeyError: no such reward was watched.
        """
        if not self.evaluations:
            return math.nan, math.nan
        name, scores = name or self.judge, self.evaluations[0][1].scores
        if name not in scores:
            raise KeyError(
                f"expected one of the rewards that were watched, {list(scores)}; got {name!r}: add it to the panel"
            )
        samples = int(json.loads((self.folder / RESULT).read_text())["samples"])
        return paired_gain(scores[name], dict(self.evaluations)[self.best].scores[name], samples)

    def __repr__(self) -> str:
        means = {u: float(e.scores[self.judge].nanmean()) for u, e in self.evaluations}
        told = [f"{len(self.log)} updates"]
        if means:
            first = next(iter(means.values()))
            told.append(f"{self.judge} {shown(first)} → {shown(means[self.best])} at update {self.best}")
        if self.stopped:
            told.append(f"stopped: {self.stopped}")
        return f"<TrainResult {self.folder}: {', '.join(told)}>"


class Report:
    """Writes a run's files and shows its progress.

    Args:
        out: the run's folder.
        tracker: one of accelerate's, by name, or None.
        description: the run's configuration.
        judge: the reward that picks the best weights.
        optimised: the reward that is trained on, if it is among those watched.
        pipeline: how the model's own pipeline is asked for samples, for the card; see `align.card.plain_use`.

    Raises:
        ValueError: there is no such tracker, or its package is missing.
    """

    def __init__(
        self,
        out: Path,
        tracker: str | None,
        description: Mapping[str, Any],
        *,
        judge: str,
        optimised: str | None,
        pipeline: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.description, self.judge, self.optimised = out, description, judge, optimised
        self.pipeline = dict(pipeline or {})
        self.tracker = Tracker(tracker, out, description) if tracker else None
        self.first: Evaluation | None = None
        self.latest: Mapping[str, float] = {}
        self.bar: Any = None
        self.shown: Mapping[str, float] = {}
        self._lines: dict[str, list[str]] = {LOG: [], EVALUATIONS: []}
        self._behind: set[str] = set()

    # While it runs

    def row(self, row: Mapping[str, float], updates: int) -> None:
        """Adds an update's numbers.

        Args:
            updates: of the whole run.
        """
        self._add(LOG, row)
        update = int(row["update"])
        if self.tracker:
            self.tracker.log({f"train/{k}": v for k, v in row.items() if k != "update"}, update)
        if self.bar is None:
            self.bar = _bar(update - 1, updates)
        self.shown = row
        self.bar.set_postfix_str(self._postfix(row), refresh=False)
        self.bar.update(update - self.bar.n)

    def evaluation(self, update: int, evaluation: Evaluation, evaluator: Evaluator) -> None:
        """Adds an evaluation and its picture."""
        self._add(EVALUATIONS, _line(update, evaluation))
        self.first = self.first or evaluation
        self.latest = evaluation.means()
        told = self._told(evaluation, evaluator.samples)
        self._say(f"update {update}: {told}")
        if self.bar is not None:
            self.bar.set_postfix_str(self._postfix(self.shown))
        if self.tracker:
            self.tracker.log({f"eval/{k}": v for k, v in self.latest.items()}, update)
        if is_drawable(evaluation.media):
            self._guarded("the sheet of samples", lambda: self._sheet(update, evaluation, evaluator, told))

    def rewind(self, log: Sequence[Mapping[str, float]], evaluations: Sequence[tuple[int, Evaluation]]) -> None:
        """Drops everything that a resumed run will write again."""
        self._lines = {LOG: [_json(row) for row in log], EVALUATIONS: [_json(_line(u, e)) for u, e in evaluations]}
        for name in self._lines:
            self._rewrite(name)
        known = {f"{u:06d}" for u, _ in evaluations}
        for picture in (self.out / "samples").glob("*.png"):
            if picture.stem not in known:
                picture.unlink()
        if evaluations:
            self.first, self.latest = evaluations[0][1], evaluations[-1][1].means()
        if self.tracker:
            self.tracker.start_at = int(log[-1]["update"]) + 1 if log else 0

    def _told(self, evaluation: Evaluation, samples: int) -> str:
        """An evaluation in a line: means, and gains over the first with their standard errors."""
        told = []
        for name in _ordered(evaluation.scores, self.judge, self.optimised):
            words = f"{name} {shown(self.latest[name])}"
            if self.first is not None and self.first is not evaluation:
                gain, error = paired_gain(self.first.scores[name], evaluation.scores[name], samples)
                words += f" ({'+' if gain >= 0 else ''}{shown(gain)} ± {shown(error)})" if gain == gain else ""
            told.append(words)
        told += [f"{name} {shown(self.latest[key])}" for name, key in (("KL", "kl"), ("diversity", "diversity"))]
        return " · ".join(told)

    def _postfix(self, row: Mapping[str, float]) -> str:
        shows: dict[str, float] = {"reward": row["reward"]} if "reward" in row else {"loss": row.get("loss", math.nan)}
        if self.judge in self.latest:
            shows[f"held-out {self.judge}"] = self.latest[self.judge]
        shows["KL"] = row.get("kl", self.latest.get("kl", math.nan))
        words = [f"{name} {shown(value)}" for name, value in shows.items()]
        return ", ".join([*words, f"{row.get('seconds', math.nan):.2f} s/update"])

    def _say(self, text: str) -> None:
        """One line on standard error, above the bar."""
        from tqdm import tqdm

        if sys.stderr is not None:
            tqdm.write(text, file=sys.stderr)

    def _sheet(self, update: int, evaluation: Evaluation, evaluator: Evaluator, told: str) -> None:
        prompts = [p.text for p in evaluator.prompts]
        title = f"{_method(self.description)}, {'before any update' if update == 0 else f'update {update}'}"
        picture, boxes = sheet_of(
            evaluation.media, evaluation.scores, prompts, evaluator.samples, self._inks(), title, told
        )
        write_sheet(picture, boxes, self._samples(update))
        if self.tracker:
            self.tracker.picture("samples", picture, update)

    def _samples(self, update: int) -> Path:
        return self.out / "samples" / f"{update:06d}.png"

    def _inks(self) -> dict[str, str]:
        """The rewards written under samples, each in its ink."""
        inks = {self.judge: INKS["judge"]}
        return inks if self.optimised in (None, self.judge) else {**inks, self.optimised: INKS["optimised"]}

    # At the end

    def finish(
        self,
        log: Sequence[Mapping[str, float]],
        evaluations: Sequence[tuple[int, Evaluation]],
        evaluator: Evaluator,
        judge: str,
        optimised: str | None,
        ledger: Ledger,
        stopped: str | None,
    ) -> None:
        """Draws the curves and writes the card and `result.json`.

        Raises:
            OSError: `result.json` could not be written.
        """
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        chosen = best(evaluations, judge) if evaluations else 0
        samples = evaluator.samples
        result = finite(
            {
                "config": dict(self.description),
                "pipeline": self.pipeline,
                "versions": versions(),
                "updates": int(log[-1]["update"]) if log else 0,
                "optimised": optimised,
                "judge": judge,
                "best": chosen,
                "prompts": [p.text for p in evaluator.prompts],
                "samples": samples,
                "evaluations": [_summary(u, e, evaluations[0][1], samples) for u, e in evaluations],
                "over_optimised": [
                    u for i, (u, _) in enumerate(evaluations) if hacked(evaluations[: i + 1], optimised, judge, samples)
                ],
                "ledger": {name: n for name, n in ledger.as_dict().items() if name in COUNTED},
                "seconds": math.fsum(s for row in log if math.isfinite(s := row.get("seconds", 0.0))),
                "stopped": stopped,
            }
        )
        for name in sorted(self._behind):
            self._rewrite(name)
        told = json.dumps(result, indent=1, allow_nan=False, default=str)
        whole(self.out / RESULT, lambda file: file.write_text(told, encoding="utf-8"))
        title = _method(self.description)
        self._guarded(
            "the curves",
            lambda: draw_curves(self.out / "curves.png", title, log, evaluations, samples, judge, optimised, chosen),
        )
        self._guarded("before and after", lambda: self._before_after(evaluations, evaluator, chosen))
        self._guarded("the model card", lambda: write_card(self.out, result))
        if self.tracker:
            self.tracker.finish()

    def _before_after(self, evaluations: Sequence[tuple[int, Evaluation]], evaluator: Evaluator, chosen: int) -> None:
        """Cuts the samples of the first and the best evaluation from their sheets and puts them side by side."""
        target = self.out / "before_after.png"
        target.unlink(missing_ok=True)  # of an earlier part of the run
        known = dict(evaluations)
        first = min(known, default=chosen)
        if first == chosen or not all(self._samples(u).is_file() for u in (first, chosen)):
            return
        blocks = []
        for update in (first, chosen):
            rows = []
            for p, images in enumerate(read_tiles(self._samples(update))[:MOST_PROMPTS]):
                places = enumerate(images[:MOST_BESIDE], p * evaluator.samples)
                rows.append([Tile(image, captions(known[update].scores, i, self._inks())) for i, image in places])
            mean = shown(known[update].means()[self.judge])
            when = "before" if update == first else f"after update {update}"
            blocks.append(Block(rows, f"{when}: {self.judge} {mean}"))
        prompts = [p.text for p in evaluator.prompts][: len(blocks[0].rows)]
        told = "same prompts and seeds on both sides; means are over all evaluation prompts"
        write_sheet(*sheet(_method(self.description), told, prompts, blocks), target)

    # Files

    def _guarded(self, what: str, act: Callable[[], object]) -> None:
        """Does what a run can live without."""
        try:
            act()
        except Exception as error:
            logger.warning("%s could not be made: %s: %s", what, type(error).__name__, error)
            logger.debug("", exc_info=True)

    def _add(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends a line. After a write that failed the file is written whole, for it may end within a line."""
        line = _json(row)
        self._lines[name].append(line)
        try:
            if name in self._behind:
                self._rewrite(name)
                return
            with (self.out / name).open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            if name not in self._behind:
                logger.warning("%s could not be written (%s); tried again at every line", name, error)
            self._behind.add(name)

    def _rewrite(self, name: str) -> None:
        whole(self.out / name, lambda file: file.write_text("".join(self._lines[name]), encoding="utf-8"))
        self._behind.discard(name)


def _bar(done: int, updates: int) -> Any:
    """A progress bar over the updates; where standard error is a file, a line now and then."""
    from tqdm import tqdm

    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        total=updates, initial=done, file=sys.stderr, disable=sys.stderr is None, dynamic_ncols=terminal, desc="train",
        mininterval=0.2 if terminal else 30.0, maxinterval=10.0 if terminal else 60.0,
        bar_format="{desc} {n_fmt}/{total_fmt} |{bar:24}| {elapsed}<{remaining}{postfix}",
    )  # fmt: skip


def _line(update: int, evaluation: Evaluation) -> dict[str, Any]:
    scores = {name: values.tolist() for name, values in evaluation.scores.items()}
    return {"update": update, "means": evaluation.means(), "scores": scores}


def _summary(update: int, evaluation: Evaluation, first: Evaluation, samples: int) -> dict[str, Any]:
    """An evaluation's means, and its paired gains over the first as [mean, standard error]."""
    gains = {name: list(paired_gain(first.scores[name], s, samples)) for name, s in evaluation.scores.items()}
    return {"update": update, "means": evaluation.means(), "gains": gains}


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(dict(row)), allow_nan=False) + "\n"


def _ordered(names: Iterable[str], judge: str, optimised: str | None) -> list[str]:
    """The judge, then what is optimised, then the others."""
    names = list(names)
    return [n for n in dict.fromkeys((judge, optimised, *names)) if n in names]


def _method(description: Mapping[str, Any]) -> str:
    """A run in a few words: "DRaFT on CrossEncoder"."""
    objective, reward = (class_name(description.get(part)) for part in ("objective", "reward"))
    return f"{objective or 'training'} on {reward or class_name(description.get('source')) or 'data'}"
