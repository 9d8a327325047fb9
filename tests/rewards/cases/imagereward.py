"""ImageReward and the models of its architecture."""

from __future__ import annotations

import pytest

import rewards
from rewards import Reward
from tests.rewards import tiny_encoders
from tests.rewards.cases import Case


def tokenizer(request: pytest.FixtureRequest) -> str:
    return str(tiny_encoders.bert_tokenizer(request.getfixturevalue("tmp_path")))


def imagereward(request: pytest.FixtureRequest) -> Reward:
    file = tiny_encoders.save_imagereward(request.getfixturevalue("tmp_path") / "ImageReward.pt")
    return rewards.ImageReward(str(file), tokenizer(request))


def itercomp(request: pytest.FixtureRequest) -> Reward:
    file = tiny_encoders.save_imagereward(request.getfixturevalue("tmp_path") / "attribute.pt", "module.")
    return rewards.IterComp(str(file), tokenizer(request))


def cyclereward(request: pytest.FixtureRequest) -> Reward:
    file = tiny_encoders.save_cyclereward(request.getfixturevalue("tmp_path") / "CycleReward-Combo.pth")
    return rewards.CycleReward(str(file), tokenizer(request))


CASES: dict[str, Case] = {
    "CycleReward": Case(cyclereward, tolerance=1e-4),
    "ImageReward": Case(imagereward, tolerance=1e-4),
    "IterComp": Case(itercomp, tolerance=1e-4),
}
