"""Products; the older combinations are in `core.py`."""

from __future__ import annotations

import rewards
from tests.rewards.cases import Case

CASES: dict[str, Case] = {
    "Product": Case(
        lambda r: rewards.Product([rewards.CLIPScore(r.getfixturevalue("clip_folder"), "cosine"), rewards.Brightness()])
    ),
}
