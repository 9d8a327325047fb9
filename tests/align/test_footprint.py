"""A run's memory is foreseen, and where it is short the network takes fewer rows at a time and makes the same samples."""

import logging
import math

import pytest
import torch

import align
from align import footprint
from align.footprint import Footprint, LiveBytes, free_bytes, measured_bytes, of_network
from rewards import Brightness
from samplers import BestOfN, Compose, FeynmanKac, Guided, SeededNoise, always, rollout

ROWS, STEPS = 8, 3


@pytest.fixture(scope="module")
def policy(tiny_folder):
    return align.load_policy(tiny_folder)


def peak(call) -> int:
    with LiveBytes() as live:
        call()
    return live.peak


@pytest.mark.parametrize("differentiates", [False, True])
def test_the_bytes_of_many_rows_are_foreseen_from_two(policy, differentiates):
    levels, shape, cond = policy.levels(STEPS, policy.size), policy.shape(policy.size), policy.encode(["a"])
    network, decoder = of_network(policy, cond, levels, shape, differentiates)
    x = torch.zeros(ROWS, *shape).requires_grad_(differentiates)
    with torch.set_grad_enabled(differentiates):
        counted = peak(lambda: policy.denoise(x, levels[0], cond.repeat(ROWS)))
    assert counted / 1.2 < network.of(ROWS) < counted * 1.2
    with torch.no_grad():
        counted = peak(lambda: policy.decode(x.detach()))
    assert counted / 1.2 < decoder.of(ROWS) < counted * 1.2


def test_a_graph_holds_more(policy):
    levels, shape, cond = policy.levels(STEPS, policy.size), policy.shape(policy.size), policy.encode(["a"])
    with_graph, without = (of_network(policy, cond, levels, shape, graph)[0] for graph in (True, False))
    assert with_graph.row > 2 * without.row


def test_live_bytes_are_those_of_storages():
    def call(rows):
        kept = torch.zeros(rows, 1000)
        gone = torch.ones(rows, 500) + 1
        del gone
        return kept.view(-1).sum()

    assert peak(lambda: call(1)) == pytest.approx(4 * 2000, abs=64)
    assert measured_bytes(call).of(10) == pytest.approx(10 * 4 * 2000, abs=640)
    assert Footprint(100, 10).fits(155) == 5
    assert Footprint(100, 10).fits(50) == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_a_split_call_gives_the_same_samples_and_gradients(policy, rows, monkeypatch):
    seen, predict = [], type(policy).predict

    def spy(self, x, at, cond):
        seen.append(len(x))
        return predict(self, x, at, cond)

    def run():
        noises = SeededNoise(range(4), policy.shape(policy.size))
        noise = [noises(i).requires_grad_() for i in range(STEPS + 1)]
        cond, levels = policy.encode(["a"]).repeat(4), policy.levels(STEPS, ())
        made = rollout(policy, policy.kernel, cond, levels, noise.__getitem__, grad=always)
        return made.x0.detach(), torch.autograd.grad(made.x0.square().sum(), noise[0])[0]

    whole = run()
    monkeypatch.setattr(type(policy), "predict", spy)
    monkeypatch.setattr(policy, "rows_at_once", rows)
    split = run()
    assert max(seen) == 2 * rows  # both branches
    assert float(whole[1].abs().max()) > 0.1
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_levels_of_a_row_stay_with_it(policy, monkeypatch):
    levels, cond = policy.levels(STEPS, ()), policy.encode(["a"]).repeat(3)
    x = torch.randn(3, *policy.shape(policy.size), generator=torch.Generator().manual_seed(0))
    whole = policy.denoise(x, levels[torch.tensor([0, 1, 2])], cond).x0
    monkeypatch.setattr(policy, "rows_at_once", 2)
    torch.testing.assert_close(policy.denoise(x, levels[torch.tensor([0, 1, 2])], cond).x0, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_what_does_not_fit_is_taken_in_parts(policy, monkeypatch, caplog, guided):
    steering = FeynmanKac(Brightness(), 0.1)
    steering = Compose(Guided(Brightness(), 1.0), steering) if guided else steering
    how = {"particles": 6, "steps": STEPS, "plain": False}
    enough = align.steer(policy, ["a cat", "rain"], steering, **how)
    assert not caplog.records
    shape, cond = policy.shape(policy.size), policy.encode(["a cat"])
    network, _ = of_network(policy, cond, policy.levels(STEPS, ()), shape, guided)
    monkeypatch.setattr(footprint, "free_bytes", lambda device: network.of(5) / footprint.ROOM)
    seen, predict = [], type(policy).predict
    monkeypatch.setattr(type(policy), "predict", lambda self, x, *how: seen.append(len(x)) or predict(self, x, *how))
    with caplog.at_level(logging.WARNING):
        short = align.steer(policy, ["a cat", "rain"], steering, **how)
    assert "12 samples at once need" in caplog.text
    assert "the network takes 5 at a time" in caplog.text
    assert max(seen) == 2 * 5
    for one, other in zip(enough.samples, short.samples, strict=True):
        torch.testing.assert_close(one.pixels, other.pixels, rtol=1e-3, atol=1e-4)
    assert policy.rows_at_once is None
    assert policy.decode_chunk == 8


def test_what_never_fits_is_refused(policy, monkeypatch):
    monkeypatch.setattr(footprint, "free_bytes", lambda device: 1000.0)
    with pytest.raises(ValueError, match=r"one sample needs .* are free"):
        align.steer(policy, "a cat", BestOfN(Brightness()), particles=2, steps=STEPS)
    assert policy.rows_at_once is None


def test_what_surely_fits_is_not_measured(policy, monkeypatch):
    monkeypatch.setattr(footprint, "of_network", lambda *how: pytest.fail("measured"))
    align.steer(policy, "a cat", BestOfN(Brightness()), particles=2, steps=STEPS)


def test_the_machine_says_what_is_free():
    assert 1e7 < free_bytes(torch.device("cpu")) < 1e15
    assert math.isinf(free_bytes(torch.device("meta")))
