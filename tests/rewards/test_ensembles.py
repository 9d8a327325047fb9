"""Ensembles: published numbers, limits between the rules, and who gets the gradient."""

import math

import pytest
import torch

from rewards import Brightness, Ensemble, Reward, Scores
from rewards.ensembles import Rule

MEMBERS = [[1.0, 2.0, 4.0], [0.0, 2.5, 3.0]]
IMAGES = torch.full((3, 3, 4, 4), 0.5)


class Says(Reward):
    """Given scores, which follow the brightness of the image with slope 1; `sigma` as a part."""

    needs_prompt = False

    def __init__(self, scores: list[float], sigma: list[float] | None = None) -> None:
        super().__init__()
        self.scores, self.sigma = torch.tensor(scores), sigma

    def measure(self, media, prompts):
        total = self.scores + media.mean((1, 2, 3)) - media.detach().mean((1, 2, 3))
        return Scores(total, {"sigma": torch.tensor(self.sigma)} if self.sigma else {})


class Own(Says):
    """Looks at its own channel, so that gradients tell members apart."""

    def __init__(self, scores: list[float], channel: int) -> None:
        super().__init__(scores)
        self.channel = channel

    def measure(self, media, prompts):
        seen = media[:, self.channel].mean((1, 2))
        return self.scores + seen - seen.detach()


def said(rule: Rule, members=MEMBERS, **how) -> torch.Tensor:
    return Ensemble([Says(m) for m in members], rule, **how)(IMAGES)


def weights(members, rule: Rule, **how) -> torch.Tensor:
    """d score / d member, (B, K)."""
    media = torch.full((len(members[0]), 3, 4, 4), 0.5).requires_grad_()
    score = Ensemble([Own(m, k) for k, m in enumerate(members)], rule, **how)(media)
    return torch.autograd.grad(score.sum(), media)[0].sum((2, 3))[:, : len(members)]


@pytest.mark.parametrize(
    ("rule", "how", "expected"),
    [
        ("mean", {}, [0.5, 2.25, 3.5]),
        ("worst", {}, [0.0, 2.0, 3.0]),
        ("uncertainty", {"penalty": 0.5, "unbiased": False}, [0.375, 2.21875, 3.375]),
        ("uncertainty", {"penalty": 0.5, "unbiased": True}, [0.25, 2.1875, 3.25]),
        ("nominal_worst", {"robust_weight": 0.25}, [0.75, 2.0, 3.75]),
        ("nominal_worst", {"robust_weight": 0.25, "nominal": 1}, [0.0, 2.375, 3.0]),
    ],
)
def test_published_numbers(rule, how, expected) -> None:
    torch.testing.assert_close(said(rule, **how), torch.tensor(expected))


def test_soft_worst_runs_from_the_worst_to_the_mean() -> None:
    torch.testing.assert_close(said("soft_worst", beta=1e-3), said("worst"), atol=1e-3, rtol=0)
    torch.testing.assert_close(said("soft_worst", beta=1e4), said("mean"), atol=1e-4, rtol=0)
    expected = [-math.log((math.exp(-a) + math.exp(-b)) / 2) for a, b in zip(*MEMBERS, strict=True)]
    torch.testing.assert_close(said("soft_worst"), torch.tensor(expected))


def test_soft_worst_is_uncertainty_to_second_order() -> None:
    """The remainder is of third order: k3 / (6 beta²), with the third cumulant k3."""
    members = [[0.0, 0.1, -1.0], [0.3, 0.2, 1.0], [0.2, 0.9, 0.5]]
    r = torch.tensor(members, dtype=torch.float64)
    third = (r - r.mean(0)).pow(3).mean(0)
    gap = said("soft_worst", members, beta=20.0) - said("uncertainty", members, penalty=1 / 40, unbiased=False)
    torch.testing.assert_close(gap.double(), third / (6 * 400), atol=1e-5, rtol=0)


def test_robust_weight_runs_from_nominal_to_worst() -> None:
    torch.testing.assert_close(said("nominal_worst", robust_weight=0.0), torch.tensor(MEMBERS[0]))
    torch.testing.assert_close(said("nominal_worst", robust_weight=1.0), said("worst"))


@pytest.mark.parametrize("rule", Rule.__args__)
@pytest.mark.parametrize("unbiased", [True, False])
def test_an_ensemble_of_one_is_its_member(rule, unbiased) -> None:
    torch.testing.assert_close(said(rule, MEMBERS[:1], unbiased=unbiased), torch.tensor(MEMBERS[0]))
    spread = Ensemble([Says(MEMBERS[0])], rule, unbiased=unbiased).score(IMAGES).parts["spread"]
    assert spread.tolist() == [0, 0, 0]


@pytest.mark.parametrize("rule", Rule.__args__)
def test_one_member_that_cannot_judge_leaves_the_sample_unjudged(rule) -> None:
    for over in ("sample", "batch"):
        scores = said(rule, [[1.0, math.nan, 2.0], [3.0, 1.0, 2.0]], over=over)
        assert scores.isnan().tolist() == [False, True, False]


def test_parts_are_members_and_their_spread() -> None:
    parts = Ensemble({"one": Says(MEMBERS[0]), "two": Says(MEMBERS[1])}, "worst").score(IMAGES).parts
    assert list(parts) == ["one", "two", "spread"]
    torch.testing.assert_close(parts["spread"], torch.tensor(MEMBERS).std(0))


def test_the_minimum_passes_the_gradient_to_one_member() -> None:
    slopes = weights([[1.0, 2.0, 3.0], [0.0, 2.5, 3.0]], "worst")
    torch.testing.assert_close(slopes, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))  # a tie has one winner


@pytest.mark.parametrize("unbiased", [True, False])
def test_uncertainty_pushes_an_outlier_down(unbiased: bool) -> None:
    members, c = [[0.0], [0.1], [5.0]], 0.5
    slopes = weights(members, "uncertainty", penalty=c, unbiased=unbiased)[0]
    r = torch.tensor(members)[:, 0]
    torch.testing.assert_close(slopes, 1 / 3 - 2 * c * (r - r.mean()) / (2 if unbiased else 3))
    assert slopes[2] < 0 < slopes[0]


def test_soft_worst_weighs_members_by_how_bad_they_are() -> None:
    slopes = weights([[1.0], [0.0], [3.0]], "soft_worst", beta=2.0)[0]
    torch.testing.assert_close(slopes, (-torch.tensor([1.0, 0.0, 3.0]) / 2).softmax(0))


def test_the_minimum_over_a_batch_is_one_member_for_all() -> None:
    ensemble = Ensemble([Says(m) for m in MEMBERS], "worst", over="batch")
    assert ensemble.compares
    assert ensemble(IMAGES).tolist() == MEMBERS[1]  # 5.5 in sum against 7
    assert not Ensemble([Says(m) for m in MEMBERS], "mean", over="batch").compares


def test_the_surest_member_is_nominal() -> None:
    sure = [Says(MEMBERS[0], [1.0, 0.1, 2.0]), Says(MEMBERS[1], [0.5, 0.2, 3.0])]
    scores = Ensemble(sure, "nominal_worst", nominal="surest", robust_weight=0.0)(IMAGES)
    assert scores.tolist() == [0.0, 2.0, 4.0]
    with pytest.raises(ValueError, match='part "sigma"; Says_2 have none'):
        Ensemble([sure[0], Says(MEMBERS[1])], "nominal_worst", nominal="surest")(IMAGES)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rule": "best"}, "rule must be one of mean, worst"),
        ({"over": "all"}, "over must be one of"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"robust_weight": 1.5}, "robust_weight must be 0 to 1"),
        ({"penalty": -1.0}, "penalty must be 0 or more"),
        ({"nominal": 2}, "nominal must be one of"),
    ],
)
def test_wrong_ensembles_raise(how, message) -> None:
    with pytest.raises(ValueError, match=message):
        Ensemble([Brightness(), Brightness()], **how)
