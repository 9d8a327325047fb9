"""Motion: how much a video moves and how steadily, so that no other reward is satisfied by a frozen one.

Image rewards averaged over frames, and most video-language models, like a still picture best; these are what to weigh against them.

    FrameDifference       d_t = mean |x_t - x_{t-1}|, and its mean over t; zero if and only if the video stands still
    TemporalFlickering    1 - mean_t d_t (VBench), or the same on second differences, which forgive steady change
    DynamicDegree         m_t = mean of the top 5% of speeds between two frames, in pixels where the shorter side has 256

DynamicDegree has two ways to see speed. "gradient" needs no network and has a gradient: with the shorter side brought to 64 pixels,
brightness constancy, I_t + v · ∇I = 0, gives in each small block

    |v| ~ mean |I_t| / sqrt(mean |∇I|² + ε²)

exact for motion along a constant slope far above ε; what has no texture or moves further than its texture is long is
underestimated, and flicker looks like motion. "raft" is RAFT, as in VBench, and sees large motion; it has no gradient here, for
RAFT cuts its own between updates.

Sources: Huang et al., "VBench", 2023, arXiv 2311.17982, released code: frames at about 8 a second, speeds in pixels, threshold
6 (side / 256) max(1, 8 / fps), dynamic where at least a quarter of the frames exceed it. Teed and Deng, "RAFT", 2020, arXiv
2003.12039; VBench's raft-things is torchvision's C_T_V1. The smooth scores "log" and "sigmoid" are ours.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prompt, Reward, Scores
from .loading import fill, find, loading, read_weights
from .preprocess import at_least_float32, resample

__all__ = ["DynamicDegree", "FrameDifference", "TemporalFlickering"]

LUMA = (0.299, 0.587, 0.114)  # Rec. 601
SIDE, BLOCK, TEXTURE = 64, 4, 0.01  # of "gradient": shorter side and blocks in pixels, and ε in values a pixel
UNIT = 256  # shorter side in pixels in which VBench gives its threshold
THRESHOLD, RATE, TOP = 6.0, 8.0, 0.05  # VBench: pixels, frames a second, share of the pixels
UPDATES = 20  # of RAFT in VBench


class FrameDifference(Reward):
    """Mean absolute difference of neighbouring frames: a term against frozen videos.

    Range: 0 to 1, 0 for a still video; natural motion mostly below 0.1
    Size: any, from two frames
    Gradient: yes; zero where two frames are equal, so give a frozen video some noise

    Args:
        enough: difference of two frames beyond which more earns nothing; None for no limit, which noise and flicker satisfy best.

    Raises:
        ValueError: `enough` is not positive.
    """

    modality = "video"
    needs_prompt = False

    def __init__(self, enough: float | None = None) -> None:
        super().__init__()
        if enough is not None and enough <= 0:
            raise ValueError(f"enough must be above 0, or None; got {enough}")
        self.enough = enough

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        change = changes(self, media, 1)
        return (change if self.enough is None else change.clamp(max=self.enough)).mean(dim=1)


class TemporalFlickering(Reward):
    """Steadiness of a video: one minus the mean change between frames, as VBench measures it.

    VBench applies order 1 to videos meant to be static, for it punishes all motion. Order 2, ours, takes the difference of
    neighbouring differences (halved): fades and slow motion cost nothing, frames that alternate cost all.

    Range: 0 to 1, 1 for a still video
    Size: any, from `order` + 1 frames
    Gradient: yes; zero where frames are equal

    Args:
        order: 1 for differences, 2 for differences of differences.

    Raises:
        ValueError: `order` is neither.
    """

    modality = "video"
    needs_prompt = False

    def __init__(self, order: int = 1) -> None:
        super().__init__()
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2; got {order}")
        self.order = order

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        return 1 - changes(self, media, self.order).mean(dim=1) / self.order


def changes(reward: Reward, media: Tensor, order: int) -> Tensor:
    """Mean absolute difference between frames: (B, F, 3, H, W) -> (B, F - order)."""
    at_least(reward, media, order + 1)
    return at_least_float32(media).diff(n=order, dim=1).abs().mean(dim=(2, 3, 4))


def at_least(reward: Reward, media: Tensor, frames: int) -> None:
    if media.shape[1] < frames:
        raise ValueError(f"{reward.name} needs at least {frames} frames; got {media.shape[1]}")


class DynamicDegree(Reward):
    """How much a video moves: VBench's dynamic degree, smooth or as published.

    With m_t the mean of the top 5% of speeds from frame t - 1 to t: "log" is the mean of log(1 + m_t); "sigmoid" that of
    sigmoid((m_t - threshold) / softness), which stops paying for more; "decision" is VBench's own 0 or 1. The part `speed` is the
    mean of m_t, in pixels where the shorter side has 256.

    Range: "log" 0 to about 4, "sigmoid" and "decision" 0 to 1
    Size: any for "gradient"; from 128 for "raft"
    Gradient: for "gradient" without "decision"
    Weights: raft_large_C_T_V1-22a6c225.pth of torchvision; none for "gradient"
    Licence: BSD-3-Clause

    Args:
        flow: how speeds are seen; see the module docstring.
        score: how speeds become a score.
        fps: of the media; frames are taken about 8 a second.
        softness: of "sigmoid", in pixels where the shorter side has 256.
        weights: "raft" only: file of a torchvision RAFT, large or small; None downloads VBench's.

    Raises:
        OSError: the weights are missing or unreadable.
        ValueError: an argument is out of its range, or the file holds another network.
    """

    modality = "video"
    needs_prompt = False

    def __init__(
        self,
        flow: Literal["gradient", "raft"] = "gradient",
        score: Literal["log", "sigmoid", "decision"] = "log",
        *,
        fps: float = 8.0,
        softness: float = 1.0,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("flow", flow, ("gradient", "raft")),
            ("score", score, ("log", "sigmoid", "decision")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        if fps <= 0 or softness <= 0:
            raise ValueError(f"fps and softness must be above 0; got {fps} and {softness}")
        if weights is not None and flow != "raft":
            raise ValueError('weights belong to flow="raft"')
        self.kind, self.softness = score, softness
        self.interval = max(1, round(fps / RATE))
        self.threshold = THRESHOLD * max(1.0, RATE / fps)
        self.raft = load_raft(weights) if flow == "raft" else None
        self.differentiable = flow == "gradient" and score != "decision"
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        frames = at_least_float32(media[:, :: self.interval])
        at_least(self, frames, 2)
        speed = (gradient_speed(frames) if self.raft is None else raft_speed(self.raft, frames)).flatten(2)
        top = speed.topk(max(1, int(TOP * speed.shape[2])), dim=2).values.mean(dim=2)  # (B, F - 1)
        total = {
            "log": lambda: top.log1p().mean(dim=1),
            "sigmoid": lambda: ((top - self.threshold) / self.softness).sigmoid().mean(dim=1),
            # of two frames, a quarter rounds to none: VBench then calls every video dynamic
            "decision": lambda: ((top > self.threshold).sum(dim=1) >= round(frames.shape[1] / 4)).to(top.dtype),
        }[self.kind]()
        return Scores(total, {"speed": top.mean(dim=1)})


def gradient_speed(frames: Tensor) -> Tensor:
    """Speed by brightness constancy: (B, F, 3, H, W) -> (B, F - 1, h, w), in units of 1/256 of the shorter side."""
    luma = torch.einsum("bfchw,c->bfhw", frames, frames.new_tensor(LUMA))
    height, width = luma.shape[-2:]
    size = [max(SIDE, round(SIDE * side / min(height, width))) for side in (height, width)]
    luma = resample(luma, (size[0], size[1]), "bilinear")
    between = (luma[:, 1:] + luma[:, :-1]) / 2
    down = (between[..., 2:, 1:-1] - between[..., :-2, 1:-1]) / 2
    right = (between[..., 1:-1, 2:] - between[..., 1:-1, :-2]) / 2
    change = F.avg_pool2d(luma.diff(dim=1)[..., 1:-1, 1:-1].abs(), BLOCK)
    slope = F.avg_pool2d(down.square() + right.square(), BLOCK)
    return change / (slope + TEXTURE**2).sqrt() * (UNIT / SIDE)


def raft_speed(raft: Any, frames: Tensor) -> Tensor:
    """Speed by RAFT: (B, F, 3, H, W) -> (B, F - 1, h, w), in units of 1/256 of the shorter side; the padding counts, as in VBench.

    Raises:
        ValueError: the frames are too small for its correlation pyramid.
    """
    height, width = frames.shape[-2:]
    if min(height, width) < 128:
        raise ValueError(
            f"RAFT needs frames of at least 128 x 128; got {height} x {width}: enlarge them, or use flow=gradient"
        )
    low, right = -height % 8, -width % 8
    padded = F.pad(
        2 * frames.flatten(0, 1) - 1, (right // 2, right - right // 2, low // 2, low - low // 2), mode="replicate"
    )
    padded = padded.to(next(raft.parameters()).dtype).unflatten(0, frames.shape[:2])
    flow = torch.stack(  # one video at a time: the correlation volume is large
        [raft(video[:-1].contiguous(), video[1:].contiguous(), num_flow_updates=UPDATES)[-1] for video in padded]
    )
    return flow.square().sum(dim=2).sqrt() * (UNIT / min(height, width))


def load_raft(weights: str | None) -> Any:
    """A RAFT with the weights of a file; the keys say whether it is the large or the small one.

    Raises:
        ValueError: the file holds something else.
    """
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large, raft_small

    if weights is None:
        with loading("raft_large_C_T_V1", "the weights, downloaded from download.pytorch.org"):
            state = Raft_Large_Weights.C_T_V1.get_state_dict(progress=False, check_hash=True)
    else:
        with loading(weights, "a file of a torchvision RAFT, or owner/name/file of one on the hub"):
            state = read_weights(find(weights))
    large = any(str(key).startswith("mask_predictor.") for key in state)
    network = raft_large() if large else raft_small()
    fill(network, state, weights or "raft_large_C_T_V1")
    return network
