"""Laws of the Lumina 2 family: our rollouts equal its pipeline's own samples, and its ways are kept."""

from __future__ import annotations

import pytest
import torch

from align.loading import load_policy
from samplers import ODE, SeededNoise, rollout
from samplers.families.lumina2 import Lumina2
from tests.samplers.families.compare import PROMPTS, agree, compare
from tests.samplers.families.tiny.lumina2 import VARIANTS, pipeline


@pytest.fixture(scope="module")
def pipe():
    made = pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_equal_the_pipeline(variant, size, guidance):
    made = VARIANTS[variant]()
    compare(made, Lumina2(made), guidance, size)


def test_a_saved_model_equals_the_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu")
    assert isinstance(policy, Lumina2) and (policy.guidance, policy.steps, policy.size) == (4.0, 30, (32, 32))
    compare(pipe, policy, 4.0, (32, 32))


def test_the_defaults_are_the_pipelines_own(pipe):
    """Its scale, its renormalisation, its system prompt; and a seed is the image of that seed."""
    policy, prompts = Lumina2(pipe), [p.text for p in PROMPTS]
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    theirs = pipe(
        prompts, generator=generators, num_inference_steps=3, height=32, width=48, output_type="latent"
    ).images
    noise = SeededNoise([3, 4], policy.shape((32, 48)))
    agree(rollout(policy, ODE(), policy.encode(prompts), policy.levels(3, (32, 48)), noise).x0, theirs)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_the_shift_counts_channels(steps):
    """What the pipeline takes for the number of tokens is the second axis of its latents, whatever the size."""
    made = VARIANTS["growing shift"]()
    policy = Lumina2(made)
    for size in ((32, 32), (1024, 768)):
        made.scheduler.set_timesteps(
            sigmas=[1 - i / steps for i in range(steps)], mu=0.5 + 0.65 * (4 - 256) / (4096 - 256)
        )
        torch.testing.assert_close(policy.levels(steps, size).sigma.float(), made.scheduler.sigmas)


def test_guidance_turns_the_velocity_of_a_row_of_pixels_and_keeps_its_length(pipe):
    policy, generator = Lumina2(pipe), torch.Generator().manual_seed(0)
    negative, positive = torch.randn(2, 3, 4, 6, 8, generator=generator)
    guided, plain = policy.guided(negative, positive, 4.0), negative + 4 * (positive - negative)
    torch.testing.assert_close(guided.norm(dim=-1), positive.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(guided, plain, dim=-1), torch.ones(3, 4, 6))


def test_the_velocity_points_to_noise(pipe):
    """The network's own time is 0 at noise, and its output the other way round."""
    policy, x = Lumina2(pipe), torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    at, cond = policy.levels(4, (32, 32))[1], policy.encode(["a cat"])
    tokens, mask, _, _ = pipe.encode_prompt("a cat", False)
    own = pipe.transformer(x, 1 - at.sigma.float()[None], tokens, mask).sample
    torch.testing.assert_close(policy.predict(x, at, cond), -own, rtol=0, atol=1e-5)


def test_only_prompts_follow_the_system_prompt(pipe):
    cond = Lumina2(pipe).encode([PROMPTS[0], "a blurry thing"])
    system = len(pipe.tokenizer(pipe.system_prompt).input_ids)
    assert int(cond.positive["encoder_attention_mask"].sum(1).min()) > system
    assert int(cond.negative["encoder_attention_mask"].sum(1).max()) < system
    assert int(cond.negative["encoder_attention_mask"].sum(1).min()) == 1  # an empty text is its mark of beginning


def test_tokens_that_fill_up_are_not_heard(pipe):
    policy = Lumina2(pipe)
    cond = policy.encode(PROMPTS)
    mask = cond.positive["encoder_attention_mask"]
    assert not bool(mask[0].all()) and bool(mask[1].all())
    x, at = (
        torch.randn(2, *policy.shape((32, 32)), generator=torch.Generator().manual_seed(0)),
        policy.levels(4, (32, 32))[1],
    )
    before = policy.predict(x, at, cond)
    cond.positive["encoder_hidden_states"][0, ~mask[0]] = 5.0
    torch.testing.assert_close(policy.predict(x, at, cond), before, rtol=0, atol=1e-6)
