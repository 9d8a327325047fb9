"""Samplers: policies, kernels, the one denoising loop, and steering."""

from .auto import Auto
from .budget import Budget
from .guidance import Backward, Guided, TimeTravel
from .hypernoise import ShiftedNoise
from .kernels import CPS, DDIM, ODE, Consistency, DanceSDE, FlowSDE, Kernel, Unmask
from .ledger import Ledger
from .levels import Clean, Levels, Prediction, diffuse, to_clean
from .metropolis import PCN, PCNL
from .noise import Noise, NoiseBank, SeededNoise
from .optimise import DNO, DOODL, DFlow, ReNO
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
from .rollover import RolloverBudget
from .search import PathSearch, RandomSearch, ZeroOrder
from .smc import SVDD, BestOfN, CoDe, FeynmanKac
from .steering import FREE, Compose, Context, RewardFailed, Steering
from .transitions import Categorical, Gaussian, Transition
from .tree import TreeSampling
from .values import LatentValue, Value

KILTER = True  # lets `align` recognise a stranger's package of the same name

__all__ = [
    "CPS",
    "DDIM",
    "DNO",
    "DOODL",
    "FREE",
    "ODE",
    "PCN",
    "PCNL",
    "SVDD",
    "Auto",
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
    "DFlow",
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
    "LatentValue",
    "Ledger",
    "Levels",
    "Noise",
    "NoiseBank",
    "Outer",
    "PathSearch",
    "Policy",
    "Prediction",
    "Price",
    "Problem",
    "RandomSearch",
    "ReNO",
    "RewardFailed",
    "RolloverBudget",
    "Scheme",
    "SeededNoise",
    "ShiftedNoise",
    "Size",
    "Steering",
    "TimeTravel",
    "Trajectory",
    "Transition",
    "TreeSampling",
    "Unmask",
    "Value",
    "ZeroOrder",
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
