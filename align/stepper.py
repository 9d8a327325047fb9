"""One optimiser step: micro-batches in, weights changed.

Each micro-batch's loss is weighed by its share of all items of the update, over all processes, so that the accumulated gradient is
that of the mean over the whole minibatch, however it is cut. Gradients of all processes are summed in one flat reduction a step,
which for LoRA is a few megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from samplers import Policy, RewardFailed
from samplers.transitions import widest

from .batches import Batch
from .config import TrainConfig
from .objectives.base import Objective
from .world import World

__all__ = ["Stepper"]

Name = TypeVar("Name", bound=Hashable)


class Stepper:
    """Optimiser, learning rate, loss scaling and moving average.

    Args:
        policy: its trainable parameters are what is stepped.

    Attributes:
        changing: whether a step is half done; still so after an error, when the weights belong to no update.

    Raises:
        ImportError: the optimiser's package is not installed.
    """

    def __init__(self, policy: Policy, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.parameters = list(policy.trainable.values())
        self.optimizer = _optimizer(self.parameters, config)
        self.scaler = torch.amp.GradScaler(policy.device.type, 1024.0, enabled=policy.dtype == torch.float16)
        self.changing = False

    def step(
        self, objective: Objective, policy: Policy, batch: Batch, update: int, check: Callable[[], None]
    ) -> dict[str, float]:
        """One step on those of this process's items that may be trained on; these may be none.

        Args:
            update: counted from 0.
            check: called between micro-batches; may raise, and then nothing has changed.

        Returns:
            Means over the items of all processes. "skipped" is 1 if loss or gradient was not finite and nothing was changed.

        Raises:
            RewardFailed: the loss asked a reward that could judge no item of the update; nothing has changed.
        """
        whole, batch = batch, batch.kept()
        total = float(self.world.sum(torch.tensor(float(batch.items))))
        rate = self.config.learning_rate * self.config.rate(update)
        if total == 0:
            return {"empty": 1.0, "learning_rate": rate}
        parts = torch.arange(batch.items).split(max(1, self.config.micro_batch // batch.members)) if batch.items else ()
        idle = [whole.take([0])] * (max(self.world.objects([len(parts)])) - len(parts)) if policy.sharded else []
        for surplus in idle:
            objective.shared(policy, surplus)
        batch = self._sharing(objective, policy, batch, parts, total)
        sums: dict[str, Tensor] = {}
        for part in parts:
            check()
            loss, metrics = objective.loss(policy, batch.take(part))
            share = len(part) / total
            self.scaler.scale(loss * share).backward()
            for name, value in {"loss": loss, **metrics}.items():
                value = widest(value.detach().to(policy.device))
                known = ~value.isnan() if name != "loss" else torch.ones_like(value, dtype=torch.bool)
                seen = torch.stack([torch.where(known, value, 0.0), known.to(value)]) * share
                sums[name] = sums.get(name, 0.0) + seen
        for surplus in idle:
            self._keep_up(objective, policy, replace(surplus, shared=batch.shared))
        norm = widest(self._reduced_norm())
        values = torch.stack([norm.expand(2), *sums.values()]).tolist()
        means = self._means(dict(zip(sums, values[1:], strict=True)))
        if means.get("reward_failed", 0.0) > 1 - 1e-9:
            raise RewardFailed(f"the reward could judge none of the {total:.0f} items of update {update + 1}")
        finite = math.isfinite(values[0][0]) and math.isfinite(means["loss"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.config.ema and "ema" not in policy.voices:
            policy.remember("ema")  # begins where training does
        self.changing = True
        if finite:
            self.scaler.step(self.optimizer)
            objective.updated(policy, update + 1)
            self._average(policy, update)
        self.scaler.update()
        self.changing = False
        self.optimizer.zero_grad(set_to_none=True)
        return {**means, "grad_norm": values[0][0], "learning_rate": rate, "skipped": float(not finite), "items": total}

    def _keep_up(self, objective: Objective, policy: Policy, batch: Batch) -> None:
        """A pass of no effect, for the sake of processes with more items: a sharded network needs all for each of its calls."""
        gradients = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        objective.loss(policy, batch)[0].backward()
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient

    def _sharing(self, objective, policy, batch: Batch, parts: tuple[Tensor, ...], total: float) -> Batch:
        """The batch with the objective's statistics over the whole update."""
        sums: dict[str, Tensor] = {}
        for part in parts:
            for name, values in objective.shared(policy, batch.take(part)).items():
                sums[name] = sums.get(name, 0.0) + widest(values.detach()).sum() / total
        if self.world.size > 1:
            means = self._total({name: float(value) for name, value in sums.items()})
            sums = {name: torch.tensor(mean, dtype=torch.float64) for name, mean in means.items()}
        return replace(batch, shared=sums)

    def _means(self, mine: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Over all processes, from (sum, share of the items that it is about) by name; NaN where that is none."""
        totals = self._total({(name, i): value for name, pair in mine.items() for i, value in enumerate(pair)})
        names = dict.fromkeys(name for name, _ in totals)
        return {n: totals[n, 0] / totals[n, 1] if totals[n, 1] else math.nan for n in names}

    def _total(self, mine: Mapping[Name, float]) -> dict[Name, float]:
        """Sums by name over processes; a process without items knows no names."""
        total: dict[Name, float] = {}
        for one in self.world.objects([dict(mine)]):
            for name, value in one.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def _reduced_norm(self) -> Tensor:
        """Sums the gradients of all processes, unscales and clips them; returns their norm before clipping."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.world.size > 1:
            flat = self.world.sum(torch.cat([p.grad.flatten() for p in self.parameters]))  # pyright: ignore
            for p, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
                p.grad = part.view_as(p)
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)

    def _average(self, policy: Policy, update: int) -> None:
        """The moving average of the weights, with the usual warm-up of its decay."""
        if not self.config.ema or (update + 1) % self.config.ema_every:
            return
        decay = min(self.config.ema, (1 + update) / (10 + update))
        for name, p in policy.trainable.items():
            policy.voices["ema"][name].lerp_(p.detach(), 1 - decay)

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    how = (config.learning_rate, config.betas, config.epsilon, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, *how)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("optimizer: adamw8bit needs bitsandbytes: pip install 'kilter[quant]'") from error
    return AdamW8bit(parameters, *how)
