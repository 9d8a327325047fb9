"""Image rewards on some frames."""

from __future__ import annotations

import torch

import rewards
from tests.rewards import tiny
from tests.rewards.cases import Case
from tests.rewards.cases.core import mixed


def clips() -> torch.Tensor:
    return (0.1 + 0.8 * tiny.natural(16, 36, 43)).unflatten(0, (4, 4))


CASES: dict[str, Case] = {
    "Sampled": Case(lambda r: rewards.Sampled(mixed(r), "first-middle-last"), media=clips),
    "Segmental": Case(lambda r: rewards.Segmental(mixed(r), 2), media=clips),
}
