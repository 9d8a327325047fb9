"""Laws of Stable Diffusion 3: our rollouts equal its pipeline's own samples, whichever text encoders are there."""

from __future__ import annotations

import pytest
import torch

from align import load_policy
from rewards import Prompt
from samplers import ODE, SeededNoise, rollout
from samplers.families.sd3 import StableDiffusion3
from tests.samplers.families.compare import PROMPTS, agree, compare, hears_row_by_row
from tests.samplers.families.tiny.sd3 import VARIANTS, build


@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_equal_the_pipeline(variant, guidance, tmp_path):
    pipe = VARIANTS[variant]()
    pipe.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu") if guidance > 1 else StableDiffusion3(pipe)
    assert isinstance(policy, StableDiffusion3)
    for size in ((16, 16), (16, 24)):
        compare(pipe, policy, guidance, size)
        assert torch.equal(policy.levels(3, size).t[:-1], pipe.scheduler.timesteps.double())


def test_defaults_are_the_published():
    policy = StableDiffusion3(build())
    assert (policy.guidance, policy.steps, policy.size, policy.multiple) == (7.0, 28, (16, 16), 4)
    assert policy.max_sequence_length == 256 and policy.contrasts and not policy.few_step


@pytest.mark.parametrize("absent", ["1", "2", "3", "12", "13", "23"])
def test_an_absent_encoder_is_heard_as_zeros(absent):
    """The pipeline's embedding with all encoders, its part of those that are not there struck out."""
    texts = [PROMPTS[0].text]
    with torch.no_grad():
        tokens, _, pooled, _ = build().encode_prompt(texts, texts, texts, do_classifier_free_guidance=False)
    words = tokens.shape[1] - 256
    parts = {
        "1": (tokens[:, :words, :16], pooled[:, :16]),
        "2": (tokens[:, :words, 16:40], pooled[:, 16:]),
        "3": (tokens[:, words:],),
    }
    for part in (part for i in absent for part in parts[i]):
        assert float(part.abs().max()) > 0.1
        part.zero_()
    if "1" in absent and "2" in absent:  # the pipeline takes the length of CLIP's tokens for 77 without its tokenizer
        tokens = torch.cat([tokens.new_zeros(1, 77 - words, 48), tokens], 1)
    heard = StableDiffusion3(build(absent)).encode(texts).positive
    torch.testing.assert_close(heard["encoder_hidden_states"], tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(heard["pooled_projections"], pooled, rtol=0, atol=1e-6)


def test_texts_and_times_are_heard_row_by_row():
    policy = StableDiffusion3(build(qk_norm="rms_norm", dual_attention_layers=(0,)))
    hears_row_by_row(policy)


def test_sizes_end_with_the_places_the_network_knows():
    policy = StableDiffusion3(build())
    assert policy.shape((48, 8)) == (4, 24, 4)
    with pytest.raises(ValueError, match=r"12 places a side, 48 pixels; got size \(52, 8\)"):
        policy.shape((52, 8))


def test_the_embedded_flow_equals_its_pipeline():
    policy = load_policy("tiny-flow", device="cpu")
    noise, guidance = SeededNoise([0, 1], policy.shape(policy.size)), 3.0
    prompts = [Prompt("a red circle left of a blue square", negative="a star"), Prompt("three green stars")]
    cond, levels = policy.encode(prompts).with_guidance(guidance), policy.levels(policy.steps)
    ours = rollout(policy, ODE(), cond, levels, noise).x0
    policy.pipe.set_progress_bar_config(disable=True)
    asked = policy.published(prompts, guidance, policy.steps, policy.size, noise(0))
    agree(ours, policy.pipe(**asked, output_type="latent").images)
    images = policy.pipe(**asked, output_type="pt").images
    torch.testing.assert_close(policy.decode(ours), images, rtol=0, atol=1e-4)
