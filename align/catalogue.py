"""The rewards there are, and what is known about each: from docstrings, class attributes and the record of what was proven."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import rewards
from rewards import Reward, facts

from .parsing import concrete

__all__ = ["Entry", "catalogue", "table"]

PROOFS = Path(rewards.__file__).with_name("proofs.json")


@dataclass(frozen=True)
class Entry:
    """A reward that can be chosen by name.

    Attributes:
        name: of the class.
        title: what it measures.
        looks_at: the modality.
        reads_prompt: whether the prompt matters.
        range, size, gradient, weights, licence: as in `rewards.facts`; weights and licence may be empty.
        proven: the laws of `rewards/contract.py` that hold on a tiny instance of its real classes.
    """

    name: str
    title: str
    looks_at: str
    reads_prompt: bool
    range: str
    size: str
    gradient: str
    weights: str
    licence: str
    proven: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def catalogue() -> list[Entry]:
    """Every exported reward, by name."""
    proofs = json.loads(PROOFS.read_text())
    entries = []
    for cls in concrete(Reward):
        if cls.__name__ in rewards.__all__:
            known = facts(cls)
            entries.append(
                Entry(
                    cls.__name__,
                    (inspect.getdoc(cls) or "").splitlines()[0],
                    cls.modality,
                    cls.needs_prompt,
                    known["Range"],
                    known["Size"],
                    known["Gradient"],
                    known.get("Weights", ""),
                    known.get("Licence", ""),
                    tuple(proofs.get(cls.__name__, ())),
                )
            )
    return entries


def table() -> str:
    """The catalogue in Markdown."""
    rows = ["| reward | what it measures | gradient | weights and licence |", "|---|---|---|---|"]
    for e in catalogue():
        source = f"{e.weights}; {e.licence}" if e.weights else ""
        cells = (f"`{e.name}`", e.title.rstrip("."), e.gradient, source)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":  # writes the table into the README
    readme = Path("README.md")
    before, _, rest = readme.read_text().partition("<!-- rewards -->\n")
    after = rest.partition("<!-- end of rewards -->")[2]
    readme.write_text(f"{before}<!-- rewards -->\n{table()}\n<!-- end of rewards -->{after}")
