"""Samplers: policies, kernels, the one denoising loop, and steering."""

from .guidance import Guided
from .kernels import CPS, DDIM, ODE, Consistency, DanceSDE, FlowSDE, Kernel, Unmask
from .ledger import Ledger
from .levels import Clean, Levels, Prediction, diffuse, to_clean
from .noise import Noise, NoiseBank, SeededNoise
from .policy import Cond, Policy, Size
from .resampling import Scheme
from .rollout import (
    GradWindow,
    Interrupted,
    Trajectory,
    always,
    last,
    never,
    only,
    random_truncation,
    rollout,
)
from .smc import SVDD, BestOfN, CoDe, FeynmanKac
from .steering import FREE, Compose, Context, RewardFailed, Steering
from .transitions import Categorical, Gaussian, Transition

KILTER = True  # lets `align` recognise a stranger's package of the same name

__all__ = [
    "CPS", "DDIM", "FREE", "ODE", "SVDD", "BestOfN", "Categorical", "Clean", "CoDe", "Compose", "Cond", "Consistency",
    "Context", "DanceSDE", "FeynmanKac", "FlowSDE", "Gaussian", "GradWindow", "Guided", "Interrupted", "Kernel", "Ledger",
    "Levels", "Noise", "NoiseBank", "Policy", "Prediction", "RewardFailed", "Scheme", "SeededNoise", "Size", "Steering",
    "Trajectory", "Transition", "Unmask", "always", "diffuse", "last", "never", "only", "random_truncation", "rollout",
    "to_clean",
]  # fmt: skip
