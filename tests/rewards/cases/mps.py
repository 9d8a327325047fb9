"""MPS."""

from __future__ import annotations

import pytest

import rewards
from rewards import Reward
from tests.rewards import tiny_encoders
from tests.rewards.cases import Case


def mps(request: pytest.FixtureRequest) -> Reward:
    clip = request.getfixturevalue("clip_folder")
    file = tiny_encoders.save_mps(request.getfixturevalue("tmp_path") / "mps.safetensors", clip)
    return rewards.MPS(str(file), clip, threshold=0.3, condition="a red photo of the house")


CASES: dict[str, Case] = {"MPS": Case(mps, tolerance=1e-3)}
