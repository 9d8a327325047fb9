"""Adapters: what is trained, and how it is written down.

LoRA (2106.09685) by peft. The policy is the adapter switched on, the reference the adapter switched off, so the reference costs no
memory; "old" and "ema" weights are copies of the small trainable tensors (`Policy.remember`). Trainable tensors are float32 over a
base of any precision. Files are in the diffusers format: `pipe.load_lora_weights(folder)` gives the same model. Pipelines that
have no such method (PixArt's) take a folder in peft's format: `PeftModel.from_pretrained(pipe.transformer, folder)`.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samplers import Policy

from .places import check_trainable, gathered

__all__ = ["Lora", "add_lora", "digest", "load_lora", "merge", "prepare_trainable", "save_adapter", "set_scale"]

logger = logging.getLogger("kilter")
ADAPTER, WEIGHTS = "pytorch_lora_weights.safetensors", "trainable.safetensors"
PEFT, OUTER = "adapter_model.safetensors", "base_model.model."  # peft's file, and what its names begin with


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter.

    Attributes:
        rank: of the update.
        alpha: the update is scaled by alpha / rank; None means alpha = rank.
        targets: names, or endings of names, of the linear and convolution layers it goes on; None takes those of the model's
            family, its attention.
        init: how A begins (B begins at 0): "gaussian" as the reference training scripts do, or peft's "default".
    """

    rank: int = 8
    alpha: float | None = None
    targets: Sequence[str] | None = None
    init: Literal["gaussian", "default"] = "gaussian"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be ≥ 1; got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"LoRA alpha must be > 0, or null for the rank; got {self.alpha}")


def prepare_trainable(policy: Policy, lora: Lora | None, seed: int) -> None:
    """Decides what is trained: an adapter that was loaded, parameters that already require gradients, a new LoRA, or everything.

    Args:
        lora: of the new adapter; None trains all weights of the network, and remembers where they began.

    Raises:
        ValueError: LoRA targets that match nothing, or half-precision weights to train.
    """
    check_trainable(policy, whole=lora is None and not policy.trainable and not _layers(policy))
    if layers := _layers(policy):  # continue an adapter; its beginning is the reference
        _tell_what_is_continued(policy, layers[0].active_adapters[0], lora)
        for name, parameter in policy.network.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif not policy.trainable and lora is not None:
        if policy.adapter:
            raise ValueError(f"{policy.adapter} holds all weights and no LoRA: set lora to null to go on training them")
        add_lora(policy, lora, seed)
        return
    elif not policy.trainable:
        policy.network.requires_grad_(True)
    half = [n for n, p in policy.trainable.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if half and _layers(policy):
        for parameter in policy.trainable.values():
            parameter.data = parameter.data.float()
    elif half:
        raise ValueError(
            f"trainable weights must be float32, but {half[0]} and {len(half) - 1} others are half precision: "
            "train a LoRA (lora: {rank: 8}) over the half-precision base, or load the model with dtype float32"
        )
    policy.remember("reference")


def add_lora(policy: Policy, lora: Lora, seed: int) -> None:
    """Puts a fresh float32 adapter on the network and makes it what is trained. At first it changes nothing.

    Raises:
        ValueError: a target matches no layer; the message lists what exists.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = policy.targets if lora.targets is None else lora.targets
    layers = [name for name, m in policy.network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv1d))]
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers)]
    if missing or not targets:
        raise ValueError(
            f"LoRA target {missing[0] if missing else '(none)'!r} matches no layer of {type(policy.network).__name__}; "
            f"it has {_endings(layers)}{_hint(missing, layers)}"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,  # pyright: ignore
        target_modules=list(targets),
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    with torch.random.fork_rng(devices=[]), gathered(policy):
        torch.default_generator.manual_seed(seed)  # not those of accelerators, which are not forked
        if hasattr(policy.network, "add_adapter"):
            policy.network.add_adapter(config)  # pyright: ignore
        else:
            inject_adapter_in_model(config, policy.network)
    for name, parameter in policy.network.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(policy.device, torch.float32)


def load_lora(pipe: Any, lora: str | Path) -> None:
    """Puts LoRA weights (a folder, a file or a hub id) on a pipeline's network."""
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(lora)
        return
    from peft import PeftConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(lora), device="cpu")
    inject_adapter_in_model(PeftConfig.from_pretrained(str(lora)), pipe.transformer)
    set_peft_model_state_dict(pipe.transformer, {name.removeprefix(OUTER): w for name, w in weights.items()})


def _tell_what_is_continued(policy: Policy, name: str, lora: Lora | None) -> None:
    """Says so where the adapter that is there is not the one that was asked for."""
    own: Any = getattr(policy.network, "peft_config", {}).get(name)
    if own is None or lora is None:
        return
    asked = (lora.rank, lora.rank if lora.alpha is None else lora.alpha)
    if asked != (own.r, own.lora_alpha):
        logger.warning(
            "training goes on from the adapter that is loaded, of rank %d and alpha %g; the lora that was asked for, "
            "of rank %d and alpha %g, is not used", own.r, own.lora_alpha, *asked,
        )  # fmt: skip


def save_adapter(policy: Policy, folder: Path, who: str = "policy") -> list[Path]:
    """Writes the trainable weights as `who` has them: a LoRA in the diffusers format, other weights as `trainable.safetensors`.

    Returns:
        The files written.

    Raises:
        OSError: they could not be written.
    """
    from safetensors import SafetensorError

    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _saved(policy, folder, who)
    except SafetensorError as error:  # what its writer makes of a full disk
        raise OSError(f"could not write the adapter to {folder}: {error}") from error


def _saved(policy: Policy, folder: Path, who: str) -> list[Path]:
    from safetensors.torch import save_file

    with policy.acting_as(who):
        if not _layers(policy) or not hasattr(policy, "pipe"):
            save_file({n: p.detach().cpu().contiguous() for n, p in policy.trainable.items()}, folder / WEIGHTS)
            return [folder / WEIGHTS]
        from peft import get_peft_model_state_dict

        pipe: Any = policy.pipe
        part = "unet" if getattr(pipe, "unet", None) is policy.network else "transformer"
        name = _layers(policy)[0].active_adapters[0]
        # in peft's own names: in diffusers' older ones it loses attention where other layers have an adapter too
        layers = get_peft_model_state_dict(policy.network, adapter_name=name)
        if not hasattr(pipe, "save_lora_weights"):
            save_file({f"{OUTER}{n}": w.detach().cpu().contiguous() for n, w in layers.items()}, folder / PEFT)
            pipe.transformer.peft_config[name].save_pretrained(folder)
            return [folder / PEFT]
        given = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": _metadata(policy.network, name)}
        for words, encoder in pipe.components.items():  # where an adapter that was loaded has a part of its own
            if words.startswith("text_encoder") and name in getattr(encoder, "peft_config", {}):
                given[f"{words}_lora_layers"] = get_peft_model_state_dict(encoder, adapter_name=name)
                given[f"{words}_lora_adapter_metadata"] = _metadata(encoder, name)
        type(pipe).save_lora_weights(folder, **given)
    return [folder / ADAPTER]


def set_scale(policy: Policy, scale: float) -> None:
    """Multiplies every adapter's effect, on text encoders too: 0 is the base, 1 the trained model, in between a cheap guard
    against over-optimisation."""
    layers = [layer for part in policy.children() for layer in _layers(part)]
    if not layers:
        raise ValueError("there is no LoRA to scale: load one with lora=…")
    for layer in layers:
        for name in layer.active_adapters:
            layer.set_scale(name, scale)
    policy.forget()


def merge(policy: Policy) -> None:
    """Adds the adapter into the base weights, for inference; there is no reference afterwards."""
    for layer in _layers(policy):
        layer.merge()


def digest(policy: Policy) -> str:
    """SHA-256 of the trainable weights, by name."""
    import hashlib

    total = hashlib.sha256()
    for name, parameter in sorted(policy.trainable.items()):
        total.update(name.encode())
        total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _layers(policy: Policy | nn.Module) -> list:
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = policy.network if isinstance(policy, Policy) else policy
    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


def _metadata(network: nn.Module, name: str) -> dict:
    """The adapter's config as diffusers keeps it in the file's header, so that alpha survives."""
    adapters: Any = network.peft_config
    kept = {k: v for k, v in adapters[name].to_dict().items() if v is not None}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in kept.items()}


def _endings(layers: Iterable[str]) -> str:
    """The distinct last parts of layer names, with what comes before a bare number."""
    names = {".".join(n.split(".")[-2:]) if n.split(".")[-1].isdigit() else n.split(".")[-1] for n in layers}
    return ", ".join(sorted(names)) or "no linear or convolution layer"


def _hint(missing: Sequence[str], layers: Iterable[str]) -> str:
    near = difflib.get_close_matches(missing[0], {n.split(".")[-1] for n in layers}, 1) if missing else []
    return f": did you mean {near[0]!r}?" if near else ""


def named_tensors(policy: Policy) -> dict[str, Tensor]:
    """Copies of the trainable weights on the CPU, by name."""
    return {name: p.detach().cpu().clone() for name, p in policy.trainable.items()}
