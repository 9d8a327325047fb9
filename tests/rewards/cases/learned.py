"""A reward learned on a random dual encoder."""

from __future__ import annotations

import pytest

import rewards
from rewards import Reward
from rewards.heads import PAL
from rewards.learned import Learned
from tests.rewards.cases import Case
from tests.rewards.tiny_learned import save_learned


def learned(request: pytest.FixtureRequest) -> Reward:
    clip = str(request.getfixturevalue("clip_folder"))
    folder = request.getfixturevalue("tmp_path") / "learned"
    save_learned(folder, rewards.CLIPScore(clip, "cosine"), clip, PAL(width=16), users=("ann", "bob"))
    return Learned(str(folder), user="bob")


CASES: dict[str, Case] = {"Learned": Case(learned, tolerance=1e-4)}
