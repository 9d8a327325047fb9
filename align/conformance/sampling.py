"""Laws of sampling: what a model makes is what its pipeline makes, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewards import Brightness, Prompt
from rewards.contract import Broken, Inapplicable
from samplers import DDIM, FeynmanKac, Kernel, SeededNoise

from ..batches import Steps
from ..evidence import law as law_of
from .trial import Cell, Trial, few, plainly, seeded

__all__ = ["batches", "decode", "encode", "guidance", "half", "levels", "replay", "samples", "steering", "texts"]

BF16 = 0.1  # relative error of a clean estimate


def levels(trial: Trial) -> str:
    """The run walks the times that the pipeline's scheduler walks.

    Compare `levels(steps, size)` with what the pipeline passes to `set_timesteps`: its shift for this size, its own sigmas, its
    spacing.
    """
    for size in trial.sizes or ():
        with trial.first_order():
            ours, theirs = trial.policy.levels(trial.steps, size), trial.times(trial.plain(size)).cpu().double()
        if len(theirs) - ours.steps not in (0, 1):  # some name the end, too
            raise Broken(f"{ours.steps} steps at size {size}, the scheduler takes {len(theirs)}")
        gap = (ours.t[:-1] - theirs[: ours.steps]).abs().max() / theirs.abs().max()
        if gap > 1e-6:
            raise Broken(f"at size {size} times are {few(ours.t[:-1])}; the scheduler's are {few(theirs)}")
    return f"{trial.steps} steps, sizes {_sizes(trial)}"


def samples(trial: Trial) -> str:
    """Without guidance a sample is the pipeline's own: two sizes, prompts of different lengths.

    `predict` or `encode` is not what the pipeline does: look at the time's scale, the sign and channels of the output, how latents
    are packed, and which conditions the network gets.
    """
    gaps = [_equal(trial, trial.plain(size)) for size in trial.sizes or ()]
    told = plainly(trial.policy.pipe.scheduler)[1]
    return f"differ by {max(gaps):.1g} of the largest latent" + (f"; {told}" if told else "")


def guidance(trial: Trial) -> str:
    """With guidance a sample is the pipeline's own, negative prompts are heard, and the scale costs what it must.

    Look at the branches: what an empty negative embeds to, `guided` (renormalised?), where the scale enters (an input of the
    network, or two branches, not both), and which scale means none in the pipeline (`published`).
    """
    trial.need_samples()
    policy, size = trial.policy, trial.small
    cells = [Cell(one, trial.scale, negatives=i == 0) for i, one in enumerate(trial.sizes or ())]
    gaps = [_equal(trial, cell) for cell in cells]
    rows = trial.run(size, trial.cond(trial.scale), steps=2).ledger.counts["network"] / 2 / len(trial.prompts)
    if rows != 1 + policy.contrasts:
        raise Broken(f"a guided step calls the network on {rows:g} rows a sample; expected {1 + policy.contrasts}")
    moved = trial.apart(trial.ours(cells[0]), trial.ours(trial.plain(size)))
    told = f"differ by {max(gaps):.1g}; the scale moves them by {moved:.2g}"
    if not policy.contrasts:
        return f"{told}, an input of the network" if moved else f"differ by {max(gaps):.1g}; the model takes no scale"
    heard = trial.apart(trial.ours(Cell(size, trial.scale, negatives=False)), trial.ours(cells[0]))
    if min(moved, heard) <= max(1e-6, 2 * max(gaps)):
        raise Broken(f"the scale moves samples by {moved:.1g}, a negative prompt by {heard:.1g}")
    return f"{told}, negative prompts by {heard:.2g}"


def decode(trial: Trial) -> str:
    """The image of a latent is the pipeline's own.

    Look at what the pipeline does to latents before `vae.decode`: scaling factor, shift, mean and standard deviation, unpacking;
    and to images after it.
    """
    trial.need_samples()
    gap, allowed = 0.0, 1e-4 if trial.policy.dtype == torch.float32 else 5e-2
    for size in trial.sizes or ():
        cell = trial.plain(size)
        with torch.no_grad():
            ours = trial.policy.decode(trial.ours(cell))
        theirs = trial.asked(cell, "pt")
        if ours.shape != theirs.shape or ours.shape[1:] != (3, *size):
            raise Broken(f"at size {size} images are {tuple(ours.shape)}, the pipeline's {tuple(theirs.shape)}")
        if not bool(ours.isfinite().all() and ours.min() >= 0 and ours.max() <= 1):
            raise Broken("pixels are not finite, or outside [0, 1]")
        gap = max(gap, float((ours.double() - theirs.to(ours).double()).abs().max()))
        if gap > allowed:
            raise Broken(f"pixels at size {size} differ by up to {gap:.2g}; allowed is {allowed:.0e}")
    return f"pixels differ by {gap:.1g}"


def encode(trial: Trial) -> str:
    """Encoding images undoes the scale of decoding latents.

    `scaled` and `unscaled` must be inverse to each other, and `encode_media` must use the first.
    """
    policy, size = trial.policy, trial.small
    media = policy.decode(torch.randn(1, *policy.shape(size), generator=seeded(0)).to(policy.device)).detach()
    try:
        x = policy.encode_media(media)
    except (NotImplementedError, AttributeError) as error:
        raise Inapplicable(f"no encoder: {error}") from error
    if x.shape[1:] != policy.shape(size):
        raise Broken(f"media of size {size} become latents {tuple(x.shape[1:])}; expected {policy.shape(size)}")
    with torch.no_grad():
        pixels = (2 * media - 1).to(policy.device, policy.vae.dtype)
        own = policy.unscaled(x.to(policy.vae.dtype), policy.vae.config).float()
        gap = trial.apart(own, policy.encoded(pixels).float().view_as(own))
        again = trial.apart(policy.encode_media(policy.decode(x)).float(), x.float())
    if gap > trial.tolerance:
        raise Broken(f"encoded, then brought to the autoencoder's scale, latents differ from its own by {gap:.2g}")
    return f"scale undone to {gap:.1g}; encoding a decoded latent moves it by {again:.2g} (measured, not judged)"


def batches(trial: Trial) -> str:
    """No sample depends on its neighbours, nor on the levels these are at.

    Look for statistics over the batch, masks or lengths taken from one row, times taken from the first row, and padding that is
    heard.
    """
    policy, size, rows = trial.policy, trial.small, range(len(trial.prompts))
    cond, gap = trial.cond(trial.scale), 0.0
    together = trial.run(size, cond, steps=2).x0
    for row in rows:
        alone = trial.run(size, trial.cond(trial.scale, [row]), steps=2, rows=[row]).x0
        gap = max(gap, trial.same(together[[row]], alone, "a sample alone and the same in a batch"))
    table = policy.levels(trial.steps, size)
    x = trial.noise(size, 0)(0).to(policy.dtype)
    with torch.no_grad():
        at = torch.tensor([1 + row % (trial.steps - 1) for row in rows])
        mixed = policy.output(x, table[at], cond)
        for row in rows:
            one = policy.output(x[[row]], table[int(at[row])], trial.cond(trial.scale, [row]))
            gap = max(gap, trial.same(mixed[[row]], one, "a row alone and the same beside rows at other levels"))
    return f"alone and together differ by {gap:.1g}"


def texts(trial: Trial) -> str:
    """A text goes through the encoders once, and its embedding does not depend on its batch.

    Embed each text alone in `embed(text, negative)`, and leave the cache to `LatentPolicy.encode`.
    """
    policy, calls = trial.policy, [0]
    parts = [m for m in policy.pipe.components.values() if isinstance(m, nn.Module)]
    encoders = [m for m in parts if m not in (policy.network, policy.vae)]

    def count(*_: object) -> None:
        calls[0] += 1

    hooks = [m.register_forward_hook(count) for m in encoders]
    try:
        new = [Prompt(p.text[::-1], meta=p.meta) for p in trial.shown(trial.small)]
        together = policy.encode(new)
        first, calls[0] = calls[0], 0
        alone = policy.encode(new[:1])
        policy.encode(new)
    finally:
        for hook in hooks:
            hook.remove()
    if calls[0]:
        raise Broken(f"texts that were embedded already went through the encoders again, in {calls[0]} calls")
    for name, value in alone.positive.items():
        row = together.positive[name][:1]
        cut = row[tuple(slice(n) for n in value.shape)]
        if not torch.equal(cut, value) or int(row.count_nonzero()) != int(value.count_nonzero()):
            raise Broken(f"{name} of a text depends on the texts beside it")
    return f"{first} calls of {len(encoders)} encoders for {len(new)} texts, then none"


def replay(trial: Trial) -> str:
    """A replayed step has exactly the log-probability it was drawn with: ratios are 1.

    Something in `predict` differs between one level for all rows and one a row, or draws randomness (dropout?): keep arithmetic
    alike.
    """
    policy = trial.policy
    kernel, cond = _stochastic(trial), trial.cond(trial.scale)
    run = trial.run(trial.small, cond, kernel, record="path")
    assert run.latents is not None and run.log_prob is not None
    asked = [i for i in range(run.levels.steps) if run.stochastic[i]]
    worst = torch.zeros(())
    for i in asked:
        at = torch.full((len(run.x0),), i)
        rows = Steps(run.latents[:, i], run.latents[:, i + 1], at, cond, kernel, run.levels)
        with torch.no_grad():
            again = law_of(policy, rows).log_prob(rows.following)
        worst = torch.maximum(worst, (again - run.log_prob[:, i]).abs().max().cpu())
    if worst > 0:
        raise Broken(f"log-probabilities of {type(kernel).__name__} steps differ by up to {float(worst):.3g} on replay")
    return f"ratios of {len(asked)} steps of {type(kernel).__name__} are 1"


def half(trial: Trial) -> str:
    """In bfloat16 a clean estimate is within 10 % of that in float32, and comes in float32.

    Find what loses precision: times, level arithmetic or conditions computed in half precision instead of at the network's door.
    """
    if trial.reload is None or trial.policy.dtype != torch.float32:
        raise Inapplicable("compared with float32 only, and the model is loaded a second time for it")
    policy, size = trial.policy, trial.small
    at = policy.levels(trial.steps, size)[trial.steps // 2]
    x = trial.noise(size, 0)(0)
    low = trial.reload("bfloat16")
    with torch.no_grad():
        full = policy.denoise(x, at, trial.cond(trial.scale)).x0
        cond = low.encode(trial.shown(size)).with_guidance(trial.scale)
        rough = low.denoise(x.to(low.dtype), at, cond).x0
        image = low.decode(rough)
    if low.dtype != torch.bfloat16 or rough.dtype != torch.float32 or image.dtype != torch.float32:
        raise Broken(f"a {low.dtype} network gives {rough.dtype} estimates and {image.dtype} images; expected float32")
    error = float((rough - full).norm() / full.norm())
    if not error < BF16:
        raise Broken(f"estimates differ by {error:.1%}; allowed are {BF16:.0%}")
    return f"estimates differ by {error:.1%}"


def steering(trial: Trial) -> str:
    """Steered by one particle a sample is a plain one; by several, weights are weights and groups do not mix.

    A row's conditions, states or noise are not taken along when rows are resampled: everything a row needs belongs into its `Cond`.
    """
    policy, size = trial.policy, trial.small
    cond, prompts, kernel = trial.cond(trial.scale), trial.shown(size), _stochastic(trial)
    how: dict[str, Any] = {"kernel": kernel, "prompts": prompts, "steering": FeynmanKac(Brightness(), beta=0.01)}
    plain = trial.run(size, cond, kernel)
    if not torch.equal(trial.run(size, cond, **how).x0, plain.x0):
        raise Broken("one particle differs from a plain sample")
    seeds = [10 * p + k for p in range(len(prompts)) for k in range(3)]
    noise = SeededNoise(seeds, policy.shape(size), device=policy.device)
    run = trial.run(size, cond, **how, noise=noise, particles=3)
    weights = run.weights.sum(1)
    if not bool(run.log_z.isfinite().all() and ((weights - 1).abs() < 1e-9).all() and run.x0.isfinite().all()):
        raise Broken(f"log evidence {run.log_z.tolist()}, sums of weights {weights.tolist()}")
    first = trial.run(size, cond[[0]], **{**how, "prompts": prompts[:1], "noise": noise[:3], "particles": 3})
    if not torch.equal(first.lineage[0], run.lineage[0]):
        raise Broken("another prompt beside it changes which particles of a prompt survive")
    trial.same(first.x0, run.x0[:3], "particles of a prompt alone and beside another")
    return f"{run.unique_ancestors.tolist()} of 3 particles live on, log evidence {few(run.log_z)}"


def _equal(trial: Trial, cell: Cell) -> float:
    """Raises unless the loop's latents are the pipeline's; how far apart they are."""
    gap = trial.gap(cell)
    if gap > trial.tolerance:
        asked = f"guidance {cell.guidance:g}{', negative prompts' if cell.negatives else ''}"
        told = f"latents differ by {gap:.2g} of the largest, allowed is {trial.tolerance:.0e}"
        raise Broken(f"at size {cell.size}, {asked}, {told}")
    return gap


def _stochastic(trial: Trial) -> Kernel:
    """The model's own kernel, or ancestral sampling where that adds no noise."""
    kernel = trial.policy.kernel
    return kernel if kernel.diversifies(trial.policy.levels(trial.steps, trial.small)) else DDIM(1.0)


def _sizes(trial: Trial) -> str:
    return " and ".join("x".join(map(str, size)) for size in trial.sizes or ())
