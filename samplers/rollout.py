"""The denoising loop: the only one in kilter.

In order, for each step: denoise → `steering.select` (may permute rows) → kernel → `steering.propose` → sample with
`noise(i + 1)` → round trip through the storage dtype → record. Where `steering.again` asks for it, the new state is noised back
and the step walked again before rows are selected. Steering, training, search and noise optimisation all call this function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rewards.base import Prompt, as_prompts

from .kernels import Kernel
from .ledger import Ledger
from .levels import Clean, Levels, diffuse, to_clean
from .noise import Noise, SeededNoise
from .overflow import check_network
from .policy import Cond, Policy
from .steering import FREE, Context, RewardFailed, Steering
from .transitions import Transition

__all__ = [
    "GradWindow",
    "Interrupted",
    "Record",
    "Trajectory",
    "always",
    "last",
    "never",
    "only",
    "random_truncation",
    "rollout",
]

GradWindow = Callable[[int, int], bool]  # (step, steps) → does this step's network call build a graph?
Record = Literal["final", "path"]


def never(i: int, steps: int) -> bool:
    """No step builds a graph."""
    return False


def always(i: int, steps: int) -> bool:
    """Every step builds a graph."""
    return True


def last(k: int) -> GradWindow:
    """The last k steps build a graph (DRaFT-K, 2309.17400)."""
    return lambda i, steps: i >= steps - k


def only(step: int) -> GradWindow:
    """One step builds a graph."""
    return lambda i, steps: i == step


def random_truncation(generator: torch.Generator, low: int = 1, high: int | None = None) -> GradWindow:
    """The last k steps, k drawn once per run uniformly from low … high (AlignProp, 2310.03739); high defaults to all steps.

    A window draws its k when it is first asked at step 0.
    """
    k = 0

    def window(i: int, steps: int) -> bool:
        nonlocal k
        if i == 0:
            k = int(torch.randint(low, (high or steps) + 1, (), generator=generator))
        return i >= steps - k

    return window


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves behind: B = P·K rows, one block of K particles a prompt.

    Attributes:
        x0: (B, …) the final states.
        levels, cond: what the run used.
        latents: (B, T+1, …) every state along each row's lineage; None unless recorded.
        log_prob: (B, T) log-density of every step under the law it was drawn from, along each lineage; 0 where the step was
            deterministic (see `stochastic`); None unless recorded.
        stochastic: (T,) which steps have a density.
        log_w: (P, K) float64 final log weights.
        log_z: (P,) float64 log evidence, NaN where the steering estimates none.
        ess: (P, E) effective sample size at each event.
        ancestors: (P, E', K) for each selection, which particle every particle came from; `selected_at` holds the steps.
        rewards: (P, K) float64 the steering's reward of the final samples, or None.
        media: (B, …) the decoded final samples if the steering scored them.
        failures: samples a reward could not judge, by its name.
        ledger: what the run spent.
        stopped_at: None, or the step at which the run was interrupted; x0 then holds clean estimates. Of an outer method the
            iterates it finished; x0 then holds the best so far.
        noise: the noises that make x0, where an outer method searched them: noise(0) or noise(0) … noise(T), (B, …) each.
        history: of an outer method, (iterates, P, K) each: "reward", "best" and what the method adds.
    """

    x0: Tensor
    levels: Levels
    cond: Cond
    latents: Tensor | None
    log_prob: Tensor | None
    stochastic: Tensor
    log_w: Tensor
    log_z: Tensor
    ess: Tensor
    ancestors: Tensor
    selected_at: tuple[int, ...]
    rewards: Tensor | None
    media: Tensor | None = None
    failures: dict[str, int] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    stopped_at: int | None = None
    noise: tuple[Tensor, ...] = ()
    history: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Tensor:
        """(P, K) normalised weights."""
        return self.log_w.softmax(1)

    @property
    def lineage(self) -> Tensor:
        """(P, K) which initial particle each final particle descends from."""
        origin = torch.arange(self.log_w.shape[1]).expand_as(self.log_w)
        for taken in self.ancestors.unbind(1):
            origin = origin.gather(1, taken)
        return origin

    @property
    def unique_ancestors(self) -> Tensor:
        """(P,) how many initial particles have descendants of positive weight."""
        living = self.log_w > -torch.inf
        return torch.tensor([len(set(o[w].tolist())) for o, w in zip(self.lineage, living, strict=True)])

    @property
    def best(self) -> Tensor:
        """(P,) the particle with the highest reward; without rewards, with the highest weight."""
        return (self.log_w if self.rewards is None else self.rewards).argmax(1)

    def draw(self, generator: torch.Generator) -> Tensor:
        """(P,) one particle a prompt, drawn by weight: a sample of the tilted law."""
        return torch.multinomial(self.weights, 1, generator=generator).squeeze(1)


class Interrupted(Exception):
    """A run stopped early; `trajectory` holds what it had, `__cause__` why."""

    def __init__(self, trajectory: Trajectory, cause: BaseException, where: str = "") -> None:
        where = where or f"stopped at step {trajectory.stopped_at} of {trajectory.levels.steps}"
        super().__init__(f"{where}: {str(cause) or 'interrupted'}")
        self.trajectory = trajectory


def rollout(
    policy: Policy,
    kernel: Kernel,
    cond: Cond,
    levels: Levels,
    noise: Noise,
    *,
    particles: int = 1,
    prompts: Sequence[str | Prompt] = (),
    steering: Steering = FREE,
    grad: GradWindow = never,
    record: Record = "final",
    watch: Callable[[Context], None] | None = None,
) -> Trajectory:
    """Samples from noise to data.

    Args:
        cond: P rows, one a prompt, or already B = P·`particles` rows.
        noise: noise(0) is the initial state (B, …), or the noise in it where `cond` has latents to begin from; noise(i) drives
            the i-th step.
        particles: K, rows a prompt; they form consecutive blocks.
        prompts: P or B prompts for the steering's rewards.
        grad: which steps' network calls build a graph, under the policy's activation checkpointing. From the first of them on
            the states stay in the graph, past later network calls outside the window too.
        record: "path" keeps every state and log-probability.
        watch: called after every step, and once at the end, with the population: progress bars and live previews.

    Returns:
        The trajectory; `x0` belongs to the graph if any step was in `grad`.

    Raises:
        ValueError: rows, prompts or steering do not fit together; raised before the network runs.
        Interrupted: Ctrl-C, or a reward that could judge nothing; carries what there was.
    """
    if steering.outside:
        raise ValueError(f"{steering} makes rollouts of its own: pass it to align.steer or samplers.run")
    noise = shaped(noise, policy)
    x = noise(0)
    cond, told = row_by_row(cond, prompts, len(x), particles)
    if cond.begin is not None:
        x = diffuse(cond.begin.to(x), x, levels[0])
    x = x.to(policy.device, policy.dtype if x.is_floating_point() else x.dtype)
    ctx = Context(policy, kernel, cond, levels, noise, particles, told, steering)
    ctx.enter(0, x, Clean(x, x))  # nothing is known yet
    _check(ctx, grad, record)
    path, log_probs, opened = [x], [], False
    try:
        for i in range(levels.steps):
            building = grad(i, levels.steps)
            opened = opened or building
            with torch.set_grad_enabled(opened):
                for left in range(steering.again(i / levels.steps), 0, -1):
                    law, _ = _step(ctx, x, i, building, select=False)
                    x = ctx.noised_back(law.sample(ctx.side_noise(left, 1)).to(x.dtype), left)
                law, base = _step(ctx, x, i, building)
                x = law.sample(noise(i + 1)).to(x.dtype)
                if law is not base and steering.weighs:
                    ratio = base.log_ratio(law, x).detach()
                    ctx.log_ratio = ratio if ctx.log_ratio is None else ctx.log_ratio + ratio
                if record == "path":
                    path.append(x)
                    log_probs.append(law.log_prob(x) if law.stochastic else x.new_zeros(len(x), dtype=torch.float32))
                if watch is not None:
                    watch(ctx)
        with torch.set_grad_enabled(opened):
            ctx.enter(levels.steps, x, Clean(x, x))
            if steering is not FREE and (ancestors := steering.select(ctx)) is not None:
                ctx.take(ancestors)
        if watch is not None:
            watch(ctx)
    except (KeyboardInterrupt, RewardFailed) as stop:
        raise Interrupted(_trajectory(ctx, [], [], ctx.step), stop) from stop
    return _trajectory(ctx, path if record == "path" else [], log_probs, None)


def _step(ctx: Context, x: Tensor, i: int, building: bool, select: bool = True) -> tuple[Transition, Transition]:
    """The laws of the next state, the steering's and the kernel's own."""
    clean, x = _denoise(ctx, x, ctx.levels[i], building, guided=ctx.differentiates(i))
    if i == 0:
        check_network(ctx.policy, clean, x, ctx.levels[i], ctx.cond)
    ctx.enter(i, x, clean)
    if select and (ancestors := ctx.steering.select(ctx)) is not None:
        ctx.take(ancestors)
    base = ctx.kernel(ctx.clean, ctx.x, ctx.levels, i)
    law = ctx.steering.propose(ctx, base)
    ctx.release()
    return law, base


def _denoise(ctx: Context, x: Tensor, at: Levels, building: bool, guided: bool) -> tuple[Clean, Tensor]:
    """The clean estimate, and the state it is a function of: a fresh leaf if a steering will differentiate it."""
    policy, cond = ctx.policy, ctx.cond
    with ctx.ledger.spend("network", len(x) * (1 + cond.guided), x.device):
        if guided:
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                return policy.denoise(x, at, cond), x
        if building and policy.checkpointing == "step":
            clean = checkpoint(policy.denoise, x, at, cond, use_reentrant=False, preserve_rng_state=False)
            return clean, x  # pyright: ignore
        if building:
            return policy.denoise(x, at, cond), x
        with torch.no_grad():
            output = policy.output(x, at, cond)
        return to_clean(policy.prediction, output, x, at), x  # after a window, the graph goes on around the network


def _check(ctx: Context, grad: GradWindow, record: Record) -> None:
    steering, progress = ctx.steering, [i / ctx.levels.steps for i in range(ctx.levels.steps)]
    if grad is not never and any(steering.tilting(done) for done in progress):
        raise ValueError(
            f"{steering} needs gradients of its own, so it cannot steer a rollout that builds a training graph"
        )
    if (grad is not never or record == "path") and any(steering.again(done) for done in progress):
        raise ValueError(
            f"{steering} walks steps more than once, which has no log-probability: it cannot steer a rollout that is recorded or "
            "trained on"
        )
    check(ctx)


def check(ctx: Context) -> None:
    """Raises before any network runs if the steering cannot work in this run, or a reward of it without prompts."""
    for reward in ctx.steering.rewards():
        if reward.needs_prompt and not ctx.prompts:
            raise ValueError(f"{reward.name} needs one prompt a sample, and this run has none: pass prompts=…")
    if ctx.cond.begin is not None and not ctx.steering.begins:
        raise ValueError(f"{ctx.steering} takes the initial noise for a state, so it cannot begin from given latents")
    ctx.steering.check(ctx)


def shaped(noise: Noise, policy: Policy) -> Noise:
    """The noise; of the policy's native size if it has none."""
    if isinstance(noise, SeededNoise) and noise.shape is None:
        return SeededNoise(noise.seeds, policy.shape(policy.size), device=policy.device, stream=noise.stream)
    return noise


def row_by_row(cond: Cond, prompts: Sequence[str | Prompt], rows: int, particles: int) -> tuple[Cond, list[Prompt]]:
    """Conditions and prompts, given one a prompt or one a sample, as one a sample."""
    if particles < 1:
        raise ValueError(f"particles must be ≥ 1; got {particles}")
    if rows % particles:
        raise ValueError(f"noise(0) has {rows} rows, which {particles} particles a prompt do not divide")
    if len(cond) == rows // particles:
        cond = cond.repeat(particles)
    if len(cond) != rows:
        raise ValueError(f"cond needs one row a prompt ({rows // particles}) or one a sample ({rows}); got {len(cond)}")
    prompts = as_prompts(list(prompts))
    if prompts and len(prompts) == rows // particles:
        prompts = [p for p in prompts for _ in range(particles)]
    if prompts and len(prompts) != rows:
        raise ValueError(
            f"prompts needs one entry a prompt ({rows // particles}) or a sample ({rows}); got {len(prompts)}"
        )
    return cond, prompts


def _trajectory(ctx: Context, path: list[Tensor], log_probs: list[Tensor], stopped_at: int | None) -> Trajectory:
    groups, particles = ctx.groups, ctx.particles
    steps = tuple(step for step, _ in ctx.ancestors)
    tables = [taken for _, taken in ctx.ancestors]
    latents = log_prob = None
    if path:
        latents, log_prob = _along_lineages(ctx, path), _along_lineages(ctx, log_probs, first=1)
    return Trajectory(
        x0=ctx.x if stopped_at is None else ctx.clean.x0.detach(),
        levels=ctx.levels,
        cond=ctx.cond,
        latents=latents,
        log_prob=log_prob,
        stochastic=ctx.kernel.stds(ctx.levels) > 0,
        log_w=ctx.log_w,
        log_z=ctx.log_z,
        ess=torch.stack(ctx.ess, 1) if ctx.ess else torch.zeros(groups, 0, dtype=torch.float64),
        ancestors=torch.stack(tables, 1) if tables else torch.zeros(groups, 0, particles, dtype=torch.long),
        selected_at=steps,
        rewards=ctx.rows.get("reward") if stopped_at is None else None,
        media=ctx.media if stopped_at is None else None,
        failures={name: n for name, count in ctx.failures.items() if (n := int(count))},
        ledger=ctx.ledger,
        stopped_at=stopped_at,
    )


def _along_lineages(ctx: Context, states: list[Tensor], first: int = 0) -> Tensor:
    """Stacks per-step rows so that each row holds its own ancestors' values. Entry j was made before selections at steps > j."""
    offsets = torch.arange(ctx.groups)[:, None] * ctx.particles
    rows = torch.arange(ctx.groups * ctx.particles)
    taken = {step: (ancestors + offsets).flatten() for step, ancestors in ctx.ancestors}
    traced = []
    for j in reversed(range(len(states))):
        if (step := j + first) in taken:
            rows = taken[step][rows]
        traced.append(states[j][rows.to(states[j].device)])
    return torch.stack(traced[::-1], 1)
