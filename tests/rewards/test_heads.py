"""Heads against the equations of their papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.base import Features
from rewards.heads import MLP, PAL, VPL

JOINT, PROMPT = 12, 4


def features(count: int = 6, seed: int = 0) -> Features:
    draw = torch.Generator().manual_seed(seed)
    return Features(torch.randn(count, JOINT, generator=draw) * 3 + 1, torch.randn(count, PROMPT, generator=draw))


def codes(count: int, length: int) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(3))


def test_features_are_standardised_and_what_never_changes_is_left():
    seen = Features(torch.cat([features().joint, torch.full((6, 1), 5.0)], dim=1), features().prompt)
    head = MLP().shape(JOINT + 1, PROMPT)
    head.fit_to(seen)
    joint, prompt = head.standard(seen)
    assert torch.allclose(joint[:, :-1].mean(0), torch.zeros(JOINT), atol=1e-6)
    assert torch.allclose(joint[:, :-1].std(0, correction=0), torch.ones(JOINT), atol=1e-5)
    assert joint[:, -1].abs().max() < 1e-6
    assert prompt.shape == (6, PROMPT)


def test_members_are_heads_of_their_own():
    head = MLP(hidden=(8,), members=3, variance=True).shape(JOINT, PROMPT, seed=1)
    mean, variance = head(features())
    assert mean.shape == (3, 6) and variance.shape == (3, 6) and bool((variance > 0).all())
    assert len(torch.unique(mean[:, 0])) == 3
    by_hand = F.gelu(features().joint @ head.weights[0][1] + head.biases[0][1]) @ head.weights[1][1] + head.biases[1][1]
    assert torch.allclose(mean[1], by_hand[:, 0], atol=1e-5)
    again = MLP(hidden=(8,), members=3, variance=True).shape(JOINT, PROMPT, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def test_pal_is_minus_the_distance_to_a_mixture_of_projected_prototypes():
    head = PAL(prototypes=3, width=8).shape(JOINT, PROMPT)
    seen, people = features(), codes(6, 3)
    ideal = people.softmax(1) @ head.f(head.prototypes)
    assert torch.allclose(head(seen, people).mean[0], -(head.f(seen.joint) - ideal).norm(dim=1), atol=1e-6)
    assert head(seen, people).mean.max() <= 0


@pytest.mark.parametrize("ideal", ["f(P)w", "f(Pw)", "Pw", "|f(P)|w"])
def test_a_person_who_is_one_prototype_has_its_point(ideal):
    head = PAL(prototypes=2, width=8, ideal=ideal).shape(JOINT, PROMPT)
    pure = torch.tensor([[60.0, -60.0]])
    point = head.ideal_points(torch.zeros(1, PROMPT), pure.softmax(1))
    expected = head.prototypes[:1] if ideal == "Pw" else head.f(head.prototypes[:1])
    expected = F.normalize(expected, dim=-1) if ideal == "|f(P)|w" else expected
    assert torch.allclose(point, expected, atol=1e-5)


def test_angles_are_scaled_cosines_that_cannot_grow_steep_without_end():
    head = PAL(width=8, kind="angle").shape(JOINT, PROMPT)
    assert head.scale.exp().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        head.scale.fill_(50.0)
    assert head(features(), codes(6, 2)).mean.abs().max() <= 100


def test_ideal_points_of_pal_b_are_read_from_the_prompt():
    head = PAL(width=8, by_prompt=True).shape(JOINT, PROMPT)
    seen, people = features(), codes(6, 2)
    other = Features(seen.joint, seen.prompt.flip(0))
    assert not torch.allclose(head(seen, people).mean, head(other, people).mean)
    with pytest.raises(ValueError, match="embeds prompts"):
        PAL(by_prompt=True).shape(JOINT, 0)


def test_pal_finds_a_new_person_among_the_prototypes():
    """Pairs judged by a known mixture lead back to it; with none the person is the average of those known."""
    head = PAL(prototypes=2, width=8).shape(JOINT, PROMPT, seed=2).requires_grad_(False)
    head.f[-1].weight.mul_(8)  # so that choices are clear
    known = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])
    a, b, who = features(400, 1), features(400, 2), torch.tensor([[2.0, -2.0]]).expand(400, -1)
    chance = (head(a, who).mean[0] - head(b, who).mean[0]).sigmoid()
    first = torch.rand(400, generator=torch.Generator().manual_seed(4)) < chance
    better, worse = (
        Features(*(torch.where(m[:, None], x, y) for x, y in zip(*p, strict=True)))
        for m, p in ((first, (a, b)), (~first, (a, b)))
    )
    code = head.infer(better, worse, known)
    assert code.softmax(0)[0].item() == pytest.approx(0.98, abs=0.05)
    assert torch.equal(code, head.infer(better, worse, known))
    nobody = head.infer(Features(a.joint[:0], a.prompt[:0]), Features(a.joint[:0], a.prompt[:0]), known)
    assert torch.allclose(nobody, known.mean(0), atol=1e-6)
    assert all(p.grad is None for p in head.parameters())


def test_vpl_reads_pairs_in_any_order_and_within_bounds():
    head = VPL(latent=6, hidden=16).shape(JOINT, PROMPT)
    better, worse = features(5, 1), features(5, 2)
    order = torch.tensor([3, 1, 4, 0, 2])
    turned = [Features(*(t[order] for t in seen)) for seen in (better, worse)]
    code = head.infer(better, worse, torch.empty(0, 6))
    assert torch.allclose(code, head.infer(*turned, torch.empty(0, 6)), atol=1e-5)
    mean, log_variance = head.posterior(100 * better.joint, 100 * worse.joint)
    assert mean.abs().max() <= 1 and log_variance.abs().max() <= 1


def test_vpl_rescales_in_training_as_published_and_always_on_request():
    head = VPL(latent=6, hidden=16).shape(JOINT, PROMPT)
    mean, log_variance = torch.full((2, 6), 0.1), torch.zeros(2, 6)
    z = head.drawn(mean, log_variance, torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(z.norm(dim=1), torch.tensor(6.0).sqrt().expand(2))
    better, worse = features(5, 1), features(5, 2)
    always = VPL(latent=6, hidden=16, rescale="always").shape(JOINT, PROMPT)
    assert always.infer(better, worse, mean).norm().item() == pytest.approx(6**0.5, rel=1e-5)
    assert head.infer(better, worse, mean).norm().item() < 6**0.5 + 1e-5


def test_the_divergence_is_the_kl_and_its_weight_comes_in_cycles():
    head = VPL(latent=6, hidden=16, kl=0.5, cycle=100).shape(JOINT, PROMPT)
    mean, log_variance = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), torch.full((3, 6), -0.3)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0, 1)).sum(1).mean()
    assert head.divergence(mean, log_variance, 0).item() == pytest.approx(0.5 * 0.1 * kl.item(), rel=1e-5)
    assert head.divergence(mean, log_variance, 50).item() == pytest.approx(0.5 * 0.55 * kl.item(), rel=1e-5)
    assert torch.equal(head.divergence(mean, log_variance, 130), head.divergence(mean, log_variance, 30))


def test_making_a_head_leaves_all_random_numbers_alone(monkeypatch: pytest.MonkeyPatch):
    """Those of an accelerator too: a reward may be loaded in the middle of a run."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    one, other = (PAL(width=4).shape(3, 0, seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and not seeded
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_heads_refuse_what_makes_no_sense():
    for make in (lambda: MLP(members=0), lambda: PAL(prototypes=0), lambda: VPL(kl=-1), lambda: PAL(kind="near")):
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(TypeError, match="PAL or VPL"):
        MLP().infer(features(), features(), torch.empty(0, 0))
    with pytest.raises(ValueError, match="codes"):
        PAL(width=8).shape(JOINT, PROMPT)(features())
