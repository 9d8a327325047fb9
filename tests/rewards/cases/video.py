"""Video rewards on tiny Qwen2-VLs."""

from __future__ import annotations

import pytest
import torch

import rewards
from rewards import Reward
from tests.rewards import tiny, tiny_mjvideo, tiny_video, tiny_vlm
from tests.rewards.cases import Case

QUESTION = "quality <|VQ_reward|> what of <|MQ_reward|> text {prompt} <|TA_reward|>"  # the published one has 4000 bytes


def video_reward(request: pytest.FixtureRequest) -> Reward:
    path = request.getfixturevalue("tmp_path")
    base = tiny_vlm.save_qwen2_vl(path / "base")
    state = tiny_video.released(tiny_video.video_reward(base).state_dict())
    reward = rewards.VideoReward(str(tiny_video.save_video_reward(path / "model", state, base)), dtype="float32")
    reward.question = QUESTION
    return reward


def videoscore(request: pytest.FixtureRequest) -> Reward:
    folder = tiny_video.save_videoscore_idefics(request.getfixturevalue("tmp_path") / "model")
    reward = rewards.VideoScore(str(folder), dtype="float32")
    reward.question = "quality of the video {prompt} "
    return reward


def mjvideo(request: pytest.FixtureRequest) -> Reward:
    path = tiny_mjvideo.save_mjvideo(request.getfixturevalue("tmp_path"))
    weights, tokenizer = path / "mjvideo.safetensors", path / "tokenizer"
    return rewards.MJVideo(str(weights), str(tokenizer), str(path), dtype="float32")


def clips() -> torch.Tensor:
    return (0.1 + 0.8 * tiny.natural(16, 84, 88)).unflatten(0, (4, 4))


CASES: dict[str, Case] = {
    "MJVideo": Case(mjvideo, media=clips, tolerance=1e-4, size=2.0, rounding=0.5),
    "VideoReward": Case(video_reward, media=clips, tolerance=1e-4, size=2.0),
    "VideoScore": Case(videoscore, media=clips, tolerance=1e-4, size=2.0, rounding=0.5),
}
