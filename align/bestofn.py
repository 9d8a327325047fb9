"""Best of n from samples one has: how much gold the best by a proxy is worth, for every n at once.

The mean over all subsets of n of N samples of the gold score of the sample that the proxy ranks first is, with the samples sorted
by the proxy (i = 1 … N),

    E_n = sum_{i=n..N}  C(i-1, n-1) / C(N, n) · gold_(i)

an unbiased estimate for every n ≤ N with far less variance than drawing subsets. The policy "best of n" is at most
log n - (n-1)/n nats from the one it samples from. Where E_n turns downward the proxy is being over-optimised.

Sources: the estimate: Nakano et al., "WebGPT", 2021, arXiv 2112.09332; the divergence: Stiennon et al., "Learning to summarize from
human feedback", 2020, arXiv 2009.01325, a bound by Beirami et al., 2024, arXiv 2401.01879; the use: Gao et al., "Scaling Laws for
Reward Model Overoptimization", 2022, arXiv 2210.10760.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["best_of_n", "divergence_of_best"]


def best_of_n(proxy: Tensor, gold: Tensor) -> Tensor:
    """(…, N) the expected gold score of the best of 1 … N samples by the proxy; float64.

    Samples that the proxy cannot tell apart are as likely to be taken.

    Args:
        proxy: (…, N), the samples of a prompt last.
        gold: the same.

    Raises:
        ValueError: shapes that differ, or scores that are not finite.
    """
    if proxy.shape != gold.shape or not proxy.numel():
        raise ValueError(
            f"proxy and gold must score the same samples; got {tuple(proxy.shape)} and {tuple(gold.shape)}"
        )
    if not (proxy.isfinite().all() and gold.isfinite().all()):
        raise ValueError("proxy and gold must be finite: leave out samples that were not judged")
    proxy, gold = proxy.double(), gold.double()
    same = (proxy[..., :, None] == proxy[..., None, :]).double()
    gold = (same @ gold[..., None])[..., 0] / same.sum(-1)  # the mean over samples that are tied
    ordered = gold.gather(-1, proxy.argsort(-1))
    return ordered @ _chances(proxy.shape[-1]).T


def _chances(count: int) -> Tensor:
    """(n, i): how likely the i-th worst of `count` samples is the best of n of them."""
    n = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    i = torch.arange(1, count + 1, dtype=torch.float64)[None]

    def log_choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma((a - b).clamp(min=0) + 1)

    whole = torch.tensor(float(count), dtype=torch.float64)
    return torch.where(i >= n, (log_choose(i - 1, n - 1) - log_choose(whole, n)).exp(), 0.0)


def divergence_of_best(n: int) -> float:
    """Nats between best of n and the policy that is sampled: at most log n - (n-1)/n.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be ≥ 1; got {n}")
    return math.log(n) - (n - 1) / n
