"""A reward kept on a device."""

from __future__ import annotations

import rewards
from tests.rewards.cases import Case

CASES = {"Placed": Case(lambda _: rewards.Placed(rewards.Brightness(), "cpu"))}
