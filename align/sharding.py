"""Sharding: the frozen base spread over the processes' devices, for a model too large for one of them.

Where `accelerate launch` asks for FSDP, each process keeps a part of every weight of the network's base, and whole blocks are
gathered only while they compute (ZeRO, 1910.02054; torch's `fully_shard`, configured by accelerate's plugin). What is trained is
left out: a LoRA is a few megabytes, so every process has all of it, and gradients, voices, optimiser and checkpoints are those of
an unsharded run. Accelerate prepares a model for FSDP on GPUs only and would shard the LoRA too, so `fully_shard` is called here.

Gathering takes all processes. So they must call the network equally often, each call with or without a gradient alike.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from samplers import Policy

from .world import World

__all__ = ["asked", "shard"]


def asked() -> bool:
    """Whether the launcher asks for sharding. One process has nobody to share with."""
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    return wanted and int(os.environ.get("WORLD_SIZE", "1")) > 1


def shard(policy: Policy, world: World) -> None:
    """Spreads the frozen weights of the network over the processes, if the launcher asks for it.

    The network may still be on the CPU, where each process has loaded all of it: a block at a time goes to the device, and a
    share of it stays there.

    Raises:
        ValueError: all weights are trained, or the launcher asks for what this cannot do.
    """
    if not asked():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    trained = policy.trainable
    if len(trained) == sum(1 for _ in policy.network.parameters()):
        raise ValueError(
            "FSDP shards the frozen base of a LoRA, but all weights are trained: set lora, or launch without FSDP"
        )
    plugin = _plugin()
    blocks = _blocks(policy.network, plugin)
    for p in trained.values():
        p.data = p.data.to(world.device)
    for voice in policy.voices.values():
        voice.update({name: w.to(world.device) for name, w in voice.items()})
    how: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, (world.size,)),
        "reshard_after_forward": plugin.reshard_after_forward,  # of the root too: between calls nothing is gathered
        "ignored_params": set(trained.values()),
    }
    for block in blocks:
        fully_shard(block, **how)
    fully_shard(policy.network, **how)
    policy.sharded = True


def _plugin() -> Any:
    """Accelerate's settings, from the launcher's environment."""
    from accelerate.utils import FullyShardedDataParallelPlugin, is_torch_version

    if not is_torch_version(">=", "2.7.0"):
        raise ValueError(f"sharding a model needs torch ≥ 2.7; this is {torch.__version__}")
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"FSDP version must be 2; got {version}: set fsdp_version: 2 in the accelerate config")
    for name, remedy in (
        ("OFFLOAD_PARAMS", "use more devices"),
        ("ACTIVATION_CHECKPOINTING", "set memory.checkpointing in the training configuration"),
    ):
        if os.environ.get(f"FSDP_{name}", "false").lower() in ("true", "1"):
            raise ValueError(f"fsdp_{name.lower()} must be false: {remedy}")
    return FullyShardedDataParallelPlugin()


def _blocks(network: nn.Module, plugin: Any) -> list[nn.Module]:
    """The parts that are gathered one at a time, inner ones first."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    chosen = fsdp2_prepare_auto_wrap_policy(plugin, network)
    blocks = [m for m in network.modules() if m is not network and chosen is not None and chosen(m)]
    if not blocks:
        raise ValueError(
            "FSDP would gather the whole network at once: name its blocks in fsdp_transformer_layer_cls_to_wrap, "
            "as configs/accelerate/fsdp_8_gpus.yaml does"
        )
    return blocks[::-1]
