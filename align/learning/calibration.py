"""Scores on a scale: what a head says of many samples, member by member and person by person, has mean 0 and spread 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.base import Features
from rewards.heads import Head, Raw

__all__ = ["Calibration", "calibrate"]

CHUNK = 8192  # samples judged at once


@dataclass(frozen=True)
class Calibration:
    """Mean and spread of scores, (K, 1 + U) each; the first column is the average of all people."""

    mean: Tensor
    std: Tensor

    def __call__(self, raw: Tensor, people: Tensor) -> Tensor:
        """(K, B) calibrated, for people by their numbers, -1 for the average."""
        return (raw - self.mean[:, people + 1]) / self.std[:, people + 1]


def said(head: Head, seen: Features, codes: Tensor, people: Tensor) -> Raw:
    """What a head says of samples for people by their numbers, -1 for the average of all."""
    every = torch.cat([codes.mean(dim=0, keepdim=True), codes]) if head.code else None
    parts = [
        head(Features(seen.joint[rows], seen.prompt[rows]), None if every is None else every[people[rows] + 1])
        for rows in torch.arange(len(people)).split(CHUNK)
    ]
    variances = [p.variance for p in parts if p.variance is not None]
    return Raw(torch.cat([p.mean for p in parts], dim=1), torch.cat(variances, dim=1) if variances else None)


def calibrate(head: Head, seen: Features, codes: Tensor) -> Calibration:
    """Takes mean and spread over samples."""
    columns = []
    for person in range(-1, len(codes) if head.code else 0):
        raw = said(head, seen, codes, torch.full((len(seen.joint),), person)).mean.double()
        columns.append((raw.mean(dim=1), raw.std(dim=1, correction=0).clamp(min=1e-6)))
    mean, std = (torch.stack(column, dim=1).float() for column in zip(*columns, strict=True))
    return Calibration(mean, std)
