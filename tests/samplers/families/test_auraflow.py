"""Laws of AuraFlow: our rollouts equal its pipeline's own samples, latents and pixels."""

from __future__ import annotations

import pytest
import torch

from align import load_policy
from samplers.families.auraflow import AuraFlow
from tests.samplers.families.compare import PROMPTS, compare
from tests.samplers.families.tiny.auraflow import build


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_rollouts_equal_the_pipelines(guidance, tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu")
    assert isinstance(policy, AuraFlow)
    for size in ((16, 16), (16, 24)):
        compare(pipe, policy, guidance, size)


def test_levels_are_those_of_the_scheduler():
    pipe = build()
    levels = AuraFlow(pipe).levels(20)
    pipe.scheduler.set_timesteps(20)
    assert levels.sigma.tolist() == pipe.scheduler.sigmas.tolist()
    assert levels.t[:-1].tolist() == pipe.scheduler.timesteps.tolist()


def test_defaults_are_the_pipelines():
    policy = AuraFlow(build())
    assert (policy.guidance, policy.steps, policy.size, policy.multiple) == (3.5, 50, (32, 32), 4)


def test_padding_is_heard_and_so_is_the_same_in_every_batch():
    policy = AuraFlow(build())
    together, alone = policy.encode(PROMPTS), policy.encode(PROMPTS[:1])
    rows = together.positive["encoder_hidden_states"]
    assert rows.shape == (2, 256, 16)
    assert torch.equal(rows[:1], alone.positive["encoder_hidden_states"])
    assert float(rows[0, -1].abs().max()) == 0
    x, at = torch.randn(1, *policy.shape((16, 16)), generator=torch.Generator().manual_seed(0)), policy.levels(3)[1]
    cut = type(alone)({"encoder_hidden_states": rows[:1, :64]})
    assert float((policy.predict(x, at, alone) - policy.predict(x, at, cut)).abs().max()) > 1e-3


def test_a_size_beyond_the_learned_places_is_refused():
    policy = AuraFlow(build())
    assert policy.shape((32, 16)) == (4, 16, 8)
    with pytest.raises(ValueError, match=r"paints up to 32 × 32 pixels; got \(16, 36\)"):
        policy.shape((16, 36))


def test_an_autoencoder_that_overflows_in_half_precision_is_kept_in_float32():
    """As the pipeline does when it decodes: its network was trained with the autoencoder of Stable Diffusion XL."""
    pipe = build().to(torch.float16)
    assert pipe.vae.config.force_upcast
    policy = AuraFlow(pipe)
    assert (policy.dtype, policy.vae.dtype) == (torch.float16, torch.float32)
    exact = AuraFlow(build())
    x0 = torch.randn(1, *policy.shape((16, 16)), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.decode(x0.half()), exact.decode(x0), rtol=0, atol=5e-3)
