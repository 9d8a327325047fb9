"""Samplers: policies, kernels, the one denoising loop, and steering."""

from .budget import Budget
from .guidance import Backward, Guided, TimeTravel
from .hypernoise import ShiftedNoise
from .kernels import CPS, DDIM, ODE, Consistency, DanceSDE, FlowSDE, Kernel, Unmask
from .ledger import Ledger
from .levels import Clean, Levels, Prediction, diffuse, to_clean
from .noise import Noise, NoiseBank, SeededNoise
from .outer import Found, Iterate, Outer, Problem, run
from .policy import Cond, Policy, Size
from .price import Price, price
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
from .values import Value

KILTER = True  # lets `align` recognise a stranger's package of the same name

__all__ = [
    "CPS",
    "DDIM",
    "FREE",
    "ODE",
    "SVDD",
    "Backward",
    "BestOfN",
    "Budget",
    "Categorical",
    "Clean",
    "CoDe",
    "Compose",
    "Cond",
    "Consistency",
    "Context",
    "DanceSDE",
    "FeynmanKac",
    "FlowSDE",
    "Found",
    "Gaussian",
    "GradWindow",
    "Guided",
    "Interrupted",
    "Iterate",
    "Kernel",
    "Ledger",
    "Levels",
    "Noise",
    "NoiseBank",
    "Outer",
    "Policy",
    "Prediction",
    "Price",
    "Problem",
    "RewardFailed",
    "Scheme",
    "SeededNoise",
    "ShiftedNoise",
    "Size",
    "Steering",
    "TimeTravel",
    "Trajectory",
    "Transition",
    "Unmask",
    "Value",
    "always",
    "diffuse",
    "last",
    "never",
    "only",
    "price",
    "random_truncation",
    "rollout",
    "run",
    "to_clean",
]
