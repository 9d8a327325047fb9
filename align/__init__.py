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

from .loading import load_policy
from .results import Sample, Steered
from .scoring import score
from .steering import row_seed, steer

__all__ = ["Sample", "Steered", "load_policy", "row_seed", "score", "steer"]
