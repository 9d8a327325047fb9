"""Small Gaussian policies and rows for the tests of objectives. All in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from align.batches import Batch, Noised, Paths, Steps
from samplers import DanceSDE, SeededNoise, rollout
from samplers.families.gaussian import GaussianPolicy

F64 = torch.float64
MEAN = torch.tensor([[0.4, -0.3, 0.8]], dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def trainable(shift: float = 0.0, means: Tensor = MEAN, **how) -> GaussianPolicy:
    """A policy that remembers `means` as its reference and has since moved by `shift` in a fixed direction."""
    policy = GaussianPolicy(means, **how)
    policy.network.means.requires_grad_(True)
    policy.remember("reference")
    with torch.no_grad():
        policy.network.means += shift * normal(*means.shape, seed=99)
    return policy


def noised(policy: GaussianPolicy, items: int, members: int = 1, seed: int = 0) -> Noised:
    """Rows whose members share noise and level."""
    count, u = items * members, torch.rand(items, generator=torch.Generator().manual_seed(seed), dtype=F64)
    eps = normal(items, *policy.size, seed=seed + 1).repeat_interleave(members, 0)
    at = policy.training_levels((0.1 + 0.8 * u).repeat_interleave(members))
    return Noised(normal(count, *policy.size, seed=seed + 2), eps, at, policy.encode(["a"] * count))


def paths(policy: GaussianPolicy, count: int, steps: int = 3, kernel=None, seed: int = 0) -> Batch:
    """Trajectories of the policy with their recorded log-densities."""
    kernel, levels = kernel or DanceSDE(eta=0.8), policy.levels(steps)
    noise = SeededNoise(range(seed, seed + count), policy.size, dtype=F64)
    run = rollout(policy, kernel, policy.encode(["a"] * count), levels, noise, record="path")
    return Batch(Paths(run.latents, run.cond, kernel, levels), {"old": run.log_prob})


def steps(policy: GaussianPolicy, items: int, members: int = 1, **how) -> Batch:
    """Every step of fresh trajectories."""
    batch = replace(paths(policy, items * members, **how), members=members)
    return batch.steps(torch.arange(batch.rows.levels.steps).expand(items, -1))


def gradient(policy: GaussianPolicy, loss: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, policy.network.means)
    return found


def assert_accumulates(objective, policy, batch: Batch, sizes: tuple[int, ...]) -> None:
    """Micro-batches, given the shared means of the update, add up to one big batch: loss, gradient and metrics."""
    parts = [batch.take(i) for i in torch.arange(batch.items).split(list(sizes))]
    found = [objective.shared(policy, part) for part in parts]
    shared = {name: torch.cat([f[name] for f in found]).mean() for name in found[0]}
    whole, metrics = objective.loss(policy, replace(batch, shared=shared))
    alone, _ = objective.loss(policy, batch)
    total, watched = torch.zeros((), dtype=F64), dict.fromkeys(metrics, 0.0)
    for part in parts:
        loss, seen = objective.loss(policy, replace(part, shared=shared))
        share = part.items / batch.items
        total = total + share * loss
        watched = {name: value + share * float(seen[name]) for name, value in watched.items()}
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(policy, total), gradient(policy, whole), rtol=1e-9, atol=1e-12)
    for name, value in watched.items():
        assert not metrics[name].requires_grad
        if "max" not in name:
            torch.testing.assert_close(value, float(metrics[name]), rtol=1e-9, atol=1e-9)


def shapes_of(rows: Noised | Steps) -> int:
    """D, the elements of one row."""
    return (rows.x0 if isinstance(rows, Noised) else rows.x)[0].numel()
