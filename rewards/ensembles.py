"""Ensembles: several rewards of one scale that must agree before a sample counts as good.

With r_1 … r_K the members' scores of a sample, m their mean and v their variance:

| rule            | score                                              | source                                             |
|-----------------|----------------------------------------------------|----------------------------------------------------|
| `mean`          | m                                                  |                                                    |
| `worst`         | min_k r_k                                          | worst-case optimisation, Coste et al. 2310.02743   |
| `uncertainty`   | m - penalty · v                                    | uncertainty-weighted optimisation, the same        |
| `soft_worst`    | -beta log mean_k exp(-r_k / beta)                  | the worst mean under a KL ball around equal weights|
| `nominal_worst` | (1 - robust_weight) r_nominal + robust_weight min_k r_k | Bayesian ensemble, Yan et al. 2409.15360      |

`soft_worst` is the mean as beta grows and the worst as it vanishes; to second order it is `uncertainty` with the population
variance and penalty 1 / (2 beta).

Gradients. The minimum passes the gradient to one member alone, the first of equals. `uncertainty` weighs member k by
1/K - 2 penalty (r_k - m) / (K - 1), so a member far above the others is pushed down.

Sources: Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization", 2023, arXiv 2310.02743. Eisenstein et al.,
"Helping or Herding?", 2023, arXiv 2312.09244: members that differ in pretraining seed help most. Yan et al., "Reward-Robust
RLHF in LLMs", 2024, arXiv 2409.15360. Deviations: the last takes the minimum of expectations over a batch, `over="batch"`; per
sample is the default because a score must not depend on its neighbours. Its nominal reward is the head that is surest of
itself; ours is so with `nominal="surest"`, which needs members that say how sure they are.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .base import Prompt, Scores
from .composite import Composite, Rewards

__all__ = ["Ensemble", "Rule"]

Rule = Literal["mean", "worst", "uncertainty", "soft_worst", "nominal_worst"]


class Ensemble(Composite):
    """Several rewards of one scale taken together with caution; see the module docstring for the rules.

    Members of different scales make the minimum that of the smallest: put each into `Standardised` first. `parts` holds the members
    and their `spread`, the standard deviation over members, which rises where a policy leaves what they know.

    Range: as its members
    Size: as its members
    Gradient: as its members

    Args:
        rewards: the members, such as one architecture trained from several seeds; a dict gives the parts names.
        rule: how the members become one score.
        penalty: of "uncertainty", times the variance; 1 in the published code, 0.1 in its training configuration.
        unbiased: whether variances divide by K - 1, as the published training code does, or by K.
        beta: of "soft_worst", in the unit of the rewards, above 0.
        robust_weight: of "nominal_worst": the share of the minimum, 0 (nominal) to 1 (worst); 0.2 to 0.4 are reported as helpful.
        nominal: of "nominal_worst": the label of the nominal member, its number, or "surest": of each sample the member whose part
            "sigma" is smallest.
        over: of "worst" and "nominal_worst": the minimum of each sample, or the member with the lowest mean over the samples of a
            call.

    Raises:
        ValueError: no rewards, modalities that differ, a rule or word that is unknown, or a number out of its range.
    """

    def __init__(
        self,
        rewards: Rewards,
        rule: Rule = "mean",
        *,
        penalty: float = 1.0,
        unbiased: bool = True,
        beta: float = 1.0,
        robust_weight: float = 0.3,
        nominal: int | str = 0,
        over: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(rewards)
        for word, value, known in (("rule", rule, Rule.__args__), ("over", over, ("sample", "batch"))):
            if value not in known:
                raise ValueError(f"{word} must be one of {', '.join(known)}; got {value!r}")
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"beta must be above 0; got {beta}")
        if not 0 <= robust_weight <= 1:
            raise ValueError(f"robust_weight must be 0 to 1; got {robust_weight}")
        if not (penalty >= 0 and math.isfinite(penalty)):
            raise ValueError(f"penalty must be 0 or more; got {penalty}")
        names = [*range(len(self.labels)), *self.labels, "surest"]
        if nominal not in names:
            raise ValueError(f"nominal must be one of {names}; got {nominal!r}")
        self.rule, self.penalty, self.unbiased, self.beta = rule, penalty, unbiased, beta
        self.robust_weight, self.over = robust_weight, over
        self.nominal = self.labels.index(nominal) if nominal in self.labels else nominal
        self.compares = self.compares or (over == "batch" and rule in ("worst", "nominal_worst"))

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        scores = self.scored(media, prompts)
        parts = {label: s.total for label, s in scores.items()}
        totals = torch.stack(list(parts.values()))  # (K, B)
        spread = variance(totals, self.unbiased).detach().sqrt()
        return Scores(self.combined(totals, scores), {**parts, "spread": spread})

    def combined(self, totals: Tensor, scores: dict[str, Scores]) -> Tensor:
        """(K, B) -> (B,), by the rule."""
        if self.rule == "mean":
            return totals.mean(dim=0)
        if self.rule == "uncertainty":
            return totals.mean(dim=0) - self.penalty * variance(totals, self.unbiased)
        if self.rule == "soft_worst":
            return -self.beta * ((-totals / self.beta).logsumexp(dim=0) - math.log(len(totals)))
        least = self.least(totals)
        if self.rule == "worst":
            return least
        return (1 - self.robust_weight) * self.chosen(totals, scores) + self.robust_weight * least

    def least(self, totals: Tensor) -> Tensor:
        """The minimum over members; NaN where any of them has none."""
        if self.over == "sample":
            return totals.min(dim=0).values
        judged = totals.detach().sum(dim=0).isfinite()
        lowest = totals[int(totals.detach()[:, judged].mean(dim=1).argmin())] if bool(judged.any()) else totals[0]
        return lowest + 0 * totals.detach().sum(dim=0)

    def chosen(self, totals: Tensor, scores: dict[str, Scores]) -> Tensor:
        """The nominal member's score of each sample."""
        if self.nominal != "surest":
            return totals[int(self.nominal)]
        if lacking := [label for label, s in scores.items() if "sigma" not in s.parts]:
            raise ValueError(
                f'nominal="surest" needs members with a part "sigma"; {", ".join(lacking)} have none: name a member instead'
            )
        sigma = torch.stack([s.parts["sigma"] for s in scores.values()]).detach()
        return totals.gather(0, sigma.argmin(dim=0, keepdim=True))[0]


def variance(totals: Tensor, unbiased: bool) -> Tensor:
    """Over members, (K, B) -> (B,); 0 for one member whatever the divisor."""
    return totals.var(dim=0, correction=min(int(unbiased), len(totals) - 1))
