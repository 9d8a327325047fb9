"""Laws of the Z-Image family: our rollouts equal its pipeline's own samples, and its ways are kept."""

from __future__ import annotations

import pytest
import torch

from align.loading import load_policy
from samplers import ODE, SeededNoise, rollout
from samplers.families.z_image import ZImage
from tests.samplers.families.compare import PROMPTS, agree, compare
from tests.samplers.families.tiny.z_image import VARIANTS, pipeline


@pytest.fixture(scope="module")
def pipe():
    made = pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("size", [(16, 16), (24, 16)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rollouts_equal_the_pipeline(variant, size, guidance):
    """The second size is 24 tokens, which the network fills up to 32."""
    made = VARIANTS[variant]()
    compare(made, ZImage(made), guidance, size)


@pytest.mark.parametrize(("name", "guidance", "steps"), [("Z-Image-Turbo", 1.0, 8), ("Z-Image", 6.0, 50)])
def test_a_student_is_known_by_its_name(pipe, tmp_path, name, guidance, steps):
    pipe.save_pretrained(tmp_path / name)
    policy = load_policy(tmp_path / name, device="cpu")
    assert (type(policy), policy.guidance, policy.steps) == (ZImage, guidance, steps)
    assert policy.few_step == load_policy(tmp_path / name, device="meta").few_step == (steps == 8)
    compare(pipe, policy, guidance, (16, 16))


def test_the_defaults_are_the_pipelines_own(pipe):
    """Its scale 5 is our 6, and a seed is the image of that seed."""
    policy, prompts = ZImage(pipe), [p.text for p in PROMPTS]
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    theirs = pipe(
        list(prompts), generator=generators, num_inference_steps=3, height=16, width=24, output_type="latent"
    ).images
    noise = SeededNoise([3, 4], policy.shape((16, 24)))
    agree(rollout(policy, ODE(), policy.encode(prompts), policy.levels(3, (16, 24)), noise).x0, theirs)


@pytest.mark.parametrize(("ours", "theirs"), [(0.0, 0.0), (1.0, 0.0), (1.5, 0.5), (6.0, 5.0)])
def test_guidance_is_counted_from_one(pipe, ours, theirs):
    policy = ZImage(pipe)
    asked = policy.published(PROMPTS, ours, 3, (16, 16), torch.zeros(2, *policy.shape((16, 16))))
    assert asked["guidance_scale"] == theirs
    assert policy.encode(PROMPTS).with_guidance(ours).guided == (theirs > 0)


def test_the_velocity_points_to_noise(pipe):
    """The network's own time is 0 at noise, and its output the other way round."""
    policy, x = ZImage(pipe), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    at, cond = policy.levels(4, (16, 16))[1], policy.encode(["a cat"])
    text = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)[0]
    own = pipe.transformer([x[0, :, None]], 1 - at.sigma.float()[None], text).sample[0][:, 0]
    torch.testing.assert_close(policy.predict(x, at, cond)[0], -own, rtol=0, atol=1e-3)


def test_every_row_is_as_long_as_its_text(pipe):
    policy = ZImage(pipe)
    cond = policy.encode(PROMPTS)
    real = cond.positive["real"]
    assert not bool(real[0].all()) and bool(real[1].all())
    x, at = (
        torch.randn(2, *policy.shape((16, 16)), generator=torch.Generator().manual_seed(0)),
        policy.levels(4, (16, 16))[1],
    )
    before = policy.predict(x, at, cond)
    cond.positive["tokens"][0, ~real[0]] = 5.0
    assert torch.equal(policy.predict(x, at, cond), before)
