"""Where weights are while a run goes on: all on the device, in few bits, or waiting on the CPU until their turn.

Quantised linear layers are counted by their bits, and the largest of them once more in full, as it is when it computes. Offloaded
networks are there in their own phases alone: whole ("model"), or two of their layers ("group", "sequential"). A backward pass
over layers that wait holds the weights of everything that is recomputed at once: a block, or the whole network. These are estimates
from sizes: what the libraries keep besides is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from samplers import Policy

from .targets import Target

__all__ = ["Kept", "kept"]

BITS = {"int8": 8.0, "fp8": 8.0, "nf4": 4.127}  # a weight, scales included; nf4 with double quantisation, 2305.14314
PARTS = {"vae": "decoder", "preview_vae": "decoder"}
AT_WORK = {"network": "network", "decoder": "decoder", "encoder": "decoder", "text": "text encoders"}


@dataclass(frozen=True)
class Kept:
    """The weights of a run.

    Attributes:
        bytes: by part, all of them.
        waits: how those of the policy are offloaded, or None.
        layer: bytes of the largest layer, by part.
        recomputed: bytes of the network's weights that a backward pass holds at once where layers wait.
        lifted: bytes of the largest quantised layer in full.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    waits: str | None = None
    layer: dict[str, int] = field(default_factory=dict)
    recomputed: int = 0
    lifted: int = 0

    def during(self, phase: str) -> int:
        """Bytes on the device in a phase."""
        if self.waits is None:
            return sum(self.bytes.values()) + self.lifted
        there = sum(size for part, size in self.bytes.items() if part not in self.layer)
        doing, backward = AT_WORK.get(phase.partition(": ")[2]), phase.endswith("backward")
        if self.waits == "model":
            return (
                there
                + self.lifted
                + max(size for p, size in self.bytes.items() if p in self.layer and doing in (p, None))
            )
        if backward:
            return there + self.lifted + self.recomputed
        return there + self.lifted + 2 * max(size for part, size in self.layer.items() if doing in (part, None))


def kept(policy: Policy, judges: Iterable[nn.Module], target: Target) -> Kept:
    """The weights of a policy without weights and of rewards; storages that parts share are counted once."""
    how, found, layer = policy.loaded_with, {}, {}
    seen: set[int] = set()
    lifted = 0
    for name, module in [*policy.named_children(), *(("reward", judge) for judge in judges)]:
        part = "text encoders" if name.startswith("text_encoder") else PARTS.get(name, name)
        few = (
            how.get("quantize") if name == "network" or (part == "text encoders" and how.get("quantize_text")) else None
        )
        for inside in module.modules():
            size = 0
            for tensor in (*inside.parameters(recurse=False), *inside.buffers(recurse=False)):
                storage = tensor.untyped_storage()
                if storage._cdata in seen:
                    continue
                seen.add(storage._cdata)
                whole = storage.nbytes()
                if few and isinstance(inside, nn.Linear) and tensor.ndim == 2:
                    lifted, whole = max(lifted, whole), int(tensor.numel() * BITS[few] / 8)
                size += target.rounded(whole)
            found[part] = found.get(part, 0) + size
            if part != "reward":
                layer[part] = max(layer.get(part, 0), size)
    return Kept(found, how.get("offload"), layer, _recomputed(policy, found.get("network", 0)), lifted)


def _recomputed(policy: Policy, whole: int) -> int:
    """Bytes of the weights of the largest block, if blocks are recomputed one by one; else of the whole network."""
    if policy.checkpointing != "block":
        return whole
    lists = [m for m in policy.network.children() if isinstance(m, nn.ModuleList)]
    blocks = [sum(p.untyped_storage().nbytes() for p in block.parameters()) for blocks in lists for block in blocks]
    return max(blocks, default=whole)
