"""Laws of FLUX.2: our rollouts equal its pipelines' own samples, latents and pixels."""

from __future__ import annotations

import json

import pytest
import torch

from align import load_policy
from rewards import Prompt
from samplers import ODE, SeededNoise, rollout
from samplers.families.flux2 import Flux2
from tests.samplers.families.compare import PROMPTS, compare
from tests.samplers.families.tiny.flux2 import VARIANTS


@pytest.fixture(scope="module")
def pipes():
    return {name: make() for name, make in VARIANTS.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_equal_the_pipelines(pipes, variant, tmp_path):
    pipe = pipes[variant]
    pipe.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_sequence_length": 64}))
    policy = load_policy(tmp_path, device="cpu")
    assert isinstance(policy, Flux2)
    for guidance, size in ((1.0, (16, 16)), (4.0, (16, 24)), (4.0, (24, 16))):
        compare(pipe, policy, guidance, size)
        assert torch.equal(policy.levels(3, size).t[:-1], pipe.scheduler.timesteps.double())


def test_defaults_are_the_published(pipes):
    dev, klein, base = (Flux2(pipe) for pipe in pipes.values())
    assert [(p.guidance, p.steps, p.few_step) for p in (dev, klein, base)] == [
        (4.0, 50, False),
        (1.0, 4, True),
        (4.0, 50, False),
    ]
    assert [p.contrasts for p in (dev, klein, base)] == [False, False, True]
    assert isinstance(klein.kernel, ODE) and not isinstance(base.kernel, ODE)
    assert {p.max_sequence_length for p in (dev, klein, base)} == {512}
    assert dev.size == (256, 256) and dev.shape((16, 24)) == (16, 4, 6)
    with pytest.raises(ValueError, match="multiples of 4"):
        dev.shape((16, 18))


def test_shifts_are_fitted_to_tokens_and_steps(pipes):
    """The line in the number of steps through its two ends, up to 4300 tokens."""
    policy = Flux2(pipes["dev"])
    ends = {10: 8.73809524e-05 * 4096 + 1.89833333, 200: 0.00016927 * 4096 + 0.45666666}
    for steps, mu in ends.items():
        assert policy.shift((256, 256), steps) == pytest.approx(mu)
    assert policy.shift((256, 256), 105) == pytest.approx(sum(ends.values()) / 2)
    assert (
        policy.shift((512, 512), 10) == policy.shift((512, 512), 200) == pytest.approx(0.00016927 * 16384 + 0.45666666)
    )


def test_latents_are_the_normalised_patches_of_the_autoencoder(pipes):
    pipe, policy = pipes["dev"], Flux2(pipes["dev"])
    media = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipe._encode_vae_image(2 * media - 1, None)
        z = pipe.vae.encode(2 * media - 1).latent_dist.mode()
    latents = policy.encode_media(media)
    torch.testing.assert_close(latents, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(policy.unscaled(latents, {}), z, rtol=0, atol=1e-6)
    assert latents.shape[1:] == policy.shape((16, 24))


def test_a_scale_is_an_input_of_dev_contrasts_branches_of_base_and_is_nothing_to_klein(pipes):
    moved = []
    for (name, pipe), branches in zip(pipes.items(), (1, 1, 2), strict=True):
        policy = Flux2(pipe)
        policy.max_sequence_length = 64
        cond, noise = policy.encode(PROMPTS), SeededNoise([0, 1], policy.shape((16, 16)))
        runs = [rollout(policy, ODE(), cond.with_guidance(g), policy.levels(2), noise) for g in (1.0, 4.0)]
        assert [run.ledger.counts["network"] for run in runs] == [4, 4 * branches], name
        moved.append(float((runs[0].x0 - runs[1].x0).abs().max()))
    assert moved[0] > 1e-2 and moved[1] == 0 and moved[2] > 1e-2


def test_a_negative_prompt_is_heard_by_base(pipes):
    policy = Flux2(pipes["klein base"])
    asked = policy.published([Prompt("a cat"), Prompt("a dog")], 4.0, 2, (16, 16), torch.zeros(2, 16, 4, 4))
    assert "negative_prompt_embeds" not in asked and "negative_prompt" not in asked
    plain, negated = (policy.encode([Prompt("a cat", negative=n)]).negative for n in ("", "blurry"))
    assert float((plain["encoder_hidden_states"] - negated["encoder_hidden_states"]).abs().max()) > 1e-2


def test_texts_and_times_are_heard_row_by_row(pipes):
    policy = Flux2(pipes["dev"])
    policy.max_sequence_length = 64
    cond, levels = policy.encode([*PROMPTS, "a bird"]), policy.levels(4)
    x = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1, 1)
    together = policy.predict(x, levels[torch.tensor([0, 0, 2])], cond)
    alone = [policy.predict(x[:1], levels[i], cond[[row]]) for row, i in enumerate((0, 0, 2))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-2
    assert float((together[2] - policy.predict(x[:1], levels[0], cond[[2]])).abs().max()) > 1e-2
