"""Laws of the transitions: densities and divergences against torch.distributions, draws, gradients, tilts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions
from torch.autograd import gradcheck

from samplers import Categorical, Gaussian

F64 = torch.float64
SHAPE = (3, 2, 4)
STDS = {"one": torch.tensor(0.7, dtype=F64), "rows": torch.tensor([0.2, 1.0, 3.0], dtype=F64).reshape(3, 1, 1)}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def gaussian(std: str, seed: int = 0) -> Gaussian:
    return Gaussian(normal(*SHAPE, seed=seed), STDS[std])


def reference(law: Gaussian):
    return distributions.Independent(distributions.Normal(law.mean, law.std.expand(SHAPE)), 2)


def token_logits(seed: int = 0) -> torch.Tensor:
    logits = 2 * normal(*SHAPE, seed=seed)
    logits[0, 0, 1] = logits[2, 1, 3] = logits[2, 1, 0] = -torch.inf
    return logits


@pytest.mark.parametrize("std", STDS)
def test_gaussian_log_density(std):
    law, x = gaussian(std), normal(*SHAPE, seed=1)
    torch.testing.assert_close(law.log_prob(x), reference(law).log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mine", STDS)
@pytest.mark.parametrize("other", STDS)
def test_gaussian_divergence(mine, other):
    p, q = gaussian(mine), Gaussian(normal(*SHAPE, seed=2), 1.3 * STDS[other])
    expected = distributions.kl_divergence(reference(p), reference(q))
    torch.testing.assert_close(p.kl(q), expected, rtol=1e-12, atol=1e-12)
    assert bool((p.kl(q) > 0).all())


@pytest.mark.parametrize(
    "law", [gaussian("one"), gaussian("rows"), Categorical(token_logits())], ids=["one", "rows", "cat"]
)
def test_divergence_from_itself_is_zero(law):
    assert torch.equal(law.kl(law), torch.zeros(3, dtype=F64))


def test_categorical_log_probability_and_divergence():
    p, q = Categorical(token_logits()), Categorical(token_logits(1) + 5)  # unnormalised on purpose
    x = torch.tensor([[0, 3], [1, 2], [2, 1]])
    theirs = [distributions.Independent(distributions.Categorical(logits=law.logits), 1) for law in (p, q)]
    torch.testing.assert_close(p.log_prob(x), theirs[0].log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.kl(q), distributions.kl_divergence(*theirs), rtol=1e-12, atol=1e-12)


def test_categorical_impossible_outcomes():
    law = Categorical(token_logits())
    assert law.log_prob(torch.tensor([[1, 0], [0, 0], [0, 1]]))[0] == -torch.inf
    alive = Categorical(torch.zeros(SHAPE, dtype=F64))
    assert bool(law.kl(alive).isfinite().all())
    assert alive.kl(law).tolist() == pytest.approx([math.inf, float(alive.kl(law)[1]), math.inf])
    assert math.isfinite(alive.kl(law)[1])


def test_laws_of_two_kinds_have_no_divergence():
    with pytest.raises(TypeError, match="Gaussian and Categorical"):
        gaussian("one").kl(Categorical(token_logits()))
    with pytest.raises(TypeError, match="Categorical and Gaussian"):
        Categorical(token_logits()).kl(gaussian("one"))


@pytest.mark.parametrize(
    "std", [torch.tensor(0.0), torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1, 1)], ids=["all", "a row"]
)
def test_deterministic_steps_have_no_density(std):
    law, other = Gaussian(normal(*SHAPE), std.double()), gaussian("one")
    assert not law.stochastic
    for ask in (lambda: law.log_prob(law.mean), lambda: law.kl(other), lambda: other.kl(law)):
        with pytest.raises(ValueError, match="deterministic"):
            ask()


def test_deterministic_steps_ignore_noise():
    law = Gaussian(normal(*SHAPE), torch.tensor(0.0, dtype=F64))
    assert torch.equal(law.sample(normal(*SHAPE, seed=5)), law.mean)


# Draws

DRAWS = 200_000


@pytest.mark.parametrize("std", STDS)
def test_gaussian_draws_have_the_right_moments(std):
    law = gaussian(std)
    x = Gaussian(law.mean[None], law.std[None]).sample(normal(DRAWS, *SHAPE, seed=3))
    scale = law.std.expand(SHAPE)
    assert bool(((x.mean(0) - law.mean).abs() < 5 * scale / math.sqrt(DRAWS)).all())
    assert bool(((x.var(0) / scale**2 - 1).abs() < 5 * math.sqrt(2 / DRAWS)).all())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_categorical_draws_have_the_right_frequencies(dtype):
    logits = torch.tensor([0.0, math.log(0.003), -torch.inf, 1.0, 2.0], dtype=dtype)
    law = Categorical(logits.expand(DRAWS, 1, 5))
    x = law.sample(normal(DRAWS, 1, 5, seed=4, dtype=dtype))
    frequency = torch.bincount(x.flatten(), minlength=5).double() / DRAWS
    p = logits.double().softmax(0)
    assert frequency[2] == 0
    assert bool(((frequency - p).abs() <= 5 * (p * (1 - p) / DRAWS).sqrt()).all())


def test_categorical_draws_survive_noise_in_both_tails():
    noise = torch.tensor([[[-38.0, -9.0, 0.0, 9.0, 38.0]]])
    perturbed = Categorical(torch.zeros(1, 1, 5)).gumbel(noise)
    assert bool(perturbed.isfinite()[..., :4].all())
    assert bool((perturbed.diff() > 0).all())


# Gradients


@pytest.mark.parametrize("std", STDS)
def test_gaussian_gradients(std):
    mean, other = normal(*SHAPE).requires_grad_(), normal(*SHAPE, seed=1).requires_grad_()
    scale = STDS[std].clone().requires_grad_()
    noise, q = normal(*SHAPE, seed=2), torch.tensor(1.1, dtype=F64, requires_grad=True)
    assert gradcheck(lambda m, s: Gaussian(m, s).sample(noise), (mean, scale))
    assert gradcheck(lambda m, s, x: Gaussian(m, s).log_prob(x), (mean, scale, other))
    assert gradcheck(lambda m, s, n, t: Gaussian(m, s).kl(Gaussian(n, t)), (mean, scale, other, q))


def test_gaussian_draws_are_reparameterised():
    """d/dmean E[f(x)] through one draw: the gradient of sum(x²) is 2x."""
    mean = normal(*SHAPE).requires_grad_()
    x = Gaussian(mean, STDS["rows"]).sample(normal(*SHAPE, seed=3))
    (gradient,) = torch.autograd.grad(x.square().sum(), mean)
    torch.testing.assert_close(gradient, 2 * x.detach())


def test_categorical_gradients():
    p, q = normal(*SHAPE).requires_grad_(), normal(*SHAPE, seed=1).requires_grad_()
    x = torch.tensor([[0, 3], [1, 2], [2, 1]])
    assert gradcheck(lambda logits: Categorical(logits).log_prob(x), (p,))
    assert gradcheck(lambda a, b: Categorical(a).kl(Categorical(b)), (p, q))


def test_categorical_gradients_stay_finite_beside_impossible_outcomes():
    base = token_logits()
    p, q = base.clone().requires_grad_(), (base * 0.5).requires_grad_()
    x = torch.tensor([[0, 3], [1, 2], [2, 1]])
    loss = Categorical(p).log_prob(x).sum() + Categorical(p).kl(Categorical(q)).sum()
    for gradient in torch.autograd.grad(loss, (p, q)):
        assert bool(gradient.isfinite().all())
        assert bool((gradient[torch.isneginf(base)] == 0).all())


# Tilts


@pytest.mark.parametrize("std", STDS)
def test_gaussian_shift_is_the_exact_tilt_by_a_linear_reward(std):
    law, grad, scale = gaussian(std), normal(*SHAPE, seed=6), 0.8
    tilted = law.shift(grad, scale)
    torch.testing.assert_close(tilted.mean - law.mean, scale * law.std**2 * grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(tilted.std, law.std)
    for seed in (7, 8):
        x = normal(*SHAPE, seed=seed)
        linear = (grad * (x - law.mean)).sum((1, 2))
        log_z = 0.5 * scale**2 * (law.std**2 * grad**2).sum((1, 2))
        torch.testing.assert_close(tilted.log_prob(x) - law.log_prob(x), scale * linear - log_z, rtol=1e-9, atol=1e-9)


def test_categorical_shift_is_the_exact_tilt_by_a_reward_of_each_token():
    law, grad, scale = Categorical(token_logits()), normal(*SHAPE, seed=9), 0.8
    weight = law.logits.exp() * (scale * grad).exp()
    torch.testing.assert_close(law.shift(grad, scale).log_probs.exp(), weight / weight.sum(-1, keepdim=True))


def test_categorical_shift_revives_nothing():
    law = Categorical(token_logits())
    dead = torch.isneginf(law.logits)
    assert bool((law.shift(torch.full(SHAPE, 1e3, dtype=F64), 10.0).log_probs[dead] == -torch.inf).all())


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_densities_are_sums_in_float32(dtype):
    mean, x = normal(2, 3, 40, 40, dtype=torch.float32), normal(2, 3, 40, 40, seed=1, dtype=dtype)
    law = Gaussian(mean, torch.tensor(0.05, dtype=F64))
    exact = Gaussian(mean.double(), law.std).log_prob(x.double())
    assert law.log_prob(x).dtype == torch.float32
    torch.testing.assert_close(law.log_prob(x).double(), exact, rtol=1e-5, atol=0)
    logits = normal(2, 9, 7, seed=2, dtype=dtype)
    assert Categorical(logits).log_prob(torch.zeros(2, 9, dtype=torch.long)).dtype == torch.float32


@pytest.mark.parametrize("other_std", [0.3, 0.5])
def test_log_ratio_is_the_difference_of_log_densities_without_their_round_off(other_std):
    """At 65 536 dimensions in float32, against the same numbers in float64."""
    g = torch.Generator().manual_seed(0)
    mean, x = torch.randn(2, 2, 65536, generator=g)
    d = 0.01 * torch.randn(2, 65536, generator=g)
    p, q = Gaussian(mean, torch.tensor(0.3)), Gaussian(mean + d, torch.tensor(other_std))
    exact_p, exact_q = (Gaussian(law.mean.double(), law.std.double()) for law in (p, q))
    exact = exact_p.log_prob(x.double()) - exact_q.log_prob(x.double())
    torch.testing.assert_close(p.log_ratio(q, x), exact, rtol=1e-8, atol=1e-6)
    tokens = Categorical(torch.randn(2, 5, 4, generator=g)), Categorical(torch.randn(2, 5, 4, generator=g))
    picked = torch.randint(4, (2, 5), generator=g)
    expected = tokens[0].log_prob(picked) - tokens[1].log_prob(picked)
    torch.testing.assert_close(tokens[0].log_ratio(tokens[1], picked).float(), expected)
    with pytest.raises(TypeError, match="two laws of one kind"):
        p.log_ratio(tokens[0], x)
