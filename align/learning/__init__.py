"""Learning a reward from preferences: `train_reward` and `adapt_reward`, which `kilter train-reward` calls.

data        preferences as tensors             losses    how far scores are from what people said
encodings   what the encoder sees              people    whom a head tells apart
fit         the loop                           report    how good it became
train       all of it, to a folder that `rewards.Learned` reads; adapt adds people to one
"""

from rewards.heads import MLP, PAL, VPL, Head

from .adapt import adapt_reward
from .fit import FitConfig
from .losses import BradleyTerry, Distributional, Loss, PlackettLuce, RaoKupper
from .train import LearnedReward, train_reward

__all__ = [
    "MLP", "PAL", "VPL", "BradleyTerry", "Distributional", "FitConfig", "Head", "LearnedReward", "Loss", "PlackettLuce",
    "RaoKupper", "adapt_reward", "train_reward",
]  # fmt: skip
