"""Guards against over-optimisation: which evaluation is best, and when an optimised reward no longer means anything.

The held-out reward is the gold reward where there is one, else the first reward of the panel that is not optimised, else the
optimised reward on held-out prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from .evaluation import Evaluation, paired_gain

__all__ = ["best", "hacked", "held_out"]

SURE = 2.0  # standard errors


def held_out(optimised: str | None, panel: Sequence[str]) -> str:
    """The name of the reward that judges the run.

    Raises:
        ValueError: there is no reward at all.
    """
    if not panel:
        raise ValueError("no reward can judge this run: name some in panel, such as panel: [CLIPScore]")
    if "gold" in panel:
        return "gold"
    others = [name for name in panel if name != optimised]
    return (others or list(panel))[0]


def best(evaluations: Sequence[tuple[int, Evaluation]], judge: str) -> int:
    """The update with the highest mean held-out reward; the later one of equals."""
    means = [(float(e.scores[judge].nanmean()), update) for update, e in evaluations]
    return max((m, u) for m, u in means if m == m)[1] if any(m == m for m, _ in means) else evaluations[-1][0]


def hacked(evaluations: Sequence[tuple[int, Evaluation]], optimised: str | None, judge: str, samples: int) -> int:
    """How many of the latest evaluations in a row show the optimised reward above, and the held-out reward below, the best
    evaluation before them by more than two paired standard errors."""
    if optimised is None or optimised == judge or len(evaluations) < 2:
        return 0
    count = 0
    for i in range(len(evaluations) - 1, 0, -1):
        known = dict(evaluations[:i])
        before, after = known[best(evaluations[:i], judge)], evaluations[i][1]
        up, up_error = paired_gain(before.scores[optimised], after.scores[optimised], samples)
        down, down_error = paired_gain(before.scores[judge], after.scores[judge], samples)
        if not (up > SURE * up_error and down < -SURE * down_error):
            break
        count += 1
    return count
