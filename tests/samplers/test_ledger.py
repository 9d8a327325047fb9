"""Laws of the ledger: counts are samples, time is the time inside the blocks, sums are sums."""

from __future__ import annotations

import time

import pytest
import torch

from samplers import Ledger

CPU = torch.device("cpu")


def test_counts_add_up_and_seconds_are_those_of_the_block():
    ledger = Ledger()
    for samples in (3, 4):
        with ledger.spend("reward", samples, CPU):
            time.sleep(0.02)
    assert ledger.counts == {"network": 0, "decode": 0, "reward": 7, "gradient": 0}
    assert 0.04 <= ledger.seconds["reward"] < 2
    assert ledger.seconds["network"] == ledger.seconds["decode"] == ledger.seconds["gradient"] == 0


def test_reading_twice_changes_nothing():
    ledger = Ledger()
    with ledger.spend("network", 1, CPU):
        pass
    assert ledger.seconds == ledger.seconds


def test_the_sum_of_two_runs():
    a, b = Ledger(), Ledger()
    with a.spend("network", 5, CPU), b.spend("network", 2, CPU):
        time.sleep(0.01)
    with b.spend("decode", 1, CPU):
        pass
    total = a + b
    assert total.counts == {"network": 7, "decode": 1, "reward": 0, "gradient": 0}
    for part, seconds in total.seconds.items():
        assert seconds == a.seconds[part] + b.seconds[part]
    assert a.counts["network"] == 5
    assert b.counts["network"] == 2


def test_what_result_files_hold():
    ledger = Ledger()
    with ledger.spend("gradient", 2, CPU):
        pass
    record = ledger.as_dict()
    assert set(record) == {"network_evaluations", "decodes", "reward_calls", "gradients", "seconds"}
    assert record["gradients"] == 2
    assert record["seconds"] == ledger.seconds


def test_failures_inside_the_block_pass_through():
    with pytest.raises(RuntimeError, match="inside"), Ledger().spend("reward", 1, CPU):
        raise RuntimeError("inside")
