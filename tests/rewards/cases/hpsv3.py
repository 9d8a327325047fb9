"""HPSv3 on a tiny Qwen2-VL."""

from __future__ import annotations

import pytest

import rewards
from tests.rewards import tiny_vlm
from tests.rewards.cases import Case


def build(request: pytest.FixtureRequest) -> rewards.HPSv3:
    qwen = request.getfixturevalue("vlm_folders")["qwen2_vl"]
    checkpoint = tiny_vlm.save_hpsv3(request.getfixturevalue("tmp_path"), qwen)
    reward = rewards.HPSv3(str(checkpoint), str(qwen), dtype="float32", pixels=56 * 84)
    reward.question = "Rate the image for: {prompt} <|Reward|> END"  # the published one has 2500 letters
    return reward


CASES: dict[str, Case] = {"HPSv3": Case(build, size=None)}
