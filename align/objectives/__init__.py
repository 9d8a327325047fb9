"""Objectives: how a batch becomes a loss. One file a loss, none importing the trainer."""

from .adjoint_matching import AdjointMatching
from .backprop import Backprop
from .base import Metrics, Objective
from .direct_align import DirectAlign
from .hypernoise import HyperNoise
from .mapo import MaPO
from .nft import DiffusionNFT
from .pairwise import Pairwise
from .policy_gradient import PolicyGradient
from .rebel import Rebel
from .seppo import SePPO
from .unary import Unary
from .weighted import Weighted

__all__ = [
    "AdjointMatching", "Backprop", "DiffusionNFT", "DirectAlign", "HyperNoise", "MaPO", "Metrics", "Objective",
    "Pairwise", "PolicyGradient", "Rebel", "SePPO", "Unary", "Weighted",
]  # fmt: skip
