"""Laws of resampling: unbiased and bounded offspring, identity, dead particles, isolation, ESS and tempering."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers.resampling import (
    UNBIASED,
    Degenerate,
    Scheme,
    ess,
    log_mean_exp,
    normalise,
    offspring,
    place,
    resample,
    temper,
)

SCHEMES = get_args(Scheme)
DRAWN = sorted(UNBIASED)
IDENTITY = ("stratified", "systematic", "residual", "ssp", "killing", "none")
WITHIN_ONE = ("systematic", "ssp")
INF = math.inf
BELOW_ONE = 1 - 2.0**-53  # the largest number a float64 generator gives

uniform = st.floats(0, BELOW_ONE)


def generators(groups: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + g) for g in range(groups)]


def counts(ancestors: Tensor) -> Tensor:
    return torch.zeros_like(ancestors).scatter_add_(1, ancestors, torch.ones_like(ancestors))


def uniforms_needed(scheme: str, size: int) -> int:
    return {"systematic": 1, "single": 1, "argmax": 0, "none": 0, "killing": 2 * size}.get(scheme, size)


@st.composite
def populations(draw, groups: int = 3):
    """Log-weights (groups, K) with some dead particles, never a whole group."""
    size = draw(st.integers(1, 12))
    entry = st.one_of(st.floats(-8, 8), st.floats(-60, 0), st.just(-INF), st.just(0.0))
    rows = [draw(st.lists(entry, min_size=size, max_size=size)) for _ in range(groups)]
    for row in rows:
        row[draw(st.integers(0, size - 1))] = draw(st.floats(-5, 5))
    return torch.tensor(rows, dtype=torch.float64)


@st.composite
def draws(draw, scheme: str):
    """Weights (P, K) and any uniforms a generator could give, the extremes included."""
    weights = normalise(draw(populations()))
    n = uniforms_needed(scheme, weights.shape[1])
    edge = st.one_of(uniform, st.sampled_from([0.0, BELOW_ONE, 0.5]))
    rows = [draw(st.lists(edge, min_size=n, max_size=n)) for _ in range(len(weights))]
    return weights, torch.tensor(rows, dtype=torch.float64).reshape(len(weights), n)


CASES = {
    "uneven": [0.05, 0.4, 0.001, 0.149, 0.3, 0.1],
    "integers and halves": [0.25, 0.125, 0.125, 0.0625, 0.1875, 0.25, 0.0, 0.0],
    "nearly flat": [0.21, 0.19, 0.2, 0.205, 0.195],
    "two": [0.7, 0.3],
    "dominated": [1e-3, 0.997, 2e-3],
}


@pytest.mark.parametrize("scheme", DRAWN)
@pytest.mark.parametrize("case", CASES)
def test_offspring_are_unbiased(scheme, case):
    weights = torch.tensor(CASES[case], dtype=torch.float64)
    size, draws = len(weights), 100_000
    log_w = weights.log().expand(draws, size)
    found = counts(resample(log_w, scheme, [torch.Generator().manual_seed(7)] * draws)).double()
    error = (found.mean(0) - size * weights).abs()
    assert (error <= 4 * found.std(0) / math.sqrt(draws) + 1e-8).all(), (found.mean(0), size * weights)


def test_low_variance_schemes_have_lower_variance_than_multinomial():
    log_w = torch.tensor(CASES["uneven"], dtype=torch.float64).log().expand(20_000, 6)
    g = torch.Generator().manual_seed(3)
    spread = {s: counts(resample(log_w, s, [g] * len(log_w))).double().var(0).sum() for s in DRAWN}
    for scheme in ("stratified", "systematic", "residual", "ssp", "killing"):
        assert spread[scheme] < spread["multinomial"] < spread["single"]


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_counts_add_up_and_respect_their_bounds_for_any_uniforms(scheme, data):
    weights, uniforms = data.draw(draws(scheme))
    size = weights.shape[1]
    found = offspring(weights, scheme, uniforms)
    assert found.dtype == torch.int64
    assert (found >= 0).all()
    assert (found.sum(1) == size).all()
    if scheme != "none":
        assert (found[weights == 0] == 0).all(), "a dead particle was drawn"
    excess = found - size * weights
    if scheme in WITHIN_ONE:
        assert (excess.abs() < 1 + 1e-6).all()
    if scheme == "stratified":
        assert (excess.abs() < 2 + 1e-6).all()
    if scheme == "residual":
        assert (found >= (size * weights - 1e-6).floor()).all()
    if scheme in ("single", "argmax"):
        assert (found.amax(1) == size).all()


@pytest.mark.parametrize("scheme", WITHIN_ONE)
def test_offspring_are_floor_or_ceil(scheme):
    log_w = torch.randn(2000, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = 9 * normalise(log_w)
    found = counts(resample(log_w, scheme, generators(2000)))
    assert ((found == expected.floor()) | (found == expected.ceil())).all()


@pytest.mark.parametrize("scheme", ["stratified", "systematic", "residual", "ssp"])
def test_integer_expectations_are_met_exactly(scheme):
    weights = torch.tensor([[0.25, 0.5, 0.0, 0.25], [1 / 2, 0.0, 0.0, 1 / 2]], dtype=torch.float64)
    for seed in range(50):
        found = counts(resample(weights.log(), scheme, generators(2, seed)))
        assert found.tolist() == [[1, 2, 0, 1], [2, 0, 0, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scheme", IDENTITY)
def test_uniform_weights_give_the_identity(scheme, dtype):
    for size in range(1, 129):
        constants = torch.tensor([0.0, -math.log(size), 1e4 / 3, -123.456], dtype=dtype)
        ancestors = resample(constants[:, None].expand(4, size), scheme, generators(4, size))
        assert torch.equal(ancestors, torch.arange(size).expand(4, size)), size


@pytest.mark.parametrize("scheme", IDENTITY)
@pytest.mark.parametrize("u", [0.0, 2.0**-53, BELOW_ONE])
def test_uniform_weights_give_the_identity_at_the_edges_of_the_uniforms(scheme, u):
    for size in range(1, 129):
        uniforms = torch.full((1, uniforms_needed(scheme, size)), u, dtype=torch.float64)
        found = offspring(torch.full((1, size), 1 / size, dtype=torch.float64), scheme, uniforms)
        assert (found == 1).all(), size


def test_multinomial_does_not_give_the_identity():
    ancestors = resample(torch.zeros(1, 64), "multinomial", generators(1))
    assert counts(ancestors).max() > 1


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_weight_on_one(scheme, dtype):
    log_w = torch.full((5, 5), -INF, dtype=dtype)
    log_w.fill_diagonal_(-3.0)
    expected = torch.arange(5)[:, None].expand(5, 5)
    for seed in range(20):
        assert torch.equal(resample(log_w, scheme, generators(5, seed)), expected)
    assert torch.equal(ess(log_w), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "none"])
def test_dead_particles_are_never_drawn(scheme):
    log_w = torch.randn(4000, 7, generator=torch.Generator().manual_seed(1))
    log_w[:, [0, 3, 6]] = -INF  # at both ends, where an inverse CDF goes wrong
    ancestors = resample(log_w, scheme, generators(4000))
    assert not torch.isin(ancestors, torch.tensor([0, 3, 6])).any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_shift_invariance(scheme, shift):
    log_w = torch.randn(200, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log_w = (log_w * 2**20).round() / 2**20  # so that the shift itself is exact
    before, after = (resample(w, scheme, generators(200)) for w in (log_w, log_w + shift))
    assert torch.equal(before, after)
    assert torch.equal(normalise(log_w), normalise(log_w + shift))
    assert torch.equal(ess(log_w), ess(log_w + shift))
    torch.testing.assert_close(log_mean_exp(log_w + shift), log_mean_exp(log_w) + shift, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_group_does_not_depend_on_the_others(scheme):
    log_w = 2 * torch.randn(6, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    together = resample(log_w, scheme, generators(6))
    alone = torch.cat([resample(log_w[[p]], scheme, [generators(6)[p]]) for p in range(6)])
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    shuffled = resample(log_w[order], scheme, [generators(6)[p] for p in order])
    assert torch.equal(together, alone)
    assert torch.equal(together[order], shuffled)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_draws_are_decided_by_the_generator_and_use_it_alike_for_all_weights(scheme):
    log_w = torch.randn(3, 8, generator=torch.Generator().manual_seed(6))
    first, second = generators(3), generators(3)
    state = torch.get_rng_state()
    assert torch.equal(resample(log_w, scheme, first), resample(log_w, scheme, second))
    resample(log_w, scheme, first)
    resample(torch.zeros(3, 8), scheme, second)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was touched"


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=60, deadline=None)
@given(log_w=populations(), seed=st.integers(0, 2**20))
def test_survivors_stay_in_place(scheme, log_w, seed):
    ancestors = resample(log_w, scheme, generators(len(log_w), seed))
    index = torch.arange(log_w.shape[1]).expand_as(ancestors)
    survives = counts(ancestors) > 0
    assert torch.equal(ancestors[survives], index[survives])


@given(st.lists(st.integers(0, 5), min_size=3, max_size=40), st.integers(1, 4))
@settings(deadline=None)
def test_place_keeps_the_multiset(picks, groups):
    drawn = torch.tensor([[p % len(picks) for p in picks]] * groups)
    drawn[1:] = drawn[1:].roll(1, 1) // 2  # another multiset in the other groups
    ancestors = place(counts(drawn))
    assert torch.equal(ancestors.sort(1).values, drawn.sort(1).values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32_cumulative_sum_cannot_overrun(scheme):
    """In float32 the cumulated weights of a large population miss one by far more than a uniform needs."""
    log_w = torch.randn(1, 4099, generator=torch.Generator().manual_seed(8)) * 3
    log_w[:, -1] = -INF
    single = torch.softmax(log_w, 1)
    assert single.cumsum(1)[0, -1] != 1, "the trap is gone: choose another seed"
    for u in (0.0, BELOW_ONE):
        uniforms = torch.full((1, uniforms_needed(scheme, 4099)), u, dtype=torch.float64)
        found = offspring(normalise(log_w), scheme, uniforms)
        assert found.sum() == 4099
        assert scheme == "none" or found[0, -1] == 0


def test_argmax_takes_the_lowest_index_of_a_tie():
    log_w = torch.tensor([[0.0, 2.0, 2.0, -INF], [1.0, 1.0, 1.0, 1.0]])
    assert resample(log_w, "argmax", generators(2)).tolist() == [[1] * 4, [0] * 4]


def test_single_replicates_one_index_by_its_weight():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    ancestors = resample(weights.log().expand(50_000, 3), "single", [torch.Generator().manual_seed(0)] * 50_000)
    assert (ancestors == ancestors[:, :1]).all()
    share = torch.bincount(ancestors[:, 0]) / 50_000
    assert ((share - weights).abs() < 4 * (weights * (1 - weights) / 50_000).sqrt()).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nan_and_infinite_weights_raise(scheme, bad):
    log_w = torch.zeros(2, 3)
    log_w[1, 2] = bad
    with pytest.raises(ValueError, match="group 1, particle 2"):
        resample(log_w, scheme, generators(2))
    for function in (normalise, ess, log_mean_exp):
        with pytest.raises(ValueError, match="group 1, particle 2"):
            function(log_w)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_group_without_a_living_particle_is_named(scheme):
    log_w = torch.tensor([[0.0, 0.0], [-INF, -INF], [0.0, -INF], [-INF, -INF]])
    if scheme == "none":
        assert torch.equal(resample(log_w, scheme, generators(4)), torch.tensor([[0, 1]] * 4))
        return
    with pytest.raises(Degenerate, match=r"\[1, 3\]") as caught:
        resample(log_w, scheme, generators(4))
    assert caught.value.groups == (1, 3)
    assert log_mean_exp(log_w).tolist() == pytest.approx([0, -INF, -math.log(2), -INF])


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match=r"systematic.*got 'sistematic'"):
        resample(torch.zeros(1, 2), "sistematic", generators(1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="one generator a group: got 1 for 2"):
        resample(torch.zeros(2, 2), "systematic", generators(1))
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        resample(torch.zeros(4), "systematic", generators(4))
    with pytest.raises(ValueError, match="floor"):
        temper(torch.zeros(1, 2), lambda gamma: gamma * torch.ones(1, 2), 1.5, 1.0)


def test_resampling_builds_no_graph():
    log_w = torch.zeros(1, 4, requires_grad=True)
    assert not resample(log_w, "systematic", generators(1)).requires_grad


@given(populations())
@settings(deadline=None)
def test_normalise_is_the_softmax(log_w):
    weights = normalise(log_w)
    torch.testing.assert_close(weights, torch.softmax(log_w, 1), rtol=1e-12, atol=0)
    assert (weights[log_w == -INF] == 0).all()
    assert torch.equal(normalise(log_w.float()).sum(1).float(), torch.ones(len(log_w)))


@given(populations())
@settings(deadline=None)
def test_ess_is_between_one_and_the_population(log_w):
    size, value = log_w.shape[1], ess(log_w)
    torch.testing.assert_close(value, 1 / normalise(log_w).square().sum(1), rtol=1e-12, atol=0)
    alive = (log_w > -INF).sum(1)
    assert ((value >= 1 - 1e-12) & (value <= alive + 1e-9)).all()
    flat = torch.where(log_w == -INF, log_w, 0.5)
    assert torch.equal(ess(flat), alive.double()), "equal weights count exactly"
    assert torch.equal(ess(torch.zeros(1, size)), torch.tensor([float(size)], dtype=torch.float64))


def test_weights_are_accumulated_in_float64():
    log_w = torch.tensor([[1e4, 1e4 + 1e-6, -1e4]], dtype=torch.float64)
    expected = math.log((1 + math.exp(1e-6)) / 3) + 1e4
    assert log_mean_exp(log_w).item() == pytest.approx(expected, abs=1e-11)
    assert {f(log_w.float()).dtype for f in (normalise, ess, log_mean_exp)} == {torch.float64}


@given(populations(), st.floats(0, 1), st.floats(0.05, 0.999), st.floats(0.01, 300))
@settings(deadline=None, max_examples=100)
def test_tempering_finds_the_largest_exponent_from_flat_weights(rewards, floor, tau, scale):
    rewards = scale * torch.where(rewards == -INF, -8.0, rewards)
    size = rewards.shape[1]
    target = max(1.0, tau * size)
    log_w = torch.zeros_like(rewards)
    gamma = temper(log_w, lambda gamma: (gamma - floor) * rewards, floor, target)
    assert ((gamma >= floor) & (gamma <= 1)).all()
    held = ess((gamma[:, None] - floor) * rewards)
    assert (held >= target).all(), "flat weights hold any target at the floor"
    beyond = (gamma + 1e-9).clamp(max=1)
    over = ess((beyond[:, None] - floor) * rewards)
    assert ((gamma == 1) | (over <= target + 1e-9)).all(), "a larger exponent would have held"


def test_tempering_takes_one_at_once_and_keeps_the_floor():
    log_w = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -5.0, -5.0, -5.0], [0.0, 0.0, 0.0, 0.0]])
    rewards = torch.tensor([[0, 0.1, 0, 0.1], [0, 0, 0, -1], [0, 30, -30, 0]], dtype=torch.float64)
    calls = []

    def increment(gamma: Tensor) -> Tensor:
        calls.append(gamma)
        assert gamma.shape == (3, 1)
        return (gamma - 0.25) * rewards

    gamma = temper(log_w, increment, 0.25, 2.0)
    assert gamma[0] == 1
    assert gamma[1] == 0.25, "its weights are too uneven for any progress"
    assert 0.25 < gamma[2] < 1
    assert ess(log_w[2:] + (gamma[2] - 0.25) * rewards[2:]).item() == pytest.approx(2.0, abs=1e-9)
    assert len(calls) <= 52


def test_tempering_takes_a_floor_and_a_target_a_group():
    rewards = torch.tensor([[0.0, 3.0, 6.0, 9.0]], dtype=torch.float64).expand(3, 4)
    floor = torch.tensor([0.0, 0.2, 0.0], dtype=torch.float64)
    target = torch.tensor([2.0, 2.0, 3.0], dtype=torch.float64)
    gamma = temper(torch.zeros(3, 4), lambda g: (g - floor[:, None]) * rewards, floor, target)
    assert gamma[1] - 0.2 == pytest.approx(gamma[0].item(), abs=1e-9)
    assert gamma[2] < gamma[0]
    alone = temper(torch.zeros(1, 4), lambda g: g * rewards[:1], 0.0, 3.0)
    assert torch.equal(gamma[2:], alone)
