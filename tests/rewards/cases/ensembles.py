"""Ensembles of two random dual encoders and a rule."""

from __future__ import annotations

import pytest

import rewards
from rewards import Reward
from tests.rewards.cases import Case


def cautious(request: pytest.FixtureRequest) -> Reward:
    one = rewards.CLIPScore(request.getfixturevalue("clip_folder"), "cosine")
    other = rewards.CLIPScore(request.getfixturevalue("siglip_folder"), "cosine")
    return rewards.Ensemble({"clip": one, "siglip": other}, "uncertainty", penalty=0.5)


CASES: dict[str, Case] = {"Ensemble": Case(cautious)}
