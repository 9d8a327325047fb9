"""The choice of an optimiser: AdamW in eight bits steps as AdamW does, resumes bit for bit, and says what it needs."""

from __future__ import annotations

import sys

import pytest
import torch

from align.config import TrainConfig
from align.stepper import Stepper
from align.world import World
from samplers.families.gaussian import GaussianPolicy


def trained(optimizer: str) -> tuple[Stepper, torch.nn.Parameter]:
    """A stepper over 5000 means, and these."""
    policy = GaussianPolicy(torch.zeros(1, 5000), dtype=torch.float32)
    policy.network.means.requires_grad_(True)
    how = TrainConfig(optimizer=optimizer, learning_rate=0.01, weight_decay=0.1)
    return Stepper(policy, how, World(cpu=True)), policy.network.means


def steps(stepper: Stepper, means: torch.nn.Parameter, seeds: range) -> None:
    for seed in seeds:
        means.grad = torch.randn(means.shape, generator=torch.Generator().manual_seed(seed))
        stepper.optimizer.step()


def test_eight_bits_ask_for_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match=r"adamw8bit needs bitsandbytes: pip install 'kilter\[quant\]'"):
        trained("adamw8bit")


def test_eight_bits_step_like_adamw_and_resume_bit_for_bit():
    pytest.importorskip("bitsandbytes")
    (full, wide), (eight, narrow), (again, resumed) = (trained(o) for o in ("adamw", "adamw8bit", "adamw8bit"))
    steps(full, wide, range(4))
    steps(eight, narrow, range(2))
    again.restore(eight.state())
    resumed.data.copy_(narrow.data)
    for stepper, means in ((eight, narrow), (again, resumed)):
        steps(stepper, means, range(2, 4))
    assert torch.equal(narrow, resumed)
    moved = wide.detach().norm()
    assert float((wide - narrow).detach().norm()) < 0.05 * float(moved)
    assert {v.dtype for v in eight.optimizer.state[narrow].values() if isinstance(v, torch.Tensor) and v.ndim == 2} == {
        torch.uint8
    }
