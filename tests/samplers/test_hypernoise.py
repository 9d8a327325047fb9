"""Laws of noise hypernetworks: an adapter of zero moves nothing, the generator speaks without its adapter, rows stay apart."""

from __future__ import annotations

import pytest
import torch

from samplers import ODE, Consistency, Problem, SeededNoise, ShiftedNoise, rollout, run
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from samplers.hypernoise import noise_shift
from tests.conftest import Linear, build_pipeline

F64 = torch.float64
SEEDS = range(3, 9)


def moved(by: float = 0.5, **how) -> GaussianPolicy:
    """A linear generator whose weights have moved since its reference was remembered."""
    policy = GaussianPolicy([[0.4, -0.3]], [0.8], **how)
    policy.network.means.requires_grad_(True)
    policy.remember("reference")
    with torch.no_grad():
        policy.network.means += by
    return policy


def problem(policy, steps=1, kernel=None, **how) -> Problem:
    noise = SeededNoise(SEEDS, (2,), dtype=F64)
    how = {"particles": 2, "prompts": ["a", "b", "c"], **how}
    return Problem(policy, kernel or Consistency(), policy.encode(["a", "b", "c"]), policy.levels(steps), noise, **how)


@pytest.mark.parametrize(("steps", "kernel"), [(1, Consistency()), (3, Consistency()), (3, ODE())], ids=str)
def test_a_linear_generator_in_closed_form(steps, kernel):
    """f(z) = K·z + (1 − α·K)·m, so Δz = (1 − α·K)·(m_θ − m_ref) for every z; the sample is the reference's from z + Δz."""
    policy = moved(0.5)
    levels = policy.levels(steps)
    gain = levels.alpha[0] * 0.64 / (0.64 * levels.alpha[0] ** 2 + levels.sigma[0] ** 2)
    want = ((1 - levels.alpha[0] * gain) * 0.5).expand(6, 2)
    noise = SeededNoise(SEEDS, (2,), dtype=F64)
    cond = policy.encode(["a"] * 6)
    torch.testing.assert_close(noise_shift(policy, noise(0), levels, cond).detach(), want)

    found = run(problem(policy, steps, kernel), ShiftedNoise(Linear()))
    reference = GaussianPolicy([[0.4, -0.3]], [0.8])
    start = noise(0) + want
    plain = rollout(reference, kernel, cond, levels, lambda i: start if i == 0 else noise(i))
    torch.testing.assert_close(found.x0, plain.x0)
    torch.testing.assert_close(found.noise[0], start)
    torch.testing.assert_close(found.rewards.flatten(), plain.x0.sum(1))
    torch.testing.assert_close(found.history["kl"].flatten(), 0.5 * want.square().sum(1))
    assert found.ledger.counts["network"] == 6 * (2 + steps)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_the_batch_changes_nothing(batch):
    one, other = (run(problem(moved(), 2, batch=n), ShiftedNoise(Linear())) for n in (batch, 32))
    assert torch.equal(one.x0, other.x0)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A latent consistency model with a guidance embedding, and a LoRA that still does nothing."""
    import diffusers
    from peft import LoraConfig

    how = {"guidance_embedding": True, "pipeline": "LatentConsistencyModelPipeline"}
    pipe = build_pipeline(tmp_path_factory.mktemp("lcm"), scheduler=diffusers.LCMScheduler(), **how)
    policy = StableDiffusion(pipe)
    policy.network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv_out"], init_lora_weights="gaussian"))
    return policy


def fill(policy, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, p in policy.network.named_parameters():
        if "lora_B" in name:
            p.data = scale * torch.randn(p.shape, generator=generator)


def test_an_adapter_of_zero_moves_nothing_and_any_adapter_leaves_the_generator_alone(student):
    policy, prompts = student, ["cat", "dog"]

    def samples(steering=None):
        noise = SeededNoise([1, 2], policy.shape((16, 16)))
        problem = Problem(
            policy, policy.kernel, policy.encode(prompts), policy.levels(2), noise, prompts=prompts
        )  # fmt: skip
        return run(problem, *[steering] * (steering is not None))

    fill(policy, 0.0)
    plain = samples()
    found = samples(ShiftedNoise(Linear()))
    assert torch.equal(found.x0, plain.x0)
    assert bool((found.history["kl"] == 0).all())

    fill(policy, 0.3)
    found = samples(ShiftedNoise(Linear()))
    assert bool((found.history["kl"] > 0).all())
    with policy.acting_as("reference"):
        assert torch.equal(samples().x0, plain.x0)
        noises = [*found.noise, torch.zeros_like(found.noise[0])]
        again = rollout(policy, policy.kernel, policy.encode(prompts), policy.levels(2), lambda i: noises[i])
    torch.testing.assert_close(found.x0, again.x0)
    assert not torch.allclose(samples().x0, plain.x0)


def test_a_policy_without_an_adapter_is_refused():
    policy = GaussianPolicy([[0.4, -0.3]], [0.8])
    with pytest.raises(ValueError, match="this policy has no adapter: pass lora="):
        run(problem(policy), ShiftedNoise(Linear()))
    with pytest.raises(ValueError, match="needs a reward"):
        run(problem(moved()), ShiftedNoise())
