"""EvalMuse."""

from __future__ import annotations

import pytest

import rewards
from rewards import Reward
from tests.rewards import tiny_encoders
from tests.rewards.cases import Case


def evalmuse(request: pytest.FixtureRequest) -> Reward:
    folder = request.getfixturevalue("tmp_path")
    return rewards.EvalMuse(str(tiny_encoders.save_evalmuse(folder)), str(folder))


CASES: dict[str, Case] = {"EvalMuse": Case(evalmuse)}
