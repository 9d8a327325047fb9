"""GenEval over a random Mask2Former, with clauses about what that finds."""

from __future__ import annotations

import pytest

import rewards
from rewards import Prompt, Reward
from tests.rewards.cases import Case
from tests.rewards.tiny_geneval import save_mask2former


def geneval(request: pytest.FixtureRequest) -> Reward:
    folder = save_mask2former(request.getfixturevalue("tmp_path"))
    return rewards.GenEval("dense", str(folder), request.getfixturevalue("clip_folder"), short=64)


def prompt(*clauses: dict) -> Prompt:
    names = " and ".join(f"{clause['count']} {clause['class']}" for clause in clauses)
    return Prompt(f"a photo of {names}", meta={"tag": "two_object", "include": list(clauses)})


CASES = {
    "GenEval": Case(
        geneval,
        (
            prompt({"class": "frisbee", "count": 4}, {"class": "bus", "count": 1, "color": "red"}),
            prompt({"class": "zebra", "count": 6}),
            prompt({"class": "tv remote", "count": 2}, {"class": "zebra", "count": 2, "position": ["left of", 0]}),
            prompt({"class": "frisbee", "count": 5}),
        ),
        size=None,
        rounding=None,
    )
}
