"""The `Policy` noun: a model family seen as "noisy x at a level → clean estimate".

A family answers five questions (`encode`, `shape`, `levels`, `predict`, `decode`); everything else is written once here:
classifier-free guidance (2207.12598) in one batched network call, conversion to (x0, eps), and which adapter speaks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .kernels import DDIM, Kernel
from .levels import Clean, Levels, Prediction, to_clean

if TYPE_CHECKING:
    from rewards.base import Modality, Prompt

__all__ = ["Cond", "Policy", "Size", "Speaker"]

Size = tuple[int, ...]  # (height, width) in pixels, or (frames, height, width)
Speaker = Literal["policy", "reference", "old", "ema"]


@dataclass(frozen=True)
class Cond:
    """What the network is conditioned on, one row a sample.

    Indexing with rows (a tensor, list or slice) is how resampling, shuffling, grouping and micro-batching all happen.

    Attributes:
        positive: named tensors, each (B, …).
        negative: the same names for the unconditional branch, or None for a model without guidance.
        guidance: classifier-free guidance scale; 1 or less switches the unconditional branch off. Networks that take the
            scale as an input read it from here.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        parts = {"positive": self.positive, "negative": self.negative or {}}
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
        return Cond({name: torch.cat([self.negative[name], value]) for name, value in self.positive.items()})

    def _map(self, change) -> Cond:
        positive = {name: change(value) for name, value in self.positive.items()}
        negative = None if self.negative is None else {name: change(value) for name, value in self.negative.items()}
        return Cond(positive, negative, self.guidance)


class Policy(nn.Module, ABC):
    """A generator. Frozen and in eval mode; training adds adapters to `network`.

    Attributes:
        network: the denoising network; LoRA lives here.
        prediction: what it predicts.
        guidance, steps: what a run uses when it is not told otherwise.
        size: the native media size in pixels.
        source: the folder or hub id it was loaded from.
        modality: what it makes.
        world: the name of a procedural world whose exact detector can judge it, or "".
    """

    network: nn.Module
    prediction: Prediction
    guidance: float = 1.0
    steps: int = 20
    size: Size = ()
    source: str = ""
    modality: Modality = "image"
    world: str = ""

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

    def preview(self, x0: Tensor) -> Tensor:
        """A cheaper `decode` for rewards of intermediate estimates; the same thing unless the family has one."""
        return self.decode(x0)

    @property
    def kernel(self) -> Kernel:
        """The kernel a run uses when it is not told otherwise."""
        return DDIM(eta=1.0)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The network's floating point type; states are stored in it between steps."""
        return next(self.network.parameters()).dtype

    def denoise(self, x: Tensor, at: Levels, cond: Cond) -> Clean:
        """The guided clean estimate at level `at`, in at least float32, from one batched network call."""
        return to_clean(self.prediction, self.output(x, at, cond), x, at)

    def output(self, x: Tensor, at: Levels, cond: Cond) -> Tensor:
        """What the network predicts, guidance applied."""
        if not cond.guided:
            return self.predict(x, at, cond)
        doubled = at if at.t.ndim == 0 else Levels(*(torch.cat([v, v]) for v in (at.t, at.alpha, at.sigma)))
        negative, positive = self.predict(torch.cat([x, x]), doubled, cond.both()).chunk(2)
        return negative + cond.guidance * (positive - negative)

    @contextmanager
    def acting_as(self, who: Speaker) -> Iterator[None]:
        """Lets another adapter speak: "reference" switches adapters off, "old" and "ema" name adapters, "policy" is as it is.

        Raises:
            ValueError: the network has no adapter of that name.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        if who == "policy" or who == "reference" and not layers:
            yield
            return
        names = {name for layer in layers for name in getattr(layer, layer.adapter_layer_names[0], {})}
        if who != "reference" and who not in names:
            raise ValueError(f"the network has no adapter {who!r}; it has {sorted(names) or 'none'}")
        before = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        try:
            for layer in layers:
                if who == "reference":
                    layer.enable_adapters(False)
                else:
                    layer.enable_adapters(True)
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
