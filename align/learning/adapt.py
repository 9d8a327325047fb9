"""`adapt_reward`: people a learned reward does not know yet, from a few pairs each has judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rewards import Reward
from rewards.learned import Learned, write_learned

from ..data import Columns, read_feedback
from ..results import prepare_folder
from .calibration import calibrate
from .data import compare
from .encodings import encode

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

    Their scores are standardised over samples kept from training.

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
    data = compare(read_feedback(preferences, "preferences", columns=columns).records)
    new = [(row, name) for row, name in enumerate(data.users) if name not in learned.users]
    decided = (~data.tied).nonzero()[:, 0]
    judge = data.user[data.pair[decided]]
    new = [(row, name) for row, name in new if bool((judge == row).any())]
    if not new:
        raise ValueError(f"nobody in {preferences} is new to {model} and has decided a pair")
    encodings = encode(learned.encoder.to(device or "cpu"), data.samples, progress=progress)
    codes = []
    for row, _ in new:
        mine = decided[judge == row]
        better, worse = (encodings(data.rows[side[mine]]) for side in (data.first, data.second))
        codes.append(learned.head.infer(better, worse, learned.codes))
    added = torch.stack(codes)
    with torch.no_grad():
        theirs = calibrate(learned.head, learned.reference, added)
    config: dict[str, Any] = {k: v for k, v in learned.config.items() if k != "format"}
    config["users"] = [*learned.users, *(name for _, name in new)]
    for name, values in (("mean", theirs.mean), ("std", theirs.std)):
        config[name] = torch.cat([getattr(learned, name), values[:, 1:]], dim=1).tolist()
    folder = prepare_folder(out, overwrite)
    write_learned(folder, config, learned.head, learned.encoder, torch.cat([learned.codes, added]), learned.reference)
    return folder
