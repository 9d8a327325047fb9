"""Laws of descriptions: everything one can choose is described by plain values, and built again from them."""

from __future__ import annotations

import inspect
import json
import math

import pytest
import torch

from align.config import TrainConfig
from align.description import build, build_policy, describe, describe_policy, differences
from align.objectives import Objective
from align.parsing import COMPONENTS, concrete
from align.sources import Rollouts
from rewards import Brightness, FromCallable, JPEGSize, Prompt, Reward, Weighted
from samplers import DDIM, Kernel
from samplers.families.gaussian import GaussianPolicy
from tests.align.runs import CASES

PLAIN = [cls for base in COMPONENTS.values() for cls in concrete(base)]


def needs_nothing(cls: type) -> bool:
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def assert_round_trip(component) -> None:
    description = describe(component)
    plain = json.loads(json.dumps(description))
    again = build(plain)
    assert type(again) is type(component)
    assert describe(again) == plain
    assert differences(plain, describe(component)) == []


@pytest.mark.parametrize("cls", [c for c in PLAIN if needs_nothing(c) and issubclass(c, (Objective, Kernel))])
def test_components_by_default(cls):
    assert_round_trip(cls())


@pytest.mark.parametrize("name", CASES)
def test_components_as_tests_make_them(name, data):
    case = CASES[name]
    assert_round_trip(case.objective())
    assert_round_trip(case.source(data))
    assert_round_trip(case.reward())


@pytest.mark.parametrize(
    "component",
    [
        TrainConfig(kernel=DDIM(eta=0.5), size=(8, 8), panel=[Brightness()], eval_prompts=["a"], lora=None),
        TrainConfig(),
        Weighted({"light": Brightness(), "size": JPEGSize()}, {"light": 0.5, "size": 2.0}),
        Rollouts([Prompt("a", "b", {"n": 1})], reward=Brightness()),
    ],
    ids=lambda c: type(c).__name__,
)
def test_components_within_components(component):
    assert_round_trip(component)


def test_policies():
    policy = GaussianPolicy(
        torch.tensor([[0.1, 0.2], [0.3, 0.4]]), [0.5, 0.6], [0.1, 0.9], frame="flow", prediction="flow"
    )
    again = build_policy(json.loads(json.dumps(describe_policy(policy))))
    for name, value in policy.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], value, rtol=1e-7, atol=1e-7)
    assert (again.frame, again.prediction, again.dtype) == ("flow", "flow", torch.float64)


def test_loaded_policies(tiny_folder):
    from align import load_policy

    description = describe_policy(load_policy(tiny_folder, device="cpu", dtype="bfloat16"))
    assert description == {"model": str(tiny_folder), "adapter": None, "dtype": "bfloat16", "device": "cpu"}
    assert build_policy(description).dtype == torch.bfloat16


def test_functions_are_described_by_where_they_are():
    assert_round_trip(FromCallable(math.fsum))
    assert describe(FromCallable(math.fsum)) == describe(FromCallable("math.fsum")) != describe(FromCallable(math.sin))


def test_differences_are_named_to_the_leaf():
    one = describe(TrainConfig(batch=2, kernel=DDIM(eta=0.5)))
    other = describe(TrainConfig(batch=4, kernel=DDIM(eta=1.0), size=(8, 8)))
    assert differences(one, one) == []
    assert differences(one, other, "train") == [
        "train.batch: 2 → 4",
        "train.kernel.eta: 0.5 → 1.0",
        "train.size: None → [8, 8]",
    ]


def test_what_cannot_be_made_again():
    for path, said in (("align.nothing.X", "No module"), ("align.config.Absent", "no attribute")):
        with pytest.raises(ValueError, match=rf"cannot make {path} again .*{said}.*: pass the object itself"):
            build({"class_path": path, "init_args": {}})
    with pytest.raises(ValueError, match="unexpected keyword argument 'colour'"):
        build({"class_path": "samplers.DDIM", "init_args": {"colour": 1}})
    assert issubclass(Brightness, Reward)
