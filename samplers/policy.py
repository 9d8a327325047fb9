"""The `Policy` noun: a model family seen as "noisy x at a level → clean estimate".

A family answers five questions (`encode`, `shape`, `levels`, `predict`, `decode`); everything else is written once here:
classifier-free guidance (2207.12598) in one batched network call, conversion to (x0, eps), and which adapter speaks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from rewards.base import Configurable

from .kernels import DDIM, Kernel
from .levels import Clean, Levels, Prediction, to_clean

if TYPE_CHECKING:
    from rewards.base import Modality, Prompt

__all__ = ["Checkpointing", "Cond", "Policy", "Size", "Speaker"]

Size = tuple[int, ...]  # (height, width) in pixels, or (frames, height, width)
Speaker = Literal["policy", "reference", "old", "ema"]
Checkpointing = Literal["none", "step", "block"]


@dataclass(frozen=True)
class Cond:
    """What the network is conditioned on, one row a sample.

    Indexing with rows (a tensor, list or slice) is how resampling, shuffling, grouping and micro-batching all happen.

    Attributes:
        positive: named tensors, each (B, …).
        negative: the same names for the unconditional branch, or None for a model without guidance.
        guidance: classifier-free guidance scale; 1 or less switches the unconditional branch off. Networks that take the
            scale as an input read it from here.
        begin: (B, …) clean latents that a run begins from, noised to its first level (SDEdit, 2108.01073); None begins from noise
            alone.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None = None
    guidance: float = 1.0
    begin: Tensor | None = None

    def __post_init__(self) -> None:
        begin = {} if self.begin is None else {"latents": self.begin}
        parts = {"positive": self.positive, "negative": self.negative or {}, "begin": begin}
        sizes = {f"{part} {name}": len(value) for part, named in parts.items() for name, value in named.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"every condition needs one row a sample; got {sizes}")
        if self.negative is not None and set(self.negative) != set(self.positive):
            raise ValueError(
                f"negative must name the tensors of positive, {sorted(self.positive)}; got {sorted(self.negative)}"
            )

    def __len__(self) -> int:
        return len(next(iter(self.positive.values()), ()))

    def __getitem__(self, rows: Tensor | Sequence[int] | slice | int) -> Cond:
        if isinstance(rows, int):
            rows = [rows]
        return self._map(lambda value: value[rows if isinstance(rows, (slice, Tensor)) else list(rows)])

    def repeat(self, times: int) -> Cond:
        """Every row `times` times in a row: one block a prompt."""
        return self._map(lambda value: value.repeat_interleave(times, 0))

    def with_guidance(self, guidance: float) -> Cond:
        """The same condition at another guidance scale."""
        return replace(self, guidance=float(guidance))

    @property
    def guided(self) -> bool:
        """Whether the unconditional branch is evaluated: as in diffusers, at scales above 1."""
        return self.negative is not None and self.guidance > 1.0

    def both(self) -> Cond:
        """Negative rows, then positive rows: one batch for one network call."""
        assert self.negative is not None
        return Cond({name: joined([self.negative[name], value]) for name, value in self.positive.items()})

    @staticmethod
    def joined(conds: Sequence[Cond]) -> Cond:
        """The rows of several conditions of one kind, in order; shorter texts are filled up with zeros."""
        first = conds[0]
        positive = {name: joined([c.positive[name] for c in conds]) for name in first.positive}
        negative = first.negative and {
            name: joined([(c.negative or {})[name] for c in conds]) for name in first.negative
        }
        begin = None if first.begin is None else torch.cat([c.begin for c in conds if c.begin is not None])
        return Cond(positive, negative, first.guidance, begin)

    def _map(self, change) -> Cond:
        positive = {name: change(value) for name, value in self.positive.items()}
        negative = None if self.negative is None else {name: change(value) for name, value in self.negative.items()}
        return Cond(positive, negative, self.guidance, None if self.begin is None else change(self.begin))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B, …) one after the other; where their other axes differ, filled up with zeros at the end."""
    longest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    filled = []
    for part in parts:
        missing = [(0, most - n) for n, most in zip(part.shape[1:], longest, strict=True)]
        filled.append(pad(part, [n for pair in reversed(missing) for n in pair]) if any(map(sum, missing)) else part)
    return torch.cat(filled)


class Policy(Configurable, nn.Module, ABC):
    """A generator. Frozen and in eval mode; training adds adapters to `network`.

    Attributes:
        network: the denoising network; LoRA lives here.
        prediction: what it predicts.
        guidance, steps: what a run uses when it is not told otherwise.
        size: the native media size in pixels.
        targets: names, or endings of names, of the layers of `network` that a LoRA goes on where it is not told otherwise.
        few_step: whether it is a student that makes whole samples in one to a few steps.
        source, adapter, control: the folder or hub id it was loaded from, that of its LoRA, and that of a ControlNet beside it.
        student: the schedule it was told to take.
        loaded_with: what else `align.load_policy` was told, such as {"offload": "group"}.
        runs_on: where it computes, if its weights wait elsewhere: network calls with a gradient, and decoding, are then
            recomputed in the backward pass, which brings the weights again.
        modality: what it makes.
        world: the name of a procedural world whose exact detector can judge it, or "".
        checkpointing: what is recomputed in the backward pass of a rollout: whole network calls ("step"), the network's own
            blocks ("block"), or nothing.
        uncond_grad: whether the unconditional branch of guidance carries a gradient.
        decode_chunk: samples decoded at a time, which bounds the decoder's memory; the result does not change.
        rows_at_once: samples the network takes at a time, likewise; None takes all.
        sharded: whether the frozen weights are spread over processes, which must then call the network equally often.
        voices: earlier weights of what is trained, by the name under which they may speak; see `remember`.
    """

    network: nn.Module
    prediction: Prediction
    guidance: float = 1.0
    steps: int = 20
    size: Size = ()
    targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    few_step: bool = False
    source: str = ""
    adapter: str = ""
    student: str = ""
    loaded_with: Mapping[str, Any] = MappingProxyType({})
    runs_on: torch.device | None = None
    control: str = ""
    modality: Modality = "image"
    world: str = ""
    checkpointing: Checkpointing = "step"
    uncond_grad: bool = True
    decode_chunk: int = 8
    rows_at_once: int | None = None
    sharded: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.voices: dict[str, dict[str, Tensor]] = {}

    @abstractmethod
    def encode(self, prompts: Sequence[str | Prompt]) -> Cond:
        """Conditions for prompts, with the negative branch where the model uses one; guidance set to the default."""

    @abstractmethod
    def shape(self, size: Size) -> tuple[int, ...]:
        """The shape of one unpacked latent, without the batch, for media of `size`."""

    @abstractmethod
    def levels(self, steps: int, size: Size) -> Levels:
        """The table of `steps` + 1 levels a run walks."""

    @abstractmethod
    def predict(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        """The network's raw output at level `at` (a scalar, or one a row)."""

    @abstractmethod
    def decode(self, x0: Tensor, frames: slice | None = None) -> Tensor:
        """Media with values in [0, 1], differentiable. `frames` picks video frames before decoding."""

    def encode_media(self, media: Tensor) -> Tensor:
        """Clean latents (B, …) of media (B, …) with values in [0, 1], on the policy's device; no graph.

        Raises:
            NotImplementedError: the family has no encoder.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot encode {self.modality}s: train on its own samples or on recorded latents"
        )

    def training_levels(self, u: Tensor) -> Levels:
        """The noise levels of quantiles u (B,) in [0, 1): 0 almost clean, 1 almost noise; uniform u is uniform in the
        network's own time."""
        table = self.levels(1000, self.size)
        return table[table.steps - 1 - (u.cpu() * table.steps).long().clamp(0, table.steps - 1)]

    def preview(self, x0: Tensor) -> Tensor:
        """A cheaper `decode` for rewards of intermediate estimates; the same thing unless the family has one."""
        return self.decode(x0)

    def in_chunks(self, decode: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
        """Decodes `decode_chunk` samples at a time; in the backward pass each chunk is recomputed unless nothing is."""
        parts = x0.split(self.decode_chunk)
        if torch.is_grad_enabled() and x0.requires_grad and (self.checkpointing != "none" or self.runs_on):
            again = {"use_reentrant": False, "preserve_rng_state": False}
            return torch.cat([checkpoint(decode, part, **again) for part in parts])  # pyright: ignore
        return torch.cat([decode(part) for part in parts])

    @property
    def kernel(self) -> Kernel:
        """The kernel a run uses when it is not told otherwise."""
        return DDIM(eta=1.0)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.runs_on or next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The network's floating point type; states are stored in it between steps."""
        return next(
            p.dtype for p in self.network.parameters() if p.is_floating_point()
        )  # quantised ones may be integers

    def denoise(self, x: Tensor, at: Levels, cond: Cond) -> Clean:
        """The guided clean estimate at level `at`, in at least float32, from one batched network call."""
        return to_clean(self.prediction, self.output(x, at, cond), x, at)

    def output(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        """What the network predicts, guidance applied; in the backward pass each part of a split batch is recomputed."""
        moving = torch.is_grad_enabled() and self.runs_on is not None
        if moving and x.requires_grad and self.loaded_with.get("offload") == "group":
            raise ValueError(
                "no gradient passes through offload='group': use offload='model' or 'sequential', or quantize"
            )
        most = len(x) if self.rows_at_once is None else self.rows_at_once
        if len(x) <= most and not moving:
            return self._output(x, at, cond)
        again = {"use_reentrant": False, "preserve_rng_state": False}
        recomputed = moving or (torch.is_grad_enabled() and self.checkpointing != "none")
        parts = []
        for first in range(0, len(x), most):
            rows = slice(first, first + most)
            one = (x[rows], at if at.t.ndim == 0 else at[rows], cond[rows])
            parts.append(checkpoint(self._output, *one, **again) if recomputed else self._output(*one))  # pyright: ignore
        return torch.cat(parts)

    def _output(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        if not cond.guided:
            return self.predict(x, at, cond)
        doubled = at if at.t.ndim == 0 else Levels(*(torch.cat([v, v]) for v in (at.t, at.alpha, at.sigma)))
        negative, positive = self.predict(torch.cat([x, x]), doubled, cond.both()).chunk(2)
        return self.guided(negative if self.uncond_grad else negative.detach(), positive, cond.guidance)

    def guided(self, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (2207.12598): both branches' outputs at a scale; 1 is the positive branch alone."""
        return negative + scale * (positive - negative)

    def forget(self) -> None:
        """Drops what is kept of texts: the encoders have changed."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def remember(self, who: str) -> None:
        """Keeps a copy of the trainable weights, which speaks in `acting_as(who)`."""
        self.voices[who] = {name: p.detach().clone() for name, p in self.trainable.items()}

    @contextmanager
    def acting_as(self, who: Speaker | str) -> Iterator[None]:
        """Lets other weights speak.

        Args:
            who: "policy" is the network as it is; a name in `voices` the weights remembered under it; an adapter's name that
                adapter; "reference", unless remembered, the network with its adapters switched off.

        Raises:
            ValueError: nothing of that name.
        """
        if who == "policy":
            yield
        elif who in self.voices:
            with self._swapped(self.voices[who]):
                yield
        else:
            with self._adapter(who):
                yield

    @contextmanager
    def _swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        mine = {name: (p, p.data) for name, p in self.network.named_parameters() if name in weights}
        try:
            for name, (p, data) in mine.items():
                p.data = weights[name].to(data)
            yield
        finally:
            for p, data in mine.values():
                p.data = data

    @contextmanager
    def _adapter(self, who: str) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        names = {name for layer in layers for name in getattr(layer, layer.adapter_layer_names[0], {})}
        if who != "reference" and who not in names:
            known = sorted(names | self.voices.keys())
            raise ValueError(f"the network has no adapter {who!r}; it has {known or 'none'}")
        if who == "reference" and not layers and self.trainable:
            raise ValueError("nothing remembers the reference: call policy.remember('reference') before training")
        before = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
        trainable = list(self.trainable.values())
        try:
            for layer in layers:
                layer.enable_adapters(who != "reference")
                if who != "reference":
                    layer.set_adapter(who)
            yield
        finally:
            for layer, (active, disabled) in zip(layers, before, strict=True):
                layer.set_adapter(active)
                layer.enable_adapters(not disabled)
            self.network.requires_grad_(False)
            for p in trainable:
                p.requires_grad_(True)

    def train(self, mode: bool = True) -> Policy:
        """Keeps eval mode: a generator being aligned samples exactly as it will when used."""
        return super().train(False)
