"""Laws of the Qwen-Image family: our rollouts equal its pipeline's own samples, and its ways are kept."""

from __future__ import annotations

import pytest
import torch

from align.loading import load_policy
from samplers import ODE, SeededNoise, rollout
from samplers.families.qwen_image import QwenImage
from tests.samplers.families.compare import PROMPTS, agree, compare
from tests.samplers.families.tiny.qwen_image import VARIANTS, pipeline


@pytest.fixture(scope="module")
def pipe():
    made = pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [(16, 16), (24, 16)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_equal_the_pipeline(variant, size, guidance):
    made = VARIANTS[variant]()
    compare(made, QwenImage(made), guidance, size)


def test_a_saved_model_equals_the_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu")
    assert isinstance(policy, QwenImage) and (policy.guidance, policy.steps) == (4.0, 50)
    compare(pipe, policy, 4.0, (16, 16))


def test_a_seed_is_the_image_of_that_seed(pipe):
    policy, prompts = QwenImage(pipe), [p.text for p in PROMPTS]
    theirs = pipe(
        prompts,
        negative_prompt=[" ", " "],
        generator=[torch.Generator().manual_seed(s) for s in (3, 4)],
        num_inference_steps=3,
        height=16,
        width=24,
        output_type="latent",
    ).images
    noise = SeededNoise([3, 4], policy.shape((16, 24)))
    agree(policy.pack(rollout(policy, ODE(), policy.encode(prompts), policy.levels(3, (16, 24)), noise).x0), theirs)


@pytest.mark.parametrize("steps", [2, 7, 50])
@pytest.mark.parametrize("size", [(16, 16), (1024, 768)], ids=str)
def test_levels_end_where_the_scheduler_says(pipe, steps, size):
    table = QwenImage(pipe).levels(steps, size)
    assert float(table.sigma[0]) == 1.0 and float(table.sigma[-1]) == 0.0
    assert float(table.sigma[-2]) == pytest.approx(0.02, rel=1e-5)


def test_packing_has_an_inverse(pipe):
    policy = QwenImage(pipe)
    x = torch.randn(2, *policy.shape((24, 16)), generator=torch.Generator().manual_seed(0))
    tokens = policy.pack(x)
    assert tokens.shape == (2, 6 * 4, 16)
    assert torch.equal(policy.unpack(tokens, x.shape[2:]), x)


def test_guidance_turns_the_velocity_of_a_patch_and_keeps_its_length(pipe):
    policy, generator = QwenImage(pipe), torch.Generator().manual_seed(0)
    negative, positive = torch.randn(2, 3, 4, 6, 8, generator=generator)
    guided = policy.guided(negative, positive, 4.0)
    patches = [v.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3) for v in (guided, positive)]
    torch.testing.assert_close(patches[0].norm(dim=-1), patches[1].norm(dim=-1))
    plain = (negative + 4 * (positive - negative)).unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)
    torch.testing.assert_close(torch.cosine_similarity(patches[0], plain, dim=-1), torch.ones(3, 3, 4))


def test_latents_are_whitened_by_channel(pipe):
    policy = QwenImage(pipe)
    media = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    own = pipe.vae.encode(2 * media[:, :, None] - 1).latent_dist.mode()  # (B, C, 1, H, W)
    config = pipe.vae.config
    for channel in range(4):
        expected = (own[:, channel, 0] - config.latents_mean[channel]) / config.latents_std[channel]
        torch.testing.assert_close(policy.encode_media(media)[:, channel], expected)
    torch.testing.assert_close(policy.unscaled(policy.encode_media(media), config), own)


def test_an_empty_negative_prompt_is_a_blank(pipe):
    policy = QwenImage(pipe)
    negative = policy.encode([PROMPTS[1]]).negative["encoder_hidden_states"]
    blank = pipe.encode_prompt([" "])[0]
    assert torch.equal(negative, blank) and blank.shape[1] > pipe.encode_prompt([""])[0].shape[1]
    assert policy.encode([""]).positive["encoder_hidden_states"].shape[1] < negative.shape[1]


def test_the_instruction_is_not_among_the_conditions(pipe):
    """Its first 34 tokens are dropped; the text and what follows it stay."""
    template = pipe.prompt_template_encode.format("a cat")
    real = QwenImage(pipe).encode(["a cat"]).positive["encoder_hidden_states_mask"]
    assert real.shape == (1, len(pipe.tokenizer(template).input_ids) - 34) and bool(real.all())


def test_long_texts_are_heard_to_their_end(pipe):
    long = "cat " * 300
    ids = pipe.tokenizer(pipe.prompt_template_encode.format(long)).input_ids
    assert 512 < len(ids) - 34 < 1024
    assert QwenImage(pipe).encode([long]).positive["encoder_hidden_states"].shape[1] == len(ids) - 34


def test_tokens_that_fill_up_are_not_heard(pipe):
    policy = QwenImage(pipe)
    cond = policy.encode(PROMPTS)
    mask = cond.positive["encoder_hidden_states_mask"]
    assert not bool(mask[0].all()) and bool(mask[1].all())
    x, at = (
        torch.randn(2, *policy.shape((16, 16)), generator=torch.Generator().manual_seed(0)),
        policy.levels(4, (16, 16))[1],
    )
    before = policy.predict(x, at, cond)
    cond.positive["encoder_hidden_states"][0, ~mask[0]] = 5.0
    torch.testing.assert_close(policy.predict(x, at, cond), before, rtol=0, atol=1e-6)


def test_a_small_autoencoder_previews(pipe):
    from diffusers import AutoencoderTiny

    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    policy = QwenImage(pipe, preview_vae=small)
    x0 = torch.randn(2, *policy.shape((16, 24)), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.preview(x0), (small.decode(x0).sample / 2 + 0.5).clamp(0, 1))
    assert policy.decode(x0).shape == (2, 3, 16, 24)


def test_networks_that_embed_guidance_are_refused():
    """diffusers' own network cannot be called with a scale; should it learn to, this family must too."""
    made = pipeline(guidance_embeds=True)
    with pytest.raises(ValueError, match="takes the guidance scale as an input"):
        QwenImage(made)
    with pytest.raises(TypeError, match="positional arguments"):
        made("a cat", guidance_scale=3.0, num_inference_steps=2, height=16, width=16)
