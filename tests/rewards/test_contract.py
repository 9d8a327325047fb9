"""The battery that every reward exported from `rewards` must pass: the laws of `rewards/contract.py`, on tiny random instances of
the real classes. A new class fails until `tests/rewards/cases` has a `Case` for it.

What was proven is recorded in `rewards/proofs.json`, which `kilter list rewards` shows; `KILTER_PROOFS=write pytest -n 0
tests/rewards/test_contract.py` writes it anew.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import pytest

import rewards
from rewards import Reward
from rewards.contract import check
from tests.rewards.cases import collect

CASES = collect()
PROOFS = Path(rewards.__file__).with_name("proofs.json")
UNIVERSAL = {"cost", "device"}  # laws that say nothing about a class, or depend on the machine


def exported() -> list[str]:
    found = [getattr(rewards, name) for name in rewards.__all__]
    return sorted(
        c.__name__ for c in found if inspect.isclass(c) and issubclass(c, Reward) and not inspect.isabstract(c)
    )


@pytest.mark.parametrize("name", exported())
def test_every_law_holds(name: str, request: pytest.FixtureRequest) -> None:
    if name not in CASES:
        pytest.fail(f"rewards.{name} has no Case in tests/rewards/cases: add one")
    case = CASES[name]
    reward = case.build(request)
    assert type(reward).__name__ == name
    findings = check(
        reward,
        case.show(),
        list(case.prompts),
        tolerance=case.tolerance,
        size=case.size,
        rounding=case.rounding,
        trained=False,
    )
    failed = {f.law: f.detail for f in findings if f.holds is False}
    assert not failed
    title, _, rest = (inspect.getdoc(type(reward)) or "").partition("\n")
    assert title.endswith(".") and len(title) < 100 and rest.startswith("\n")
    proven = [f.law for f in findings if f.holds and f.law not in UNIVERSAL]
    recorded = json.loads(PROOFS.read_text()) if PROOFS.exists() else {}
    if os.environ.get("KILTER_PROOFS") == "write":
        kept = {k: v for k, v in {**recorded, name: proven}.items() if k in exported()}
        PROOFS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    else:
        assert recorded.get(name, proven) == proven, (
            "record what is proven: KILTER_PROOFS=write pytest -n 0 " + __file__
        )


def test_no_case_and_no_proof_is_stale() -> None:
    assert set(CASES) <= set(exported())
    assert set(json.loads(PROOFS.read_text())) == set(exported())
