"""Objectives: how a batch becomes a loss. One file a loss, none importing the trainer."""

from .backprop import Backprop
from .base import Metrics, Objective
from .mapo import MaPO
from .pairwise import Pairwise
from .policy_gradient import PolicyGradient
from .unary import Unary
from .weighted import Weighted

__all__ = ["Backprop", "MaPO", "Metrics", "Objective", "Pairwise", "PolicyGradient", "Unary", "Weighted"]
