"""What a run is planned for: a device's memory, how it hands out memory, and which attention it runs.

CUDA's caching allocator hands out multiples of 512 bytes. cuBLAS keeps a workspace for each thread that multiplies matrices, one
for the forward and one for the backward pass: 32 MiB on Hopper and later, 8 MiB + 128 KiB before
(docs.pytorch.org/docs/stable/notes/cuda.html). cuDNN's workspaces live within a convolution and are not foreseen. The driver's
context lies outside of what torch counts.

Attention decides whether an L × L matrix is kept. On a GPU flash attention (half precision, heads up to 256 wide, no mask) or the
memory-efficient kernel keep q, k, v, the output and one number a query; the CPU has a flash kernel of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..footprint import free_bytes

__all__ = ["Attention", "Target"]

GIB, UNITS = 1 << 30, {"": 10**9, "GB": 10**9, "GIB": 1 << 30, "MB": 10**6, "MIB": 1 << 20}
CONTEXT = 600 << 20  # of the driver and the libraries' kernels on an H100
HOPPER, OLDER = 32 << 20, (8 << 20) + (128 << 10)
GPUS = {  # GiB that torch reports
    "t4": 14.6, "l4": 22.0, "a10": 22.0, "a10g": 22.0, "v100-16": 15.8, "v100-32": 31.7, "rtx3060": 11.6, "rtx3090": 23.6,
    "rtx4090": 23.5, "rtx5090": 31.4, "l40s": 44.4, "a6000": 47.4, "a100-40": 39.4, "a100-80": 79.1, "h100": 79.1,
    "h200": 139.8, "b200": 178.0,
}  # fmt: skip
NEW = ("h100", "h200", "b200", "rtx5090")


@dataclass(frozen=True)
class Target:
    """A device that a run is planned for.

    Attributes:
        name: for tables.
        room: bytes a run may hold.
        cuda: whether it is a GPU of CUDA.
        workspace: bytes that cuBLAS keeps for each of the forward and the backward pass.
    """

    name: str = "cpu"
    room: float = float("inf")
    cuda: bool = False
    workspace: int = 0

    @classmethod
    def of(cls, wanted: str | None) -> Target:
        """The GPU that a name such as "a100-80" or a size such as "24GB" or "16GiB" means, or the device that is here.

        Raises:
            ValueError: it is neither.
        """
        if wanted is None:
            return cls.here()
        word = re.sub(r"(?<=.)[\s_-]", "", wanted.strip().lower())
        known = {name.replace("-", ""): name for name in GPUS}
        if name := known.get(word.removesuffix("gb")):
            return cls(name, GPUS[name] * GIB - CONTEXT, True, HOPPER if name in NEW else OLDER)
        size = re.fullmatch(r"(\d+(?:\.\d+)?)(gb|gib|mb|mib|)", word)
        if size is None or not float(size[1]) > 0:
            raise ValueError(f"a GPU is a size such as 24GB or 16GiB, or one of {', '.join(GPUS)}; got {wanted!r}")
        return cls(wanted, float(size[1]) * UNITS[size[2].upper()] - CONTEXT, True, OLDER)

    @classmethod
    def here(cls) -> Target:
        """The present GPU, or what is free of the CPU's memory."""
        if not torch.cuda.is_available():
            return cls("cpu", free_bytes(torch.device("cpu")))
        known = torch.cuda.get_device_properties(0)
        return cls(known.name, known.total_memory - CONTEXT, True, HOPPER if known.major >= 9 else OLDER)

    def rounded(self, size: int) -> int:
        """What an allocation of so many bytes takes."""
        return -(-size // 512) * 512 if self.cuda else size

    def unlimited(self) -> Target:
        """The same device with endless memory."""
        return replace(self, room=float("inf"))


class Attention:
    """The attention that the target would run, in place of what tensors without data would take."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention as `torch.nn.functional.scaled_dot_product_attention` would pick its kernel."""
        aten: Any = torch.ops.aten
        how = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        heads, width = query.shape[-3] if query.ndim == 4 else 0, query.shape[-1]
        if enable_gqa and heads and key.shape[-3] != heads:
            key, value = (t.repeat_interleave(heads // key.shape[-3], -3) for t in (key, value))
        fused = query.ndim == 4 and width == key.shape[-1] and dropout_p == 0
        needs = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        mask = None if attn_mask is None else _additive(attn_mask, query)
        half = query.dtype in (torch.float16, torch.bfloat16)
        if not self.target.cuda and fused and width == value.shape[-1]:
            return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, **how)[0]
        if self.target.cuda and fused and half and width <= 256 and mask is None and width == value.shape[-1]:
            padded = [F.pad(t, (0, -width % 8)) for t in (query, key, value)] if width % 8 else [query, key, value]
            return aten._scaled_dot_product_flash_attention(*padded, **how | {"scale": scale or width**-0.5})[0][
                ..., :width
            ]
        if self.target.cuda and fused and width % (8 if half else 4) == 0:
            if mask is not None:
                mask = mask.expand(*query.shape[:3], key.shape[-2])
            return aten._scaled_dot_product_efficient_attention(query, key, value, mask, needs, **how)[0]
        return aten._scaled_dot_product_attention_math(query, key, value, mask, **how)[0]


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """A mask as numbers to add."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.where(mask, query.new_zeros(()), -torch.inf)
