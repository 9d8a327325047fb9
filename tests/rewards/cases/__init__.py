"""How every reward is built offline for the battery in `test_contract.py`: each module here adds a `CASES`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import pytest
from torch import Tensor

from rewards import Reward
from tests.rewards import tiny


@dataclass(frozen=True)
class Case:
    """How to build a reward offline and what to show it.

    Attributes:
        build: takes pytest's request, for fixtures.
        prompts: four prompts that the reward tells apart.
        media: four samples; None means images of natural statistics.
        tolerance: allowed difference of scores that should be equal, in the reward's unit.
        size: how far scores may move when media are enlarged, in standard deviations of the scores; None for as far as they like.
        rounding: the same for media rounded to 8 bits.
    """

    build: Callable[[pytest.FixtureRequest], Reward]
    prompts: tuple[str, ...] = ("a red cat", "two dog on the house", "the blue bird", "photo of a car")
    media: Callable[[], Tensor] | None = None
    tolerance: float = 1e-5
    size: float | None = 1.0
    rounding: float | None = 0.2

    def show(self) -> Tensor:
        # away from 0 and 1, so that no clamp hides a slope
        return self.media() if self.media else 0.1 + 0.8 * tiny.natural(4, 36, 43)


def collect() -> dict[str, Case]:
    """The cases of all modules here."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {name: case for module in modules for name, case in module.CASES.items()}
