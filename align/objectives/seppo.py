"""SePPO: preferences between given winners and samples of an earlier version of the policy.

Only winners x_w are given. One of the policy's earlier checkpoints, called ref here, samples x_r for the same prompt; both are
noised alike, and with e the denoising error

    L = −log σ(−β/2·[(e_w^θ − e_w^ref) − s·(e_r^θ − e_r^ref)]).

The anchor decides what the sample is taken for. Where the policy already explains the winner at least as well as ref does,
e_w^θ ≤ e_w^ref, ref is thought the weaker model and its sample the loser: s = +1, Diffusion-DPO. Elsewhere ref may be the better
one, so its sample is learnt like a winner: s = −1, the sum of two fine-tunings.

Checkpoints are kept as voices "past-n" of the policy, the initial weights as "past-0" and one more every so many updates; of
these the initial one and the newest are kept. One is drawn for each collection and speaks as "old".

Source: SePPO, 2410.05255; its repository samples and scores only, so this follows the paper's description and public reviews.

Deviations. A tie is s = +1. The anchor compares errors at the one level and noise each row has; the paper's averaging over
levels is had by several draws in the source, each then an item of its own. The initial weights stay in the ring.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from samplers import Kernel, Policy, Size, rollout
from samplers.noise import mix

from ..batches import Batch, Noised
from ..evidence import Reduction, errors
from ..sampling import Sampling
from .base import Metrics, Objective

if TYPE_CHECKING:
    from ..sources import Source

__all__ = ["SePPO", "Selection"]

Selection = Literal["random", "latest", "initial"]


class SePPO(Objective):
    """Prefers given winners to samples of an earlier checkpoint, where the anchor says so (SePPO).

    Args:
        beta: sharpness; Diffusion-DPO's 5000 belongs to "mean".
        ring: how many checkpoints are kept at most. Published: 7.
        every: updates from one checkpoint to the next. Published: 30.
        selection: which checkpoint samples and is compared with.
        anchor: "winner" lets the winner's errors decide the sign; "none" always takes the sample for the loser.
        kernel, steps, guidance, size: how checkpoints sample; the policy's own by default. The size must be that of the data.
        rows: samples made at a time.
        reduction: of errors over the elements of a sample; see `align.evidence`.
    """

    source = "data"
    takes = (Noised,)

    def __init__(
        self,
        beta: float = 5000.0,
        ring: int = 7,
        every: int = 30,
        selection: Selection = "random",
        anchor: Literal["winner", "none"] = "winner",
        kernel: Kernel | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        size: Size | None = None,
        rows: int = 16,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        for name, value in (("beta", beta), ("ring", ring), ("every", every), ("rows", rows)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0; got {value}")
        if selection not in get_args(Selection) or anchor not in ("winner", "none"):
            raise ValueError(
                f"selection must be one of {', '.join(get_args(Selection))} and anchor winner or none; "
                f"got {selection!r} and {anchor!r}"
            )
        self.beta, self.ring, self.every, self.anchor = beta, ring, every, anchor
        self.selection: Selection = selection
        self.reduction: Reduction = reduction
        self.kernel, self.steps, self.guidance, self.size, self.rows = kernel, steps, guidance, size, rows
        self.sampling: Sampling | None = None

    def check_source(self, source: Source, sampling: Sampling) -> None:
        if (self.kernel, self.steps, self.guidance, self.size) == (None, None, None, None):
            self.sampling = sampling

    def begin(self, policy: Policy) -> None:
        policy.remember("past-0")

    def updated(self, policy: Policy, update: int) -> None:
        """Pushes a checkpoint every so many updates and forgets the oldest but the initial one."""
        if update % self.every:
            return
        policy.remember(f"past-{update // self.every}")
        for name in _past(policy)[1 : -(self.ring - 1) or None]:
            del policy.voices[name]

    def annotate(self, policy: Policy, batch: Batch, seed: int) -> Batch:
        """Pairs each winner with a sample of a remembered checkpoint for its prompt, noised alike."""
        rows = batch.rows
        assert isinstance(rows, Noised)
        past = _past(policy)
        drawn = torch.randint(len(past), (), generator=torch.Generator().manual_seed(seed))
        policy.voices["old"] = policy.voices[past[{"initial": 0, "latest": -1}.get(self.selection, int(drawn))]]
        sampled = self._sampled(policy, batch, seed).to(rows.x0)
        finite = sampled.flatten(1).isfinite().all(1).cpu()
        twice = torch.arange(len(batch)).repeat_interleave(2)
        pairs = batch[twice]
        assert isinstance(pairs.rows, Noised)
        x0 = torch.stack([rows.x0, sampled], 1).flatten(0, 1)  # (B, 2, …) -> (B*2, …)
        keep = finite if "keep" not in batch.columns else finite & batch.columns["keep"].cpu()
        return replace(pairs, rows=replace(pairs.rows, x0=x0), members=2).having(keep=keep[twice])

    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Metrics]:
        assert isinstance(batch.rows, Noised) and batch.members == 2
        mine = errors(policy, batch.rows, self.reduction).reshape(-1, 2)
        with torch.no_grad(), policy.acting_as("old"):
            old = errors(policy, batch.rows, self.reduction).reshape(-1, 2)
        winner, sampled = (mine - old).unbind(1)
        sign = torch.ones_like(winner)
        if self.anchor == "winner":
            sign = torch.where(winner.detach() <= 0, 1.0, -1.0).to(winner)
        inside = -self.beta / 2 * (winner - sign * sampled)
        errors_now = mine.detach().mean(0)
        return batch.mean(-logsigmoid(inside)), {
            "preferring": (sign > 0).to(winner).mean(),  # the share of items with s = +1
            "margin": inside.detach().mean(),
            "winner_error": errors_now[0],
            "sampled_error": errors_now[1],
            "winner_drift": (mine.detach()[:, 0] / old[:, 0]).mean(),
        }

    def _sampled(self, policy: Policy, batch: Batch, seed: int) -> Tensor:
        """(B, …) samples of the weights called old, one a row; each depends on its item alone."""
        assert isinstance(batch.rows, Noised)
        sampling = self.sampling or Sampling.of(policy, self.kernel, self.steps, self.guidance, self.size)
        if sampling.shape != (shape := tuple(batch.rows.x0.shape[1:])):
            raise ValueError(
                f"the data are latents {shape}, but samples would be {sampling.shape}: pass the data's size to SePPO"
            )
        item = batch.columns.get("item", torch.arange(len(batch))).tolist()
        parts = []
        for some in torch.arange(len(batch)).split(self.rows):
            noise = sampling.noise(policy, [mix(seed, item[i]) for i in some.tolist()])
            cond = batch.rows[some].cond.with_guidance(sampling.guidance)
            with policy.acting_as("old"):
                parts.append(rollout(policy, sampling.kernel, cond, sampling.levels, noise).x0)
        return torch.cat(parts)


def _past(policy: Policy) -> list[str]:
    """The names of the remembered checkpoints, oldest first."""
    numbers = sorted(int(name.removeprefix("past-")) for name in policy.voices if name.startswith("past-"))
    return [f"past-{n}" for n in numbers]
