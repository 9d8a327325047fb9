"""Critiques written and read by a random MM-RLHF-Reward."""

from __future__ import annotations

import pytest

import rewards
from rewards import Reward
from tests.rewards.cases import Case
from tests.rewards.tiny_critique import save_mmrlhf


def build(request: pytest.FixtureRequest) -> Reward:
    folder = request.getfixturevalue("tmp_path") / "mmrlhf"
    save_mmrlhf(folder)
    return rewards.Critique(rewards.MMRLHFJudge(str(folder), dtype="float32"), max_tokens=6)


CASES: dict[str, Case] = {"Critique": Case(build, tolerance=1e-4, size=None, rounding=None)}
