"""What a training run leaves behind for people: logs, curves, sample grids, a model card and `result.json`.

log.jsonl           one line an update
evaluations.jsonl   one line an evaluation: means, and the score of every sample
samples/000025.png  the evaluation's samples after 25 updates, same prompts and seeds every time
before_after.png    the reference and the best weights, side by side
curves.png          the optimised reward, the held-out rewards, KL and diversity against updates
README.md           a model card
result.json         configuration, versions, evaluations, ledger
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samplers import Ledger

from .evaluation import Evaluation, Evaluator

__all__ = ["Report", "TrainResult"]


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


class Report:
    """Writes a run's files."""

    def __init__(self, out: Path, tracker: str | None, description: Mapping[str, Any]) -> None:
        self.out, self.description = out, description

    def row(self, row: Mapping[str, float], updates: int) -> None:
        """Adds an update's numbers."""
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def evaluation(self, update: int, evaluation: Evaluation, evaluator: Evaluator) -> None:
        """Adds an evaluation and its picture."""
        print(update, {k: round(v, 4) for k, v in evaluation.means().items()}, flush=True)

    def rewind(self, log: Sequence[Mapping[str, float]]) -> None:
        """Drops rows that a resumed run will write again."""
        partial = self.out / "log.jsonl.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in log))
        os.replace(partial, self.out / "log.jsonl")

    def finish(self, log, evaluations, evaluator: Evaluator, judge: str, optimised, ledger: Ledger, stopped) -> None:
        """Draws the curves and writes the card and `result.json`."""
