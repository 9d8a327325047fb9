"""A judge whose answers are rules, for rewards that read what a judge writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewards import Ask, Judge


class Scribe(Judge):
    """Answers by a rule and remembers what it was asked."""

    def __init__(self, rule: Callable[[Ask], str | None]) -> None:
        super().__init__()
        self.rule = rule
        self.asks: list[Ask] = []
        self.how: dict[str, float] = {}

    def odds(self, asks: Sequence[Ask], choices: Sequence[Sequence[str]]) -> Tensor:
        return torch.full((len(asks), len(choices)), torch.nan)

    def write(self, asks: Sequence[Ask], *, temperature: float = 0.0, max_tokens: int = 512) -> list[str | None]:
        self.asks, self.how = list(asks), {"temperature": temperature, "max_tokens": max_tokens}
        return [self.rule(ask) for ask in asks]


def bright(media: Tensor) -> float:
    """0 to 1, little moved by size and rounding."""
    return media.float().mean().item()


def wordy(ask: Ask) -> float:
    """0 to 1, of the prompt at the end of a published question."""
    return sum(map(ord, ask.text)) % 97 / 97
