"""The `Steering` noun: what inference-time control does to the loop.

A steering may do three things at a step: `select` (which rows go on: resampling), `propose` (tilt the law of the next
state) and `again` (walk the step more than once). It holds only its configuration; all that changes during a run lives in
the `Context`, whose per-row quantities follow their rows through every selection.
"""

from __future__ import annotations

import copy
import math
from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from rewards.base import Prompt, Reward

from .kernels import DDIM, Kernel
from .ledger import Ledger
from .levels import Clean, Levels, at_least_float32, diffuse_again
from .noise import Noise, side_generator, side_noise
from .transitions import Categorical, Transition
from .values import Value

if TYPE_CHECKING:
    from .policy import Cond, Policy

__all__ = ["FREE", "Compose", "Context", "RewardFailed", "Schedule", "Steering", "Through", "Tilt", "scheduled"]

Through = Literal["network", "x0"]
Schedule = Literal["constant", "linear", "exp"]
LIFT = {torch.float16: 1024.0}  # multiplies gradients on their way through networks: float16 ends at 6e-8


def scheduled(schedule: Schedule, step: int, steps: int, full_at: float = 1.0) -> float:
    """γ in [0, 1], the share of a tilt that counts at a step; 1 from `full_at`, a share of the run in (0, 1], on.

    "linear" grows evenly. "exp" is the (1 + k)^i − 1 of DAS (2501.05803) with the k that reaches 1 at `full_at`; its own k = 0.008
    does so at step 87, whatever the number of steps.
    """
    if schedule == "constant":
        return 1.0
    done = min((step + 1) / (full_at * steps), 1.0)
    return done if schedule == "linear" else 2.0**done - 1


class Tilt(NamedTuple):
    """A gradient that a steering will ask for.

    Attributes:
        judge: a reward, judging the clean estimate, or a value, judging the state.
        through: "network" differentiates with respect to the state; "x0", for rewards, with respect to the clean estimate, which
            needs no graph of the network.
    """

    judge: Reward | Value
    through: Through = "network"


class RewardFailed(RuntimeError):
    """A reward could judge no sample of some prompt, so steering cannot go on."""


class Context:
    """The population at one step: P prompts × K particles, flattened to B rows, one block a prompt.

    Attributes:
        step: 0 … T; at T the run is over and `x` is the final state.
        x: (B, …) the state.
        clean: the clean estimate; at step T, x itself.
        log_w: (P, K) float64 log weights since the start of the run; never reset, so log mean exp is the log evidence.
        log_z: (P,) float64 log evidence, NaN until a sampler that estimates it has finished.
        log_ratio: (B,) float64 log p/q of guided proposals not yet accounted for in log_w.
        rows: per-particle quantities (P, K) that a steering keeps between steps, on the CPU.
        media: the decoded final samples, once a reward has asked for them.
        ess, ancestors: one entry an event: (P,) and (step, (P, K)).
        failures: samples each reward could not judge, by name; numbers on the device become plain ones at the end.
    """

    def __init__(
        self,
        policy: Policy,
        kernel: Kernel,
        cond: Cond,
        levels: Levels,
        noise: Noise,
        particles: int,
        prompts: Sequence[Prompt],
        steering: Steering,
    ) -> None:
        self.policy, self.kernel, self.cond, self.levels, self.noise = policy, kernel, cond, levels, noise
        self.particles, self.prompts = particles, list(prompts)
        self.groups = len(cond) // particles
        self.step = 0
        self.log_w = torch.zeros(self.groups, particles, dtype=torch.float64)
        self.log_z = torch.full((self.groups,), torch.nan, dtype=torch.float64)
        self.rows: dict[str, Tensor] = {}
        self.ess: list[Tensor] = []
        self.ancestors: list[tuple[int, Tensor]] = []
        self.failures: dict[str, int | Tensor] = {}
        self.ledger = Ledger()
        self.steering = steering
        self.x: Tensor
        self.clean: Clean
        self.media: Tensor | None = None
        self.log_ratio: Tensor | None = None
        self._entered: tuple[Tensor, Tensor] | None = None
        self._decoded: tuple[Tensor, Tensor] | None = None
        self._taken: Tensor | None = None

    @property
    def final(self) -> bool:
        """Whether the run is over and only the last weighting is left."""
        return self.step == self.levels.steps

    def enter(self, step: int, x: Tensor, clean: Clean) -> None:
        """Moves to a step; what was computed for the last one is dropped."""
        self.step, self._scores, self._gradients, self._taken = step, {}, {}, None
        self._entered, self._decoded = (x, clean.x0), None
        self.x, self.clean = x, clean

    def take(self, ancestors: Tensor) -> None:
        """Lets the rows `ancestors` (P, K), indices within a group, go on: every per-row quantity is reindexed."""
        self.ancestors.append((self.step, ancestors))
        self.rows = {name: value.gather(1, ancestors) for name, value in self.rows.items()}
        rows = (ancestors + torch.arange(self.groups)[:, None] * self.particles).flatten().to(self.x.device)
        self.x = self.x[rows]
        self.clean = Clean(*(None if part is None else part[rows] for part in self.clean))  # pyright: ignore
        self.cond = self.cond[rows]
        self._scores = {name: value[rows] for name, value in self._scores.items()}
        self._gradients = {name: value[rows] for name, value in self._gradients.items()}
        self._taken = rows if self._taken is None else self._taken[rows]
        if self.log_ratio is not None:
            self.log_ratio = self.log_ratio[rows]

    def score(self, judge: Reward | Value) -> Tensor:
        """(B,) the reward of the clean estimate at this step, computed once; of the full decode at the final step.

        Of a value, its estimate at the state itself. Where a steering tilts by the judge, its gradients are computed in the same
        pass.
        """
        if id(judge) not in self._scores:
            if isinstance(judge, Value):
                self._estimate(judge)
            elif any(isinstance(tilt.judge, Reward) for tilt in self.tilting):
                self._judge(judge)
            else:
                self._scores[id(judge)] = self.score_of(self.clean.x0, judge)
        return self._scores[id(judge)]

    def gradient(self, judge: Reward | Value, through: Through = "network") -> Tensor:
        """(B, …) the gradient of `score`, which the steering's `tilting` must have announced; 0 for samples that have none.

        Args:
            judge: a reward or a value.
            through: see `Tilt`.
        """
        self.score(judge)
        return self._usable(self._gradients[through, id(judge)], judge)

    def slope(self, x0: Tensor, reward: Reward) -> Tensor:
        """(B, …) the gradient of the reward with respect to given clean samples; 0 for samples that have none."""
        with torch.enable_grad():
            leaf = x0.detach().requires_grad_()
            scores = self.score_of(leaf, reward)
            (gradient,) = gradients(scores, [leaf], self.policy.dtype)
        return self._usable(_marked(gradient, scores), reward)

    def _usable(self, gradient: Tensor, judge: Reward | Value) -> Tensor:
        finite = gradient.flatten(1).isfinite().all(1)
        name = f"gradient of {judge.name}"
        self.failures[name] = self.failures.get(name, 0) + (~finite).sum()
        return gradient.where(finite.reshape(-1, *[1] * (gradient.ndim - 1)), 0.0)

    def score_of(self, x0: Tensor, reward: Reward) -> Tensor:
        """(B,) the reward of given clean samples."""
        decode = self.policy.decode if self.final else self.policy.preview
        with torch.set_grad_enabled(torch.is_grad_enabled() and x0.requires_grad):
            with self.ledger.spend("decode", len(x0), x0.device):
                media = decode(x0)
            if self.final:
                self.media = media
            with self.ledger.spend("reward", len(x0), x0.device):
                return reward(media, self.prompts)

    @property
    def tilting(self) -> list[Tilt]:
        """The gradients the steering asks for at this step."""
        return [] if self.final else self.steering.tilting(self.step / self.levels.steps)

    def differentiates(self, step: int) -> bool:
        """Whether the steering will differentiate a reward through the network call of this step."""
        tilts = self.steering.tilting(step / self.levels.steps)
        return any(isinstance(tilt.judge, Reward) and tilt.through == "network" for tilt in tilts)

    def _judge(self, reward: Reward) -> None:
        """The reward of the estimate and its gradients in one pass; all rewards of a step share one decode.

        Rows are in the order before this step's selection, as they are in the graph of the network.
        """
        assert self._entered is not None
        (x, x0), found = self._entered, {}
        through = [tilt.through for tilt in self.tilting if tilt.judge is reward]
        with torch.enable_grad():
            if self._decoded is None:
                with self.ledger.spend("decode", len(x0), x0.device):
                    leaf = x0.detach().requires_grad_()
                    self._decoded = leaf, self.policy.preview(leaf)
            leaf, media = self._decoded
            with self.ledger.spend("reward", len(x0), x0.device):
                scores = reward(media if through else media.detach(), self.prompts)
                if through:
                    (found["x0"],) = gradients(scores, [leaf], self.policy.dtype, retain_graph=True)
            if "network" in through:
                with self.ledger.spend("gradient", len(x) * (1 + self.cond.guided), x.device):
                    wanted = {
                        id(t.judge) for t in self.tilting if isinstance(t.judge, Reward) and t.through == "network"
                    }
                    more = len(wanted - {judge for how, judge in self._gradients if how == "network"}) > 1
                    lift = LIFT.get(self.policy.dtype, 1.0)
                    (slope,) = torch.autograd.grad(x0, x, lift * found["x0"], retain_graph=more)
                    found["network"] = at_least_float32(slope) / lift
        rows, scores = slice(None) if self._taken is None else self._taken, scores.detach()
        self._scores[id(reward)] = scores[rows]
        self._gradients |= {(how, id(reward)): _marked(gradient, scores)[rows] for how, gradient in found.items()}

    def _estimate(self, value: Value) -> None:
        """A value at the state, and its gradient if that will be asked for: there is no graph but its own."""
        tilts = any(tilt.judge is value for tilt in self.tilting)
        x = self.x.detach().requires_grad_(tilts)
        with torch.set_grad_enabled(tilts), self.ledger.spend("reward", len(x), x.device):
            scores = value(x, self.levels[self.step], self.cond, self.prompts)
            if tilts:
                (gradient,) = gradients(scores, [x], self.policy.dtype)
                self._gradients["network", id(value)] = _marked(gradient, scores)
        self._scores[id(value)] = scores.detach()

    def release(self) -> None:
        """Lets go of the step's graphs once its rewards have been differentiated."""
        self._decoded = None
        if self._entered is not None and self.differentiates(self.step):
            self.x = self.x.detach()
            self.clean = Clean(*(None if part is None else part.detach() for part in self.clean))  # pyright: ignore
        self._entered = None

    def noised_back(self, x: Tensor, draw: int) -> Tensor:
        """A state after this step, noised forward to the level before it; one for each `draw`."""
        now, to = self.levels[self.step + 1], self.levels[self.step]
        return diffuse_again(at_least_float32(x), self.side_noise(draw, 0), now, to).to(x.dtype)

    def posterior_draw(self, draw: int) -> Tensor:
        """(B, …) an approximate draw from p(x0 | x_t): half of the remaining way stochastically, then one clean estimate.

        Tokens are drawn independently from their clean marginals, masked positions only.
        """
        noise = self.side_noise(1 + draw)
        if self.clean.eps is None:
            guess = Categorical(self.clean.x0).sample(noise)
            return torch.where(self.x == self.clean.x0.shape[-1], guess, self.x)
        middle = (self.step + self.levels.steps + 1) // 2
        if middle >= self.levels.steps:
            return self.clean.x0
        now, to = self.levels[self.step], self.levels[middle]
        ancestral = DDIM(1.0)
        x = ancestral.law(self.clean, self.x, now, to, ancestral.std(now, to)).sample(noise).to(self.x.dtype)
        with self.ledger.spend("network", len(x) * (1 + self.cond.guided), x.device):
            return self.policy.denoise(x, to, self.cond).x0

    def side_noise(self, *keys: int) -> Tensor:
        """(B, …) standard normal draws beside the noise of the run, a function of the row's seed, the step and the keys."""
        shape = self.clean.x0.shape[1:]
        return side_noise(self.noise, range(len(self.x)), shape, self.step, *keys).to(self.x.device)

    def generators(self) -> list[torch.Generator]:
        """One generator a group for this step's resampling, tied to the seed of the group's first row."""
        return [side_generator(self.noise, group * self.particles, self.step, 0) for group in range(self.groups)]


class Steering(ABC):
    """Inference-time control. The base class steers nothing.

    Attributes:
        outside: whether it makes rollouts of its own, see `samplers.outer`.
        begins: whether its runs may begin from given latents (`Cond.begin`).
        plain: whose weights sample where nothing is steered; see `Policy.acting_as`.
    """

    reward: Reward | None = None
    outside: bool = False
    begins: bool = True
    least: int = 1  # how many particles belong together: a prompt has a multiple of them
    plain: str = "policy"

    @property
    def weighs(self) -> bool:
        """Whether its weights account for proposals by log p/q, which then need a density."""
        return False

    @property
    def selects(self) -> bool:
        """Whether it weighs and selects rows: it has a `select` of its own."""
        return type(self).select is not Steering.select

    def select(self, ctx: Context) -> Tensor | None:
        """Ancestors (P, K), indices within each group, or None to keep the population. Called at every step and once at T."""
        return None

    def propose(self, ctx: Context, base: Transition) -> Transition:
        """The law to sample the next state from, given the kernel's own."""
        return base

    def check(self, ctx: Context) -> None:
        """Raises before any network runs if this steering cannot work in this run."""

    def tilting(self, progress: float) -> list[Tilt]:
        """The gradients `propose` will ask for when this share of the steps, in [0, 1), is done."""
        return []

    def again(self, progress: float) -> int:
        """How often the next step is noised back and walked again when this share of the steps is done."""
        return 0

    def rewards(self) -> list[Reward]:
        """Every reward this steering uses."""
        return [] if self.reward is None else [self.reward]

    def bind(self, reward: Reward | None) -> Steering:
        """A copy that uses `reward` wherever no reward was given."""
        bound = copy.copy(self)
        bound.reward = self.reward or reward
        return bound

    def _need_reward(self) -> Reward:
        if self.reward is None:
            raise ValueError(f"{type(self).__name__} needs a reward: pass reward=…")
        return self.reward

    def __repr__(self) -> str:
        fields = {k: v.name if isinstance(v, (Reward, Value)) else v for k, v in vars(self).items()}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in fields.items())})"


class Free(Steering):
    """No steering: plain sampling."""


FREE = Free()


class Compose(Steering):
    """Several steerings at once: proposals are chained; at most one may select.

    `Compose(Guided(reward, 1 / beta), FeynmanKac(reward, beta))` is twisted sequential Monte Carlo.

    Args:
        a, b: the steerings, in the order in which their proposals are applied; either may be a `Compose`.
    """

    def __init__(self, a: Steering, b: Steering) -> None:
        self.a, self.b, self.least = a, b, math.lcm(a.least, b.least)
        if a.outside or b.outside:
            raise ValueError(
                f"Compose joins steerings within a rollout; {a if a.outside else b} makes rollouts of its own"
            )
        if a.selects and b.selects:
            raise ValueError(f"both steerings of a Compose select rows: keep one of {a} and {b}")

    @property
    def weighs(self) -> bool:
        return self.a.weighs or self.b.weighs

    @property
    def selects(self) -> bool:
        return self.a.selects or self.b.selects

    def select(self, ctx: Context) -> Tensor | None:
        return (self.a if self.a.selects else self.b).select(ctx)

    def propose(self, ctx: Context, base: Transition) -> Transition:
        return self.b.propose(ctx, self.a.propose(ctx, base))

    def check(self, ctx: Context) -> None:
        self.a.check(ctx)
        self.b.check(ctx)

    def tilting(self, progress: float) -> list[Tilt]:
        tilts = self.a.tilting(progress) + self.b.tilting(progress)
        return list({(id(tilt.judge), tilt.through): tilt for tilt in tilts}.values())

    def again(self, progress: float) -> int:
        return max(self.a.again(progress), self.b.again(progress))

    def rewards(self) -> list[Reward]:
        return list({id(reward): reward for reward in self.a.rewards() + self.b.rewards()}.values())

    def bind(self, reward: Reward | None) -> Steering:
        return Compose(self.a.bind(reward), self.b.bind(reward))


def gradients(scores: Tensor, leaves: Sequence[Tensor], dtype: torch.dtype, retain_graph: bool = False) -> list[Tensor]:
    """Of the sum of scores (B,) at some leaves, in at least float32; NaN adds nothing, and where all are NaN there may be no graph.

    Args:
        dtype: the type that networks between scores and leaves compute in; see `LIFT`.
    """
    if not scores.requires_grad and bool(scores.isnan().all()):
        return [torch.zeros_like(at_least_float32(leaf)) for leaf in leaves]
    lift = LIFT.get(dtype, 1.0)
    how = {"retain_graph": retain_graph, "allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(lift * scores.nansum(), leaves, **how)  # pyright: ignore
    return [at_least_float32(gradient) / lift for gradient in found]


def _marked(gradient: Tensor, scores: Tensor) -> Tensor:
    """NaN for samples without a score, whose gradient the sum over the others says is 0."""
    return gradient.masked_fill(scores.isnan().reshape(-1, *[1] * (gradient.ndim - 1)), torch.nan)
