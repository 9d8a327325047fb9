"""Sampling in noise space: Markov chains over the noises of a run that leave p(x0)·exp(r(x0)/β) invariant.

A run is a deterministic function of its noises z ~ N(0, I), so the tilted law of what it makes is that of z under
N(z; 0, I)·exp(r(z)/β). With step b in (0, 1], a = sqrt(1 − b²) and a drift g(z),

    z' = a·z + (1 − a)/β·g(z) + b·ξ,    ξ ~ N(0, I)

is accepted with probability min(1, exp(A)), κ = (1 − a)/β,

    A = (r(z') − r(z))/β + κ/b²·[g(z')·(z − a·z') − g(z)·(z' − a·z)] + κ²/(2b²)·(|g(z)|² − |g(z')|²),

in which the Gaussian law has cancelled: the law is exact for any drift, at any step, in any dimension. g = 0 is `PCN`,
g = ∇r is `PCNL`, whose A is 0 for linear rewards. Without a reward the proposals themselves leave N(0, I) as it is.

Sources: Cotter, Roberts, Stuart & White, MCMC methods for functions, 1202.0709 (pCN, pCNL; their δ has a = (2 − δ)/(2 + δ));
Ψ-Sampler, 2506.01320 (pCNL over noise); ORIGEN, 2503.22194. Deviations: Ψ-Sampler's chains make the particles of a
later sequential Monte Carlo, here they are the result. ORIGEN, which accepts every proposal, has the drift η·b²·∇r: the same
thing at β = (1 − a)/(η·b²), the temperature at which linear rewards are tilted exactly. Its step that adapts to the reward is
left out: it is defined for rewards below 0 only, its correction h·∇s/2 has the wrong sign (s falls as r rises, so that
∇s = −2k·(s_max − s_min)·2q(1 − q)·∇r), and in d dimensions an exact ratio would hold (h/h')^(d/2). So is its stop at the first
success, which rewards here do not define.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import torch
from torch import Tensor

from rewards.base import Reward

from .outer import Found, Problem, where_rows
from .rollout import always
from .search import Noises, NoiseSearch, gaussians, replaced
from .steering import Context, gradients
from .transitions import widest

__all__ = ["PCN", "PCNL"]


@dataclass
class Chains:
    """The states of all chains.

    Attributes:
        rewards: (B,) float64 on the CPU, NaN where there is no judgement.
        noise: all noises of the run, (B, …) each.
        x0, media: (B, …) what they make.
        drift: (B, …) g at each varied noise, or nothing.
    """

    rewards: Tensor
    noise: list[Tensor]
    x0: Tensor
    media: Tensor
    drift: list[Tensor]

    def where(self, rows: Tensor, other: Chains) -> Chains:
        """These where the mask (B,) is true, else the others."""
        noise, drift = (
            [where_rows(rows, mine, its) for mine, its in zip(*both, strict=True)]
            for both in ((self.noise, other.noise), (self.drift, other.drift))
        )
        x0, media = where_rows(rows, self.x0, other.x0), where_rows(rows, self.media, other.media)
        return Chains(torch.where(rows, self.rewards, other.rewards), noise, x0, media, drift)


class PCN(NoiseSearch):
    """Preconditioned Crank–Nicolson: a Metropolis chain over noise that samples the tilted law, with no gradient.

    The result is the last state of each chain: a sample of p(x0)·exp(r/beta) once the chain has forgotten its start. What was
    not judged is never moved to; a chain that starts there wanders until it finds something that was. The history holds
    "accepted" and "step" of every iterate.

    Args:
        reward: what to tilt by; None takes the run's.
        beta: temperature of the tilt exp(r/beta), in units of the reward, > 0.
        step: b in (0, 1], the share of fresh noise; 1 proposes independent noise.
        rounds: iterates, ≥ 1; the first is the plain sample.
        burn_in: iterates at the start in which each chain adapts its step; it is fixed after them, so that the law is exact.
        target: the rate of acceptance, in (0, 1), that steps adapt to.
        noises: "all" that a run uses; or the "initial" one, which samples the law given the others.
    """

    keeps: Literal["best", "last"] = "last"
    accept: bool = True

    def __init__(
        self,
        reward: Reward | None = None,
        beta: float = 0.1,
        step: float = 0.3,
        rounds: int = 50,
        burn_in: int = 20,
        target: float = 0.234,
        noises: Noises = "all",
    ) -> None:
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be above 0 and finite; got {beta}: RandomSearch and ZeroOrder are greedy")
        if not 0 < step <= 1:
            raise ValueError(f"step is the share of fresh noise, in (0, 1]; got {step}")
        if rounds < 1 or burn_in < 0:
            raise ValueError(f"rounds must be ≥ 1 and burn_in ≥ 0; got {rounds} and {burn_in}")
        if not 0 < target < 1:
            raise ValueError(f"target is a rate of acceptance, in (0, 1); got {target}")
        self.reward, self.beta, self.step, self.rounds = reward, beta, step, rounds
        self.burn_in, self.target = burn_in, target
        self.noises: Noises = noises

    def iterations(self, problem: Problem, found: Found) -> Generator[None]:
        state = self._judged(problem, problem.bank())
        step = torch.full((problem.rows,), self.step, dtype=torch.float64)
        accepted = torch.ones(problem.rows, dtype=torch.bool)
        for i in range(1, self.rounds + 1):
            found.offer(state.rewards, state.x0, state.media, state.noise)
            found.note(accepted=accepted, step=step)
            yield
            if i == self.rounds:
                return
            noise, luck = self._proposed(problem, state, step, i)
            proposal = self._judged(problem, noise)
            chance = self._chance(state, proposal, step)
            if i <= self.burn_in:
                adapted = (step * torch.exp((chance - self.target) / math.sqrt(i))).clamp(max=1.0)
                step = adapted.where(_possible(state), step)
            accepted = luck < chance
            state = proposal.where(accepted, state)

    def _judged(self, problem: Problem, noise: Sequence[Tensor]) -> Chains:
        """The states at some noises."""
        scores, x0, media = problem.rate(noise, self._need_reward())
        return Chains(scores.detach().double().cpu(), list(noise), x0, media, [])

    def _proposed(self, problem: Problem, state: Chains, step: Tensor, i: int) -> tuple[list[Tensor], Tensor]:
        """The noises of the proposals, and (B,) uniform numbers to accept them by."""
        which = self.varied(state.noise)
        *fresh, luck = gaussians(problem, [*(state.noise[j] for j in which), step], i)
        moved = []
        for n, j in enumerate(which):
            z = state.noise[j]
            a, kappa, b = (_spread(value, z) for value in self._sizes(step))
            mean = a * widest(z)
            if state.drift:
                mean = mean + kappa * widest(state.drift[n])
            moved.append((mean + b * widest(fresh[n])).to(z.dtype))
        return replaced(state.noise, which, moved), torch.special.ndtr(luck)

    def _chance(self, state: Chains, proposal: Chains, step: Tensor) -> Tensor:
        """(B,) the probability of accepting: 0 where the proposal was not judged, 1 where the state was not."""
        if self.accept:
            log_ratio = (proposal.rewards - state.rewards) / self.beta
            if state.drift:
                log_ratio = log_ratio + self._drifted(state, proposal, step)
            chance = log_ratio.clamp(max=0.0).exp().nan_to_num(0.0)
        else:
            chance = (~proposal.rewards.isnan()).double()
        return chance.where(_possible(state), 1.0)

    def _drifted(self, state: Chains, proposal: Chains, step: Tensor) -> Tensor:
        """(B,) what a drift adds to the logarithm of the ratio, summed in float64."""
        a, kappa, b = self._sizes(step)
        total = torch.zeros_like(step)
        for n, j in enumerate(self.varied(state.noise)):
            z, new, g, back = (
                widest(v).flatten(1) for v in (state.noise[j], proposal.noise[j], state.drift[n], proposal.drift[n])
            )
            keep = _spread(a, z)
            cross = (back * (z - keep * new) - g * (new - keep * z)).sum(1).cpu().double()
            lengths = (g.square() - back.square()).sum(1).cpu().double()
            total = total + (kappa * cross + kappa**2 / 2 * lengths) / b**2
        return total

    def _sizes(self, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) a, κ and b."""
        a = (1 - step**2).clamp(min=0).sqrt()
        return a, (1 - a) / self.beta, step


class PCNL(PCN):
    """Preconditioned Crank–Nicolson Langevin: the same chain with proposals that follow the gradient of the reward.

    The gradient goes through decoder and network at every step of the run. Without acceptance this is ORIGEN's sampler.

    Args:
        reward: a differentiable reward to tilt by; None takes the run's.
        beta: temperature of the tilt exp(r/beta), in units of the reward, > 0; the default is Ψ-Sampler's.
        step: b in (0, 1], the share of fresh noise; the default is Ψ-Sampler's, whose ε is 0.5.
        rounds: iterates, ≥ 1; the first is the plain sample.
        burn_in: iterates at the start in which each chain adapts its step; it is fixed after them, so that the law is exact.
        target: the rate of acceptance, in (0, 1), that steps adapt to.
        noises: "all" that a run uses; or the "initial" one, which samples the law given the others.
        clip: bounds every element of the gradient to [−clip, clip]; the law stays exact.
        accept: whether proposals may be rejected; without, the law is exact for linear rewards only.
        keeps: whether the result is the "last" state of each chain, a sample, or its "best".
    """

    def __init__(
        self,
        reward: Reward | None = None,
        beta: float = 0.1,
        step: float = 0.6285,
        rounds: int = 50,
        burn_in: int = 20,
        target: float = 0.574,
        noises: Noises = "all",
        clip: Optional[float] = None,
        accept: bool = True,
        keeps: Literal["best", "last"] = "last",
    ) -> None:
        super().__init__(reward, beta, step, rounds, burn_in, target, noises)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip bounds the elements of a gradient and must be above 0; got {clip}")
        if burn_in and not accept:
            raise ValueError("without acceptance there is no rate for steps to adapt to: set burn_in to 0")
        self.clip, self.accept, self.keeps = clip, accept, keeps

    def check(self, ctx: Context) -> None:
        super().check(ctx)
        reward = self._need_reward()
        if not reward.differentiable:
            raise ValueError(f"PCNL needs the gradient of its reward, and {reward.name} has none: use PCN")
        if not ctx.noise(0).is_floating_point():
            raise ValueError("PCNL needs the gradient of the samples, and tokens have none: use PCN")

    def _judged(self, problem: Problem, noise: Sequence[Tensor]) -> Chains:
        reward, which, parts = self._need_reward(), self.varied(noise), []
        for rows in problem.parts():
            given = [n[rows].detach().requires_grad_(j in which) for j, n in enumerate(noise)]
            with torch.enable_grad():
                x0 = problem.sample(given, rows, grad=always).x0
                scores, media = problem.judge(x0, reward, rows)
                drift = gradients(scores, [given[j] for j in which], problem.policy.dtype)
            parts.append((scores.detach().double().cpu(), x0.detach(), media, *self._usable(drift)))
        scores, x0, media, *drift = (torch.cat(column) for column in zip(*parts, strict=True))
        return Chains(scores, [n.detach() for n in noise], x0, media, drift)

    def _usable(self, drift: Sequence[Tensor]) -> list[Tensor]:
        """Clipped; 0 in rows whose gradient is not finite, which are then moved as by PCN."""
        finite = torch.stack([g.flatten(1).isfinite().all(1) for g in drift]).all(0)
        clipped = drift if self.clip is None else [g.clamp(-self.clip, self.clip) for g in drift]
        return [where_rows(finite, g, torch.zeros_like(g)) for g in clipped]


def _possible(state: Chains) -> Tensor:
    """(B,) whether the tilted law has such a state: not if its reward is −∞ or there is none."""
    return state.rewards > -torch.inf


def _spread(value: Tensor, x: Tensor) -> Tensor:
    """(B,) shaped to broadcast against x (B, …), on its device."""
    return value.to(x.device, widest(x[:0]).dtype).reshape(-1, *[1] * (x.ndim - 1))
