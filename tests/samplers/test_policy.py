"""Laws of the policy: conditions are rows, guidance is one call and one formula, adapters speak and are put back."""

from __future__ import annotations

import pytest
import torch

from samplers import Cond, Levels
from samplers.families.sd import StableDiffusion
from tests.conftest import build_pipeline


def cond(rows: int = 4, guidance: float = 3.0) -> Cond:
    base = torch.arange(rows * 2.0).reshape(rows, 2)
    return Cond({"text": base, "time": base[:, :1] + 100}, {"text": -base, "time": -base[:, :1] - 100}, guidance)


def texts(c: Cond) -> list[float]:
    """The first number of every row, after checking that all four tensors went the same way."""
    assert c.negative is not None
    assert torch.equal(c.negative["text"], -c.positive["text"])
    assert torch.equal(c.positive["time"], c.positive["text"][:, :1] + 100)
    assert torch.equal(c.negative["time"], -c.positive["time"])
    return (c.positive["text"][:, 0] / 2).tolist()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([2, 0, 0], [2, 0, 0]),
        ((1, 3), [1, 3]),
        (torch.tensor([3, 3]), [3, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (0, [0]),
        (3, [3]),
        (-1, [3]),
        ([], []),
    ],
    ids=str,
)
def test_rows_of_a_condition(rows, expected):
    taken = cond()[rows]
    assert texts(taken) == expected
    assert len(taken) == len(expected)
    assert taken.guidance == 3.0


def test_rows_beyond_the_end_raise_and_iteration_ends():
    with pytest.raises(IndexError):
        cond()[4]
    assert [len(row) for row in cond()] == [1, 1, 1, 1]


def test_repeat_makes_one_block_a_prompt_and_indexing_undoes_it():
    repeated = cond(3).repeat(2)
    assert texts(repeated) == [0, 0, 1, 1, 2, 2]
    assert texts(repeated[::2]) == [0, 1, 2]
    assert texts(cond(3).repeat(1)) == texts(cond(3))


def test_both_is_negative_then_positive():
    both = cond(3).both()
    assert len(both) == 6
    assert both.negative is None
    assert torch.equal(both.positive["text"], torch.cat([-cond(3).positive["text"], cond(3).positive["text"]]))


@pytest.mark.parametrize(("guidance", "guided"), [(1.0, False), (5.0, True), (1.01, True), (0.0, False), (0.5, False)])
def test_guidance_of_one_or_less_is_no_guidance(guidance, guided):
    assert cond().with_guidance(guidance).guided is guided
    assert not Cond({"text": torch.zeros(2, 1)}, None, guidance).guided
    assert cond().guidance == 3.0


def test_conditions_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="one row a sample"):
        Cond({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="one row a sample"):
        Cond({"a": torch.zeros(2, 1)}, {"a": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match=r"positive, \['a'\]; got \['b'\]"):
        Cond({"a": torch.zeros(2, 1)}, {"b": torch.zeros(2, 1)})


# The network


@pytest.fixture
def policy(tmp_path) -> StableDiffusion:
    return StableDiffusion(build_pipeline(tmp_path))


@pytest.fixture
def state(policy):
    """(x, level, cond) of two rows."""
    x = torch.randn(2, *policy.shape((16, 16)), generator=torch.Generator().manual_seed(0))
    return x, policy.levels(5)[2], policy.encode(["a red cat", "dog"])


def calls(policy) -> list[int]:
    """Grows by the batch size of every forward of the network."""
    seen: list[int] = []
    policy.network.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("guidance", [1.5, 2.0, 7.5])
@pytest.mark.parametrize("rows", [False, True])
def test_guidance_formula_in_one_batched_call(policy, state, guidance, rows):
    x, at, c = state
    if rows:
        at = policy.levels(5)[torch.tensor([1, 3])]
    seen = calls(policy)
    clean = policy.denoise(x, at, c.with_guidance(guidance))
    assert seen == [4]
    alone = [policy.denoise(x, at, Cond(part)).eps for part in (c.negative, c.positive)]
    torch.testing.assert_close(clean.eps, alone[0] + guidance * (alone[1] - alone[0]), rtol=1e-5, atol=1e-5)
    alpha, sigma = at.like(x)
    torch.testing.assert_close(alpha * clean.x0 + sigma * clean.eps, x, rtol=1e-4, atol=1e-4)


def test_guidance_of_one_skips_the_negative_branch(policy, state):
    x, at, c = state
    seen = calls(policy)
    clean = policy.denoise(x, at, c.with_guidance(1.0))
    assert seen == [2]
    assert torch.equal(clean.eps, policy.denoise(x, at, Cond(c.positive)).eps)


def test_one_level_a_row_equals_each_row_alone(policy, state):
    x, _, c = state
    levels, steps = policy.levels(5), torch.tensor([4, 1])
    together = policy.denoise(x, levels[steps], c)
    for row, i in enumerate(steps.tolist()):
        alone = policy.denoise(x[row : row + 1], levels[i], c[row])
        torch.testing.assert_close(together.x0[row : row + 1], alone.x0, rtol=1e-4, atol=1e-4)


def test_half_network_gives_float32_estimates(policy, state):
    x, at, c = state
    clean = policy.bfloat16().denoise(x.bfloat16(), at, c)
    assert clean.x0.dtype == clean.eps.dtype == torch.float32


def test_train_keeps_every_module_in_eval(policy):
    assert not any(module.training for module in policy.train().modules())
    assert not any(module.training for module in policy.train(True).modules())


# Adapters


def add_adapter(policy, name: str, seed: int) -> None:
    """A LoRA that says something: its B is not zero."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_v"])
    policy.network.add_adapter(config, name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in policy.network.named_parameters():
        if f".{name}." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def adapted(policy, state):
    """(policy, base output, {adapter: output}) with "default" active and three adapters in all."""
    say = lambda: policy.predict(state[0], state[1], state[2].with_guidance(1.0))  # noqa: E731
    base = say()
    outputs = {}
    for seed, name in enumerate(("default", "old", "ema")):
        add_adapter(policy, name, seed)
        policy.network.set_adapter(name)
        outputs[name] = say()
    policy.network.set_adapter("default")
    for key, parameter in policy.network.named_parameters():  # an odd pattern, so that restoring it means something
        parameter.requires_grad_(".default." in key and "to_q" in key or key == "conv_in.bias")
    return policy, base, outputs, say


def flags(policy) -> dict[str, bool]:
    return {key: parameter.requires_grad for key, parameter in policy.network.named_parameters()}


def test_the_fixture_has_four_different_voices(adapted):
    _, base, outputs, _ = adapted
    voices = [base, *outputs.values()]
    for a in range(4):
        for b in range(a):
            assert float((voices[a] - voices[b]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("who", ["policy", "reference", "old", "ema"])
def test_the_named_voice_speaks_exactly_and_everything_is_put_back(adapted, who):
    policy, base, outputs, say = adapted
    before = flags(policy)
    assert sum(before.values()) > 1
    with policy.acting_as(who):
        expected = {"policy": outputs["default"], "reference": base}.get(who, outputs.get(who))
        assert torch.equal(say(), expected)
    assert torch.equal(say(), outputs["default"])
    assert flags(policy) == before


@pytest.mark.parametrize("who", ["reference", "old"])
def test_an_exception_puts_everything_back(adapted, who):
    policy, _, outputs, say = adapted
    before = flags(policy)
    with pytest.raises(RuntimeError, match="inside"), policy.acting_as(who):
        raise RuntimeError("inside")
    assert torch.equal(say(), outputs["default"])
    assert flags(policy) == before


@pytest.mark.parametrize(("outer", "inner"), [("reference", "old"), ("old", "reference"), ("old", "ema")])
def test_voices_nest(adapted, outer, inner):
    policy, base, outputs, say = adapted
    voices, before = {"reference": base, **outputs}, flags(policy)
    with policy.acting_as(outer):
        with policy.acting_as(inner):
            assert torch.equal(say(), voices[inner])
        assert torch.equal(say(), voices[outer])
    assert torch.equal(say(), outputs["default"])
    assert flags(policy) == before


def test_gradients_reach_the_policy_after_the_reference_spoke(adapted):
    policy, _, _, say = adapted
    with policy.acting_as("reference"), torch.no_grad():
        say()
    say().sum().backward()
    for key, parameter in policy.network.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, key


def test_unknown_voices_name_what_exists(adapted, tmp_path):
    policy, *_ = adapted
    with (
        pytest.raises(ValueError, match=r"no adapter 'new'; it has \['default', 'ema', 'old'\]"),
        policy.acting_as("new"),
    ):
        pass
    bare = StableDiffusion(build_pipeline(tmp_path / "bare"))
    with pytest.raises(ValueError, match="no adapter 'old'; it has none"), bare.acting_as("old"):
        pass


def test_without_adapters_the_reference_is_the_policy(policy, state):
    x, at, c = state
    plain = policy.denoise(x, at, c).x0
    with policy.acting_as("reference"):
        assert torch.equal(policy.denoise(x, at, c).x0, plain)


def test_levels_of_the_doubled_batch_follow_their_rows(policy, state):
    """The guided call at levels a row sees each level twice, in the order negative, positive."""
    x, _, c = state
    seen: list[torch.Tensor] = []
    policy.network.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    levels: Levels = policy.levels(5)[torch.tensor([1, 3])]
    policy.denoise(x, levels, c)
    assert seen[0].tolist() == [*levels.t.tolist(), *levels.t.tolist()]
