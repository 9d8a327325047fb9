"""The people whose preferences are learned: what stands for them while a head is trained, and when it is."""

from __future__ import annotations

import torch
from torch import Tensor

from rewards.base import Features
from rewards.heads import VPL, Head
from samplers.noise import mix

from .data import Comparisons
from .encodings import Encodings

__all__ = ["Alike", "Inferred", "People", "Table", "check_people", "people_of"]

READ = 512  # pairs from which a person is read in the end
CONTEXT, NOISE = 11, 12  # what random streams are mixed for


class People:
    """Who judges. This one makes no difference between people."""

    parameters: tuple[Tensor, ...] = ()

    def codes(self, batch: Comparisons, step: int) -> tuple[Tensor | None, Tensor | float]:
        """(R, code) of whoever judged each row, and what to add to the loss."""
        return None, 0.0

    def final(self) -> Tensor:
        """(U, code) of all people, without chance."""
        return torch.empty(0, 0)


class Alike(People):
    """One taste for all."""


class Table(People):
    """A learned code a person, for PAL; its beginning is standard normal, as published."""

    def __init__(self, head: Head, users: int, seed: int) -> None:
        self.table = torch.randn(users, head.code, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        self.parameters = (self.table,)

    def codes(self, batch: Comparisons, step: int) -> tuple[Tensor | None, Tensor | float]:
        return self.table[batch.people], 0.0

    def final(self) -> Tensor:
        return self.table.detach().clone()


class Inferred(People):
    """Codes read from the pairs a person has judged, for VPL: a few of them at a step, most of them in the end."""

    def __init__(self, head: VPL, data: Comparisons, encodings: Encodings, seed: int) -> None:
        self.head, self.encodings, self.seed = head, encodings, seed
        decided = (~data.tied).nonzero()[:, 0]
        judge = data.user[data.pair[decided]]
        self.pairs = [
            torch.stack([data.rows[data.first[mine]], data.rows[data.second[mine]]], dim=1)
            for mine in (decided[judge == user] for user in range(len(data.users)))
        ]  # a person's pairs as samples (C, 2), the better first

    def codes(self, batch: Comparisons, step: int) -> tuple[Tensor | None, Tensor | float]:
        present, where = batch.people.unique(return_inverse=True)
        draw = torch.Generator().manual_seed(mix(self.seed, CONTEXT, step))
        read = [self.pairs[user] for user in present.tolist()]
        drawn = torch.stack([p[torch.randint(len(p), (self.head.context,), generator=draw)] for p in read])  # (U, C, 2)
        seen = self.head.standard(self.encodings(drawn.flatten()))[0].unflatten(0, drawn.shape)
        mean, log_variance = self.head.posterior(seen[:, :, 0], seen[:, :, 1])
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(mix(self.seed, NOISE, step)))
        z = self.head.drawn(mean, log_variance, noise)
        return z[where], self.head.divergence(mean, log_variance, step)

    def final(self) -> Tensor:
        known = torch.empty(0, self.head.code)
        return torch.stack([self.head.infer(*self._seen(p[:READ]), known) for p in self.pairs])

    def _seen(self, pairs: Tensor) -> tuple[Features, Features]:
        with torch.no_grad():
            return self.encodings(pairs[:, 0]), self.encodings(pairs[:, 1])


def check_people(head: Head, data: Comparisons) -> None:
    """Raises unless everyone can be learned whom a head tells apart.

    Raises:
        ValueError: records name nobody, or somebody has no pair to be known by.
    """
    if not head.code:
        return
    kind = type(head).__name__
    if nameless := int((data.user < 0).sum()):
        raise ValueError(
            f'{kind} learns what each person likes, but {nameless} of {len(data)} records have no "annotator"'
        )
    told = data.user[data.pair[~data.tied]].unique()
    if silent := sorted(set(range(len(data.users))) - set(told.tolist())):
        names = ", ".join(data.users[user] for user in silent[:8])
        raise ValueError(
            f"{len(silent)} people have decided no pair that is not held out, such as {names}: leave them out"
        )


def people_of(head: Head, data: Comparisons, encodings: Encodings, seed: int) -> People:
    """The people a head needs."""
    if not head.code:
        return Alike()
    return Inferred(head, data, encodings, seed) if isinstance(head, VPL) else Table(head, len(data.users), seed)
