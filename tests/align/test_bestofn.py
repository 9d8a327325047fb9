"""Best of n: the estimate is the mean over all subsets, exactly."""

from itertools import combinations

import pytest
import torch

from align.bestofn import best_of_n, divergence_of_best


def enumerated(proxy: torch.Tensor, gold: torch.Tensor, n: int) -> float:
    """The mean gold of the best by the proxy over all subsets, ties shared."""
    found = []
    for rows in combinations(range(len(proxy)), n):
        p, g = proxy[list(rows)], gold[list(rows)]
        found.append(g[p == p.max()].mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_the_mean_over_all_subsets(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    proxy, gold = (torch.randn(3, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    proxy = proxy.round() if ties else proxy
    found = best_of_n(proxy, gold)
    for p in range(3):
        assert found[p].tolist() == pytest.approx([enumerated(proxy[p], gold[p], n) for n in range(1, 10)])


def test_ends() -> None:
    proxy, gold = torch.tensor([0.3, 0.1, 0.2]), torch.tensor([5.0, 1.0, 3.0])
    assert best_of_n(proxy, gold).tolist() == pytest.approx([3.0, 13 / 3, 5.0])
    assert best_of_n(proxy, -gold)[2] == -5


def test_many_samples_lose_no_precision() -> None:
    count = 4096
    rank = torch.arange(count, dtype=torch.float64)
    expected = [(n * (count + 1)) / (n + 1) - 1 for n in (1, 2, 64, count)]  # the mean largest of n of 0 … count - 1
    assert best_of_n(rank, rank)[[0, 1, 63, -1]].tolist() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (4, 0.636294), (16, 1.835089), (64, 3.174508)])
def test_divergence(n: int, nats: float) -> None:
    assert divergence_of_best(n) == pytest.approx(nats, abs=1e-6)


def test_what_cannot_be_estimated_raises() -> None:
    with pytest.raises(ValueError, match="same samples"):
        best_of_n(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="finite"):
        best_of_n(torch.tensor([1.0, torch.nan]), torch.ones(2))
    with pytest.raises(ValueError, match="n must be"):
        divergence_of_best(0)
