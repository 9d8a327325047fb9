"""HyperNoise: the adapter learns to move the initial noise to where the frozen generator makes what the reward likes.

With z the noise of a row, Δz its shift (`samplers.hypernoise`), and g the generator with the adapter off,

    L = −r(decode(g(z + Δz))) + kl_weight · |Δz|²/2.

The second term stands for the divergence between the law of z + Δz and that of z, which bounds the divergence between the laws
of what the generator makes of them; |Δz|²/2 is exact for a constant shift.

The generator is differentiated with respect to its start at once, and the adapter against that gradient: the derivative is the
whole one, and whatever is recomputed in the generator's backward pass is recomputed with the adapter off. One step is the
published case; with more, the gradient passes through all of them.

Source: Noise Hypernetworks, 2508.09968, and its code.

Deviations. The paper sums |Δz|² over the D elements of a sample; its code, and so the published weight 0.5·mean(Δz²), averages
them: that is "mean" with kl_weight 1, the default. The paper's own form is "sum". Every sample has noise of its own; the code
shares one noise in a batch. Rewards enter in their published scale; see `samplers.hypernoise` for Δz.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewards import Prompt, Reward
from samplers import Policy, always, rollout
from samplers.hypernoise import noise_shift, starting_from
from samplers.noise import Noise
from samplers.steering import gradients

from ..batches import Batch, Starts
from ..evidence import Reduction, reduced
from .backprop import check_reward, judged, seeded, sound, watched
from .base import Metrics, Objective

__all__ = ["HyperNoise"]


class HyperNoise(Objective):
    """Trains a noise hypernetwork: the adapter moves the initial noise, the generator stays (HyperNoise).

    Args:
        kl_weight: of |Δz|²/2, in units of the reward, > 0. Published: 1, with "mean".
        reduction: of |Δz|²/2 over the elements of a sample.
        reward: what is maximised; the run's by default.
    """

    source = "prompts"
    takes = (Starts,)
    shifts = True

    def __init__(self, kl_weight: float = 1.0, reduction: Reduction = "mean", reward: Reward | None = None) -> None:
        if not kl_weight > 0:
            raise ValueError(f"kl_weight must be > 0, or nothing holds the noise near where it was; got {kl_weight}")
        self.kl_weight, self.reward = kl_weight, reward
        self.reduction: Reduction = reduction

    def check(self, policy: Policy) -> None:
        check_reward(self, policy)
        if policy.adapter:
            raise ValueError(
                f"HyperNoise trains an adapter of its own on a generator without one, but {policy.adapter} is loaded: merge it "
                "into the model first"
            )

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        rows = batch.rows
        assert isinstance(rows, Starts)
        noise = seeded(policy, rows)
        z = noise(0)
        shift = noise_shift(policy, z, rows.levels, rows.cond)
        reward, ok, slope = self._generated(policy, rows, starting_from(z + shift.detach(), noise), batch.prompts)
        climbed = (slope * (shift - shift.detach())).flatten(1).sum(1)  # 0, with the reward's gradient
        kl = reduced(0.5 * shift.square().flatten(1).sum(1), z, self.reduction)
        loss = self.kl_weight * kl.mean() - (reward + climbed).mean()
        return loss, {**watched(reward, ok), "kl": kl.detach().mean()}

    def _generated(
        self, policy: Policy, rows: Starts, noise: Noise, prompts: tuple[Prompt, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) rewards of the generator's samples, 0 where there is none, (B,) where there is one, (B, …) gradients at noise(0)."""
        assert self.reward is not None
        start = noise(0).requires_grad_()
        reward = torch.zeros(len(rows), device=start.device)
        ok, slope = torch.zeros_like(reward, dtype=torch.bool), torch.zeros_like(start)
        with policy.acting_as("reference"), torch.enable_grad():
            x0 = rollout(policy, rows.kernel, rows.cond, rows.levels, starting_from(start, noise), grad=always).x0
            chosen = sound(x0).nonzero().flatten()
            if len(chosen):
                media = policy.decode(x0[chosen.to(x0.device)])
                scores, known = judged(self.reward, media, tuple(prompts[i] for i in chosen.tolist()))
                reward[chosen], ok[chosen] = scores.detach().to(reward), known
                if bool(known.any()):  # where nothing is, there may be no graph
                    (slope,) = gradients(scores, [start], policy.dtype)
        return reward, ok, torch.where(ok.reshape(-1, *[1] * (slope.ndim - 1)), slope, 0)
