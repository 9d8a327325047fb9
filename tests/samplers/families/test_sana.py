"""Laws of Sana and Sana-Sprint: our rollouts equal their pipelines' own samples, latents and pixels."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from align import load_policy
from samplers import Consistency, diffuse
from samplers.families.sana import Sana, SanaSprint
from tests.samplers.families.compare import PROMPTS, compare
from tests.samplers.families.tiny.sana import VARIANTS, build


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_equal_the_pipelines(variant, guidance, tmp_path):
    pipe = VARIANTS[variant]()
    pipe.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu")
    assert type(policy) is (SanaSprint if variant == "sprint" else Sana)
    for size in ((32, 32), (32, 64)):
        compare(pipe, policy, guidance, size, 2)
    compare(pipe, policy, guidance, (32, 32), 3)


def test_a_network_that_predicts_a_variance_too_is_heard_without_it():
    pipe = build(variance=True)
    compare(pipe, Sana(pipe), 4.5, (32, 32))


def test_defaults_are_the_pipelines():
    policies = [make() for make in (lambda: Sana(build()), lambda: SanaSprint(VARIANTS["sprint"]()))]
    assert [(p.guidance, p.steps, p.few_step, p.contrasts) for p in policies] == [
        (4.5, 20, False, True),
        (4.5, 2, True, False),
    ]
    assert isinstance(policies[1].kernel, Consistency)
    assert [p.multiple for p in policies] == [32, 32]
    with pytest.raises(ValueError, match="multiples of 32"):
        policies[0].shape((48, 32))


@pytest.mark.parametrize("variant", ["dpm-solver", "euler"])
@pytest.mark.parametrize("steps", [1, 20])
def test_levels_are_those_of_the_scheduler(variant, steps):
    pipe = VARIANTS[variant]()
    levels = Sana(pipe).levels(steps)
    pipe.scheduler.set_timesteps(steps)
    torch.testing.assert_close(levels.sigma, pipe.scheduler.sigmas.double(), rtol=0, atol=0)
    torch.testing.assert_close(levels.t[:-1], pipe.scheduler.timesteps.double(), rtol=0, atol=0)
    assert torch.equal(levels.alpha + levels.sigma, torch.ones(steps + 1, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_levels_of_sprint_lie_on_a_circle(steps):
    pipe = VARIANTS["sprint"]()
    levels = SanaSprint(pipe).levels(steps)
    pipe.scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    assert levels.t.tolist() == pipe.scheduler.timesteps.tolist()
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(steps + 1, dtype=torch.float64))
    torch.testing.assert_close(levels.sigma, levels.t.sin())
    assert float(levels.sigma[-1]) == 0 and abs(float(levels.alpha[0])) < 4e-6
    middle = SanaSprint(pipe).training_levels(torch.tensor([0.5]))
    assert float(middle.t) == pytest.approx(torch.pi / 4, abs=1e-2)
    assert float(middle.alpha / middle.sigma) == pytest.approx(1, abs=1e-2)


def test_sprint_is_the_velocity_of_a_flow_seen_on_the_circle():
    """A flow network that knows x0 and z answers z − x0 at every s; the policy then finds both exactly at every angle."""
    policy = SanaSprint(VARIANTS["sprint"]())
    generator = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    policy.velocity = lambda x, t, cond, **more: z - x0
    cond = policy.encode(["a cat"] * 3)
    levels = policy.levels(7)
    for at in (levels[2], levels[0], levels[torch.tensor([1, 4, 6])]):
        x = diffuse(x0, z, at)
        alpha, sigma = at.like(x)
        v = policy.predict(x, at, cond)
        torch.testing.assert_close(alpha * x - sigma * v, x0)
        torch.testing.assert_close(sigma * x + alpha * v, z)


def test_only_the_prompt_follows_the_instruction():
    policy = Sana(build())
    cond = policy.encode(["a cat"])
    longer, plain = (policy.embed("a cat", negative)["encoder_hidden_states"] for negative in (False, True))
    assert longer.shape == plain.shape == (300, 16)
    assert torch.equal(cond.positive["encoder_hidden_states"][0], longer)
    assert float((longer[1] - plain[1]).abs().max()) > 1e-2
    assert policy.encode(["a cat"]).negative["encoder_attention_mask"].sum() == 1  # where a text begins


def test_padding_is_not_heard():
    policy = Sana(build())
    cond, at = policy.encode(PROMPTS), policy.levels(3)[1]
    x = torch.randn(2, *policy.shape((32, 32)), generator=torch.Generator().manual_seed(0))
    tokens, mask = cond.positive["encoder_hidden_states"], cond.positive["encoder_attention_mask"]
    before = policy.predict(x, at, cond)
    tokens[mask == 0] += 1
    torch.testing.assert_close(policy.predict(x, at, cond), before, rtol=0, atol=1e-5)
    tokens[mask == 1] += 1
    assert float((policy.predict(x, at, cond) - before).abs().max()) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_time_and_guidance_are_heard(variant):
    policy = VARIANTS[variant]()
    policy = (SanaSprint if variant == "sprint" else Sana)(policy)
    cond, levels = policy.encode(PROMPTS), policy.levels(3)
    x = torch.randn(1, *policy.shape((32, 32)), generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    outputs = policy.output(x, levels[0], cond)
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-3
    assert float((outputs - policy.output(x, levels[1], cond)).abs().max()) > 1e-3
    assert float((outputs - policy.output(x, levels[0], cond.with_guidance(1.0))).abs().max()) > 1e-3


def test_media_become_latents_of_the_network_s_scale():
    policy = Sana(build())
    media = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    latents = policy.encode_media(media)
    assert latents.shape == (2, *policy.shape((32, 64)))
    torch.testing.assert_close(latents / 0.41407, policy.vae.encode(2 * media - 1).latent)


def test_a_solver_of_diffusion_is_refused():
    with pytest.raises(
        ValueError, match=r"use_flow_sigmas=True and prediction_type='flow_prediction'; got False and 'eps"
    ):
        Sana(build(scheduler=DPMSolverMultistepScheduler()))
    with pytest.raises(ValueError, match="SanaSprint walks the levels of SCMScheduler"):
        SanaSprint(build())
