"""The rewards a run is watched by."""

from __future__ import annotations

from collections.abc import Sequence

from rewards import Prompt, Reward, Shapes
from rewards.shapes import parse
from samplers import Policy

__all__ = ["gold_of", "panel_of"]


def gold_of(policy: Policy, prompts: Sequence[Prompt]) -> Reward | None:
    """The exact detector of the model's world, if it has one that understands every prompt."""
    if policy.world != "shapes":
        return None
    try:
        for prompt in prompts:
            parse(prompt.text)
    except ValueError:
        return None
    return Shapes()


def panel_of(rewards: Sequence[Reward | None], gold: Reward | None) -> dict[str, Reward]:
    """Rewards by name, each once, names made distinct; the gold reward last and called "gold"."""
    panel: dict[str, Reward] = {}
    for reward in {id(r): r for r in rewards if r is not None}.values():
        name, n = reward.name, 2
        while name in panel:
            name, n = f"{reward.name}-{n}", n + 1
        panel[name] = reward
    return panel if gold is None else {**panel, "gold": gold}
