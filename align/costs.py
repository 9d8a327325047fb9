"""Costs: seconds of the network, the decoder, the rewards and a gradient, measured on the first step of a run.

One call of each part at the first level. What measuring spends is on no ledger; its seconds count where a budget is in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rewards import Prompt, Reward
from samplers import Cond, Ledger, Levels, Policy

__all__ = ["PARTS", "branches", "cost_table", "measured", "seconds_of"]

PARTS = {"network": "network evaluation", "decode": "decode", "reward": "reward call", "gradient": "gradient"}


def branches(cond: Cond) -> int:
    """Network evaluations a sample and step: two where guidance asks for the unconditional branch too."""
    return 1 + cond.guided


def measured(
    policy: Policy,
    cond: Cond,
    levels: Levels,
    shape: Sequence[int],
    prompt: Prompt,
    rewards: Sequence[Reward],
    rows: int,
    differentiates: bool,
) -> dict[str, float]:
    """Seconds of one of each of `PARTS`; 0 for a part that the run does not use.

    Args:
        cond: of one prompt.
        shape: of one latent.
        rows: samples in a call.
        differentiates: whether the run has gradients taken through the network.
    """
    ledger, many, asked = Ledger(), cond[[0]].repeat(rows), [prompt] * rows
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0)).to(policy.device, policy.dtype)
    with torch.no_grad():
        with ledger.spend("network", rows * branches(cond), x.device):
            x0 = policy.denoise(x, levels[0], many).x0
        with ledger.spend("decode", rows, x.device):
            media = policy.decode(x0)
        with ledger.spend("reward", rows * len(rewards), x.device):
            for reward in rewards:
                reward(media, asked)
    if differentiates:
        x.requires_grad_()
        media = policy.decode(policy.denoise(x, levels[0], many).x0)
        total = torch.stack([reward(media, asked).nansum() for reward in rewards if reward.differentiable]).sum()
        with ledger.spend("gradient", rows * branches(cond), x.device):
            torch.autograd.grad(total, x)
    seconds = ledger.seconds
    return {on: seconds[on] / n if n else 0.0 for on, n in ledger.counts.items()}


def seconds_of(counts: Mapping[str, float], rates: Mapping[str, float]) -> float:
    """What so many of each part will take."""
    return sum(n * rates[on] for on, n in counts.items())


def cost_table(each: Mapping[str, float], total: Mapping[str, float], rates: Mapping[str, float] | None) -> str:
    """One line a part: what a particle takes of it, what the run takes of it, and how long that is."""
    lines = [f"{'':>20} {'a particle':>10} {'the run':>10}" + (f" {'s each':>9} {'s':>8}" if rates else "")]
    for on, name in PARTS.items():
        line = f"{name + 's':>20} {each[on]:>10.4g} {total[on]:>10.6g}"
        lines.append(line + (f" {rates[on]:>9.2g} {total[on] * rates[on]:>8.2f}" if rates else ""))
    return "\n".join(lines)
