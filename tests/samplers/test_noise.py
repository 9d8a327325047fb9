"""Laws of the noise: a function of (seed, step) alone, independent streams, and gradients to the chosen leaves only."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from samplers import DDIM, NoiseBank, SeededNoise, always, rollout
from samplers.families.gaussian import GaussianPolicy
from samplers.noise import side_generator

SHAPE = (2, 5)
SEEDS = [3, 0, 2**40, 17, -5]


@pytest.mark.parametrize("i", [0, 1, 7])
def test_a_row_does_not_depend_on_its_batch(i):
    together = SeededNoise(SEEDS, SHAPE)(i)
    for row, seed in enumerate(SEEDS):
        assert torch.equal(SeededNoise([seed], SHAPE)(i)[0], together[row])
    assert torch.equal(SeededNoise(SEEDS[::-1], SHAPE)(i), together.flip(0))
    assert torch.equal(SeededNoise(SEEDS, SHAPE)[1:3](i), together[1:3])


def test_asking_twice_or_out_of_order_changes_nothing():
    noise = SeededNoise(SEEDS, SHAPE)
    forwards = [noise(i) for i in range(4)]
    backwards = [noise(i) for i in reversed(range(4))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert torch.equal(a, b)


def test_global_random_state_is_neither_read_nor_written():
    before = torch.random.get_rng_state()
    first = SeededNoise([1], SHAPE)(3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(5)
    assert torch.equal(first, SeededNoise([1], SHAPE)(3))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_the_initial_latent_is_the_one_of_a_plain_generator(seed):
    expected = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(SeededNoise([seed], SHAPE)(0), expected)


def test_dtype_rounds_the_same_draw():
    full, half = SeededNoise(SEEDS, SHAPE)(2), SeededNoise(SEEDS, SHAPE, dtype=torch.bfloat16)(2)
    assert torch.equal(half, full.bfloat16())


def test_seeds_steps_and_streams_are_independent_standard_normals():
    n = 20_000
    draws = torch.cat(
        [SeededNoise([0, 1, 2], (n,), stream=stream)(i) for stream, i in itertools.product((0, 1), (0, 1, 2))]
    )  # seeds × steps × streams
    assert len(draws) == 18
    assert bool((draws.mean(1).abs() < 5 / math.sqrt(n)).all())
    assert bool(((draws.var(1) - 1).abs() < 5 * math.sqrt(2 / n)).all())
    correlation = torch.corrcoef(draws) - torch.eye(18)
    assert float(correlation.abs().max()) < 5 / math.sqrt(n)
    shifted = torch.corrcoef(torch.cat([draws[:, 1:], draws[:, :-1]]))[:18, 18:]  # nor is one stream another one, later
    assert float(shifted.abs().max()) < 5 / math.sqrt(n)


def test_no_two_streams_share_a_seed():
    noise = SeededNoise(range(20), SHAPE)
    seeds = {noise.generator(row, i).initial_seed() for row in range(20) for i in range(20)}
    seeds |= {side_generator(noise, row, i, j).initial_seed() for row in range(20) for i in range(20) for j in range(3)}
    assert len(seeds) == 20 * 20 * 4


def test_side_decisions_follow_the_seed_not_the_row():
    a, b = SeededNoise([5, 9], SHAPE), SeededNoise([9, 5], SHAPE)
    assert side_generator(a, 0, 3).initial_seed() == side_generator(b, 1, 3).initial_seed()
    assert side_generator(a, 0, 3).initial_seed() != side_generator(a, 1, 3).initial_seed()


@pytest.mark.parametrize("trainable", [(), (0,), (2,), (0, 1, 3)])
def test_only_trainable_noise_gets_gradients_through_a_rollout(trainable):
    policy = GaussianPolicy([[1.0, -1.0], [0.0, 2.0]], [0.5, 0.7], [0.4, 0.6])
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(4)]
    bank = NoiseBank(tensors, trainable)
    levels = policy.levels(4)[:4]  # stops short of clean data, so that every step is noisy
    x0 = rollout(policy, DDIM(1.0), policy.encode([""] * 3), levels, bank, grad=always).x0
    assert x0.requires_grad is bool(trainable)
    if trainable:
        x0.square().sum().backward()
    for i, parameter in enumerate(bank.tensors):
        assert (parameter.grad is not None and bool((parameter.grad != 0).all())) is (i in trainable)


def test_bank_copies_what_it_is_given_and_knows_its_range():
    given = [torch.zeros(1, 2), torch.zeros(1, 2)]
    bank = NoiseBank(given, [1])
    given[0] += 1
    assert float(bank(0).sum()) == 0
    assert [p.requires_grad for p in bank.parameters()] == [False, True]
    with pytest.raises(IndexError, match=r"noise 0 … 1; .* got 2"):
        bank(2)
    with pytest.raises(IndexError):
        bank(-1)
    with pytest.raises(ValueError, match=r"2 given tensors; got \[2\]"):
        NoiseBank(given, [0, 2])
