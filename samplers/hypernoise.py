"""Noise hypernetworks: an adapter that moves the initial noise of a generator instead of changing the generator.

With f_θ the network with its adapter and f_ref without it, both at the first level of the run,

    Δz(z) = f_θ(z) − f_ref(z),        x_T = z + Δz(z),

and the rollout from x_T is that of the generator alone, the adapter off. An adapter that begins at zero begins at Δz = 0, exactly.
It costs two network evaluations a sample. The law of x_T has no density in closed form, so there are no importance weights
that would make the moved noise exact in SMC.

Source: Noise Hypernetworks, 2508.09968. It trains them: `align.objectives.HyperNoise`.

Deviations: there Δz is the adapter's part of the last layer alone, which needs an adapter on that layer, and one network
evaluation. The difference of two outputs asks nothing of the network and lets the adapters of all layers speak at first order.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from rewards.base import Reward

from .levels import Levels, at_least_float32
from .noise import Noise
from .outer import Found, Outer, Problem
from .policy import Cond, Policy
from .steering import Context

__all__ = ["ShiftedNoise", "noise_shift", "shifted_noise", "starting_from"]


def noise_shift(policy: Policy, z: Tensor, levels: Levels, cond: Cond) -> Tensor:
    """(B, …) Δz of initial noises, with the graph of the adapter's network call if there is one."""
    x = z.to(policy.device, policy.dtype)
    with torch.no_grad(), policy.acting_as("reference"):
        base = at_least_float32(policy.output(x, levels[0], cond))
    return at_least_float32(policy.output(x, levels[0], cond)) - base


@torch.no_grad()
def shifted_noise(policy: Policy, noise: Noise, levels: Levels, cond: Cond) -> Noise:
    """The noise with its initial state moved."""
    z = noise(0)
    return starting_from(z + noise_shift(policy, z, levels, cond), noise)


def starting_from(start: Tensor, noise: Noise) -> Noise:
    """The noise with another initial state."""
    return lambda i: start if i == 0 else noise(i)


class ShiftedNoise(Outer):
    """Samples with a noise hypernetwork: the adapter moves the initial noise, the network without it makes the sample.

    Its only iterate is the moved one; plain samples of such a policy are those with the adapter off.

    Args:
        reward: scores the samples; the run's by default.
    """

    plain = "reference"
    begins = False
    rounds = 1

    def __init__(self, reward: Reward | None = None) -> None:
        self.reward = reward

    def check(self, ctx: Context) -> None:
        self._need_reward()
        layers = (hasattr(m, "adapter_layer_names") for m in ctx.policy.network.modules())  # what peft puts in
        if "reference" not in ctx.policy.voices and not any(layers):
            raise ValueError(
                "ShiftedNoise needs a trained noise hypernetwork, but this policy has no adapter: pass lora=…"
            )

    @torch.no_grad()
    def iterations(self, problem: Problem, found: Found) -> Generator[None]:
        policy, parts, shifts = problem.policy, [], []
        noises = problem.bank()
        for rows in problem.parts():
            cond, z = problem.cond[rows.to(policy.device)], noises[0][rows.to(policy.device)]
            with problem.ledger.spend("network", 2 * len(rows) * (1 + cond.guided), policy.device):
                shifts.append(noise_shift(policy, z, problem.levels, cond))
            start = z + shifts[-1]
            with policy.acting_as("reference"):
                x0 = problem.sample([start, *(n[rows.to(policy.device)] for n in noises[1:])], rows).x0
            parts.append((*problem.judge(x0, self._need_reward(), rows), x0, start))
        rewards, media, x0, start = (torch.cat(column) for column in zip(*parts, strict=True))
        found.offer(rewards, x0, media, [start, *noises[1:]])
        found.note(kl=0.5 * torch.cat(shifts).flatten(1).square().sum(1))
        yield
