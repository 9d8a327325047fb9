"""Laws of Stable Diffusion XL: our rollouts equal its pipeline's own samples, latents and pixels."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler

from align import load_policy
from rewards import Prompt
from samplers import ODE, NoiseBank, SeededNoise, rollout
from samplers.families.sdxl import StableDiffusionXL
from tests.samplers.families.compare import agree, drawn
from tests.samplers.families.tiny.sdxl import VARIANTS, build

PROMPTS = [Prompt("a cat", negative="a blurry thing"), Prompt("two dogs and one red bird")]


def compare(pipe, policy, guidance, size, prompts=PROMPTS, steps=2):
    """Latents equal to 1e-5 of their scale, images to 1e-4; a trailing Euler run begins where its scheduler does, at σ_T·ε."""
    noise, levels = SeededNoise([0, 1], policy.shape(size)), policy.levels(steps, size)
    renoised = "LCM" in type(pipe.scheduler).__name__
    start = noise
    if policy.few_step and not renoised:
        start = NoiseBank([levels.sigma[0].float() * noise(0), *[torch.zeros_like(noise(0))] * steps])
    cond = policy.encode(prompts).with_guidance(guidance)
    ours = rollout(policy, policy.kernel if renoised else ODE(), cond, levels, start).x0
    if "Ancestral" in type(pipe.scheduler).__name__:  # its first-order form
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    asked, seen = policy.published(prompts, guidance, steps, size, noise(0)), []
    watch = lambda pipe, i, t, state: seen.append(state["latents"]) or state  # noqa: E731
    with drawn(noise):
        images = pipe(**asked, output_type="pt", callback_on_step_end=watch).images
    agree(ours, seen[-1])
    torch.testing.assert_close(policy.decode(ours), images, rtol=0, atol=1e-4)
    assert images.shape == (2, 3, *size) and float(images.std()) > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_equal_the_pipeline(variant, tmp_path):
    pipe = VARIANTS[variant]()
    compare(pipe, StableDiffusionXL(pipe), 1.0, (48, 64))
    pipe.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu")
    assert isinstance(policy, StableDiffusionXL)
    compare(pipe, policy, 5.0, (64, 64))
    compare(pipe, policy, 5.0, (48, 64), [Prompt(p.text) for p in PROMPTS])
    if policy.contrasts:
        compare(pipe, policy, 5.0, (48, 64), [Prompt(p.text, negative="bad " + p.text) for p in PROMPTS])


def test_defaults_are_those_of_the_pipeline_and_the_students():
    policies = {name: StableDiffusionXL(make()) for name, make in VARIANTS.items()}
    assert {p.size for p in policies.values()} == {(64, 64)}
    found = {name: (p.guidance, p.steps, p.few_step) for name, p in policies.items()}
    assert found["base"] == (5.0, 50, False)
    assert found["LCM"] == (8.0, 4, True)
    assert found["turbo"] == found["lightning"] == found["merged LCM-LoRA"] == (1.0, 4, True)


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("variant", ["base", "turbo", "LCM"])
def test_levels_are_those_of_the_scheduler(variant, steps):
    pipe = VARIANTS[variant]()
    levels = StableDiffusionXL(pipe).levels(steps)
    pipe.scheduler.set_timesteps(steps)
    assert levels.t[:-1].tolist() == pipe.scheduler.timesteps.tolist()
    if variant != "LCM":
        torch.testing.assert_close(levels.sigma / levels.alpha, pipe.scheduler.sigmas.double())
    assert float(levels.sigma[-1]) == 0


def heard(policy, *, size=(64, 64), prompts=PROMPTS, at=1, guidance=1.0):
    """The network's output on one latent for all rows."""
    x = torch.randn(policy.shape(size), generator=torch.Generator().manual_seed(0)).expand(len(prompts), -1, -1, -1)
    return policy.output(x, policy.levels(3)[at], policy.encode(prompts).with_guidance(guidance))


def test_text_time_size_and_guidance_are_heard(monkeypatch):
    policy = StableDiffusionXL(VARIANTS["LCM"]())
    plain = heard(policy)
    assert float((plain[0] - plain[1]).abs().max()) > 1e-2
    for other in (heard(policy, at=0), heard(policy, guidance=8.0)):
        assert float((plain - other).abs().max()) > 1e-2
    told = []
    policy.network.register_forward_pre_hook(lambda _, args, given: told.append(given), with_kwargs=True)
    heard(policy, size=(48, 64))
    assert told[0]["added_cond_kwargs"]["time_ids"].tolist() == [[48, 64, 0, 0, 48, 64]] * 2
    added = policy.added
    monkeypatch.setattr(policy, "added", lambda x, cond: added(x, cond) | {"time_ids": torch.zeros(len(x), 6)})
    assert float((plain - heard(policy)).abs().max()) > 1e-2


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_negative_is_silent_where_the_model_says_so(zeros):
    policy = StableDiffusionXL(build(zeros=zeros))
    negative = policy.encode(PROMPTS).negative
    for value in negative.values():
        assert bool((value[1] == 0).all()) == zeros
        assert bool(value[0].any())
    empty = policy.encode([Prompt("", negative="")])
    assert all(bool(value.any()) for value in empty.positive.values())  # an empty prompt is no empty negative
    alone = policy.encode(PROMPTS[1:]).negative  # and no row hears of another
    assert all(torch.equal(alone[name], value[1:]) for name, value in negative.items())


def test_latents_with_moments_come_back():
    policy = StableDiffusionXL(VARIANTS["DDIM, latents with moments"]())
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.unscaled(policy.scaled(z), policy.vae.config), z)
    tiny = AutoencoderTiny()  # names none
    torch.testing.assert_close(policy.unscaled(z, tiny.config), z)
    media = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    mean = torch.tensor(policy.vae.config.latents_mean)[:, None, None]
    std = torch.tensor(policy.vae.config.latents_std)[:, None, None]
    with torch.no_grad():
        mode = policy.vae.encode(2 * media - 1).latent_dist.mode()
    expected = (mode - mean) * policy.vae.config.scaling_factor / std
    torch.testing.assert_close(policy.encode_media(media), expected)


@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_overflows_in_half_precision_works_in_float32(upcast):
    """In both directions, and with a gradient; one that was mended stays in float16."""
    pipe = build(force_upcast=upcast)
    exact = StableDiffusionXL(copy.deepcopy(pipe))
    half = StableDiffusionXL(pipe.to(torch.float16))
    assert half.dtype == torch.float16
    assert half.vae.dtype == (torch.float32 if upcast else torch.float16)
    if not upcast:
        return
    generator = torch.Generator().manual_seed(0)
    x0, media = torch.randn(1, 4, 8, 8, generator=generator), torch.rand(1, 3, 64, 64, generator=generator)
    torch.testing.assert_close(half.decode(x0.half()), exact.decode(x0), rtol=0, atol=5e-3)
    torch.testing.assert_close(half.encode_media(media), exact.encode_media(media), rtol=0, atol=5e-3)
    leaf = x0.half().requires_grad_()
    half.decode(leaf).mean().backward()
    assert bool(leaf.grad.any()) and half.decode(x0).dtype == torch.float32


def test_gradients_reach_the_noise_through_recomputed_blocks():
    policy, slopes = StableDiffusionXL(build()), []
    noise = SeededNoise([3], policy.shape((64, 64)))(0)
    for checkpointing in ("none", "block"):
        policy.checkpointing = checkpointing
        if checkpointing == "block":
            policy.network.enable_gradient_checkpointing()
        leaf = noise.clone().requires_grad_()
        cond = policy.encode(PROMPTS[:1]).with_guidance(5.0)
        policy.denoise(leaf, policy.levels(3)[1], cond).x0.square().sum().backward()
        slopes.append(leaf.grad)
    assert float(slopes[0].abs().max()) > 1e-3
    torch.testing.assert_close(slopes[0], slopes[1])
