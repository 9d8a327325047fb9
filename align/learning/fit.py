"""Fitting a head, and a LoRA on its encoder if asked, to comparisons: AdamW, stopped where pairs held out are explained best.

A batch is a number of prompts with all that was said about them (pictures of one prompt seen at different steps over-fit sooner;
Kirstain et al. 2023, arXiv 2305.01569). What is drawn at a step depends on the seed and the number of the step alone, so a fit that
was cut off and goes on from its state ends in the same weights, bit for bit.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from rewards.base import Features
from rewards.files import whole
from rewards.heads import Head, Raw
from samplers.noise import mix

from .data import Comparisons
from .encodings import Encodings
from .losses import Loss
from .people import People

__all__ = ["Fit", "FitConfig", "fit", "held_out_loss"]

ORDER, BOOTSTRAP = 1, 2  # what random streams are mixed for


@dataclass(frozen=True)
class FitConfig:
    """How a reward is fitted.

    Attributes:
        epochs: passes over the data, at most.
        batch: prompts a step.
        learning_rate: of AdamW.
        people_rate: of what stands for each person in PAL, who is seen in few of the batches.
        weight_decay: of AdamW.
        patience: epochs without a better loss on what is held out, after which the fit stops.
        holdout: share of the prompts held out, which decide when to stop.
        balance: what counts equally: every term of the loss by its record's weight ("none"), every "prompt" (PickScore), or every
            "user" however much they said (PAL's weighted losses).
        bootstrap: each member of an ensemble sees its own sample of the prompts.
        lora: rank of an adapter trained on the encoder's linear layers; 0 trains the head alone, on features computed once.
        encode_batch: images encoded at a time.
        seed: of weights, order and split.
        save_seconds: at least so long between two saved states.
    """

    epochs: int = 200
    batch: int = 64
    learning_rate: float = 1e-3
    people_rate: float = 0.03
    weight_decay: float = 0.01
    patience: int = 10
    holdout: float = 0.1
    balance: Literal["none", "prompt", "user"] = "prompt"
    bootstrap: bool = False
    lora: int = 0
    encode_batch: int = 32
    seed: int = 0
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        least = {
            "epochs": 1,
            "batch": 1,
            "patience": 1,
            "lora": 0,
            "encode_batch": 1,
            "weight_decay": 0,
            "save_seconds": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be ≥ {low}; got {getattr(self, name)}")
        if not min(self.learning_rate, self.people_rate) > 0 or not 0 < self.holdout < 1:
            raise ValueError(
                f"rates must be > 0 and holdout in (0, 1); got {self.learning_rate}, {self.people_rate} and {self.holdout}"
            )
        if self.balance not in ("none", "prompt", "user"):
            raise ValueError(f'balance must be "none", "prompt" or "user"; got {self.balance!r}')


@dataclass
class Fit:
    """What a fit came to.

    Attributes:
        curve: (loss on the training prompts, loss on those held out) of each epoch.
        best: the epoch whose weights were kept, counted from 0.
    """

    curve: list[tuple[float, float]]
    best: int


def fit(
    head: Head,
    people: People,
    loss: Loss,
    train: Comparisons,
    held: Comparisons,
    encodings: Encodings,
    config: FitConfig,
    adapters: Mapping[str, Tensor] | None = None,
    state: Path | None = None,
    progress: bool = False,
) -> Fit:
    """Fits in place; afterwards all weights are those of the best epoch.

    Args:
        adapters: more weights to train, by name.
        state: where to save now and then, and go on from if it is there.

    Raises:
        ValueError: the loss is not finite.
    """
    trained = (
        dict(head.named_parameters())
        | {f"people.{i}": p for i, p in enumerate(people.parameters)}
        | dict(adapters or {})
    )
    for parameter in trained.values():
        parameter.requires_grad_(True)
    groups: list[dict[str, Any]] = [{"params": [p for name, p in trained.items() if not name.startswith("people.")]}]
    groups += [{"params": list(people.parameters), "lr": config.people_rate}] if people.parameters else []
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    result, best, epoch = Fit([], -1), _copied(trained), 0
    if state is not None and state.is_file():
        saved = torch.load(state, map_location="cpu", weights_only=True)
        _restore(trained, saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        result, best, epoch = (
            Fit([tuple(c) for c in saved["curve"]], saved["best_epoch"]),
            saved["best"],
            saved["epoch"],
        )
    last = time.monotonic()
    with tqdm(total=config.epochs, initial=epoch, desc="learning", unit="epoch", disable=not progress) as bar:
        while epoch < config.epochs and epoch - result.best <= config.patience:
            learned = _epoch(head, people, loss, train, encodings, config, optimizer, epoch)
            told = held_out_loss(head, people, loss, held, encodings, config)
            if result.best < 0 and not math.isfinite(told):
                raise ValueError(
                    f"after the first epoch the loss of what is held out is {told}: lower learning_rate, now "
                    f"{config.learning_rate:g}"
                )
            result.curve.append((learned, told))
            if result.best < 0 or told < result.curve[result.best][1]:
                result.best, best = epoch, _copied(trained)
            epoch += 1
            bar.set_postfix(held_out=f"{told:.4f}", best=f"{result.curve[result.best][1]:.4f}")
            bar.update()
            if state is not None and time.monotonic() - last >= config.save_seconds:
                _save(state, trained, optimizer, result, best, epoch)
                last = time.monotonic()
    _restore(trained, best)
    for parameter in trained.values():
        parameter.requires_grad_(False)
    return result


def held_out_loss(
    head: Head, people: People, loss: Loss, held: Comparisons, encodings: Encodings, config: FitConfig
) -> float:
    """The loss of comparisons, averaged over members; people have their final codes."""
    with torch.no_grad():
        codes = people.final()
        raw = _scores(head, held, encodings, codes[held.people] if head.code else None)
        return float(_weighted(loss, held, raw, None, config).mean())


def _epoch(
    head: Head,
    people: People,
    loss: Loss,
    train: Comparisons,
    encodings: Encodings,
    config: FitConfig,
    optimizer: torch.optim.Optimizer,
    epoch: int,
) -> float:
    """One pass over the training prompts; the average loss."""
    prompts = train.prompt.unique()
    order = prompts[
        torch.randperm(len(prompts), generator=torch.Generator().manual_seed(mix(config.seed, ORDER, epoch)))
    ]
    counts = _bootstrap(head.members, int(prompts.max()) + 1, config) if config.bootstrap else None
    total = 0.0
    steps = order.split(config.batch)
    for i, chosen in enumerate(steps):
        batch = train.of_prompts(chosen)
        codes, extra = people.codes(batch, epoch * len(steps) + i)
        raw = _scores(head, batch, encodings, codes)
        value = _weighted(loss, batch, raw, counts, config)
        optimizer.zero_grad()
        (value.sum() + extra).backward()
        optimizer.step()
        total += float(value.detach().mean()) * len(chosen) / len(order)
    return total


def _scores(head: Head, data: Comparisons, encodings: Encodings, codes: Tensor | None) -> Raw:
    """(K, R) of the rows of comparisons."""
    seen = encodings(data.rows)
    return head(Features(*(t.to(head.centre.device) for t in seen)), codes)  # pyright: ignore


def _weighted(loss: Loss, data: Comparisons, raw: Raw, counts: Tensor | None, config: FitConfig) -> Tensor:
    """(K,) the average of the terms, balanced as asked; 0 where there are none."""
    terms, record = loss.terms(data, raw)
    weight = data.weight[record]
    if config.balance != "none":
        of = (data.prompt if config.balance == "prompt" else data.user)[record] + 1
        weight = weight / of.bincount().clamp(min=1)[of]
    weight = weight.to(terms)
    weights = weight[None] if counts is None else weight * counts[:, data.prompt[record]]
    return (weights * terms).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-12)


def _bootstrap(members: int, prompts: int, config: FitConfig) -> Tensor:
    """(K, prompts) how often each member sees each prompt."""
    draw = torch.Generator().manual_seed(mix(config.seed, BOOTSTRAP))
    picked = torch.randint(prompts, (members, prompts), generator=draw)
    return torch.zeros(members, prompts).scatter_add_(1, picked, torch.ones(picked.shape))


def _copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def _restore(weights: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(to[name])


def _save(
    path: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    result: Fit,
    best: dict[str, Tensor],
    epoch: int,
) -> None:
    state: dict[str, Any] = {
        "weights": _copied(weights),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "curve": result.curve,
        "best_epoch": result.best,
        "best": best,
        "epoch": epoch,
    }
    whole(path, lambda file: torch.save(state, file), durable=False)
