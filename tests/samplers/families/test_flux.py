"""Laws of FLUX.1: our rollouts equal its pipeline's own samples, latents and pixels."""

from __future__ import annotations

import math

import pytest
import torch

from align import load_policy
from samplers import ODE, SeededNoise, rollout
from samplers.families.flux import Flux
from tests.samplers.families.compare import PROMPTS, compare, hears_row_by_row
from tests.samplers.families.tiny.flux import VARIANTS, build


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_equal_the_pipeline(variant, guidance, tmp_path):
    pipe = VARIANTS[variant]()
    pipe.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu") if guidance > 1 else Flux(pipe)
    assert isinstance(policy, Flux)
    policy.max_sequence_length = 64
    for size in ((16, 16), (16, 24)):
        compare(pipe, policy, guidance, size)
        times = pipe.scheduler.timesteps.double()
        assert torch.equal(policy.levels(3, size).t[:-1], times)


def test_defaults_are_the_published():
    policies = [Flux(make()) for make in VARIANTS.values()]
    assert [(p.guidance, p.steps, p.few_step) for p in policies] == [(3.5, 28, False), (1.0, 4, True), (1.0, 28, False)]
    assert [p.contrasts for p in policies] == [False, True, True]
    assert [p.max_sequence_length for p in policies] == [512, 256, 512]
    assert policies[0].size == (256, 256) and policies[0].shape((8, 12)) == (4, 4, 6)
    with pytest.raises(ValueError, match="multiples of 4"):
        policies[0].shape((8, 10))


def test_levels_of_the_student_are_even_and_of_the_others_shifted():
    student, dev = Flux(VARIANTS["schnell"]()), Flux(build())
    assert student.levels(4, (16, 24)).sigma.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert isinstance(student.kernel, ODE) and not isinstance(dev.kernel, ODE)
    shift = math.exp(1.15)  # of 4096 tokens
    expected = [shift * u / (1 + (shift - 1) * u) for u in (1, 0.75, 0.5, 0.25, 0)]
    assert dev.levels(4, (256, 256)).sigma.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(dev.levels(4, (16, 16)).sigma[1]) < 0.84


def test_a_scale_is_an_input_of_dev_and_contrasts_branches_of_the_others():
    for policy, branches in ((Flux(build()), 1), (Flux(VARIANTS["schnell"]()), 2)):
        cond, noise = policy.encode(PROMPTS), SeededNoise([0, 1], policy.shape((16, 16)))
        runs = [rollout(policy, ODE(), cond.with_guidance(g), policy.levels(2), noise) for g in (1.0, 4.0)]
        assert [run.ledger.counts["network"] for run in runs] == [4, 4 * branches]
        assert float((runs[0].x0 - runs[1].x0).abs().max()) > 1e-2


def test_texts_and_times_are_heard_row_by_row():
    policy = Flux(build())
    hears_row_by_row(policy)


def test_a_patch_is_a_token():
    """What is packed is what the network returns packed: neighbours stay neighbours."""
    policy = Flux(build())
    x = torch.arange(2 * 4 * 4 * 6).reshape(2, 4, 4, 6).float()
    tokens = policy.pack(x)
    assert tokens.shape == (2, 6, 16)
    assert tokens[0, 4].tolist() == x[0, :, 2:4, 2:4].flatten().tolist()


def test_networks_that_take_images_are_refused():
    with pytest.raises(ValueError, match="takes 24 channels, a packed latent has 16"):
        Flux(build(in_channels=24, out_channels=16))
