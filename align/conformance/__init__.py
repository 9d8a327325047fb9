"""The laws that every model obeys here, checked on any model: `kilter check-model`, and the battery over tiny random instances of
the real classes of every family.

A law is a function of a `Trial` that returns what it measured, raises `Broken` with what went wrong, or `Inapplicable` with the
reason. The rest of its docstring says what a broken law means and what to do. Latents are compared as shares of the largest one,
and agree to 5e-5 in float32 (3 % in float16, 10 % in bfloat16: check in float32 if you can); images agree to 1e-4 (5 % in half
precision).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rewards.contract import Broken, Inapplicable
from samplers import Policy
from samplers.latents import LatentPolicy

from . import sampling, tuning
from .trial import Trial, exactly

__all__ = ["LAWS", "Finding", "Trial", "check", "statement"]


@dataclass(frozen=True)
class Finding:
    """What became of a law.

    Attributes:
        law: its name.
        holds: None where it does not apply.
        detail: what was measured, or why it failed or does not apply.
        remedy: what a failure means and what to do; empty otherwise.
        seconds: it took.
    """

    law: str
    holds: bool | None
    detail: str
    remedy: str
    seconds: float


LAWS: dict[str, Callable[[Trial], str]] = {
    law.__name__.replace("_", " "): law
    for law in (
        sampling.levels, sampling.samples, sampling.guidance, sampling.decode, sampling.encode, sampling.batches,
        sampling.texts, sampling.replay, sampling.steering, sampling.half, tuning.gradient, tuning.recomputing, tuning.adapter,
        tuning.saved_adapter,
    )
}  # fmt: skip


def statement(law: str) -> tuple[str, str]:
    """What a law says, and what it means where it is broken."""
    said, _, remedy = (inspect.getdoc(LAWS[law]) or "").partition("\n\n")
    return said, " ".join(remedy.split())


def check(policy: Policy, *, laws: Sequence[str] = (), **trial) -> Iterator[Finding]:
    """Puts a model to the test of the laws, one after the other.

    Args:
        policy: loaded by `load_policy`; it is left as it was.
        laws: names; all by default.
        trial: see `Trial`.

    Raises:
        ValueError: an unknown law, a policy without a pipeline, or arguments that do not fit the model.
    """
    if not isinstance(policy, LatentPolicy):
        raise ValueError(
            f"{type(policy).__name__} has no diffusers pipeline to be compared with: load it by load_policy"
        )
    if unknown := set(laws) - set(LAWS):
        raise ValueError(f"laws must be among {', '.join(LAWS)}; got {', '.join(sorted(unknown))}")
    on_trial = Trial(policy, **trial)
    return (_tried(name, on_trial) for name in laws or LAWS)


def _tried(name: str, trial: Trial) -> Finding:
    began, holds = time.perf_counter(), None
    try:
        with exactly():
            holds, detail = True, LAWS[name](trial)
    except Inapplicable as reason:
        detail = str(reason)
    except Broken as fault:
        holds, detail = False, str(fault)
    except Exception as error:  # a law that cannot even be tried does not hold
        holds, detail = False, f"{type(error).__name__}: {error}"
    remedy = statement(name)[1] if holds is False else ""
    return Finding(name, holds, detail, remedy, time.perf_counter() - began)
