"""A panel of rewards on one batch after another: each row's scores, and why it has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any, Literal

import torch
from torch import Tensor

from rewards import Prompt, Reward, Scores
from rewards.preprocess import sharing

from .ahead import Batch
from .decoding import as_float

__all__ = ["OnError", "Scorer", "device_of"]

OnError = Literal["nan", "unread", "stop"]
Answer = tuple[float, dict[str, float], str]  # total, parts, and why there is none


class Scorer:
    """Scores batches.

    Args:
        panel: rewards by name, of one modality, on the device they are on.
        on_error: "nan" gives rows that cannot be read or judged NaN and the reason; "unread" stops at a file that cannot be read
            or a prompt that is missing, "stop" at whatever has no score.
        tick: called with the number of rows and of errors of every batch.

    Raises:
        ValueError: `on_error` is unknown.
    """

    def __init__(
        self, panel: Mapping[str, Reward], on_error: OnError = "nan", tick: Callable[[int, int], Any] = lambda *_: None
    ) -> None:
        if on_error not in OnError.__args__:
            raise ValueError(f"on_error must be one of {', '.join(OnError.__args__)}; got {on_error!r}")
        self.panel, self.on_error, self.tick = dict(panel), on_error, tick
        self.modality, self.device = next(iter(panel.values())).modality, device_of(panel.values())

    @property
    def whole(self) -> bool:
        """Whether the rows of a prompt must come together."""
        return any(reward.compares for reward in self.panel.values())

    def finish(self, media: Tensor) -> Tensor:
        """A batch as it waits for its turn: what can be done beside the scoring is done."""
        if self.device.type == "cuda":
            return media.pin_memory()
        return as_float(media) if self.device.type == "cpu" else media

    def rows(self, batch: Batch) -> list[dict[str, Any]]:
        """The rows of a batch: "row", "id", the name of the media under their modality, "prompt", "scores", "parts" and "error".

        Raises:
            ValueError: a row has none of its scores and `on_error` says to stop, or memory is short.
        """
        rows: list[dict[str, Any]] = [
            {
                "row": item.entry.row,
                "id": item.entry.id,
                self.modality: item.entry.name,
                "prompt": item.prompt.text if item.prompt else None,
                "scores": dict.fromkeys(self.panel, math.nan),
                "parts": {},
                "error": item.problem or None,
            }
            for item in batch.items
        ]
        if batch.media is not None:
            with sharing():
                self._judge(rows, batch.media, [item.prompt for item in batch.items])
        wrong = [row for row in rows if row["error"]]
        stops = wrong if self.on_error == "stop" else [r for r in wrong if batch.media is None or r["prompt"] is None]
        if stops and self.on_error != "nan":
            first = min(stops, key=lambda row: row["row"])
            raise ValueError(f"row {first['row']}, {first['id']}: {first['error']}")
        self.tick(len(rows), len(wrong))
        return rows

    def _judge(self, rows: list[dict[str, Any]], media: Tensor, prompts: list[Prompt | None]) -> None:
        media = as_float(media.to(self.device, non_blocking=True))
        asked = [i for i, prompt in enumerate(prompts) if prompt is not None]
        for name, reward in self.panel.items():
            take = asked if reward.needs_prompt else list(range(len(rows)))
            given = [p for p in prompts if p is not None] if len(asked) == len(take) else []
            reasons = dict.fromkeys(range(len(rows)), "it needs a prompt, and there is none")
            if take:
                answers = _judged(reward, media if len(take) == len(rows) else media[take], given)
                for i, (total, own, reason) in zip(take, answers, strict=True):
                    rows[i]["scores"][name] = total
                    rows[i]["parts"] |= {f"{name}.{part}": value for part, value in own.items()}
                    reasons[i] = reason
            for i, reason in reasons.items():
                if reason:
                    rows[i]["error"] = f"{rows[i]['error'] or ''}; {name}: {reason}".removeprefix("; ")


def device_of(rewards: Iterable[Reward]) -> torch.device:
    """Where the first reward that is anywhere is."""
    tensors = chain.from_iterable(chain(reward.parameters(), reward.buffers()) for reward in rewards)
    return next(tensors, torch.empty(0)).device


def _judged(reward: Reward, media: Tensor, prompts: list[Prompt]) -> list[Answer]:
    """What a reward says; where it refuses the batch, what it says about each row, or each prompt's rows, by themselves."""
    try:
        with torch.no_grad():
            return _answers(reward.score(media, prompts))
    except torch.OutOfMemoryError as error:
        size = "×".join(map(str, media.shape))
        raise ValueError(f"{reward.name} ran out of memory with media of {size}: lower batch") from error
    except ValueError as error:
        units = _units(prompts, len(media)) if reward.compares else [[i] for i in range(len(media))]
        if len(units) == 1:
            return [(math.nan, {}, str(error))] * len(media)
    answers = [_judged(reward, media[unit], [prompts[i] for i in unit] if prompts else []) for unit in units]
    return list(chain.from_iterable(answers))


def _units(prompts: Sequence[Prompt], rows: int) -> list[list[int]]:
    """Consecutive rows of one prompt."""
    if not prompts:
        return [list(range(rows))]
    return [list(g) for _, g in groupby(range(rows), key=lambda i: (prompts[i].text, prompts[i].negative))]


def _answers(scores: Scores) -> list[Answer]:
    parts = {name: values.tolist() for name, values in scores.parts.items()}
    return [
        (
            total,
            {name: values[i] for name, values in parts.items()},
            "it could not judge this" if total != total else "",
        )
        for i, total in enumerate(scores.total.tolist())
    ]
