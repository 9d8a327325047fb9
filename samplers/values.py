"""The `Value` noun: what the reward of the final sample will be, judged at a noisy state, without decoder.

At state x_t the value that makes sequential Monte Carlo and guidance exact is the soft value

    V_t(x_t) = β·log E[exp(r(x0)/β) | x_t],

expectations being over what the sampler goes on to do. As a twist of `FeynmanKac` or `SVDD` any value is sound, since the last
weighting is by the reward itself; the nearer to V_t, the less the weights vary. `Guided` follows its gradient: on a flow,
v − w·t/(1 − t)·∇V is the velocity of the tilted law if w·V_t = log E[exp(w·r(x0)) | x_t].

`LatentValue` is learned (`align.train_value`): a small head on early layers of the policy's own network, which has seen noise at
every level; what they say is averaged over positions, so that heads are small and fit any size.

Sources: Flow-NRG, a reward model on early layers of the generator, 2501.13918 (VideoAlign; which layers is not published); learned
values in the place of the clean estimate's reward, SVDD-MC, 2408.08252, and Feynman–Kac steering, 2501.06848.
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rewards.base import Configurable, Prompt

from .levels import Levels, at_least_float32

if TYPE_CHECKING:
    from .policy import Cond, Policy

__all__ = ["LatentValue", "Value", "ValueHead", "early_layers", "features", "probe"]

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
HARMONICS = 8  # of the noise level
ALIKE = 0.05  # relative distance of probes that half precision explains


class Value(Configurable, nn.Module, ABC):
    """An estimate of the final reward at a noisy state; frozen, higher is better, in units of the reward.

    Attributes:
        differentiable: whether a gradient with respect to the state exists.
    """

    differentiable: bool = True

    @abstractmethod
    def forward(self, x: Tensor, at: Levels, cond: Cond, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) estimates in at least float32, part of the graph if `x` requires a gradient; NaN where there is none.

        Args:
            x: (B, …) noisy states.
            at: their level: a scalar level, or one a row.
            cond: (B,) conditions of the policy.
            prompts: one a row, or none.
        """

    def attach(self, policy: Policy) -> None:
        """Makes ready for states of this policy; called before a run begins.

        Raises:
            ValueError: they cannot be judged.
        """

    @property
    def name(self) -> str:
        """How messages call this value."""
        return type(self).__name__


class LatentValue(Value):
    """A value learned by `kilter train-value`: a head on early layers of the policy's own network.

    It belongs to the model it was trained on and to how that sampled; a call costs those layers, without guidance.

    Args:
        model: the folder that `kilter train-value` wrote.

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the weights do not fill the head; when attached, the policy is not the one it was trained on.
    """

    probe: Tensor
    policy: Policy

    def __init__(self, model: str) -> None:
        super().__init__()
        folder = Path(model).expanduser()
        config, weights = _read(folder)
        if config.get("format") != FORMAT:
            raise ValueError(
                f"{model} has format {config.get('format')!r}; this version reads {FORMAT}: train it again, or update"
            )
        self.model, self.config = str(folder), config
        self.head = ValueHead(config["width"], config["hidden"])
        self.register_buffer("probe", weights.pop("probe"), persistent=False)
        try:
            self.head.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{model} does not hold the weights that its {CONFIG} describes: {error}") from error
        self.requires_grad_(False)

    def attach(self, policy: Policy) -> None:
        if getattr(self, "policy", None) is policy:
            return
        if policy.sharded:
            raise ValueError(f"{self.name} reads single layers, which a sharded network does not have: do not shard it")
        self.to(policy.device)
        width, heard = probe(policy, self.config["layers"])
        if width != self.config["width"] or (heard - self.probe).norm() > ALIKE * self.probe.norm():
            raise ValueError(
                f"{self.model} was trained on another model than {policy.source or type(policy).__name__}, whose early layers say "
                f"something else: load {self.config.get('model') or 'that model'}, or train a value for this one"
            )
        object.__setattr__(self, "policy", policy)  # beside the module, not part of it

    def forward(self, x: Tensor, at: Levels, cond: Cond, prompts: Sequence[Prompt]) -> Tensor:
        return self.head(features(self.policy, self.config["layers"], x, at, cond))


class ValueHead(nn.Module):
    """Layers that make a value of features.

    Args:
        width: how many features there are.
        hidden: widths of the layers.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor

    def __init__(self, width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        layers = [(nn.SiLU(), nn.Linear(a, b)) for a, b in itertools.pairwise([width, *hidden, 1])]
        self.head = nn.Sequential(*itertools.chain(*layers))[1:]
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("scale", torch.tensor([0.0, 1.0]))  # mean and spread of the rewards

    def forward(self, seen: Tensor) -> Tensor:
        """(B,) values of features (B, width)."""
        mean, spread = self.scale
        return mean + spread * self.head((seen - self.mean) / self.std).squeeze(1)


def features(policy: Policy, layers: Sequence[str], x: Tensor, at: Levels, cond: Cond) -> Tensor:
    """(B, width) what a value looks at, in float32, part of the graph if `x` is.

    These are channel means of the state and of what the layers put out, harmonics of the level's angle atan(σ/α), and the
    condition, averaged over its tokens. Texts that were filled up to the longest of the batch are cut back first, those of one
    length at a time, so that no row depends on the others.

    Args:
        layers: names of the network's modules; it runs until all of them have spoken.
    """
    if (lengths := _lengths(cond)) is not None:
        groups = [(lengths == n).nonzero().flatten() for n in lengths.unique()]
        one = [(x[r], at if at.t.ndim == 0 else at[r], _cut(cond[r], int(lengths[r[0]]))) for r in groups]
        parts = [features(policy, layers, *rows) for rows in one]
        return torch.cat(parts)[torch.cat(groups).argsort().to(x.device)]
    angle = torch.atan2(at.sigma, at.alpha).to(x.device, torch.float32).expand(len(x))
    turns = 2 * angle[:, None] * torch.arange(1, HARMONICS + 1, device=x.device)
    parts = [x.flatten(2).mean(2) if x.ndim > 2 else x] if x.is_floating_point() else []
    parts += _heard(policy, layers, x, at, cond)
    parts += [turns.cos(), turns.sin()]
    real = next((told for name, told in cond.positive.items() if _is_mask(name, told)), None)
    for name, told in cond.positive.items():
        if told.ndim == 3 and real is not None:
            parts.append((at_least_float32(told) * real[..., None]).sum(1) / real.sum(1, keepdim=True))
        elif not _is_mask(name, told):
            parts.append(_averaged(told) if told.ndim > 2 else told.reshape(len(x), -1))
    return torch.cat([part.to(x.device, torch.float32) for part in parts], 1)


@torch.no_grad()
def probe(policy: Policy, layers: Sequence[str]) -> tuple[int, Tensor]:
    """How many features there are, and what the layers say of one state made by rule, by which a network is recognised."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, *policy.shape(policy.size), generator=g).to(policy.device, policy.dtype)
    at, cond = policy.levels(2, policy.size)[1], policy.encode(["a photo"])
    heard = _heard(policy, layers, x, at, cond)
    return features(policy, layers, x, at, cond).shape[1], torch.cat([x.new_empty(1, 0), *heard], 1)[0].float()


def early_layers(network: nn.Module) -> list[str]:
    """The layers to read by default: a UNet's middle, else the block at a third of the longest stack, else none."""
    if getattr(network, "mid_block", None) is not None:
        return ["mid_block"]
    stacks = {name: part for name, part in network.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1}
    if not stacks:
        return []
    name, blocks = max(stacks.items(), key=lambda stack: len(stack[1]))
    return [f"{name}.{(len(blocks) - 1) // 3}"]


def _is_mask(name: str, told: Tensor) -> bool:
    """Whether a condition says which tokens of a text are real."""
    return told.ndim == 2 and (told.dtype == torch.bool or name.endswith("mask"))


def _lengths(cond: Cond) -> Tensor | None:
    """(B,) tokens of each text, on the CPU, where some were filled up in this batch; a family masks those with booleans."""
    mask = next(
        (told for name, told in cond.positive.items() if _is_mask(name, told) and told.dtype == torch.bool), None
    )
    if mask is None or bool(mask.all()):
        return None
    return mask.sum(1).cpu()


def _cut(cond: Cond, length: int) -> Cond:
    """The condition without guidance, its texts no longer than this."""
    texts = {name for name, told in cond.positive.items() if told.ndim == 3 or _is_mask(name, told)}
    positive = {name: told[:, :length] if name in texts else told for name, told in cond.positive.items()}
    return replace(cond, positive=positive, negative=None)


class _Enough(Exception):
    """All layers that matter have spoken."""


def _heard(policy: Policy, names: Sequence[str], x: Tensor, at: Levels, cond: Cond) -> list[Tensor]:
    """Channel means (B, C) of what layers put out; those after the last of them do not run, nor does guidance."""
    if not names:
        return []
    heard: dict[str, list[Tensor]] = {}

    def listen(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple[Any, ...]) -> None:
            outputs = (output,) if isinstance(output, Tensor) else output  # of blocks of two streams, text and image
            heard[name] = [part for part in outputs if isinstance(part, Tensor)]
            if len(heard) == len(names):
                raise _Enough

        return hook

    hooks = []
    try:
        for name in names:
            hooks.append(policy.network.get_submodule(name).register_forward_hook(listen(name)))
        policy.predict(x, at, cond)
    except _Enough:
        return [_averaged(part) for name in names for part in heard[name]]
    except AttributeError as error:
        raise ValueError(f"{type(policy.network).__name__} has no layer that is named like {names}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    raise ValueError(f"layers {sorted(set(names) - set(heard))} of {type(policy.network).__name__} do not run")


def _averaged(said: Tensor) -> Tensor:
    """(B, C) in at least float32: (B, C, H, W, …) averaged over positions, (B, L, C) over tokens."""
    said = at_least_float32(said)
    return said.mean(1) if said.ndim == 3 else said.flatten(2).mean(2) if said.ndim > 3 else said


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise OSError(
            f"{folder} is no value: it needs {CONFIG} and {WEIGHTS}, as kilter train-value writes them ({error})"
        ) from error
