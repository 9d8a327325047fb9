"""A small world of known tastes, and the embedded CLIP to see it by."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import tastes
from rewards import CLIPScore

ROOT = Path(__file__).resolve().parents[3]
PEOPLE = {f"{taste}-{i}": taste for i in range(6) for taste in tastes.TASTES}


@dataclasses.dataclass(frozen=True)
class World:
    """Files of preferences on training and on held-out prompts, and who judged."""

    folder: Path
    made: dict[tuple[str, str], list[str]]
    train: Path
    held: Path

    @property
    def cache(self) -> Path:
        """Where encodings are kept."""
        return self.folder / "cache"

    @property
    def judged(self) -> list[tuple[str, str, str]]:
        """(taste, colour, colour) of the pairs held out."""
        return [(PEOPLE[who], a, b) for who, a, b in tastes.asked(self.held)]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("tastes")
    made = tastes.pictures(folder, variants=1)
    train = tastes.judged(folder, "train.jsonl", PEOPLE, 160, made, tastes.PREFIXES[:3], ("a",), seed=1)
    held = tastes.judged(folder, "held.jsonl", PEOPLE, 60, made, tastes.PREFIXES[3:4], ("a",), seed=2)
    return World(folder, made, train, held)


@pytest.fixture(scope="session")
def clip() -> CLIPScore:
    return CLIPScore(str(ROOT / "assets" / "tiny-clip"))
