"""The rewards and model families there are, and what is known about each: from docstrings, class attributes and the records of what
was proven."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import rewards
import samplers
from rewards import Reward, facts
from samplers.families import FAMILIES

from .conformance import LAWS
from .parsing import concrete

__all__ = ["Entry", "Family", "catalogue", "families", "family_table", "table"]

PROOFS = Path(rewards.__file__).with_name("proofs.json")
FAMILY_PROOFS = Path(samplers.__file__).with_name("proofs.json")


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


@dataclass(frozen=True)
class Family:
    """A file of `samplers/families`.

    Attributes:
        title: what it is.
        pipelines: the classes of diffusers whose models it drives.
        kinds: of its models, tiny random instances of which were proven.
        proven: the laws of `align/conformance` that hold on all of them.
        sources: arXiv numbers.
    """

    title: str
    pipelines: tuple[str, ...]
    kinds: tuple[str, ...]
    proven: tuple[str, ...]
    sources: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def families() -> list[Family]:
    """Every family, in the order of `FAMILIES`."""
    proofs, found = json.loads(FAMILY_PROOFS.read_text()), []
    for name in dict.fromkeys(adapter.partition(":")[0] for adapter in FAMILIES.values()):
        said = inspect.getdoc(import_module(name)) or ""
        pipelines = tuple(p for p, adapter in FAMILIES.items() if adapter.partition(":")[0] == name)
        kinds = {kind: laws for p in pipelines for kind, laws in proofs.get(p, {}).items()}
        proven = tuple(law for law in LAWS if kinds and all(law in laws for laws in kinds.values()))
        sources = tuple(dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", said)))
        found.append(Family(" ".join(said.partition("\n\n")[0].split()), pipelines, tuple(kinds), proven, sources))
    return found


def table() -> str:
    """The catalogue in Markdown."""
    rows = []
    for e in catalogue():
        source = f"{e.weights}; {e.licence}" if e.weights else ""
        rows.append((f"`{e.name}`", e.title.rstrip("."), e.gradient, source))
    return _markdown(("reward", "what it measures", "gradient", "weights and licence"), rows)


def family_table() -> str:
    """The families in Markdown."""
    rows = []
    for f in families():
        missing = [law for law in LAWS if law not in f.proven]
        laws = f"{len(f.proven)} of {len(LAWS)}, not {', '.join(missing)}" if missing else f"all {len(LAWS)}"
        pipelines = ", ".join(f"`{p}`" for p in f.pipelines)
        rows.append((f.title.rstrip("."), pipelines, f"{laws}: {'; '.join(f.kinds)}", ", ".join(f.sources)))
    return _markdown(("family", "pipelines", "laws proven, and on which kinds", "sources"), rows)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _written(text: str, mark: str, content: str) -> str:
    """A text with new content between its marks; without them as it is."""
    before, found, rest = text.partition(f"<!-- {mark} -->\n")
    after = rest.partition(f"<!-- end of {mark} -->")[2]
    return f"{before}{found}{content}\n<!-- end of {mark} -->{after}" if found else text


if __name__ == "__main__":  # writes the tables into the README
    readme = Path("README.md")
    readme.write_text(_written(_written(readme.read_text(), "rewards", table()), "families", family_table()))
