"""Budgets: how much a run may spend, in seconds, network evaluations or reward calls.

A network evaluation is one sample through one branch of the network; differentiating one costs as much as two more (the
backward pass), so `Ledger.evaluations` is network + 2·gradient.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from .ledger import Ledger

__all__ = ["Budget"]

Unit = Literal["s", "nfe", "rewards"]
WORDS = {"s": "seconds", "nfe": "network evaluations", "rewards": "reward calls"}


@dataclass(frozen=True)
class Budget:
    """What a run may spend.

    Attributes:
        amount: above 0.
        unit: "s" seconds of wall clock, "nfe" network evaluations (`Ledger.evaluations`), "rewards" samples judged.

    Raises:
        ValueError: an amount that is no positive number, or an unknown unit.
    """

    amount: float
    unit: Unit = "s"

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(
                f"a budget is in {' or '.join(get_args(Unit))}, such as 20s, 400nfe, 64rewards; got {self.unit!r}"
            )
        if not 0 < self.amount < float("inf"):
            raise ValueError(f"a budget must be above 0; got {self.amount:g} {WORDS[self.unit]}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From "20s", "2min", "400nfe" or "64rewards"."""
        found = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?(?:e\d+)?)\s*([A-Za-z]+)\s*", text)
        if found is None:
            raise ValueError(f"a budget is a number and a unit, such as 20s, 400nfe or 64rewards; got {text!r}")
        amount, unit = float(found[1]), found[2].lower()
        if unit in ("m", "min", "minutes"):
            amount, unit = 60 * amount, "s"
        names = {"sec": "s", "second": "s", "seconds": "s", "reward": "rewards"}
        return cls(amount, names.get(unit, unit))  # pyright: ignore[reportArgumentType]

    def spent(self, ledger: Ledger, seconds: float) -> float:
        """How much of this budget's unit a ledger and a clock say was spent."""
        return {"s": seconds, "nfe": float(ledger.evaluations), "rewards": float(ledger.counts["reward"])}[self.unit]

    def __str__(self) -> str:
        return f"{self.amount:g}{self.unit}"
