"""The battery that every model family must pass: the laws of `align/conformance`, on tiny random instances of the real classes.

A new family fails until `tests/samplers/families/tiny` has `VARIANTS` of it: pipelines of the real classes, saved in the hub layout
and loaded again here. The first of each module and those in `WHOLE` are asked everything at once, the others their costlier laws
in the slow suite.

What was proven is recorded in `samplers/proofs.json`, which the README shows; `KILTER_PROOFS=write pytest -n 0 -m "slow or not
slow" tests/samplers/families/test_conformance.py` writes it anew.
"""

from __future__ import annotations

import json
import math
import os
import pkgutil
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

import samplers
from align import load_policy
from align.catalogue import families, family_table
from align.cli import main
from align.conformance import LAWS, check
from samplers.families import FAMILIES
from tests.samplers.families import tiny

PROOFS = Path(samplers.__file__).with_name("proofs.json")
COSTLY = ["half", "gradient", "recomputing", "adapter", "saved adapter"]
WHOLE = {"sprint", "klein"}  # of other networks than the first of their module
MODULES = {m.name: import_module(f"{tiny.__name__}.{m.name}") for m in pkgutil.iter_modules(tiny.__path__)}
ALL = [(family, variant) for family, module in MODULES.items() for variant in module.VARIANTS]


def is_whole(family: str, variant: str) -> bool:
    return variant in WHOLE or variant == next(iter(MODULES[family].VARIANTS))


@pytest.mark.parametrize(("family", "variant"), ALL, ids=lambda name: name)
def test_every_law_holds(family: str, variant: str, tmp_path: Path) -> None:
    prove(family, variant, [law for law in LAWS if is_whole(family, variant) or law not in COSTLY], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), [one for one in ALL if not is_whole(*one)], ids=lambda name: name)
def test_every_costly_law_holds(family: str, variant: str, tmp_path: Path) -> None:
    prove(family, variant, COSTLY, tmp_path)


def prove(family: str, variant: str, laws: list[str], folder: Path) -> None:
    MODULES[family].VARIANTS[variant]().save_pretrained(folder)
    policy = load_policy(folder, device="cpu")
    unit = math.lcm(policy.multiple, 8)
    reload = lambda dtype: load_policy(folder, device="cpu", dtype=dtype)  # noqa: E731
    findings = list(check(policy, laws=laws, sizes=((unit, unit), (2 * unit, unit)), reload=reload))
    assert not {f.law: f.detail for f in findings if f.holds is False}
    record(type(policy.pipe).__name__, variant, laws, [f.law for f in findings if f.holds])


def record(pipeline: str, variant: str, tried: list[str], proven: list[str]) -> None:
    proofs = json.loads(PROOFS.read_text()) if PROOFS.exists() else {}
    before = proofs.get(pipeline, {}).get(variant, [])
    if os.environ.get("KILTER_PROOFS") == "write":
        proofs.setdefault(pipeline, {})[variant] = [
            law for law in LAWS if law in proven or (law in before and law not in tried)
        ]
        write({p: {v: proofs[p][v] for v in known() if v in proofs[p]} for p in FAMILIES if p in proofs})
    else:
        assert [law for law in before if law in tried] == proven, f"record what is proven, see {__file__}"


def known() -> Counter[str]:
    return Counter(variant for _, variant in ALL)


def write(proofs: dict[str, dict[str, list[str]]]) -> None:
    """A line a variant."""
    pipelines = []
    for name, variants in proofs.items():
        lines = [f"  {json.dumps(variant)}: {json.dumps(laws)}" for variant, laws in variants.items()]
        pipelines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    PROOFS.write_text("{\n" + ",\n".join(pipelines) + "\n}\n")


def test_every_family_is_proven_and_no_proof_is_stale() -> None:
    proofs = json.loads(PROOFS.read_text())
    assert set(proofs) == set(FAMILIES)
    assert Counter(variant for variants in proofs.values() for variant in variants) == known()
    assert {law for variants in proofs.values() for laws in variants.values() for law in laws} == set(LAWS)


def test_the_catalogue_of_families_tells_what_was_proven(capsys: pytest.CaptureFixture[str]) -> None:
    found = families()
    assert [p for f in found for p in f.pipelines] == list(FAMILIES)
    assert all(f.title and f.kinds and set(f.proven) <= set(LAWS) for f in found)
    assert main(["list", "families", "--json"]) == 0
    assert [json.loads(line)["title"] for line in capsys.readouterr().out.splitlines()] == [f.title for f in found]
    assert family_table() in (PROOFS.parent.parent / "README.md").read_text(), "write it: python -m align.catalogue"


def test_the_example_of_the_page_on_families_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (PROOFS.parent / "families" / "README.md").read_text()
    (tmp_path / "chroma_example.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FAMILIES, "ChromaPipeline", "")  # and so taken out again
    import_module("chroma_example")
    chroma().save_pretrained(tmp_path / "model")
    policy = load_policy(tmp_path / "model", device="cpu")
    findings = list(check(policy, sizes=((8, 8), (16, 8)), laws=[law for law in LAWS if law != "half"]))
    fails = {f.law: f.detail for f in findings if not f.holds}
    assert set(fails) <= {"recomputing"}, fails  # diffusers 0.42 loses Chroma's mask where it recomputes blocks
    assert all("'block'" in detail for detail in fails.values())


def chroma():
    import diffusers

    from tests.samplers.families.parts import autoencoder, stirred, t5, unhurried

    encoder, tokenizer = t5(24)
    sides = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 4)}
    guide = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    network = diffusers.ChromaTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, **sides, **guide)
    return diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=unhurried(stirred(network)),
    )
