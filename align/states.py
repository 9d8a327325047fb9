"""Noisy states and the reward of the sample each belongs to: what values are learned from.

    path        states along the policy's own trajectories: E[· | x_t] is that of the sampler itself, at its kernel and steps
    diffused    its samples, or images people have compared, noised to any level; what is compared shares its noise and level, as in
                Flow-NRG (2501.13918)

A row of `States` is a sample, a column a level of noise, or a narrow band of them. Only what the early layers see of a state is
kept, so that each state passes them once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from rewards import Prompt, Reward
from rewards.files import whole
from samplers import Levels, Policy, SeededNoise, diffuse
from samplers.values import features

from .given import Encoded
from .learning.data import compare
from .rows import Record
from .sampling import Sampling, seed_of

__all__ = ["Kind", "States", "StatesOf"]

Kind = Literal["path", "diffused"]
SAMPLE, NOISE, LEVEL = 1, 2, 3  # what seeds are mixed for
COMPARED = 32  # samples of a prompt that are compared with one another
ESTIMATED = 8  # columns whose clean estimates are judged, for comparison


@dataclass(frozen=True)
class States:
    """N samples, at S levels each.

    Attributes:
        seen: (N, S, D) features.
        noise: (N, S) σ/(α + σ), from 1 for noise to 0 for data.
        estimate: (N, S) the reward of the decoded clean estimate, NaN where it was not asked.
        reward: (N,) of the samples; NaN where they were only compared, or could not be judged.
        prompt: (N,) which prompt each is of.
        pairs: (M, 2) samples of one prompt that were compared, the better first.
    """

    seen: Tensor
    noise: Tensor
    estimate: Tensor
    reward: Tensor
    prompt: Tensor
    pairs: Tensor

    def take(self, kept: Tensor) -> States:
        """Some of the samples, and the pairs among them."""
        new = torch.full((len(self.seen),), -1)
        new[kept] = torch.arange(len(kept))
        pairs = new[self.pairs]
        rows = (self.seen[kept], self.noise[kept], self.estimate[kept], self.reward[kept], self.prompt[kept])
        return States(*rows, pairs[(pairs >= 0).all(1)])


class StatesOf:
    """Makes states.

    Args:
        layers: of the network, that are read.
        reward: judges samples; None where they were compared.
        sampling: how samples are made.
        kind: which states.
        levels: S, states a sample, at most; of a path no more than its steps.
        seed: of samples, noise and levels.
    """

    def __init__(
        self,
        policy: Policy,
        layers: Sequence[str],
        reward: Reward | None,
        sampling: Sampling,
        kind: Kind,
        levels: int,
        seed: int,
    ) -> None:
        self.policy, self.layers, self.reward, self.sampling = policy, layers, reward, sampling
        self.kind, self.seed = kind, seed
        self.levels = min(levels, sampling.levels.steps) if kind == "path" else levels

    def sampled(
        self, prompts: Sequence[Prompt], samples: int, judged: set[int], file: Path | None, progress: bool
    ) -> States:
        """States of the policy's own samples, row by row of one prompt after the other; pairs by the reward.

        Args:
            judged: rows whose clean estimates are judged too.
            file: where to save now and then, and go on from if it is there.
        """
        rows = [(p, k) for p in range(len(prompts)) for k in range(samples)]
        parts: list[tuple[Tensor, ...]] = []
        if file is not None and file.is_file():
            parts = torch.load(file, weights_only=True)
        done, last = sum(len(part[0]) for part in parts), time.monotonic()
        with tqdm(total=len(rows), initial=done, desc="sampling", unit="sample", disable=not progress) as bar:
            while done < len(rows):
                chunk = rows[done : done + self.sampling.rows]
                parts.append(self._chunk(prompts, chunk, [done + i in judged for i in range(len(chunk))]))
                done += len(chunk)
                bar.update(len(chunk))
                if file is not None and (done == len(rows) or time.monotonic() - last > 30):
                    whole(file, lambda path: torch.save(parts, path), durable=False)
                    last = time.monotonic()
        seen, noise, estimate, reward = (torch.cat(column) for column in zip(*parts, strict=True))
        pairs = torch.combinations(torch.arange(min(samples, COMPARED)))
        pairs = (pairs + samples * torch.arange(len(prompts))[:, None, None]).flatten(0, 1)
        first, second = reward[pairs].T
        pairs = torch.where((first > second)[:, None], pairs, pairs.flip(1))[(first - second).abs() > 0]
        return States(seen, noise, estimate, reward, torch.tensor([p for p, _ in rows]), pairs)

    def compared(self, records: Sequence[Record], progress: bool) -> States:
        """States of images that people have compared, noised."""
        data, encoded = compare(records), Encoded()
        samples = data.samples
        numbers: dict[Prompt, int] = {}
        prompt = torch.tensor([numbers.setdefault(side.prompt, len(numbers)) for side in samples])
        parts = []
        for rows in tqdm(torch.arange(len(samples)).split(self.sampling.rows), "encoding", disable=not progress):
            sides = [samples[i] for i in rows.tolist()]
            x0 = encoded(self.policy, [side.media for side in sides], self.sampling.size)
            parts.append(self._looked(x0, [side.prompt for side in sides], *self._diffused(x0, prompt[rows].tolist())))
        seen, noise = (torch.cat(column) for column in zip(*parts, strict=True))
        pairs = torch.stack([data.rows[data.first], data.rows[data.second]], 1)[~data.tied]
        unknown = torch.full(noise.shape, torch.nan)
        return States(seen, noise, unknown, unknown[:, 0], prompt, pairs)

    def _chunk(
        self, prompts: Sequence[Prompt], chunk: Sequence[tuple[int, int]], judged: Sequence[bool]
    ) -> tuple[Tensor, ...]:
        """Features, noise, judged clean estimates, and rewards of some samples."""
        assert self.reward is not None
        told = [prompts[p] for p, _ in chunk]
        seeds = [seed_of(self.seed, SAMPLE, p, k) for p, k in chunk]
        path = self.kind == "path"
        ended = self.sampling.roll(self.policy, told, seeds, record="path" if path else "final")
        with torch.no_grad():
            reward = self.reward(self.policy.decode(ended.x0), told).cpu()
        if path:
            columns = torch.linspace(0, ended.levels.steps - 1, self.levels).round().long()
            assert ended.latents is not None
            x = ended.latents[:, columns.to(ended.latents.device)]
            at = ended.levels[columns.repeat(len(chunk))]
        else:
            x, at = self._diffused(ended.x0, [p for p, _ in chunk])
        seen, noise = self._looked(ended.x0, told, x, at)
        return seen, noise, self._estimates(told, x, at, torch.tensor(judged)), reward

    def _diffused(self, x0: Tensor, prompt: Sequence[int]) -> tuple[Tensor, Levels]:
        """(B, S, …) samples noised to S bands of levels, and the level of each; one prompt has one noise and level a band."""
        u = torch.stack(
            [
                torch.rand(self.levels, generator=torch.Generator().manual_seed(seed_of(self.seed, LEVEL, p)))
                for p in prompt
            ]
        )
        at = self.policy.training_levels(((torch.arange(self.levels).flip(0) + u) / self.levels).flatten())
        noise = SeededNoise([seed_of(self.seed, NOISE, p) for p in prompt], x0.shape[1:], device=x0.device)
        eps = torch.stack([noise(s) for s in range(self.levels)], 1)
        clean = x0[:, None].expand_as(eps)
        return diffuse(clean.flatten(0, 1), eps.flatten(0, 1).to(x0), at).unflatten(0, clean.shape[:2]), at

    def _looked(self, x0: Tensor, prompts: Sequence[Prompt], x: Tensor, at: Levels) -> tuple[Tensor, Tensor]:
        """(B, S, D) features on the CPU, and (B, S) noise."""
        cond = self.sampling.cond(self.policy, prompts)
        flat = x.flatten(0, 1).to(self.policy.device, self.policy.dtype if x.is_floating_point() else x.dtype)
        with torch.no_grad():
            seen = [
                features(self.policy, self.layers, flat[rows], at[rows], cond[rows // self.levels]).cpu()
                for rows in torch.arange(len(flat)).split(self.sampling.rows)
            ]
        noise = (at.sigma / (at.alpha + at.sigma)).float()
        return torch.cat(seen).unflatten(0, (len(x0), self.levels)), noise.unflatten(0, (len(x0), self.levels))

    def _estimates(self, prompts: Sequence[Prompt], x: Tensor, at: Levels, judged: Tensor) -> Tensor:
        """(B, S) the reward of decoded clean estimates, of the rows and columns where they are asked; NaN elsewhere."""
        estimate = torch.full((len(x), self.levels), torch.nan)
        columns = torch.linspace(0, self.levels - 1, min(ESTIMATED, self.levels)).round().long()
        asked = (judged.nonzero() * self.levels + columns).flatten()
        if not len(asked):
            return estimate
        cond, flat = self.sampling.cond(self.policy, prompts), x.flatten(0, 1)
        assert self.reward is not None
        with torch.no_grad():
            for rows in asked.split(self.sampling.rows):
                of = rows // self.levels
                clean = self.policy.denoise(flat[rows].to(self.policy.dtype), at[rows], cond[of])
                scores = self.reward(self.policy.preview(clean.x0), [prompts[i] for i in of.tolist()])
                estimate.view(-1)[rows] = scores.cpu()
        return estimate
