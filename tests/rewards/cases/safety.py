"""Safety penalties."""

from __future__ import annotations

from pathlib import Path

import pytest

import rewards
from rewards import Reward
from tests.rewards.cases import Case
from tests.rewards.tiny_safety import save_checker, save_classifier


def built(name: str, save):
    def build(request: pytest.FixtureRequest) -> Reward:
        folder: Path = request.getfixturevalue("tmp_path")
        return getattr(rewards, name)(str(save(folder)))

    return build


CASES = {
    "Safety": Case(built("Safety", save_classifier)),
    "SafetyChecker": Case(built("SafetyChecker", save_checker)),
}
