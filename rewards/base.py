"""The `Reward` noun: media and prompts in, one number a sample out; higher is better, in the published scale.

A reward is a frozen network (or a rule) that owns its preprocessing. A subclass writes one method, `measure`;
everything every reward must do alike stands here once: checking the media and the prompts, refusing a gradient it
cannot give, float32 scores, and NaN (never a number) for a sample that could not be judged.

Media are float tensors with values in [0, 1]: images (B, 3, H, W), video (B, F, 3, H, W); audio is (B, C, N) in
[-1, 1]; tokens are integer (B, L).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Configurable", "Features", "Modality", "Prompt", "Reward", "Scores", "as_prompts", "facts"]

Modality = Literal["image", "video", "audio", "tokens"]
EMPTY: Mapping[str, Any] = MappingProxyType({})
RANGE_TOLERANCE = 1e-3  # a decoder's round-off, not a licence for another range

FACTS = ("Range", "Size", "Gradient", "Weights", "Licence")

LAYOUT = {
    "image": (4, 1, "(B,3,H,W) with values in [0,1]"),
    "video": (5, 2, "(B,F,3,H,W) with values in [0,1]"),
    "audio": (3, None, "(B,C,N) with values in [-1,1]"),
    "tokens": (2, None, "(B,L) integer token ids"),
}


@dataclass(frozen=True)
class Prompt:
    """What a sample should show. A plain `str` is accepted wherever a `Prompt` is.

    Attributes:
        text: the prompt.
        negative: the negative prompt, used by classifier-free guidance.
        meta: anything a reward needs beside the text, such as the clauses a detector checks.
    """

    text: str
    negative: str = ""
    meta: Mapping[str, Any] = field(default_factory=lambda: EMPTY, hash=False)

    def __str__(self) -> str:
        return self.text


def as_prompts(prompts: Sequence[str | Prompt] | str | Prompt) -> list[Prompt]:
    """Wraps plain strings; a single prompt becomes a list of one."""
    if isinstance(prompts, (str, Prompt)):
        prompts = [prompts]
    wrong = [p for p in prompts if not isinstance(p, (str, Prompt))]
    if wrong:
        raise TypeError(f"prompts must be str or Prompt; got {type(wrong[0]).__name__}: {wrong[0]!r}")
    return [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]


@dataclass(frozen=True)
class Scores:
    """What a reward says about B samples.

    Attributes:
        total: (B,) float32, higher is better; NaN where the sample could not be judged.
        parts: named components, each (B,) float32, such as the clauses of a prompt or the terms of a sum.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=lambda: EMPTY)


class Features(NamedTuple):
    """What a reward's networks see in B samples, for a head to be learned on; see `Learned`.

    Attributes:
        joint: (B, D) of the samples with their prompts.
        prompt: (B, E) of the prompts alone; E is 0 where they are not read by themselves.
    """

    joint: Tensor
    prompt: Tensor


class Configurable:
    """Remembers what its constructor was called with in `arguments`, so that files can say how it was made."""

    arguments: Mapping[str, Any] = EMPTY

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        try:
            arguments = dict(inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs).arguments)
        except TypeError:  # __init__ itself will say what is wrong
            arguments = {}
        arguments.pop("self", None)
        object.__setattr__(made, "arguments", arguments)
        return made


class Reward(Configurable, nn.Module, ABC):
    """Scores samples. Subclasses implement `measure`; callers use `score` or call the reward.

    A reward is frozen and always in eval mode: a parent's `.train()` cannot switch its dropout on. It runs on the
    device of its input.

    The docstring of a class that can be chosen by name holds the lines that `facts` reads.

    Attributes:
        modality: what it looks at.
        differentiable: whether a gradient with respect to the media exists.
        needs_prompt: whether the prompt matters.
        compares: whether a score says how a sample does among those of the same prompt in the same call, rather than by itself.
        claims_quality: whether blur, noise and compression should lower the score of a good picture.
        stays: whether it keeps to a device of its own instead of following its input.
    """

    modality: Modality = "image"
    differentiable: bool = True
    needs_prompt: bool = True
    compares: bool = False
    claims_quality: bool = False
    stays: bool = False

    def __init__(self) -> None:
        super().__init__()
        super().train(False)

    @abstractmethod
    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor | Scores:
        """Scores checked media: (B,) or `Scores`. `prompts` has B entries, or none where `needs_prompt` is false."""

    def embed(self, media: Tensor, prompts: list[Prompt]) -> Features:
        """What `measure` bases its judgement on, of checked media; not every reward has it.

        Raises:
            TypeError: this one has none.
        """
        raise TypeError(f"{self.name} has no features to learn a reward on: choose an encoder such as CLIPScore")

    def score(self, media: Tensor, prompts: Sequence[str | Prompt] = ()) -> Scores:
        """Scores a batch.

        Args:
            media: see the module docstring.
            prompts: one a sample; may be empty for a reward that needs none.

        Returns:
            Scores with float32 values, part of the graph if `media` requires a gradient; NaN for samples that are not finite.

        Raises:
            TypeError, ValueError: the media have the wrong type, rank, channel count or range, or the prompts do not
            match.
            RuntimeError: a gradient was asked of a reward that has none.
        """
        finite = self.check(media)
        prompts = as_prompts(prompts)
        if (prompts or self.needs_prompt) and len(prompts) != len(media):
            raise ValueError(
                f"{self.name} needs one prompt a sample: got {len(prompts)} prompts for {len(media)} samples"
            )
        if finite is not None:
            return self._score_finite(media, prompts, finite)
        wants_gradient = torch.is_grad_enabled() and media.requires_grad
        if wants_gradient and not self.differentiable:
            raise RuntimeError(
                f"{self.name} is not differentiable, yet a gradient was asked of it: "
                "use a steering or objective that needs none, or a differentiable reward"
            )
        first = next(following(self), None)
        if first is not None and first.device != media.device:
            self.to(media.device)
        # A trainer's autocast must not decide the precision of a score. Not inference_mode: what a reward or its library remembers
        # could never enter a graph again, and it saves 0.04 ms a call, nothing beside a network of real size.
        kind = media.device.type if torch.amp.is_autocast_available(media.device.type) else "cpu"
        with torch.set_grad_enabled(wants_gradient), torch.autocast(kind, enabled=False):
            result = self.measure(media, prompts)
        if isinstance(result, Tensor):
            result = Scores(result)
        for part, values in {"total": result.total, **result.parts}.items():
            if values.shape != (len(media),):
                raise ValueError(f"{self.name} must return ({len(media)},) scores; {part} has {tuple(values.shape)}")
        return Scores(result.total.float(), {k: v.float() for k, v in result.parts.items()})

    def forward(self, media: Tensor, prompts: Sequence[str | Prompt] = ()) -> Tensor:
        """The totals alone: (B,) float32."""
        return self.score(media, prompts).total

    @property
    def name(self) -> str:
        """How messages and result files call this reward."""
        return type(self).__name__

    def _score_finite(self, media: Tensor, prompts: list[Prompt], finite: Tensor) -> Scores:
        """Scores the finite samples; the others get NaN."""
        missing = torch.full((len(media),), torch.nan, device=media.device)
        if not bool(finite.any()):
            return Scores(missing)
        scores = self.score(media[finite], [p for p, f in zip(prompts, finite.tolist(), strict=False) if f])
        spread = {k: missing.masked_scatter(finite, v) for k, v in {"": scores.total, **scores.parts}.items()}
        return Scores(spread.pop(""), spread)

    def check(self, media: Tensor) -> Tensor | None:
        """Raises unless `media` has the layout of `modality`; (B,) which samples are finite, or None if all are."""
        rank, channels, layout = LAYOUT[self.modality]
        if not isinstance(media, Tensor):
            raise TypeError(f"{self.name}: media must be a tensor {layout}; got {type(media).__name__}")
        shape = tuple(media.shape)
        got = f"got {media.dtype} {shape}".replace("torch.", "")
        if media.ndim != rank or (channels is not None and shape[channels] != 3):
            hint = ": pass images.permute(0,3,1,2)" if media.ndim == rank == 4 and shape[-1] == 3 else ""
            raise ValueError(f"{self.name}: media must be {layout}; {got}{hint}")
        if self.modality == "tokens":
            if media.is_floating_point():
                raise TypeError(f"{self.name}: media must be {layout}; {got}")
            return None
        if not media.is_floating_point():
            hint = ": divide by 255" if media.dtype == torch.uint8 else ""
            raise TypeError(f"{self.name}: media must be {layout}; {got}{hint}")
        if media.numel() == 0:
            raise ValueError(f"{self.name}: media must not be empty; {got}")
        low, high = torch.aminmax(media.detach())
        finite = None
        if not (low.isfinite() and high.isfinite()):
            finite = media.detach().flatten(1).isfinite().all(1)
            low, high = (
                torch.aminmax(media.detach()[finite]) if bool(finite.any()) else (low.new_zeros(()), low.new_ones(()))
            )
        floor = -1.0 if self.modality == "audio" else 0.0
        if low < floor - RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            hint = ": pass (media + 1) / 2" if floor == 0 and low >= -1.01 and high <= 1.01 else ""
            raise ValueError(f"{self.name}: media must be {layout}; {got} spanning [{low:.3g}, {high:.3g}]{hint}")
        return finite

    def train(self, mode: bool = True) -> Reward:
        """Keeps eval mode whatever is asked."""
        return super().train(False)

    def freeze(self) -> Reward:
        """Switches the gradients of all weights off and eval mode on; constructors that hold a network call it last."""
        return self.requires_grad_(False).train(False)


def following(module: nn.Module) -> Iterator[Tensor]:
    """The weights of a module and its children, but for those of rewards that stay on a device of their own."""
    if not getattr(module, "stays", False):
        yield from chain(module.parameters(recurse=False), module.buffers(recurse=False))
        for child in module.children():
            yield from following(child)


def facts(cls: type[Reward]) -> dict[str, str]:
    """What a user choosing a reward asks first, read from the lines of its docstring that begin with these words.

    Range     of the scores
    Size      the native size of the media
    Gradient  "yes", "no", or what it depends on
    Weights   hub ids
    Licence   of code and weights

    Raises:
        ValueError: Range, Size or Gradient is missing, or one of Weights and Licence is without the other.
    """
    lines = [line.partition(": ") for line in (inspect.getdoc(cls) or "").splitlines()]
    found = {word: rest.strip() for word, colon, rest in lines if word in FACTS and colon}
    if {"Range", "Size", "Gradient"} - set(found) or len({"Weights", "Licence"} & set(found)) == 1:
        raise ValueError(
            f"the docstring of {cls.__name__} needs the lines {', '.join(FACTS)}; it has {', '.join(found)}"
        )
    return found
