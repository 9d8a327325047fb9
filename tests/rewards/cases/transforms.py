"""Functions of one random dual encoder, and a constraint on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import rewards
from rewards import Reward
from tests.rewards.cases import Case


def on_clip(make: Callable[[Reward], Reward]) -> Callable[[pytest.FixtureRequest], Reward]:
    return lambda request: make(rewards.CLIPScore(request.getfixturevalue("clip_folder"), "cosine"))


CASES: dict[str, Case] = {
    "Clipped": Case(on_clip(lambda r: rewards.Clipped(r, -1.0, 1.0))),
    "Constrained": Case(
        on_clip(lambda r: rewards.Constrained(r, [rewards.Brightness()], [0.6], squash="sigmoid", initial=0.5))
    ),
    "Delta": Case(on_clip(lambda r: rewards.Delta(r, 0.1))),
    "LogSigmoid": Case(on_clip(lambda r: rewards.LogSigmoid(r, 0.1, temperature=0.1)), tolerance=1e-4),
    "Standardised": Case(on_clip(lambda r: rewards.Standardised(r, mean=0.1, std=0.05)), tolerance=1e-3),
}
