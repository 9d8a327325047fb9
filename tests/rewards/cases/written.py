"""Rewards that read what a judge writes, with a judge that writes by rule."""

from __future__ import annotations

import rewards
from rewards import Ask
from tests.rewards.cases import Case
from tests.rewards.scribe import Scribe, bright, wordy


def score(ask: Ask) -> str:
    return f"Score: {1 + 4 * bright(ask.media[0]) + 4 * wordy(ask):.6f}"


def acs(ask: Ask) -> str:
    value = 1 + 2 * bright(ask.media[0]) + wordy(ask)
    return "\n".join(
        f"{name} Score (1-5): {value + i / 8:.6f}" for i, name in enumerate(("Alignment", "Coherence", "Style"))
    )


def shares(ask: Ask) -> str:
    first = 0.5 + (bright(ask.media[0]) - bright(ask.media[1]))
    rows = f" Image 1: {first:.6f}\n Image 2: {1 - first:.6f}\n"
    return "\n".join(f"{name} Score:\n{rows}" for name in ("Alignment", "Coherence", "Style"))


CASES: dict[str, Case] = {
    "UnifiedReward": Case(lambda _: rewards.UnifiedReward(Scribe(acs))),
    "WinRate": Case(lambda _: rewards.WinRate(Scribe(shares), "share"), ("a red cat", "a blue dog") * 2),
    "Written": Case(lambda _: rewards.Written(Scribe(score), "How well does it show {prompt}?")),
}
