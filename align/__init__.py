# ruff: noqa: E402 — the guard must run before anything is imported from the siblings
"""kilter: align generative models with rewards, by steering the sampling or training the weights.

import align, rewards, samplers

policy = align.load_policy()                                   # the embedded model, a folder or a hub id
reward = rewards.CrossEncoder()
result = align.steer(policy, "a red circle left of a blue square", samplers.FeynmanKac(reward, beta=0.1))
result.save("out")
"""

from importlib import import_module

for _name in ("rewards", "samplers"):
    if not getattr(_package := import_module(_name), "KILTER", False):
        raise ImportError(
            f"kilter needs its own package {_name!r}, but Python found {_package.__file__ or list(_package.__path__)}: "
            "rename that file or folder, or start Python from another directory"
        )

from .adapters import Lora
from .batches import Batch, Noised, Paths, Starts, Steps
from .bestofn import best_of_n
from .choices import sample_pairs
from .comparing import Comparison, compare_rewards
from .config import TrainConfig
from .data import append_feedback, read_feedback, validate, write_feedback
from .feedback import Captions, Likes, Preferences
from .learning import FitConfig, LearnedReward, adapt_reward, train_reward
from .loading import load_policy
from .memory import Memory
from .objectives import Objective
from .planning.plan import Plan, plan
from .reports import TrainResult
from .results import Sample, Steered
from .scoring import ScoredSet, score, score_rows, score_set
from .sources import Prompts, Rollouts, Source
from .steering import row_seed, steer
from .trainer import Trainer
from .training import train
from .values import LearnedValue, ValueConfig, train_value
from .verdicts import Verdicts, eval_reward
from .versus import Versus, compare_steerings
from .windows import Window

__all__ = [
    "Batch", "Captions", "Comparison", "FitConfig", "LearnedReward", "LearnedValue", "Likes", "Lora", "Memory", "Noised",
    "Objective", "Paths", "Plan", "Preferences", "Prompts", "Rollouts", "Sample", "ScoredSet", "Source", "Starts", "Steered",
    "Steps", "TrainConfig", "TrainResult", "Trainer", "ValueConfig", "Verdicts", "Versus", "Window", "adapt_reward",
    "append_feedback", "best_of_n", "compare_rewards", "compare_steerings", "eval_reward", "load_policy", "plan", "read_feedback",
    "row_seed", "sample_pairs", "score", "score_rows", "score_set", "steer", "train", "train_reward", "train_value",
    "validate", "write_feedback",
]  # fmt: skip
