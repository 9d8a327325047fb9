"""`adapt_reward`: people a learned reward does not know yet, from a few pairs each has judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards import Reward
from rewards.learned import Learned, write_learned

from ..data import Columns, read_feedback
from ..results import prepare_folder
from .calibration import calibrate
from .data import Comparisons, compare
from .encodings import Cached, encode

__all__ = ["adapt_reward"]


def adapt_reward(
    model: str | Path,
    preferences: str | Path,
    *,
    out: str | Path | None = None,
    columns: Columns | None = None,
    encoder: Reward | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Adds everyone in a file of preferences whom a learned reward does not know; its weights stay as they are.

    Their scores, and those for the average of all people, of whom they are now some, are standardised over samples kept from
    training.

    Args:
        model: the folder of a reward whose head tells people apart.
        preferences: pairs they have judged; each record names its "annotator". Ties say nothing.
        out: the folder to write; the next free runs/NNN by default. It may be `model` itself with `overwrite`.
        columns: of parquet.
        encoder: in place of the recorded one.
        device: of the encoder; the CPU by default.

    Returns:
        The folder.

    Raises:
        ValueError: the reward scores alike for everyone, or there is nobody new who has decided a pair.
    """
    learned = Learned(str(model), encoder=encoder)
    if not learned.head.code:
        raise ValueError(f"{model} scores alike for everyone: only rewards with a head PAL or VPL take people in")
    records = read_feedback(preferences, "preferences", columns=columns).records
    records = [r for r in records if r.annotator is not None and r.annotator not in learned.users]
    data = compare(records) if records else None
    new = [] if data is None else data.user[data.pair[~data.tied]].unique().tolist()
    if data is None or not new:
        raise ValueError(f"nobody in {preferences} is new to {model} and has decided a pair")
    folder = prepare_folder(out, overwrite)
    encodings = encode(learned.encoder.to(device or "cpu"), data.samples, progress=progress)
    added = torch.stack([_code(learned, data, encodings, person) for person in new])
    codes = torch.cat([learned.codes, added])
    with torch.no_grad():
        now = calibrate(learned.head, learned.reference, codes)
    config: dict[str, Any] = {k: v for k, v in learned.config.items() if k != "format"}
    config["users"] = [*learned.users, *(data.users[person] for person in new)]
    for name, values in (("mean", now.mean), ("std", now.std)):  # those who were known stay as they are
        values[:, 1 : 1 + len(learned.codes)] = getattr(learned, name)[:, 1:]
        config[name] = values.tolist()
    write_learned(folder, config, learned.head, learned.encoder, codes, learned.reference)
    return folder


def _code(learned: Learned, data: Comparisons, encodings: Cached, person: int) -> Tensor:
    """What stands for a person, from the pairs they have decided."""
    mine = (~data.tied & (data.user[data.pair] == person)).nonzero()[:, 0]
    better, worse = (encodings(data.rows[side[mine]]) for side in (data.first, data.second))
    return learned.head.infer(better, worse, learned.codes)
