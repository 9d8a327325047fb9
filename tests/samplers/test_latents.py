"""Laws of what latent families share: levels are the scheduler's own, sizes, the autoencoder's scale, joined conditions."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from samplers import Cond
from samplers.latents import FlowPolicy, VPPolicy
from samplers.policy import joined


class Part(torch.nn.Module):
    """A module with a configuration."""

    def __init__(self, **config) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (dict,), {"__getattr__": dict.__getitem__})(config)


class Pipe:
    """What a policy reads of a pipeline."""

    vae_scale_factor = 8

    def __init__(self, scheduler) -> None:
        self.scheduler = scheduler
        self.vae = Part(latent_channels=4, scaling_factor=0.5, shift_factor=0.25)
        self.components = {"transformer": Part(), "vae": self.vae, "scheduler": scheduler}


class Flow(FlowPolicy):
    """A flow whose texts are as long as they are."""

    multiple = 16
    size = (1024, 1024)

    def embed(self, text, negative):
        return {"tokens": torch.full((len(text), 2), float(negative)), "mask": torch.ones(len(text), dtype=torch.bool)}

    def predict(self, x, at, cond):
        return x


class Noise(VPPolicy):
    """Diffusion with the same texts."""

    embed, predict = Flow.embed, Flow.predict


SHIFTS = {
    "none": {},
    "constant": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9, "max_image_seq_len": 8192},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}


@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize("steps", [1, 7, 28])
@pytest.mark.parametrize("given", [False, True])
def test_flow_levels_are_those_of_the_scheduler(kind, steps, given, monkeypatch):
    if given:
        monkeypatch.setattr(Flow, "sigmas", lambda self, steps: [1 - i / steps for i in range(steps)])
    scheduler = FlowMatchEulerDiscreteScheduler(**SHIFTS[kind])
    policy = Flow(Pipe(scheduler))
    if kind == "terminal" and steps == 1:
        with pytest.raises(ValueError, match="steps must be 2 or more, got 1"):  # one level cannot be both ends
            policy.levels(1, (512, 768))
        return
    levels = policy.levels(steps, (512, 768))
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = slope * (32 * 48) + config.base_shift - slope * config.base_image_seq_len  # the line through both corners
    dynamic = {"mu": mu} if config.use_dynamic_shifting else {}
    scheduler.set_timesteps(steps, sigmas=policy.sigmas(steps), **dynamic)
    torch.testing.assert_close(levels.sigma, scheduler.sigmas.double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(levels.t[:-1], scheduler.timesteps.double(), rtol=0, atol=1e-4)
    assert torch.equal(levels.alpha + levels.sigma, torch.ones(steps + 1, dtype=torch.float64))
    assert float(levels.sigma[-1]) == 0
    assert bool((levels.sigma.diff() < 0).all())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_shift_moves_every_level_as_published(shift):
    """2403.03206, equation 23: t' = s·t / (1 + (s − 1)·t), on an even grid the pipeline gives."""
    policy = Flow(Pipe(FlowMatchEulerDiscreteScheduler(shift=shift)))
    policy.sigmas = lambda steps: [1 - i / steps for i in range(steps)]
    t = 1 - torch.arange(11, dtype=torch.float64) / 10
    torch.testing.assert_close(policy.levels(10).sigma, shift * t / (1 + (shift - 1) * t), rtol=0, atol=1e-6)


def test_a_dynamic_shift_grows_with_the_size_and_is_halved_noise_at_equal_signal():
    """exp(mu) = the shift of the signal-to-noise ratio; 256 tokens have mu 0.5, 4096 have 1.15."""
    policy = Flow(Pipe(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)))
    policy.sigmas = lambda steps: [1 - i / steps for i in range(steps)]
    for size, mu in (((256, 256), 0.5), ((1024, 1024), 1.15)):
        odds = policy.levels(4, size)
        ratio = (odds.sigma / odds.alpha)[1:-1] / torch.tensor([3.0, 1.0, 1 / 3], dtype=torch.float64)
        torch.testing.assert_close(ratio.log(), torch.full((3,), mu, dtype=torch.float64), rtol=0, atol=1e-5)


def test_training_levels_of_a_flow_are_uniform_in_its_time():
    levels = Flow(Pipe(FlowMatchEulerDiscreteScheduler(shift=3.0))).training_levels(torch.tensor([0.0, 0.25, 0.5]))
    assert levels.sigma.tolist() == [0, 0.25, 0.5]
    assert levels.t.tolist() == [0, 250, 500]


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("karras", [False, True])
def test_levels_of_sigma_schedulers_are_their_own(kind, spacing, karras):
    scheduler = kind(beta_schedule="scaled_linear", timestep_spacing=spacing, use_karras_sigmas=karras)
    levels = Noise(Pipe(scheduler)).levels(9)
    scheduler.set_timesteps(9)
    torch.testing.assert_close(levels.sigma / levels.alpha, scheduler.sigmas.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(levels.t[:-1], scheduler.timesteps.double())
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(10, dtype=torch.float64))


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"Flow walks the levels of FlowMatchEuler.*; the model's scheduler is Euler"):
        Flow(Pipe(EulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="the model's scheduler is FlowMatchEulerDiscreteScheduler"):
        Noise(Pipe(FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(ValueError, match="invert_sigmas"):
        Flow(Pipe(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))).levels(4)


def test_scaled_undoes_unscaled():
    policy = Flow(Pipe(FlowMatchEulerDiscreteScheduler()))
    z = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(policy.unscaled(policy.scaled(z), policy.vae.config), z)
    assert policy.scaled(torch.tensor(0.25)) == 0 and policy.scaled(torch.tensor(2.25)) == 1


def test_sizes_are_multiples_and_the_nearest_is_offered():
    policy = Flow(Pipe(FlowMatchEulerDiscreteScheduler()))
    assert policy.shape((32, 48)) == (4, 4, 6)
    with pytest.raises(ValueError, match=r"multiples of 16 pixels; got \(40, 512\): \(32, 512\) is near"):
        policy.shape((40, 512))


def test_texts_of_any_length_share_a_batch():
    policy = Flow(Pipe(FlowMatchEulerDiscreteScheduler()))
    cond = policy.encode(["ab", "abcd"])
    assert cond.positive["tokens"].shape == (2, 4, 2)
    assert cond.positive["mask"].sum(1).tolist() == [2, 4]
    both = Cond.joined([cond, policy.encode(["abcdef"])])
    assert both.positive["mask"].sum(1).tolist() == [2, 4, 6] and both.positive["mask"].shape == (3, 6)
    doubled = both[[2]].both()
    assert doubled.positive["mask"].sum(1).tolist() == [0, 6]  # no negative text, no token
    assert policy.encode([]).positive == {}


def test_both_branches_share_an_embedding_only_where_they_hear_alike():
    policy = Flow(Pipe(FlowMatchEulerDiscreteScheduler()))
    assert float(policy._embedded(["a"], True)["tokens"].sum()) == 2
    policy = Flow(Pipe(FlowMatchEulerDiscreteScheduler()))
    policy.sided = False
    assert float(policy._embedded(["a"], True)["tokens"].sum()) == 0


def test_embeddings_are_forgotten_beyond_their_bytes(monkeypatch):
    monkeypatch.setattr("samplers.latents.REMEMBERED", 40)  # a letter is 9 bytes here
    policy = Flow(Pipe(FlowMatchEulerDiscreteScheduler()))
    policy.sided = False
    assert policy.encode(["abc", "ab", "a"]).positive["mask"].sum(1).tolist() == [3, 2, 1]
    assert {text for text, _ in policy._embeddings} == {"ab", "a", ""}


def test_joined_pads_only_what_is_shorter():
    a, b = torch.ones(1, 2, 3), torch.ones(2, 4, 3)
    out = joined([a, b])
    assert out.shape == (3, 4, 3) and out.sum((1, 2)).tolist() == [6, 12, 12]
