"""Rewards: score images, video, audio and tokens. Works alone; imports nothing of kilter's other packages."""

from .aesthetic import Aesthetic
from .audio import CLAPScore, Clipping, Loudness, Silence
from .base import Modality, Prompt, Reward, Scores, as_prompts, facts
from .clip import CLIPScore, DualEncoder, HPSv2, OpenCLIPScore, PickScore
from .combine import Batched, Framewise, Product, Weighted
from .crossencoder import CrossEncoder
from .ensembles import Ensemble
from .imagereward import CycleReward, ImageReward, IterComp
from .judging import Ask, Judge
from .ocr import OCRAccuracy
from .preprocess import Preprocess
from .shapes import Shapes
from .simple import Brightness, Colour, JPEGSize, Sharpness, SmoothJPEGSize

KILTER = True  # lets `align` recognise a stranger's package of the same name

__all__ = [
    "Aesthetic",
    "Ask",
    "Batched",
    "Brightness",
    "CLAPScore",
    "CLIPScore",
    "Clipping",
    "Colour",
    "CrossEncoder",
    "CycleReward",
    "DualEncoder",
    "Ensemble",
    "Framewise",
    "HPSv2",
    "ImageReward",
    "IterComp",
    "JPEGSize",
    "Judge",
    "Loudness",
    "Modality",
    "OCRAccuracy",
    "OpenCLIPScore",
    "PickScore",
    "Preprocess",
    "Product",
    "Prompt",
    "Reward",
    "Scores",
    "Shapes",
    "Sharpness",
    "Silence",
    "SmoothJPEGSize",
    "Weighted",
    "as_prompts",
    "facts",
]
