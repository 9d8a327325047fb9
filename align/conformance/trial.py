"""A model on trial: its samples by kilter's loop and by its own diffusers pipeline, asked for the same thing.

Both begin with the same noise. Where the pipeline's scheduler adds noise of its own (latent consistency), it gets generators that
make what the loop is given. A multistep or clipping scheduler is replaced, for the comparison alone, by its first-order form, since
the loop walks first-order steps; Euler's start is brought to variance 1, as everywhere here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewards import Prompt
from rewards.contract import Broken, Inapplicable
from samplers import ODE, Cond, Kernel, NoiseBank, Policy, Size, Trajectory, rollout
from samplers.latents import LatentPolicy

__all__ = ["Cell", "Trial", "double", "exactly", "few", "plainly", "quietly", "seeded"]

PROMPTS = (Prompt("a cat", negative="blurry"), Prompt("a red ball in a box", negative="a bad drawing"))
TOLERANCE = {torch.float32: 5e-5, torch.float16: 3e-2, torch.bfloat16: 0.1}  # shares of the largest latent
KEPT = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "LCMScheduler", "SCMScheduler")
RENOISING = ("LCMScheduler", "SCMScheduler")
EULER = {"EulerAncestralDiscreteScheduler": "EulerDiscreteScheduler"}
EULER |= {"FlowMatchHeunDiscreteScheduler": "FlowMatchEulerDiscreteScheduler"}
DIFFUSION = ("DDIM", "DDPM", "PNDM", "UniPC", "DEIS", "Heun", "LMS", "DPMSolverSinglestep")


@dataclass(frozen=True)
class Cell:
    """One way to ask for samples: a size, a guidance scale, and whether prompts keep their negatives."""

    size: Size
    guidance: float
    negatives: bool = True


@dataclass
class Trial:
    """What the laws look at.

    Attributes:
        policy: on trial.
        reload: loads the same model in a precision, by its name; None where that cannot be asked.
        prompts: two or more, of different lengths, with negatives.
        sizes: of media in pixels, one of them not square; None takes two near an eighth of the native size.
        steps: of a sample; a divisor of 1000.
        guidance: above 1; None takes the model's own, or 4.
        seed: of the first sample.
    """

    policy: LatentPolicy
    reload: Callable[[str], Policy] | None = None
    prompts: tuple[Prompt, ...] = PROMPTS
    sizes: tuple[Size, ...] | None = None
    steps: int = 4
    guidance: float | None = None
    seed: int = 0
    _cells: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        policy = self.policy
        if self.sizes is None:
            unit = math.lcm(policy.multiple, 8)  # some pipelines take multiples of 8 only
            height, width = (max(unit, round(n / 8 / unit) * unit) for n in policy.size)
            self.sizes = ((height, width), (max(height + unit, round(1.5 * height / unit) * unit), width))
        for size in self.sizes:
            policy.shape(size)
        if self.guidance is None:
            self.guidance = policy.guidance if policy.guidance > 1 else 4.0
        if not self.guidance > 1:
            raise ValueError(f"guidance must be above 1, since without guidance all is asked too; got {self.guidance}")
        if self.steps < 2 or 1000 % self.steps:
            raise ValueError(f"steps must be a divisor of 1000, at least 2, since DDIM rounds others; got {self.steps}")
        if len({len(p.text) for p in self.prompts}) < 2:
            raise ValueError("give two or more prompts of different lengths")

    @property
    def tolerance(self) -> float:
        """By which equal latents may differ, as a share of the largest."""
        return TOLERANCE.get(self.policy.dtype, TOLERANCE[torch.float32])

    @property
    def small(self) -> Size:
        """The first of the sizes."""
        assert self.sizes is not None
        return self.sizes[0]

    @property
    def scale(self) -> float:
        """The guidance scale."""
        assert self.guidance is not None
        return self.guidance

    def plain(self, size: Size) -> Cell:
        """Without guidance."""
        return Cell(size, 1.0, negatives=False)

    def shown(self, size: Size, rows: Sequence[int] | None = None, negatives: bool = True) -> list[Prompt]:
        """Prompts, each with a picture of this size for models that look at one."""
        height, width = size[-2:]
        pictures = [torch.rand(3, height, width, generator=seeded(100 + row)) for row in range(len(self.prompts))]
        shown = [
            Prompt(p.text, p.negative if negatives else "", {"control": picture})
            for p, picture in zip(self.prompts, pictures, strict=True)
        ]
        return [shown[row] for row in (range(len(shown)) if rows is None else rows)]

    def cond(self, guidance: float = 1.0, rows: Sequence[int] | None = None, size: Size | None = None) -> Cond:
        """Conditions of prompts at a guidance scale."""
        return self.policy.encode(self.shown(size or self.small, rows)).with_guidance(guidance)

    def noise(self, size: Size, steps: int, rows: Sequence[int] | None = None) -> NoiseBank:
        """Noise of a run as schedulers draw it: the start, and one generator a row from which every step draws."""
        shape, seeds = self.policy.shape(size), self.seeds(rows)
        starts = [torch.randn(shape, generator=seeded(seed)) for seed in seeds]
        streams = self.generators(rows)
        kind = self.policy.dtype
        later = [torch.stack([torch.randn(shape, generator=g, dtype=kind) for g in streams]) for _ in range(steps)]
        return NoiseBank([n.to(self.policy.device) for n in (torch.stack(starts), *later)])

    def seeds(self, rows: Sequence[int] | None = None) -> list[int]:
        """One a prompt."""
        return [self.seed + row for row in (range(len(self.prompts)) if rows is None else rows)]

    def generators(self, rows: Sequence[int] | None = None) -> list[torch.Generator]:
        """What steps of each row draw from."""
        return [seeded(1000 + seed) for seed in self.seeds(rows)]

    @property
    def kernel(self) -> Kernel:
        """What the pipeline's scheduler does in a step."""
        return self.policy.kernel if type(self.policy.pipe.scheduler).__name__ in RENOISING else ODE()

    def run(self, size: Size, cond: Cond, kernel: Kernel | None = None, steps: int | None = None, **how) -> Trajectory:
        """Samples by kilter's loop; `how` goes to `rollout`, `rows` says which prompts' seeds are used."""
        steps = steps or self.steps
        noise = how.pop("noise", None) or self.noise(size, steps, how.pop("rows", None))
        return rollout(self.policy, kernel or self.kernel, cond, self.policy.levels(steps, size), noise, **how)

    def ours(self, cell: Cell) -> Tensor:
        """Latents by the loop, made once."""
        if ("ours", cell) not in self._cells:
            with self.first_order():
                cond = self.policy.encode(self.shown(cell.size, negatives=cell.negatives))
                found = self.run(cell.size, cond.with_guidance(cell.guidance)).x0
            self._cells["ours", cell] = found
        return self._cells["ours", cell]

    def theirs(self, cell: Cell) -> Tensor:
        """Latents by the pipeline, in its own layout, made once."""
        if ("theirs", cell) not in self._cells:
            self.ours(cell)  # first, before the pipeline leaves a trace on the parts they share
            self._cells["theirs", cell] = self.asked(cell, "latent")
        return self._cells["theirs", cell]

    def asked(self, cell: Cell, output: str) -> Tensor:
        """What the pipeline answers: "latent" or "pt" (images in [0, 1])."""
        policy = self.policy
        with self.first_order(), quietly(policy.pipe):
            x = self.noise(cell.size, 0)(0).to(policy.dtype) / self._start(cell.size)
            given = policy.published(
                self.shown(cell.size, negatives=cell.negatives), cell.guidance, self.steps, cell.size, x
            )
            if type(policy.pipe.scheduler).__name__ in RENOISING:
                given["generator"] = self.generators()
            found = policy.pipe(**given, output_type=output).images
            self._cells["times", cell] = policy.pipe.scheduler.timesteps
        return found

    def times(self, cell: Cell) -> Tensor:
        """The times that the pipeline's scheduler went through."""
        self.theirs(cell)
        return self._cells["times", cell]

    def gap(self, cell: Cell) -> float:
        """How far the loop's latents are from the pipeline's, as a share of the largest."""
        return self.apart(self.policy.pack(self.ours(cell)), self.theirs(cell))

    def apart(self, ours: Tensor, theirs: Tensor) -> float:
        """The largest difference, as a share of the largest value or of 1.

        Raises:
            Broken: other shapes, or values that are not finite.
        """
        if ours.shape != theirs.shape:
            raise Broken(f"one is {tuple(ours.shape)}, the other {tuple(theirs.shape)}")
        ours, theirs = ours.double(), theirs.double()
        if not bool(ours.isfinite().all() & theirs.isfinite().all()):
            raise Broken("latents are not finite")
        return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))

    def same(self, ours: Tensor, theirs: Tensor, what: str) -> float:
        """Raises unless latents agree to `tolerance`; how far apart they are."""
        gap = self.apart(ours, theirs)
        if gap > self.tolerance:
            raise Broken(f"{what} differ by {gap:.2g} of the largest latent; allowed is {self.tolerance:.0e}")
        return gap

    def need_samples(self) -> None:
        """Raises where plain samples differ from the pipeline's already: what follows from them says nothing new."""
        if self.gap(self.plain(self.small)) > self.tolerance:
            raise Inapplicable("samples differ already")

    def _start(self, size: Size) -> float:
        """By what the pipeline multiplies its initial latents beyond variance 1."""
        scheduler = self.policy.pipe.scheduler
        if type(scheduler).__name__ != "EulerDiscreteScheduler":
            return 1.0
        scheduler.set_timesteps(self.steps)
        return float(scheduler.init_noise_sigma / (scheduler.sigmas[0] ** 2 + 1) ** 0.5)

    @contextmanager
    def first_order(self) -> Iterator[None]:
        """Gives pipeline and policy the first-order form of the model's scheduler for a while."""
        policy, before = self.policy, self.policy.pipe.scheduler
        try:
            policy.pipe.scheduler = policy.scheduler = plainly(before)[0]
            yield
        finally:
            policy.pipe.scheduler = policy.scheduler = before


def plainly(scheduler: Any) -> tuple[Any, str]:
    """A scheduler's first-order form that neither clips nor draws noise beyond its kind, and what was changed, or ""."""
    import diffusers

    name, kind = type(scheduler).__name__, type(scheduler)
    change: dict[str, Any] = {}
    if name in EULER:
        kind = getattr(diffusers, EULER[name])
    elif name == "DPMSolverMultistepScheduler":
        change = {"solver_order": 1, "algorithm_type": "dpmsolver++", "thresholding": False}
    elif name not in KEPT and name.startswith(DIFFUSION):
        kind, change = diffusers.DDIMScheduler, {"clip_sample": False, "thresholding": False}
        if scheduler.config.get("timestep_spacing") == "linspace":  # whose steps diffusers' DDIM does not take
            change["timestep_spacing"] = "leading"
    known = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    changed = [f"{k} {v}" for k, v in change.items() if k in known and known[k] != v]
    made = kind.from_config({**known, **change}) if kind is not type(scheduler) or changed else scheduler
    told = [kind.__name__] * (kind is not type(scheduler)) + changed
    return made, f"{name} compared as {', '.join(told)}" if told else ""


@contextmanager
def exactly() -> Iterator[None]:
    """Convolutions of GPUs in full float32 for a while, whose shortcuts differ with the batch."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def double(policy: Policy, limit: float = 4e9) -> Iterator[bool]:
    """A policy's network in float64 for a while, if that takes at most `limit` bytes; whether it does.

    What stands beside the network, such as a ControlNet, goes with it. Casting there and back is exact.
    """
    network = nn.ModuleList([m for name, m in policy.named_children() if name in ("network", "controlnet")])
    weights = [*network.named_parameters(), *network.named_buffers()]
    kinds = {name: weight.dtype for name, weight in weights}
    fits = 8 * sum(w.numel() for _, w in weights) <= limit and all(w.is_floating_point() for w in network.parameters())
    exact = fits and next(network.parameters()).device.type != "mps"
    try:
        if exact:
            network.double()
        yield exact
    finally:
        if exact:
            for name, weight in [*network.named_parameters(), *network.named_buffers()]:
                weight.data = weight.data.to(kinds[name])


@contextmanager
def quietly(pipe: Any) -> Iterator[None]:
    """A pipeline without its progress bar and remarks."""
    import diffusers

    logs, before = diffusers.utils.logging, getattr(pipe, "_progress_bar_config", None)
    level = logs.get_verbosity()
    pipe.set_progress_bar_config(disable=True)
    logs.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logs.set_verbosity(level)
        pipe.set_progress_bar_config(**(before or {}))


def seeded(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def few(values: Tensor) -> str:
    """The first of some numbers, for messages."""
    return ", ".join(f"{v:.6g}" for v in values.flatten()[:4].tolist()) + (" …" if values.numel() > 4 else "")
