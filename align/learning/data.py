"""Preferences as tensors: which sample stands where in which answer.

A record (one answer of one person about two or more samples of one prompt) has a row a sample. Losses read

    pairs     (first, second), the better first, and whether they tie                 Bradley–Terry and its kin
    places    of each row in its record, 0 the best; equal places are ties            Plackett–Luce

A winner among three or more says nothing about the others: they form no pair, and only the first stage of the ranking counts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewards import Prompt

from ..pairs import Side
from ..rows import Record

__all__ = ["Comparisons", "compare", "digest", "split"]


@dataclass(frozen=True)
class Comparisons:
    """L records of R rows and P pairs, over samples and people that other `Comparisons` may share.

    Attributes:
        samples: what rows point to.
        users: the people records point to, by name.
        rows: (R,) the sample of each row, record by record.
        record: (R,) the record of each row.
        place: (R,) its place in the record, 0 the best.
        staged: (R,) whether its stage of the ranking says something.
        first, second: (P,) rows of the pairs, the better first.
        tied: (P,) whether neither is better.
        margin: (P,) by how much the first leads by other criteria; 0 where the record says nothing.
        pair: (P,) the record of each pair.
        weight, prompt, user: (L,) of the records; user is -1 where nobody is named.
    """

    samples: Sequence[Side]
    users: Sequence[str]
    rows: Tensor
    record: Tensor
    place: Tensor
    staged: Tensor
    first: Tensor
    second: Tensor
    tied: Tensor
    margin: Tensor
    pair: Tensor
    weight: Tensor
    prompt: Tensor
    user: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def people(self) -> Tensor:
        """(R,) who judged each row."""
        return self.user[self.record]

    def take(self, records: Tensor) -> Comparisons:
        """Some of the records, in the order given."""
        new = torch.full((len(self),), -1)
        new[records] = torch.arange(len(records))

        def within(of: Tensor) -> Tensor:
            """Indices of rows or pairs whose record was taken, in its new order."""
            kept = (new[of] >= 0).nonzero()[:, 0]
            return kept[new[of[kept]].argsort(stable=True)]

        rows, pairs = within(self.record), within(self.pair)
        at = torch.full((len(self.rows),), -1)
        at[rows] = torch.arange(len(rows))
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in ("rows", "place", "staged")},
            **{name: getattr(self, name)[pairs] for name in ("tied", "margin")},
            **{name: getattr(self, name)[records] for name in ("weight", "prompt", "user")},
            record=new[self.record[rows]],
            first=at[self.first[pairs]],
            second=at[self.second[pairs]],
            pair=new[self.pair[pairs]],
        )

    def of_prompts(self, prompts: Tensor) -> Comparisons:
        """All records of some prompts."""
        return self.take(torch.isin(self.prompt, prompts).nonzero()[:, 0])


def compare(records: Sequence[Record]) -> Comparisons:
    """Reads preferences.

    Raises:
        ValueError: a record has no images.
    """
    samples: dict[tuple[str, Prompt], int] = {}
    listed: list[Side] = []
    prompts: dict[Prompt, int] = {}
    users: dict[str, int] = {}
    per_row: list[tuple[int, int, int, bool]] = []
    per_pair: list[tuple[int, int, bool, float, int]] = []
    per_record: list[tuple[float, int, int]] = []
    for number, record in enumerate(records):
        if not record.images:
            raise ValueError(f"line {record.line} has no images: rewards are learned from what people saw")
        start = len(per_row)
        levels = sorted(set(record.quality), reverse=True)
        for media, quality in zip(record.images, record.quality, strict=True):
            key = (media.key, record.prompt)
            if samples.setdefault(key, len(listed)) == len(listed):
                listed.append(Side(record.prompt, media))
            per_row.append((samples[key], number, levels.index(quality), quality > levels[-1]))
        for i, j in record.pairs():
            lead = record.margin[i] - record.margin[j] if record.margin else 0.0
            per_pair.append((start + i, start + j, record.tied(i, j), lead, number))
        user = -1 if record.annotator is None else users.setdefault(record.annotator, len(users))
        per_record.append((record.weight, prompts.setdefault(record.prompt, len(prompts)), user))
    columns = [torch.tensor(column) for table in (per_row, per_pair, per_record) for column in zip(*table, strict=True)]
    rows, record, place, staged, first, second, tied, margin, pair, weight, prompt, user = columns
    return Comparisons(
        listed, list(users), rows, record, place, staged, first, second, tied, margin, pair, weight, prompt, user
    )


def split(data: Comparisons, share: float, seed: int) -> tuple[Comparisons, Comparisons]:
    """Records to learn from and records held out, such that no prompt is in both.

    Raises:
        ValueError: there are too few prompts.
    """
    prompts = data.prompt.unique()
    held = math.ceil(share * len(prompts))
    if not 0 < held < len(prompts):
        raise ValueError(
            f"a share of {share} of {len(prompts)} prompts cannot be held out: pass a file of preferences on others as heldout"
        )
    order = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))]
    return data.of_prompts(order[held:]), data.of_prompts(order[:held])


def digest(records: Sequence[Record]) -> str:
    """SHA-256 of what was judged and how, wherever the files lie."""
    total = hashlib.sha256()
    for r in records:
        images = [media.digest for media in r.images]
        total.update(repr((r.prompt.text, images, r.quality, r.annotator, r.weight, r.margin)).encode())
    return total.hexdigest()
