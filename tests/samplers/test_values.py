"""Values of noisy states: exact ones make sequential Monte Carlo sharp, and no value makes it wrong."""

import itertools
import math
from importlib import import_module

import pytest
import torch

from samplers import (
    DDIM,
    SVDD,
    Compose,
    FeynmanKac,
    Guided,
    Interrupted,
    NoiseBank,
    SeededNoise,
    Unmask,
    Value,
    rollout,
)
from samplers.families import FAMILIES
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd3 import StableDiffusion3
from samplers.values import early_layers, features, probe
from tests.conftest import Linear, Table, TokenReward, z_score
from tests.oracles import (
    MIXTURE,
    ddim_coefficients,
    gaussian_chain,
    gaussian_continuation,
    mixture_posterior,
    mixture_soft_value,
    mixture_tilted_linear,
    tilted_law,
    tilted_linear,
    unmasking_law,
    unmasking_values,
)
from tests.samplers.families.tiny import sd3
from tests.samplers.test_smc import MEAN, STD, STEPS, chain, run


class Given(Value):
    """A function of the state and the number of its level."""

    def __init__(self, levels, function):
        super().__init__()
        self.levels, self.function = levels, function

    def forward(self, x, at, cond, prompts):
        step = int((self.levels.alpha - at.alpha).abs().argmin())
        return self.function(x, step)


def exact_value(levels, lam=1.0):
    """The soft value of r(x) = x on the discretised chain: what the chain does from a state on is one Gaussian."""
    law = gaussian_chain(levels.alpha, levels.sigma, MEAN, STD, ddim_coefficients(levels.alpha, levels.sigma, 1.0))
    slope, offset, var = gaussian_continuation(law)
    return Given(levels, lambda x, i: (slope[i] * x + offset[i] + lam * var[i] / 2).sum(1))


NONSENSE = {
    "zero": lambda x, i: torch.zeros(len(x)),
    "backwards": lambda x, i: -0.5 * x.sum(1),
    "wild": lambda x, i: torch.sin(40 * x.sum(1) + i),
    "silent": lambda x, i: torch.full((len(x),), torch.nan).where(x[:, 0] < 0, x[:, 0].float()),
}


@pytest.mark.parametrize("potential", ["difference", "max"])
@pytest.mark.parametrize("kind", ["exact", *NONSENSE])
def test_evidence_is_unbiased_whatever_the_value_says(kind, potential):
    policy, levels, mean, var = chain()
    value = exact_value(levels) if kind == "exact" else Given(levels, NONSENSE[kind])
    ended = run(FeynmanKac(Linear(), 1.0, potential, every=2, value=value), 3000, 8, policy=policy, levels=levels)
    log_z, tilted_mean, _ = tilted_linear(mean, var, 1.0)
    assert abs(z_score((ended.log_z - log_z).exp(), 1.0)) < 3
    steered = ended.log_z.exp() * (ended.weights * ended.x0.view(3000, 8)).sum(1)
    assert abs(z_score(steered, math.exp(log_z) * tilted_mean)) < 3.5


def test_svdd_with_a_value_is_unbiased():
    policy, levels, mean, var = chain()
    ended = run(SVDD(Linear(), 1.0, 4, value=exact_value(levels)), 6000, 8, policy=policy, levels=levels)
    assert abs(z_score((ended.log_z - tilted_linear(mean, var, 1.0)[0]).exp(), 1.0)) < 3


class Reverse(DDIM):
    """The exact reverse kernel of a mixture (spec 8.3): component, clean sample and next state are all drawn."""

    def law(self, clean, x, now, to, std):
        return ReverseStep(x[:, 0], now, to, float(std))


class ReverseStep:
    stochastic = True

    def __init__(self, x, now, to, std):
        self.x, self.now, self.to, self.std = x, now, to, std

    def sample(self, noise):
        posterior = mixture_posterior(self.x, float(self.now.alpha), float(self.now.sigma), MIXTURE)
        second = torch.special.ndtr(noise[:, 0]) > posterior.weights[:, 0]
        pick = second.long()[:, None]
        mean, var = (part.gather(1, pick)[:, 0] for part in (posterior.means, posterior.variances))
        x0 = mean + var.sqrt() * noise[:, 1]
        eps = (self.x - self.now.alpha * x0) / self.now.sigma
        toward = (self.to.sigma**2 - self.std**2).clamp(min=0).sqrt()
        return (self.to.alpha * x0 + toward * eps + self.std * noise[:, 2])[:, None]


def test_the_exact_value_has_less_variance_than_the_clean_estimate():
    """Between two modes the posterior mean misleads; the soft value does not. Spec 8.3: relative variances .51 and .21."""
    policy = GaussianPolicy([[-2.0], [1.5]], [0.6, 0.4], [0.7, 0.3])
    levels, groups, k, lam = policy.levels(STEPS), 8000, 16, 1.5
    log_z, tilted = mixture_tilted_linear(MIXTURE, lam)
    assert math.isclose(float(log_z), 1.2412445, abs_tol=1e-6)
    g = torch.Generator().manual_seed(0)
    bank = [torch.randn(groups * k, 1 if i == 0 else 3, generator=g, dtype=torch.float64) for i in range(STEPS + 1)]
    value = Given(
        levels, lambda x, i: mixture_soft_value(x[:, 0], float(levels.alpha[i]), float(levels.sigma[i]), MIXTURE, lam)
    )
    spread = {}
    for name, judge in {"clean": None, "value": value}.items():
        how = FeynmanKac(Linear(), 1 / lam, every=2, start=0.2, value=judge)
        ended = rollout(
            policy, Reverse(1.0), policy.encode([""] * groups), levels, NoiseBank(bank), particles=k, steering=how
        )
        ratio = (ended.log_z - log_z).exp()
        assert abs(z_score(ratio, 1.0)) < 3.5
        spread[name] = float(ratio.var())
    assert spread["value"] < 0.3 < 0.4 < spread["clean"], spread


def test_values_of_tokens_follow_the_enumerated_law():
    """The exact value of every masked state: unbiased, and sharper than clean estimates drawn at once."""
    policy, groups, k, steps = Table(), 2000, 8, 3
    g = torch.Generator().manual_seed(0)
    table = 2 * torch.randn(3, 3, 3, generator=g, dtype=torch.float64)
    reward = TokenReward({state: table[state].item() for state in itertools.product(range(3), repeat=3)})
    levels = policy.levels(steps)
    log_z, _ = tilted_law(unmasking_law(policy.table, levels.alpha), table, 1.0)
    exact = unmasking_values(policy.table, levels.alpha, table, 1.0)
    value = Given(levels, lambda x, i: exact[i][tuple(x.T)])
    assert math.isclose(float(exact[0][3, 3, 3]), log_z, rel_tol=1e-9)
    normals = [torch.randn(groups * k, 3, 4, generator=g) for _ in range(steps)]

    def noise(i):
        return torch.full((groups * k, 3), 3) if i == 0 else normals[i - 1]

    spread = []
    for judge in (None, value):
        ended = rollout(
            policy, Unmask(), policy.encode([""] * groups), levels, noise, particles=k,
            steering=FeynmanKac(reward, 1.0, value=judge),
        )  # fmt: skip
        ratio = (ended.log_z - log_z).exp()
        assert abs(z_score(ratio, 1.0)) < 3.5
        spread.append(float(ratio.var()))
    assert spread[1] < 0.9 * spread[0], spread


def test_a_value_spares_decoder_and_reward_until_the_end():
    policy, levels, _, _ = chain()
    ended = run(FeynmanKac(Linear(), 1.0, value=exact_value(levels)), 2, 4)
    assert ended.ledger.counts["decode"] == 8
    assert ended.ledger.counts["network"] == 8 * STEPS


def test_what_is_refused():
    _, levels, _, _ = chain()
    with pytest.raises(ValueError, match="no draws to average"):
        FeynmanKac(Linear(), value=exact_value(levels), draws=2)
    with pytest.raises(Interrupted, match="Given could judge no sample"):
        run(FeynmanKac(Linear(), value=Given(levels, lambda x, i: torch.full((len(x),), torch.nan))), 2, 4)
    with pytest.raises(ValueError, match="FeynmanKac needs a reward"):
        run(FeynmanKac(value=exact_value(levels)), 2, 4)


def test_guided_by_the_exact_value_and_weighed_by_it_weights_are_nearly_constant():
    """What is left of their variance, 2.3 without guidance, vanishes with the length of a step."""
    spread = {}
    for steps in (10, 40):
        policy = GaussianPolicy([MEAN], [STD])
        levels = policy.levels(steps)
        law = gaussian_chain(levels.alpha, levels.sigma, MEAN, STD, ddim_coefficients(levels.alpha, levels.sigma, 1.0))
        slope, offset, var = gaussian_continuation(law)
        value = Given(levels, lambda x, i, s=slope, o=offset, v=var: (s[i] * x + o[i] + v[i]).sum(1))
        how = Compose(Guided(scale=2.0, value=value), FeynmanKac(Linear(), 0.5, value=value, resampler="none"))
        noise = SeededNoise(range(2000), (1,), dtype=torch.float64)
        ended = rollout(policy, DDIM(1.0), policy.encode([""]), levels, noise, particles=2000, steering=how)
        log_z, tilted_mean, tilted_var = tilted_linear(float(law.mean[-1]), float(law.var[-1]), 2.0)
        spread[steps] = float(ended.log_w.var())
        assert abs(z_score((ended.log_w - log_z).exp().flatten(), 1.0)) < 4
        assert ended.ledger.counts["decode"] == 2000
    assert spread[10] < 0.2 and spread[40] < 0.02, spread


@pytest.mark.parametrize("family", ["qwen_image", "z_image", "lumina2", "pixart", "sd3"])
def test_no_row_of_features_depends_on_the_texts_of_others(family):
    """Texts of different lengths are filled up in a batch, also in the streams that text and image share."""
    pipe = next(iter(import_module(f"tests.samplers.families.tiny.{family}").VARIANTS.values()))()
    module, name = FAMILIES[type(pipe).__name__].split(":")
    policy = getattr(import_module(module), name)(pipe)
    policy.size = (32, 32)
    x = torch.randn(4, *policy.shape(policy.size), generator=torch.Generator().manual_seed(0))
    prompts = ["two dogs and one red bird", "a cat", "a red bird and a cat", "a cat"]
    layers, at = early_layers(policy.network), policy.levels(6, policy.size)[torch.tensor([1, 4, 2, 3])]
    together = features(policy, layers, x, at, policy.encode(prompts))
    alone = [features(policy, layers, x[[i]], at[[i]], policy.encode([prompt])) for i, prompt in enumerate(prompts)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert probe(policy, layers)[0] == together.shape[1]


def test_both_streams_of_a_block_are_heard():
    """A block of text and image puts out the text first; the image is what a value is about."""
    policy = StableDiffusion3(sd3.build())
    layers, at, cond = ["transformer_blocks.0"], policy.levels(6)[3], policy.encode(["a cat"])
    said: list = []
    policy.network.transformer_blocks[0].register_forward_hook(lambda _, args, output: said.append(output))
    x = torch.randn(1, *policy.shape((32, 32)), generator=torch.Generator().manual_seed(0))
    found = features(policy, layers, x, at, cond)
    channels, width = x.shape[1], policy.network.inner_dim
    torch.testing.assert_close(found[:, channels : channels + 2 * width], torch.cat([s.mean(1) for s in said[0]], 1))
