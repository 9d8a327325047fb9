"""Consistency and actions on tiny networks."""

from __future__ import annotations

import rewards
from tests.rewards import tiny_frames
from tests.rewards.cases import Case
from tests.rewards.cases.core import folder
from tests.rewards.cases.motion import drifting

ACTIONS = ("abseiling", "zumba", "juggling balls", "yoga")

CASES: dict[str, Case] = {
    "Action": Case(
        lambda r: rewards.Action(str(tiny_frames.save_videomae(r.getfixturevalue("tmp_path")))), ACTIONS, drifting
    ),
    "BackgroundConsistency": Case(
        lambda r: rewards.BackgroundConsistency(folder("clip_folder")(r)), media=drifting, size=None, rounding=0.5
    ),
    "SubjectConsistency": Case(
        lambda r: rewards.SubjectConsistency(str(tiny_frames.save_dino(r.getfixturevalue("tmp_path")))),
        media=drifting,
        size=None,
        rounding=0.5,
    ),
}
