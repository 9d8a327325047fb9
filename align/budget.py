"""One budget for a run: how many particles it pays for, what it will buy, and what was spent.

A budget is for the steered arm of a run, over all its prompts: sampling, and judging by the steering's own rewards. The plain
arm, the panel that scores results, and loading are not charged. Every prompt gets an equal share.

* Within a rollout (best of N, Feynman–Kac, SVDD, guidance) the number of particles is what fits.
* Methods around the loop stop themselves when one more iterate would not fit. They get as many chains as can finish all their
  rounds, and at least one.
* A number of particles that was asked for is kept: the run is refused if the budget cannot pay for it.

In network evaluations or reward calls the plan is exact and the run deterministic. In seconds it rests on measured rates (see
`costs`), which later prompts correct by how long earlier ones took, so the number of particles depends on the machine.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards import Prompt
from samplers import Budget, Cond, Kernel, Ledger, Levels, Outer, Policy, Price, Steering, price
from samplers.budget import WORDS

from .costs import branches, cost_table, measured, seconds_of
from .world import World

__all__ = ["Purse", "opened"]

MOST = (1 << 16) - 1  # particles, by the stride of seeds between prompts
FEW, SMALL = 4, 0.05  # samples in the first timed call; the share of a budget that a call at the real batch may take


@dataclass
class Purse:
    """A budget, and how it is shared out to prompts.

    Attributes:
        budget: of all prompts.
        price: what a prompt's particles cost.
        steering: what is paid for.
        prompts: how many there are.
        rates: seconds of each part; needed where the budget is in seconds.
        asked: the number of particles that was asked for, if any.
        spent: so far, in the budget's unit; what measuring took where that is seconds.

    Raises:
        ValueError: the budget pays for less than a sample a prompt, for less than was asked for, or for nothing there is.
    """

    budget: Budget
    price: Price
    steering: Steering
    prompts: int
    rates: Mapping[str, float] | None = None
    asked: int | None = None
    spent: float = 0.0
    served: int = field(default=0, init=False)
    slower: float = field(default=1.0, init=False)  # than the rates said
    planned: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        if not self.cost(self.steering.least, 2):
            name, unit = type(self.steering).__name__, WORDS[self.budget.unit]
            raise ValueError(
                f"{name} spends no {unit}, so a budget of {self.budget} has nothing to buy: give it in another unit"
            )
        least = self.asked or self.steering.least
        needed = self.prompts * self.cost(least)
        if needed <= self.budget.amount - self.spent:
            self.planned = self.predicted()
            return
        smallest = self._rounded(self.prompts * self.cost(self.steering.least) + self.spent)
        samples = "one sample" if self.steering.least == 1 else f"{self.steering.least} samples that belong together"
        start = f"{type(self.steering).__name__} needs {self._said(self.cost(self.steering.least))} for {samples}"
        start += f", so {self.prompts} prompts need at least {smallest}" if self.prompts > 1 else ""
        if needed > self.prompts * self.cost(self.steering.least) and smallest.amount <= self.budget.amount:
            raise ValueError(
                f"{self.asked} particles need {self._rounded(needed + self.spent)}, more than the budget of {self.budget}: leave "
                f"the number out to take the {self._fitting()} that fit, or raise the budget"
            )
        raise ValueError(
            f"the budget of {self.budget} is less than one sample a prompt: {start}; raise it to {smallest}"
        )

    @property
    def outside(self) -> bool:
        """Whether the steering stops itself."""
        return isinstance(self.steering, Outer)

    @property
    def spends(self) -> bool:
        """Whether its iterates are as large as the budget allows."""
        return isinstance(self.steering, Outer) and self.steering.spends

    def cost(self, particles: int, rounds: float = 1) -> float:
        """What particles of a prompt cost in the budget's unit."""
        counts = self.price.of(particles, rounds if self.outside else 1)
        if self.budget.unit == "s":
            assert self.rates is not None, "seconds are budgeted by measured rates"
            return self.slower * seconds_of(counts, self.rates)
        return counts["reward"] if self.budget.unit == "rewards" else counts["network"] + 2 * counts["gradient"]

    @property
    def share(self) -> float:
        """What each prompt to come may spend: what is left in seconds, its part of the whole in what is exact."""
        if self.budget.unit != "s":
            return self.budget.amount / self.prompts
        return max(0.0, self.budget.amount - self.spent) / max(1, self.prompts - self.served)

    def particles(self) -> int:
        """How many particles the next prompts get."""
        return self.asked or self._fitting()

    def _fitting(self) -> int:
        if self.spends:
            return self.steering.least
        each = self.cost(self.steering.least, self.price.rounds)
        fits = math.floor(self.share / each * (1 + 1e-9))
        return min(max(1, fits) * self.steering.least, MOST - MOST % self.steering.least)

    def allowance(self, prompts: int) -> Budget | None:
        """What the next prompts may spend, for a method that stops itself."""
        return Budget(max(self.share * prompts, 1e-9), self.budget.unit) if self.outside else None

    def pay(self, ledger: Ledger, seconds: float, prompts: int, particles: int) -> None:
        """Books what prompts have cost."""
        took, planned = self.budget.spent(ledger, seconds), prompts * self.cost(particles)
        self.spent, self.served = self.spent + took, self.served + prompts
        if self.budget.unit == "s" and not self.outside:
            self.slower *= took / planned

    def predicted(self) -> dict[str, float]:
        """Counts of the whole run, as planned before it."""
        particles, rounds = self.particles(), self.price.rounds
        more = self.cost(particles, 2) - self.cost(particles)
        if self.outside and more > 0 and (self.spends or self.cost(particles, rounds) > self.share):
            fits = (self.share - self.cost(particles)) / more
            rounds = 1 + (fits if self.spends else math.floor(fits))
        return {on: float(round(self.prompts * n)) for on, n in self.price.of(particles, rounds).items()}

    def table(self, steps: int, branches: int) -> str:
        """What the budget will buy, for people."""
        particles, total = self.particles(), self.planned
        each = {on: n / particles / self.prompts for on, n in total.items()}
        rows = f"{_many(particles, 'chain' if self.outside else 'particle')} × {_many(self.prompts, 'prompt')}"
        summary = f"{rows} × {_many(steps, 'step')} × {_many(branches, 'branch', 'es')}: "
        summary += f"{total['network'] + 2 * total['gradient']:.6g} NFE, {total['decode']:.6g} decodes, "
        summary += f"{total['reward']:.6g} rewards"
        summary += f", ≈ {seconds_of(total, self.rates):.1f} s" if self.rates else ""
        heading = f"a budget of {self.budget} for {type(self.steering).__name__}"
        return f"{heading}\n{cost_table(each, total, self.rates)}\n{summary}"

    def as_dict(self, world: World) -> dict[str, Any]:
        """For result files: the budget, what all processes spent of it, and what was planned."""
        spent = [each for part in world.objects([[self.spent]]) for each in part]
        names = {
            "network_evaluations": "network",
            "decodes": "decode",
            "reward_calls": "reward",
            "gradients": "gradient",
        }
        predicted: dict[str, Any] = {name: self.planned[on] for name, on in names.items()}
        if self.rates:
            predicted |= {"seconds": seconds_of(self.planned, self.rates), "seconds_each": dict(self.rates)}
        total = max(spent) if self.budget.unit == "s" else sum(spent)
        return {"amount": self.budget.amount, "unit": self.budget.unit, "spent": total, "predicted": predicted}

    def _said(self, amount: float) -> str:
        return f"{amount:.3g} seconds" if self.budget.unit == "s" else f"{amount:g} {WORDS[self.budget.unit]}"

    def _rounded(self, amount: float) -> Budget:
        """The smallest budget one would write down that is no less."""
        if self.budget.unit != "s":
            return Budget(math.ceil(amount - 1e-9), self.budget.unit)
        scale = 10 ** (math.floor(math.log10(amount)) - 1)
        return Budget(math.ceil(amount * 1.2 / scale) * scale, "s")  # measuring again will not take just as long


def _many(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{plural if count != 1 else ''}"


def opened(
    budget: Budget,
    steering: Steering,
    policy: Policy,
    kernel: Kernel,
    levels: Levels,
    cond: Cond,
    shape: Sequence[int],
    prompts: Sequence[Prompt],
    asked: int | None,
    batch: int,
    show: bool,
) -> Purse:
    """Prices a steering, times its parts where that is of use, and opens a purse.

    The parts are called once with a single sample, which warms everything up, then with a few, then at the batch that will be
    used, unless that call alone would take more than a twentieth of the budget.

    Args:
        cond: of the first prompt.
        shape: of one latent.
        asked: the number of particles that was asked for.
        batch: samples in flight at a time.
        show: print what the budget will buy, on standard error.

    Raises:
        ValueError: as in `Purse`; before anything but the timed calls has run.
    """
    began = time.perf_counter()
    cost = price(steering, policy, kernel, levels, cond, steering.least, shape)
    what = (budget, cost, steering, len(prompts))
    if budget.unit != "s":
        Purse(*what, asked=asked)  # raises before the network runs
        if not show:
            return Purse(*what, asked=asked)

    def time_of(rows: int) -> dict[str, float]:
        differentiates = cost.first["gradient"] + cost.then["gradient"] > 0
        return measured(policy, cond, levels, shape, prompts[0], steering.rewards(), rows, differentiates)

    time_of(1)
    rates = time_of(min(FEW, batch))
    if budget.unit == "s":
        purse = Purse(*what, rates, asked, time.perf_counter() - began)
        rows = min(max(batch, purse.particles()), purse.particles() * len(prompts))
        if rows > FEW and seconds_of(dict.fromkeys(rates, rows * branches(cond)), rates) < SMALL * budget.amount:
            rates = time_of(rows)
    purse = Purse(*what, rates, asked, (time.perf_counter() - began) if budget.unit == "s" else 0.0)
    if show:
        print(purse.table(levels.steps, branches(cond)), file=sys.stderr)
    return purse
