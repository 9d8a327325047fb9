"""Rewards: score images, video, audio and tokens. Works alone; imports nothing of kilter's other packages."""

from .base import Modality, Prompt, Reward, Scores, as_prompts
from .clip import CLIPScore, DualEncoder, HPSv2, OpenCLIPScore, PickScore
from .combine import Batched, Framewise, Weighted
from .preprocess import Preprocess
from .simple import Brightness, Colour, JPEGSize, Sharpness, SmoothJPEGSize

KILTER = True  # lets `align` recognise a stranger's package of the same name

__all__ = [
    "Batched",
    "Brightness",
    "CLIPScore",
    "Colour",
    "DualEncoder",
    "Framewise",
    "HPSv2",
    "JPEGSize",
    "Modality",
    "OpenCLIPScore",
    "PickScore",
    "Preprocess",
    "Prompt",
    "Reward",
    "Scores",
    "Sharpness",
    "SmoothJPEGSize",
    "Weighted",
    "as_prompts",
]
