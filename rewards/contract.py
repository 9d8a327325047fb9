"""The laws that every reward obeys, checked on any reward: `kilter check-reward`, and the battery over the classes here.

A law is a function of a `Trial` (a reward, media and prompts) that returns what it measured, raises `Broken` with what went wrong,
or `Inapplicable` with the reason. Differences are in the reward's unit and compared with `tolerance`; where a law allows a change
that matters little (size, 8 bits) it is measured in standard deviations of the scores over the media given.

Laws about samples hold for a `compares` reward as far as whole prompts are moved together.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prompt, Reward, Scores, as_prompts, facts
from .specimens import DAMAGE, doubled, example, interior

__all__ = ["LAWS", "Finding", "Trial", "check"]

ENLARGED = 1.5  # by how much media are enlarged to see whether their size matters
DOUBLE_LIMIT = 4e9  # bytes of weights in float64 beyond which slopes are measured in the reward's own precision
STEPS = (1e-2, 3e-3, 1e-3, 1e-4)  # of finite differences: the best must agree
SLOPE = 2e-2  # relative error allowed there
LONG = "a photo of a red cat and a blue dog in front of the house with two green birds and a car on the road "


class Broken(Exception):
    """The law does not hold."""


class Inapplicable(Exception):
    """The law says nothing about this reward."""


@dataclass(frozen=True)
class Finding:
    """What became of a law.

    Attributes:
        law: its name.
        holds: None where it does not apply.
        detail: what was measured, or why it failed or does not apply.
    """

    law: str
    holds: bool | None
    detail: str


@dataclass
class Trial:
    """What the laws look at.

    Attributes:
        reward: under trial.
        media: B samples in the reward's layout, at least 2, not all alike.
        prompts: one a sample.
        tolerance: by which equal scores may differ, in the reward's unit.
        size: how far scores may move when media are enlarged, in their standard deviations; None only measures.
        rounding: the same for rounding to 8 bits.
        trained: whether the weights mean anything; without it `quality` cannot be expected.
    """

    reward: Reward
    media: Tensor
    prompts: list[Prompt]
    tolerance: float = 1e-4
    size: float | None = None
    rounding: float | None = None
    trained: bool = True
    first: Scores = field(init=False)

    def __post_init__(self) -> None:
        self.first = self.run()

    def run(self, media: Tensor | None = None, prompts: list[Prompt] | None = None) -> Scores:
        """Scores without a graph."""
        with torch.no_grad():
            return self.reward.score(
                self.media if media is None else media, self.prompts if prompts is None else prompts
            )

    @property
    def spread(self) -> float:
        """Standard deviation of the scores over the media given."""
        return max(self.first.total[self.first.total.isfinite()].std().item(), self.tolerance)

    def same(self, scores: Tensor, expected: Tensor, what: str) -> float:
        """Raises unless two sets of scores agree; the largest difference."""
        if not torch.equal(scores.isnan(), expected.isnan()):
            raise Broken(f"{what} changes which samples are judged")
        gap = (scores - expected).nan_to_num(0).abs().max().item()
        if gap > self.tolerance:
            raise Broken(f"{what} moves scores by up to {gap:.3g}; allowed is {self.tolerance:.3g}")
        return gap

    def rows(self, size: int) -> Iterator[list[int]]:
        """Indices of consecutive calls of about `size` samples that keep the samples of a prompt together if need be."""
        if not self.reward.compares:
            yield from (list(range(i, min(i + size, len(self.media)))) for i in range(0, len(self.media), size))
            return
        for text in dict.fromkeys(p.text for p in self.prompts):
            yield [i for i, p in enumerate(self.prompts) if p.text == text]


def described(trial: Trial) -> str:
    """The docstring says range, size and gradient."""
    try:
        return "; ".join(f"{word.lower()} {rest}" for word, rest in facts(type(trial.reward)).items())
    except ValueError as error:
        raise Broken(str(error)) from error


def scores(trial: Trial) -> str:
    """One float32 a sample, most of them finite and not all alike."""
    total = trial.first.total
    for part, values in {"total": total, **trial.first.parts}.items():
        if values.shape != (len(trial.media),) or values.dtype != torch.float32:
            raise Broken(f"{part} is {values.dtype} {tuple(values.shape)}; wanted float32 ({len(trial.media)},)")
    finite = total[total.isfinite()]
    if len(finite) < 2:
        raise Broken(f"{len(finite)} of {len(total)} samples could be judged: give media and prompts that it can judge")
    if not finite.std() > 0:
        raise Broken(f"all {len(finite)} scores are {finite[0].item():.4g}")
    failed = f", {len(total) - len(finite)} could not be judged" if len(finite) < len(total) else ""
    return f"{finite.min().item():.4g} to {finite.max().item():.4g}, spread {trial.spread:.3g}{failed}"


def order(trial: Trial) -> str:
    """Turning the order of the samples round turns the scores."""
    rows = list(range(len(trial.media)))[::-1]
    shuffled = trial.run(trial.media[rows], [trial.prompts[i] for i in rows])
    return f"moved {trial.same(shuffled.total, trial.first.total[rows], 'the order of the samples'):.1g}"


def batches(trial: Trial) -> str:
    """A sample's score does not depend on its neighbours: one at a time, three at a time."""
    gap = 0.0
    for size in (1, 3):
        total = torch.full_like(trial.first.total, torch.nan)
        for rows in trial.rows(size):
            total[rows] = trial.run(trial.media[rows], [trial.prompts[i] for i in rows]).total
        gap = max(gap, trial.same(total, trial.first.total, f"scoring {size} at a time"))
    return f"moved {gap:.1g}"


def padding(trial: Trial) -> str:
    """A neighbour with a much longer prompt changes nothing."""
    if not trial.reward.needs_prompt:
        raise Inapplicable("reads no prompt")
    media = torch.cat([trial.media, trial.media[:1]])
    longer = trial.run(media, [*trial.prompts, Prompt(LONG, meta=trial.prompts[0].meta)]).total
    return f"moved {trial.same(longer[:-1], trial.first.total, 'a long prompt beside them'):.1g}"


def prompt(trial: Trial) -> str:
    """The prompt matters if the class says so, and only then; a missing one is an error."""
    rolled = trial.run(prompts=[*trial.prompts[1:], trial.prompts[0]]).total
    if not trial.reward.needs_prompt:
        trial.same(rolled, trial.first.total, "another prompt (the class says that it reads none)")
        trial.same(trial.run(prompts=[]).total, trial.first.total, "leaving the prompts out")
        return "reads none, needs none"
    if trial.reward.compares:
        return "prompts say who is compared"
    moved = (rolled - trial.first.total).nan_to_num(0).abs().max()
    if not moved > 10 * trial.tolerance and torch.equal(rolled.isnan(), trial.first.total.isnan()):
        raise Broken(f"each sample with its neighbour's prompt scores as before (moved {moved:.2g})")
    try:
        trial.run(prompts=trial.prompts[:-1])
    except ValueError:
        return f"the neighbour's prompt moves scores by up to {moved:.3g}"
    raise Broken("one prompt too few raises no ValueError")


def refusals(trial: Trial) -> str:
    """Media of another range, type or rank are refused, with an error that shows what came."""
    media = trial.media
    wrong = {"a missing dimension": media[0], "a list": [media[0]]}
    if trial.reward.modality != "tokens":
        wrong |= {"values far outside the range": 2 * media - 3, "integers": (255 * media).to(torch.uint8)}
    if trial.reward.modality == "image":
        wrong["channels last"] = media.permute(0, 2, 3, 1)
    for what, given in wrong.items():
        try:
            trial.run(given, trial.prompts)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
        raise Broken(f"{what} is accepted")
    return f"refuses {', '.join(wrong)}"


def broken_samples(trial: Trial) -> str:
    """A sample with NaN in it gets NaN and spoils no other."""
    if trial.reward.modality == "tokens" or trial.reward.compares:
        raise Inapplicable("tokens are integers" if trial.reward.modality == "tokens" else "its samples are compared")
    media = trial.media.clone()
    media[0].view(-1)[0] = torch.nan
    total = trial.run(media).total
    if not total[0].isnan():
        raise Broken(f"a sample with a NaN scores {total[0].item():.4g}")
    trial.same(total[1:], trial.first.total[1:], "a broken neighbour")
    return "NaN for it alone"


def precision(trial: Trial) -> str:
    """Media of any floating type and memory layout are read as they are; scores are float32."""
    if trial.reward.modality == "tokens":
        raise Inapplicable("tokens are integers")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        media = trial.media.to(dtype)
        low, exact = trial.run(media).total, trial.run(media.float()).total
        if low.dtype != torch.float32:
            raise Broken(f"{dtype} media give {low.dtype} scores")
        trial.same(low, exact, f"reading {dtype}".replace("torch.", ""))
    if trial.media.ndim == 4:
        layout = trial.run(trial.media.contiguous(memory_format=torch.channels_last)).total
        trial.same(layout, trial.first.total, "the memory layout")
    return "float16, bfloat16, float64 and channels-last memory"


def device(trial: Trial) -> str:
    """The reward follows its input to another device."""
    if not torch.cuda.is_available():
        raise Inapplicable("there is no GPU here")
    here = trial.media.device
    there = torch.device("cpu" if here.type == "cuda" else "cuda")
    moved = trial.run(trial.media.to(there)).total
    back = trial.run().total.to(here)
    trial.same(back, trial.first.total, "a visit to another device")
    gap = (moved.to(here) - trial.first.total).nan_to_num(0).abs().max().item()
    if gap > 0.05 * trial.spread:
        raise Broken(f"scores on {there.type} differ by up to {gap:.3g}")
    return f"{there.type} moves scores by {gap:.1g}"


def seed(trial: Trial) -> str:
    """Scores are the same each time, whatever the global random state, and leave it alone."""
    state = torch.get_rng_state(), random.getstate()
    try:
        torch.manual_seed(1)
        random.seed(1)
        before = torch.get_rng_state()
        again = trial.run().total
        if not torch.equal(before, torch.get_rng_state()):
            raise Broken("scoring draws from torch's global generator")
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
    return f"moved {trial.same(again, trial.first.total, 'scoring again'):.1g}"


def frozen(trial: Trial) -> str:
    """No weight is trainable, and no parent can switch training mode on."""
    torch.nn.ModuleList([trial.reward]).train()
    training = [name for name, module in trial.reward.named_modules() if module.training]
    trainable = [name for name, weight in trial.reward.named_parameters() if weight.requires_grad]
    if training or trainable:
        raise Broken(f"in training mode: {training[:3]}; trainable: {trainable[:3]}")
    return f"{sum(p.numel() for p in trial.reward.parameters()):,} weights"


def gradient(trial: Trial) -> str:
    """A graph changes no score and reaches every sample; a reward without a gradient says so when asked for one."""
    media = interior(trial.media).requires_grad_()
    if not trial.reward.differentiable:
        try:
            trial.reward.score(media, trial.prompts)
        except RuntimeError:
            return "none, and a request is an error"
        raise Broken("a gradient was asked of a reward that declares none, and no RuntimeError came")
    plain = trial.run(media.detach()).total
    traced = trial.reward.score(media, trial.prompts).total
    if plain.requires_grad or not traced.requires_grad:
        raise Broken("scores carry a graph exactly when none was asked for")
    trial.same(traced.detach(), plain, "asking for a gradient")
    (slope,) = torch.autograd.grad(traced[traced.isfinite()].sum(), media)
    flat = slope.flatten(1).abs().amax(dim=1)[traced.isfinite()]
    if not slope.isfinite().all():
        raise Broken("the gradient is not finite")
    if not (flat > 0).all():
        raise Broken(f"no gradient reaches {int((flat == 0).sum())} of {len(flat)} samples")
    return f"largest {flat.max().item():.3g} a unit of the media"


def slope(trial: Trial) -> str:
    """The gradient is the slope of the score: central differences along it."""
    if not trial.reward.differentiable:
        raise Inapplicable("not differentiable")
    media = interior(trial.media).requires_grad_()
    exact = sum(p.numel() * 8 for p in trial.reward.parameters()) <= DOUBLE_LIMIT
    total = trial.reward.score(media, trial.prompts).total
    (along,) = torch.autograd.grad(total[total.isfinite()].sum(), media)
    kind = torch.float64 if exact else torch.float32
    along = along.to(kind)
    direction = along / along.abs().max()
    expected = (along * direction).sum()
    with doubled(trial.reward) if exact else torch.no_grad():
        slopes = []
        for step in STEPS:
            up, down = (
                trial.run(media.detach().to(kind) + s * direction).total.double().nansum() for s in (step, -step)
            )
            slopes.append((up - down) / (2 * step))
    error = min(abs(s / expected - 1) for s in slopes).item()
    if not error < SLOPE:
        raise Broken(f"differences give {[f'{s:.4g}' for s in slopes]}, the gradient {expected:.4g}")
    return f"relative error {error:.1g}"


def sizes(trial: Trial) -> str:
    """Enlarged media score alike: what a picture shows matters, not how many pixels it has."""
    media = pictures(trial)
    side = [round(ENLARGED * s) for s in media.shape[-2:]]
    large = F.interpolate(media.flatten(0, -4), size=side, mode="bicubic", antialias=True).clamp(0, 1)
    return moved(trial, large.unflatten(0, media.shape[:-3]), f"media {ENLARGED} times as large", trial.size)


def rounding(trial: Trial) -> str:
    """Media rounded to the 8 bits of a file score alike."""
    return moved(trial, (255 * pictures(trial)).round() / 255, "rounding to 8 bits", trial.rounding)


def pictures(trial: Trial) -> Tensor:
    if trial.reward.modality not in ("image", "video"):
        raise Inapplicable(f"made for {trial.reward.modality}")
    return trial.media


def moved(trial: Trial, media: Tensor, what: str, allowed: float | None) -> str:
    gap = (trial.run(media).total - trial.first.total).nan_to_num(0).abs().max().item() / trial.spread
    if allowed is not None and gap > allowed:
        raise Broken(f"{what} moves scores by {gap:.2g} spreads; allowed are {allowed:.2g}")
    return f"{what} moves scores by {gap:.2g} spreads"


def quality(trial: Trial) -> str:
    """Blur, noise and compression lower the mean score, the more the stronger they are."""
    if not trial.reward.claims_quality:
        raise Inapplicable("claims nothing about quality")
    if not trial.trained:
        raise Inapplicable("random weights know no quality")
    media = pictures(trial)
    clean, found = trial.first.total.nanmean().item(), []
    for name, harm in DAMAGE.items():
        means = [clean, *(trial.run(harm(media, s)).total.nanmean().item() for s in (1, 2, 3))]
        if any(after >= before for before, after in pairwise(means)):
            raise Broken(f"more and more {name} scores {[f'{m:.4g}' for m in means]}")
        found.append(f"{name} {means[-1] - clean:+.3g}")
    return ", ".join(found)


def cost(trial: Trial) -> str:
    """Seconds a sample, bytes of weights, and bytes that a gradient keeps: measured, not judged."""
    clock = time.perf_counter()
    trial.run()
    seconds = (time.perf_counter() - clock) / len(trial.media)
    weights = sum(p.numel() * p.element_size() for p in chain(trial.reward.parameters(), trial.reward.buffers()))
    told = f"{1000 * seconds:.3g} ms a sample, {weights / 1e6:.3g} MB of weights"
    if not trial.reward.differentiable:
        return told
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trial.reward.score(trial.media.clone().requires_grad_(), trial.prompts)
    own = {p.untyped_storage().data_ptr() for p in trial.reward.parameters()}
    return f"{told}, {sum(v for k, v in kept.items() if k not in own) / len(trial.media) / 1e6:.3g} MB a sample for a gradient"


LAWS: dict[str, Callable[[Trial], str]] = {
    law.__name__.replace("_", " "): law
    for law in (
        described, scores, order, batches, padding, prompt, refusals, broken_samples, precision, device, seed, frozen, gradient,
        slope, sizes, rounding, quality, cost,
    )
}  # fmt: skip


def check(
    reward: Reward, media: Tensor | None = None, prompts: list[str] | list[Prompt] | None = None, **allowed
) -> list[Finding]:
    """Puts a reward to the test of every law.

    Args:
        reward: to be checked, on the device of the media.
        media, prompts: at least 2 samples in its layout that it can judge, and a prompt each; those of `example` by default.
        allowed: `tolerance`, `size`, `rounding`, `trained`; see `Trial`.

    Raises:
        ValueError: fewer than 2 samples.
    """
    if (media is None) != (prompts is None):
        raise ValueError("give media and prompts together, or neither")
    if media is None or prompts is None:
        media, prompts = example(reward)
    if len(media) < 2:
        raise ValueError(f"{reward.name} needs at least 2 samples to be checked on; got {len(media)}")
    trial = Trial(reward, media, as_prompts(prompts), **allowed)
    findings = []
    for name, law in LAWS.items():
        try:
            holds, detail = True, law(trial)
        except Inapplicable as reason:
            holds, detail = None, str(reason)
        except Broken as fault:
            holds, detail = False, str(fault)
        except Exception as error:  # a law that cannot even be tried does not hold
            holds, detail = False, f"{type(error).__name__}: {error}"
        findings.append(Finding(name, holds, detail))
    return findings
