"""Rewards: score images, video, audio and tokens. Works alone; imports nothing of kilter's other packages."""

from .adapters import FromCallable, as_ddpo_fn, as_multi_score, from_callable
from .aesthetic import Aesthetic, ShadowAesthetic
from .audio import CLAPScore, Clipping, Loudness, Silence
from .base import Modality, Prompt, Reward, Scores, as_prompts, facts
from .clip import CLIPScore, PickScore
from .combine import Batched, Framewise, Product, Weighted
from .consistency import Action, BackgroundConsistency, SubjectConsistency
from .constraints import Constrained
from .critique import Assessor, Critique, MMRLHFJudge
from .crossencoder import CrossEncoder
from .dual import DualEncoder
from .ensembles import Ensemble
from .evalmuse import EvalMuse
from .flant5 import CLIPFlanT5
from .geneval import GenEval
from .hpsv3 import HPSv3
from .imagereward import CycleReward, ImageReward, IterComp
from .judging import Ask, Judge
from .learned import Learned
from .localjudge import LocalJudge
from .mjvideo import MJVideo
from .motion import DynamicDegree, FrameDifference, TemporalFlickering
from .mps import MPS
from .ocr import OCRAccuracy
from .openclip import HPSv2, OpenCLIPScore, SocialReward
from .placed import Placed
from .preprocess import Preprocess
from .safety import Safety, SafetyChecker
from .segments import Sampled, Segmental
from .server import ServedJudge
from .shapes import Shapes
from .simple import Brightness, Colour, JPEGSize, Sharpness, SmoothJPEGSize
from .transforms import Clipped, Delta, LogSigmoid, Standardised
from .video import VideoReward
from .videoscore import VideoScore
from .vlm import QAlign, Rating, VQAScore, YesNo
from .winrate import WinRate
from .written import UnifiedReward, Written
from .xcomposer import XComposerReward

KILTER = True  # lets `align` recognise a stranger's package of the same name

__all__ = [
    "MPS",
    "Action",
    "Aesthetic",
    "Ask",
    "Assessor",
    "BackgroundConsistency",
    "Batched",
    "Brightness",
    "CLAPScore",
    "CLIPFlanT5",
    "CLIPScore",
    "Clipped",
    "Clipping",
    "Colour",
    "Constrained",
    "Critique",
    "CrossEncoder",
    "CycleReward",
    "Delta",
    "DualEncoder",
    "DynamicDegree",
    "Ensemble",
    "EvalMuse",
    "FrameDifference",
    "Framewise",
    "FromCallable",
    "GenEval",
    "HPSv2",
    "HPSv3",
    "ImageReward",
    "IterComp",
    "JPEGSize",
    "Judge",
    "Learned",
    "LocalJudge",
    "LogSigmoid",
    "Loudness",
    "MJVideo",
    "MMRLHFJudge",
    "Modality",
    "OCRAccuracy",
    "OpenCLIPScore",
    "PickScore",
    "Placed",
    "Preprocess",
    "Product",
    "Prompt",
    "QAlign",
    "Rating",
    "Reward",
    "Safety",
    "SafetyChecker",
    "Sampled",
    "Scores",
    "Segmental",
    "ServedJudge",
    "ShadowAesthetic",
    "Shapes",
    "Sharpness",
    "Silence",
    "SmoothJPEGSize",
    "SocialReward",
    "Standardised",
    "SubjectConsistency",
    "TemporalFlickering",
    "UnifiedReward",
    "VQAScore",
    "VideoReward",
    "VideoScore",
    "Weighted",
    "WinRate",
    "Written",
    "XComposerReward",
    "YesNo",
    "as_ddpo_fn",
    "as_multi_score",
    "as_prompts",
    "facts",
    "from_callable",
]
