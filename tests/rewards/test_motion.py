"""Motion against closed forms on ramps, steps and flicker; RAFT against torchvision's own network, scored as VBench scores it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.optical_flow import raft_large, raft_small

from rewards import DynamicDegree, FrameDifference, TemporalFlickering
from rewards.motion import TEXTURE
from tests.rewards import tiny


def grey(frames: Tensor, side: int = 64) -> Tensor:
    """Flat frames of given values: (B, F) -> (B, F, 3, side, side)."""
    return frames[:, :, None, None, None].expand(-1, -1, 3, side, side)


def ramp(speed: float, frames: int = 5, side: int = 64, slope: float = 0.01) -> Tensor:
    """A constant slope that moves to the right by `speed` pixels a frame: (1, F, 3, side, side)."""
    x = torch.arange(side, dtype=torch.float64) - speed * torch.arange(frames, dtype=torch.float64)[:, None]
    return (0.3 + slope * x).clamp(0, 1)[None, :, None, None].expand(-1, -1, 3, side, -1)


def test_frame_difference_of_steps() -> None:
    values = torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.3, 0.4], [0.0, 1.0, 0.0], [0.0, 0.0, 0.8]])
    torch.testing.assert_close(FrameDifference()(grey(values)), torch.tensor([0.0, 0.1, 1.0, 0.4]))
    # a cut cannot pay for standing still
    torch.testing.assert_close(FrameDifference(0.1)(grey(values)), torch.tensor([0.0, 0.1, 0.1, 0.05]))


def test_flickering_by_vbench_and_by_second_differences() -> None:
    values = torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.3, 0.4], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(TemporalFlickering()(grey(values)), torch.tensor([1.0, 0.9, 0.0]))
    torch.testing.assert_close(TemporalFlickering(2)(grey(values)), torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("speed", [0.0, 0.5, 2.0])
def test_the_speed_of_a_ramp_is_exact(speed: float) -> None:
    scores = DynamicDegree().score(ramp(speed))
    expected = 4 * speed * 0.01 / math.hypot(0.01, TEXTURE)  # 4 = 256 / 64
    assert scores.parts["speed"].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert scores.total.item() == pytest.approx(math.log1p(expected), rel=1e-5, abs=1e-9)


def test_speed_is_relative_to_the_picture_and_steep_slopes_reach_it() -> None:
    assert DynamicDegree().score(ramp(4.0, side=128, slope=0.005)).parts["speed"] == pytest.approx(
        DynamicDegree().score(ramp(2.0)).parts["speed"].item(), rel=1e-2
    )
    steep = DynamicDegree().score(ramp(0.5, side=64, slope=0.1)[..., :64, :64].clamp(0, 1)).parts["speed"].item()
    assert 1.9 < steep < 2.1  # half a pixel of 64


def test_faster_scenes_score_higher_and_frames_are_taken_eight_a_second() -> None:
    scene = tiny.natural(1, 96, 160, slope=2.0)[0]
    clips = torch.stack([torch.stack([scene[..., v * f : v * f + 96] for f in range(16)]) for v in (0, 1, 2, 3)])
    scores = DynamicDegree()(clips)
    assert scores[0] == 0
    assert (scores.diff() > 0.1).all()
    torch.testing.assert_close(DynamicDegree(fps=24)(clips), DynamicDegree()(clips[:, ::3]))
    torch.testing.assert_close(DynamicDegree(fps=4)(clips), scores)


def test_the_decision_counts_a_quarter_of_the_frames() -> None:
    """Eight frames; two pairs above 6 pixels make it dynamic. Between frames further apart the threshold rises."""
    speed = 2.4 * math.hypot(0.01, TEXTURE) / 0.01  # 9.6 pixels of 256
    for moving, expected in ((1, 0.0), (2, 1.0), (7, 1.0)):
        steps = torch.tensor([speed] * moving + [0.0] * (7 - moving)).cumsum(0)
        clip = torch.cat([ramp(0.0, 1), *(ramp(0.0, 1) - 0.01 * s for s in steps)], dim=1)
        assert DynamicDegree(score="decision")(clip.clamp(0, 1)).item() == expected
        assert DynamicDegree(score="decision", fps=4.0)(clip.clamp(0, 1)).item() == 0  # 12 pixels
    still = DynamicDegree(score="sigmoid", softness=2.0)(ramp(0.0)).item()
    assert still == pytest.approx(1 / (1 + math.exp(3)), rel=1e-5)


@pytest.mark.parametrize("large", [True, False])
def test_raft_is_torchvisions_scored_as_vbench_does(large: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = (raft_large if large else raft_small)().eval()
    torch.save(network.state_dict(), tmp_path / "raft.pth")
    clip = tiny.natural(3, 131, 140)[None]
    reward = DynamicDegree("raft", weights=str(tmp_path / "raft.pth"))
    with torch.no_grad():
        padded = torch.nn.functional.pad(2 * clip[0] - 1, (2, 2, 2, 3), mode="replicate")
        flows = [network(a[None], b[None], num_flow_updates=20)[-1][0] for a, b in pairwise(padded)]
    tops = [f.norm(dim=0).flatten().sort(descending=True).values[: int(0.05 * 136 * 144)].mean() for f in flows]
    expected = torch.stack(tops) * 256 / 131
    scores = reward.score(clip)
    torch.testing.assert_close(scores.parts["speed"][0], expected.mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.total[0], expected.log1p().mean(), rtol=1e-4, atol=1e-4)


def test_raft_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    state = raft_small().state_dict()
    torch.save(state, tmp_path / "raft.pth")
    reward = DynamicDegree("raft", weights=str(tmp_path / "raft.pth"))
    with pytest.raises(RuntimeError, match="not differentiable"):
        reward(torch.rand(1, 2, 3, 128, 128, requires_grad=True))
    with pytest.raises(ValueError, match="128 x 128"):
        reward(torch.rand(1, 2, 3, 120, 200))
    state.popitem()
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="lacks"):
        DynamicDegree("raft", weights=str(tmp_path / "short.pth"))
    with pytest.raises(OSError, match="nowhere"):
        DynamicDegree("raft", weights=str(tmp_path / "nowhere.pth"))


def test_wrong_arguments_are_refused() -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"flow": "lucas"}, "flow must be"),
        ({"score": "mean"}, "score must be"),
        ({"fps": 0}, "above 0"),
        ({"weights": "x.pth"}, "raft"),
    )
    for arguments, match in wrong:
        with pytest.raises(ValueError, match=match):
            DynamicDegree(**arguments)
    with pytest.raises(ValueError, match="enough"):
        FrameDifference(0)
    with pytest.raises(ValueError, match="order"):
        TemporalFlickering(3)
    for reward in (FrameDifference(), TemporalFlickering(), DynamicDegree()):
        with pytest.raises(ValueError, match="at least 2 frames"):
            reward(torch.rand(2, 1, 3, 8, 8))
