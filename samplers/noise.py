"""Noise is an argument: the loop never draws it.

A `Noise` answers `noise(i)`: 0 is the initial latent, i ≥ 1 drives the i-th step (the one from level i − 1 to level i). It is
a function of i: asking twice gives the same tensor, so that a step can be checkpointed, replayed or resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["Noise", "NoiseBank", "SeededNoise", "onward", "side_generator", "side_noise"]

Noise = Callable[[int], Tensor]
_MASK = (1 << 64) - 1


def mix(seed: int, *keys: int) -> int:
    """A 63-bit seed from a seed and keys (SplitMix64's finaliser), so that streams do not overlap."""
    state = seed & _MASK
    for key in keys:
        state = (state + 0x9E3779B97F4A7C15 * (key + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class SeededNoise:
    """Standard normal noise with one stream a row, so a sample does not depend on the batch it is drawn in.

    noise(0) of a row is `torch.randn(shape, generator=torch.Generator().manual_seed(seed))`: the initial latent of a
    diffusers pipeline given that generator. Noise is drawn on the CPU in float32, whatever the device, and so is the same
    everywhere.

    Args:
        seeds: one a row.
        shape: of one row, without the batch: `policy.shape(size)`; None lets `rollout` take the policy's native size.
        device, dtype: of the returned tensors.
        stream: selects an independent set of streams for the same seeds.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        stream: int = 0,
    ) -> None:
        self.seeds = [int(s) for s in seeds]
        self.shape = None if shape is None else tuple(shape)
        self.device, self.dtype, self.stream = device, dtype, stream

    def __call__(self, i: int) -> Tensor:
        if self.shape is None:
            raise ValueError("this noise has no shape: pass shape=policy.shape(size)")
        rows = [torch.randn(self.shape, generator=self.generator(row, i)) for row in range(len(self.seeds))]
        return torch.stack(rows).to(self.device, self.dtype)

    def generator(self, row: int, *keys: int) -> torch.Generator:
        """A fresh generator for a row and keys; the key 0 on stream 0 is the seed itself."""
        seed = self.seeds[row]
        plain = self.stream == 0 and keys == (0,)
        return torch.Generator().manual_seed(seed if plain else mix(seed, self.stream, *keys))

    def __getitem__(self, rows: slice) -> SeededNoise:
        return SeededNoise(self.seeds[rows], self.shape, device=self.device, dtype=self.dtype, stream=self.stream)


class NoiseBank(nn.Module):
    """Given noise, held as parameters: any subset may be made leaves of a graph.

    Args:
        tensors: noise(0), noise(1), …, each (B, …).
        trainable: indices whose tensors require gradients.
    """

    def __init__(self, tensors: Sequence[Tensor], trainable: Sequence[int] = ()) -> None:
        super().__init__()
        out_of_range = [i for i in trainable if not 0 <= i < len(tensors)]
        if out_of_range:
            raise ValueError(f"trainable must index the {len(tensors)} given tensors; got {out_of_range}")
        self.tensors = nn.ParameterList(
            nn.Parameter(t.detach().clone(), requires_grad=i in trainable) for i, t in enumerate(tensors)
        )

    def forward(self, i: int) -> Tensor:
        if not 0 <= i < len(self.tensors):
            raise IndexError(
                f"the bank holds noise 0 … {len(self.tensors) - 1}; a run of T steps asks for 0 … T, got {i}"
            )
        return self.tensors[i]


def side_generator(noise: Noise, row: int, *keys: int) -> torch.Generator:
    """A generator for decisions beside the noise itself (resampling, look-ahead draws), tied to a row's seed if it has one."""
    seed = noise.seeds[row] if isinstance(noise, SeededNoise) else row
    return torch.Generator().manual_seed(mix(seed, 0x51DE, *keys))


def side_noise(noise: Noise, rows: Iterable[int], shape: Sequence[int], *keys: int) -> Tensor:
    """(R, *shape) standard normal draws beside the noise itself, on the CPU: a function of each row's seed and the keys."""
    return torch.stack([torch.randn(tuple(shape), generator=side_generator(noise, row, *keys)) for row in rows])


def onward(x: Tensor, noise: Noise, begin: int) -> Noise:
    """The noise of a run that begins at a step `begin` of the whole, in states x (B, …)."""
    return lambda i: x if i == 0 else noise(begin + i)
