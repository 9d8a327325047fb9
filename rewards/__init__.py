"""Rewards: score images, video, audio and tokens. Works alone; imports nothing of kilter's other packages."""

from .aesthetic import Aesthetic
from .base import Modality, Prompt, Reward, Scores, as_prompts, facts
from .clip import CLIPScore, DualEncoder, HPSv2, OpenCLIPScore, PickScore
from .combine import Batched, Framewise, Product, Weighted
from .crossencoder import CrossEncoder
from .ensembles import Ensemble
from .judging import Ask, Judge
from .preprocess import Preprocess
from .shapes import Shapes
from .simple import Brightness, Colour, JPEGSize, Sharpness, SmoothJPEGSize

KILTER = True  # lets `align` recognise a stranger's package of the same name

__all__ = [
    "Aesthetic",
    "Ask",
    "Batched",
    "Brightness",
    "CLIPScore",
    "Colour",
    "CrossEncoder",
    "DualEncoder",
    "Ensemble",
    "Framewise",
    "HPSv2",
    "JPEGSize",
    "Judge",
    "Modality",
    "OpenCLIPScore",
    "PickScore",
    "Preprocess",
    "Product",
    "Prompt",
    "Reward",
    "Scores",
    "Shapes",
    "Sharpness",
    "SmoothJPEGSize",
    "Weighted",
    "as_prompts",
    "facts",
]
