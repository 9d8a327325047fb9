"""CLAP and the guards of audio."""

from __future__ import annotations

import pytest
import torch

import rewards
from rewards import Reward
from tests.rewards import tiny_audio
from tests.rewards.cases import Case


def clap(request: pytest.FixtureRequest) -> Reward:
    folder = tiny_audio.save_clap(request.getfixturevalue("tmp_path"))
    return rewards.CLAPScore(str(folder), sample_rate=tiny_audio.RATE)


def uneven() -> torch.Tensor:
    """Sounds of which more and more is clipped, and more and more is silent."""
    x = tiny_audio.sounds()
    for i, row in enumerate(x):
        row.mul_(1 + i).clamp_(-1, 1)
        row[:, : 2000 * i] = 0
    return x


CASES: dict[str, Case] = {
    "CLAPScore": Case(clap, media=lambda: tiny_audio.sounds(samples=3 * tiny_audio.RATE // 2, channels=2)),
    "Clipping": Case(lambda _: rewards.Clipping(), media=uneven),
    "Loudness": Case(lambda _: rewards.Loudness(sample_rate=tiny_audio.RATE), media=uneven, tolerance=1e-4),
    "Silence": Case(lambda _: rewards.Silence(sample_rate=tiny_audio.RATE), media=uneven),
}
