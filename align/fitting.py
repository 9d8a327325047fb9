"""Whether the parts of a run fit each other; asked before anything is sampled or written."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from rewards import Reward

from .objectives.base import Objective
from .sources import Run, Source

__all__ = ["check_parts", "optimised_reward"]


def optimised_reward(objective: Objective, source: Source) -> Reward | None:
    """What a run raises: the reward that the objective asks itself, or else the one that scores the samples."""
    if source.kind == "rollouts" and not asks_reward(objective):
        return source.reward or objective.reward
    return objective.reward or source.reward


def asks_reward(objective: Objective) -> bool:
    """Whether an objective scores samples itself."""
    return "reward" in inspect.signature(type(objective).__init__).parameters


def check_parts(run: Run, objective: Objective, source: Source, panel: Sequence[Reward]) -> None:
    """Checks source and objective against each other, the policy and the processes.

    Raises:
        ValueError: they do not fit.
    """
    objective.check(run.policy)
    if source.makes not in objective.takes:
        takes = " or ".join(kind.__name__ for kind in objective.takes)
        raise ValueError(
            f"{type(objective).__name__} takes {takes} rows, but {type(source).__name__} makes "
            f"{source.makes.__name__}: choose a source of kind {objective.source!r}, or its evidence"
        )
    if missing := [c for c in objective.needs if c not in source.columns]:
        raise ValueError(
            f"{type(objective).__name__} needs {missing}, which {type(source).__name__} does not make; "
            f"it makes {list(source.columns)}"
        )
    wanted, got = objective.members, source.members
    if wanted != got and not (wanted == 0 and got > 1):
        raise ValueError(
            f"{type(objective).__name__} needs items of {wanted or 'two or more'} rows, "
            f"{type(source).__name__} makes items of {got}: set its pairs"
        )
    speakers = ("policy", "reference", *objective.remembers)
    if source.speaker not in speakers:
        raise ValueError(
            f"{type(objective).__name__} keeps no weights called {source.speaker!r}: the source's speaker may be one of "
            f"{', '.join(speakers)}"
        )
    for reward in (r for r in (objective.reward, *panel) if r is not None):
        if reward.modality != run.policy.modality:
            raise ValueError(f"{reward.name} scores {reward.modality}, but the model makes {run.policy.modality}")
    for reward in (r for r in panel if r.compares):
        raise ValueError(
            f"{reward.name} compares samples of one policy, so it cannot judge a run: take it out of panel"
        )
    if asks_reward(objective) and objective.reward is not None and objective.reward.compares:
        raise ValueError(
            f"{type(objective).__name__} scores a few samples at a time, but {objective.reward.name} compares those of a prompt: "
            "use an objective on Rollouts, or a reward that judges each sample by itself"
        )
    source.check(run)
    objective.check_source(source, source.sampling(run, 0))
