"""Memory: what the backward pass recomputes, which attention runs, and how much is decoded at a time.

A rollout with gradient through T network calls stores T sets of activations unless it recomputes them. Per step ("step"), only
the states between steps are stored, and one network call's activations exist at a time; per block ("block"), the network's own
blocks are recomputed, so that less is held within a call and more over a trajectory. The decoder is always recomputed chunk by
chunk unless checkpointing is "none".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from samplers import Policy
from samplers.policy import Checkpointing

__all__ = ["Memory"]


@dataclass(frozen=True)
class Memory:
    """How to fit a run.

    Attributes:
        checkpointing: "step", "block" or "none"; see the module docstring.
        attention: "sdpa" is torch's own; "xformers" needs the package (extra `gpu`).
        decode_chunk: samples decoded at a time.
    """

    checkpointing: Checkpointing = "step"
    attention: Literal["sdpa", "xformers"] = "sdpa"
    decode_chunk: int = 8

    def __post_init__(self) -> None:
        if self.decode_chunk < 1:
            raise ValueError(f"decode_chunk must be ≥ 1; got {self.decode_chunk}")

    def apply(self, policy: Policy) -> None:
        """Sets a policy up.

        Raises:
            ValueError: xformers is asked for and not installed, or the network cannot do what is asked.
        """
        policy.checkpointing, policy.decode_chunk = self.checkpointing, self.decode_chunk
        block = self.checkpointing == "block"
        if block and not hasattr(policy.network, "enable_gradient_checkpointing"):
            raise ValueError(
                f"{type(policy.network).__name__} cannot recompute its blocks: use checkpointing 'step' or 'none'"
            )
        for part in (policy.network, getattr(policy, "controlnet", None)):
            if hasattr(part, "enable_gradient_checkpointing"):
                getattr(part, "enable_gradient_checkpointing" if block else "disable_gradient_checkpointing")()
        if self.attention == "xformers":
            try:
                policy.network.enable_xformers_memory_efficient_attention()  # pyright: ignore[reportCallIssue]
            except (ModuleNotFoundError, ImportError, AttributeError) as error:
                raise ValueError(
                    f"attention 'xformers' cannot be used here ({error}): pip install 'kilter[gpu]'"
                ) from error
