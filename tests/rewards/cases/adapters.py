"""A user's function."""

from __future__ import annotations

from torch import Tensor

import rewards
from tests.rewards.cases import Case


def letters(images: Tensor, prompts: list[str]) -> Tensor:
    """Brightness times the length of the prompt."""
    return images.mean(dim=(1, 2, 3)) * images.new_tensor([len(text) for text in prompts])


CASES = {"FromCallable": Case(lambda _: rewards.FromCallable(letters, differentiable=True), tolerance=1e-4)}
