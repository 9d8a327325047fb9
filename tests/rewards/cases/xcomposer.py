"""InternLM-XComposer2.5-Reward's interface, with code in the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import rewards
from rewards import Reward
from tests.rewards.cases import Case
from tests.rewards.tiny_xcomposer import save_xcomposer


def build(request: pytest.FixtureRequest) -> Reward:
    path: Path = request.getfixturevalue("tmp_path")
    patch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    patch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(path / "modules")
    )  # where code is copied to
    folder = str(save_xcomposer(path / "model"))
    return rewards.XComposerReward(folder, trust_remote_code=True, dtype="float32")


CASES: dict[str, Case] = {"XComposerReward": Case(build, tolerance=2e-3)}
