"""Networks that overflow in float16: found where a run begins, and named with the module where it happens.

Half of the published checkpoints were trained in bfloat16, whose numbers are as large as float32's; float16 ends at 65504.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .levels import Clean, Levels
    from .policy import Cond, Policy

__all__ = ["check_network", "check_output"]

REMEDY = "load the model with dtype bfloat16 (--dtype bfloat16), or float32"


def check_network(policy: Policy, clean: Clean, x: Tensor, at: Levels, cond: Cond) -> None:
    """Raises if a float16 network gave what is no number for finite states; of any other type nothing is looked at.

    Raises:
        ValueError: it did.
    """
    if policy.dtype != torch.float16 or _finite(clean.x0):
        return
    found: list[str] = []
    hooks = [m.register_forward_hook(_watch(name, found)) for name, m in policy.network.named_modules()]
    try:
        with torch.no_grad():
            output = policy.output(x, at, cond)
    finally:
        for hook in hooks:
            hook.remove()
    if not _finite(output) and _finite(x):
        where = f" at {found[0]}" if found else ""
        raise ValueError(f"the {type(policy.network).__name__} overflows in float16{where}: {REMEDY}")


def check_output(who: str, *outputs: Tensor) -> None:
    """Raises if float16 outputs of `who` are no numbers.

    Raises:
        ValueError: they are not.
    """
    if not _finite(*(t for t in outputs if t.dtype == torch.float16)):
        raise ValueError(f"the {who} overflows in float16: {REMEDY}")


def _finite(*tensors: Tensor) -> bool:
    return all(t.is_meta or not t.is_floating_point() or bool(t.isfinite().all()) for t in tensors)


def _watch(name: str, found: list[str]) -> Any:
    def watch(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not found and isinstance(first, Tensor) and not _finite(first):
            found.append(name or type(module).__name__)

    return watch
