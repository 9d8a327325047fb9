"""Laws of training: gradients are slopes and cost what they must, adapters come off, and are read by plain diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from rewards.contract import Broken, Inapplicable
from samplers import ODE, GradWindow, always, never
from samplers.policy import Checkpointing

from ..adapters import Lora, add_lora, load_lora, save_adapter
from ..footprint import stored
from ..memory import Memory
from .trial import Trial, double, few, quietly, seeded

__all__ = ["adapter", "gradient", "recomputing", "saved_adapter"]

SLOPES = {
    True: ((1e-5, 1e-3, 1e-7), 1e-3),
    False: ((3e-2, 1e-2, 3e-3), 5e-2),
}  # in float64 or not: steps, error allowed
HEARD = 1e-2  # share of its output by which a LoRA should move a network, to be told from rounding
STATES = 8  # states of a step that a rollout may keep for its backward pass


def gradient(trial: Trial) -> str:
    """The gradient with respect to the initial noise is the slope: differences in float64, through two guided steps.

    The graph is cut or bent in `predict`: look for detach, no_grad, in-place changes, and casts through another type.
    """
    with double(trial.policy) as exact:
        start = trial.noise(trial.small, 0, [0])(0).to(trial.policy.dtype)
        noise = start.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(_value(trial, noise, always), noise)
        told = _slope(lambda h, d: _value(trial, start + h * d), [slope], exact)
    x0 = trial.noise(trial.small, 0, [0])(0).detach().requires_grad_()
    (slope,) = torch.autograd.grad(trial.policy.decode(x0).sum(), x0)
    if not bool(slope.isfinite().all() and slope.count_nonzero()):
        raise Broken("no finite gradient comes through the decoder")
    return f"{told}; the decoder lets it through"


def adapter(trial: Trial) -> str:
    """A LoRA hears the gradient, changes samples, and switched off leaves the base, bit for bit.

    Look for layers that the network calls by their weights instead of as modules, and for another path than `policy.network`.
    """
    base = trial.run(trial.small, trial.cond(trial.scale), ODE(), steps=2).x0
    with _with_lora(trial):
        tuned = trial.run(trial.small, trial.cond(trial.scale), ODE(), steps=2).x0
        if torch.equal(tuned, base):
            raise Broken("a LoRA of random weights changes nothing")
        with trial.policy.acting_as("reference"):
            off = trial.run(trial.small, trial.cond(trial.scale), ODE(), steps=2).x0
        if not torch.equal(off, base):
            raise Broken(f"switched off, it leaves a difference of {trial.apart(off, base):.2g}")
        with double(trial.policy) as exact:
            weights = list(trial.policy.trainable.values())
            start = trial.noise(trial.small, 0, [0])(0).to(trial.policy.dtype)
            found = torch.autograd.grad(
                _value(trial, start, always), weights, allow_unused=True, materialize_grads=True
            )
            kept = [w.detach().clone() for w in weights]

            def moved(h: float, *d: Tensor) -> Tensor:
                for weight, own, step in zip(weights, kept, d, strict=True):
                    weight.data = own + h * step
                return _value(trial, start)

            told = _slope(moved, found, exact)
    reached = sum(bool(f.count_nonzero()) for f in found)
    return f"reaches {reached} of {len(found)} matrices, {told}"


def saved_adapter(trial: Trial) -> str:
    """A saved LoRA gives the same sample in plain diffusers: by the pipeline's own `load_lora_weights`, or by peft if it has none.

    Names in the file are not those the pipeline looks for, or alpha was lost: compare with a file that diffusers wrote.
    """
    pipe, cell = trial.policy.pipe, trial.plain(trial.small)
    trial.need_samples()
    with TemporaryDirectory() as folder:
        with _with_lora(trial):
            ours = Trial(trial.policy, None, trial.prompts, trial.sizes, trial.steps, seed=trial.seed).ours(cell)
            files = save_adapter(trial.policy, Path(folder))
        try:
            with quietly(pipe):
                load_lora(pipe, folder)
            theirs = trial.asked(cell, "latent")
        finally:
            _unwrap(trial.policy.network)
    gap = trial.same(trial.policy.pack(ours), theirs, "samples with the LoRA here and in diffusers")
    moved = trial.apart(ours, trial.ours(cell))
    if not moved > 2 * gap:
        raise Broken("a LoRA of random weights changes nothing")
    return f"{files[0].name}: differ by {gap:.1g}; without it they moved by {moved:.2g}"


def recomputing(trial: Trial) -> str:
    """Recomputing steps or blocks in the backward pass changes no gradient, and what is kept stays flat in the number of steps.

    The network draws randomness, keeps state between calls, or loses arguments where it recomputes its blocks. If only 'block' is
    wrong, train with checkpointing 'step'.
    """
    policy, chunk = trial.policy, trial.policy.decode_chunk
    before: Checkpointing = policy.checkpointing
    known: list[Checkpointing] = ["none", "step", "block"]
    ways = known[: 3 if hasattr(policy.network, "enable_gradient_checkpointing") else 2]
    found, kept, fewer = {}, {}, 0
    try:
        for how in ways:
            Memory(how, decode_chunk=chunk).apply(policy)
            found[how], kept[how] = _graph(trial, 4)
            fewer = _graph(trial, 2)[1] if how == "step" else fewer
    finally:
        Memory(before, decode_chunk=chunk).apply(policy)
    for how in ways[1:]:
        trial.same(found[how], found["none"], f"gradients with checkpointing '{how}' and without")
        if not kept[how] < kept["none"]:
            raise Broken(f"checkpointing '{how}' keeps {kept[how]:,} bytes, no less than {kept['none']:,} without")
    state = found["none"].nbytes
    grown = (kept["step"] - fewer) / 2 / state
    if grown > STATES:
        raise Broken(f"a step more keeps {grown:.3g} states; allowed are {STATES}")
    shares = [f"'{how}' keeps {kept[how] / kept['none']:.1%}" for how in ways[1:]]
    return f"{', '.join(shares)} of the bytes; a step more, {grown:.2g} states"


def _value(trial: Trial, start: Tensor, grad: GradWindow = never) -> Tensor:
    """A random linear function of the sample of the first prompt after two guided steps from `start`."""
    cond = trial.cond(trial.scale, [0])
    x0 = trial.run(trial.small, cond, ODE(), 2, noise=lambda i: start if i == 0 else 0 * start, grad=grad).x0
    weight = torch.randn(x0.shape, generator=seeded(1), dtype=torch.float64).to(x0.device)
    return (weight * x0).sum()


def _slope(value: Callable[..., Tensor], found: Sequence[Tensor], exact: bool) -> str:
    """Raises unless gradients are the slope of `value(h, *directions)` along themselves, by central differences."""
    largest = max(float(g.abs().max()) for g in found)
    if not 0 < largest < float("inf"):
        raise Broken(f"no gradient arrives (the largest is {largest:g})")
    ways = [g / largest for g in found]
    expected = sum(float((g.double() * d).sum()) for g, d in zip(found, ways, strict=True))
    sizes, allowed = SLOPES[exact]
    slopes = []
    for h in sizes:
        slopes.append((float(value(h, *ways)) - float(value(-h, *ways))) / (2 * h))
        if (error := abs(slopes[-1] / expected - 1)) < allowed:
            return f"relative error {error:.1g} in {'float64' if exact else 'its own precision'}"
    raise Broken(f"differences give {few(torch.tensor(slopes))}, the gradient {expected:.4g}")


def _graph(trial: Trial, steps: int) -> tuple[Tensor, int]:
    """The gradient at the initial noise through guided steps, and the bytes kept for it, weights aside."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in trial.policy.parameters() if stored(p)}

    def keep(tensor: Tensor) -> Tensor:
        if stored(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    start = trial.noise(trial.small, 0, [0])(0).detach().requires_grad_()
    cond = trial.cond(trial.scale, [0])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x0 = trial.run(trial.small, cond, ODE(), steps, noise=lambda i: start if i == 0 else 0 * start, grad=always).x0
    (slope,) = torch.autograd.grad(x0.float().square().sum(), start)
    return slope, sum(size for pointer, size in kept.items() if pointer not in own)


@contextmanager
def _with_lora(trial: Trial) -> Iterator[None]:
    """The network with a LoRA of random weights, alpha not its rank, for a while."""
    policy = trial.policy
    if policy.adapter or policy.trainable:
        raise Inapplicable("the model carries adapters or trainable weights already: check its base")
    try:
        add_lora(policy, Lora(rank=4, alpha=8), seed=0)
        x, at = trial.noise(trial.small, 0, [0])(0).to(policy.dtype), policy.levels(trial.steps, trial.small)[1]
        with torch.no_grad():
            base = policy.output(x, at, trial.cond(rows=[0]))
            for strength in (0.05, 0.5, 5.0):  # until it is heard
                generator = seeded(2)
                for name, weight in policy.trainable.items():
                    if "lora_B" in name:
                        weight.data = strength * torch.randn(weight.shape, generator=generator).to(weight)
                if trial.apart(policy.output(x, at, trial.cond(rows=[0])), base) > HEARD:
                    break
        yield
    finally:
        _unwrap(policy.network)


def _unwrap(network: nn.Module) -> None:
    """Takes adapters off."""
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(network)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(network):
            delattr(network, name)
    network.requires_grad_(False)
