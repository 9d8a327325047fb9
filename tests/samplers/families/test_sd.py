"""Laws of the Stable Diffusion family: our rollouts equal the pipelines' own samples, latents and pixels."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler
from torch import Tensor

from align.loading import EMBEDDED, load_policy
from rewards import Prompt
from samplers import DDIM, ODE, BestOfN, Consistency, NoiseBank, SeededNoise, always, rollout
from samplers.families.sd import StableDiffusion
from tests.conftest import Linear, build_pipeline

PROMPTS = [Prompt("a b", negative="blurry"), Prompt("hello cat and dog", negative="")]
SCHEDULERS = {
    "eps, leading, offset 1": lambda: DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "eps, leading, offset 0": lambda: DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
    "eps, leading, to one": lambda: DDIMScheduler(
        clip_sample=False, set_alpha_to_one=True, beta_schedule="scaled_linear"
    ),
    "v, trailing, zero SNR": lambda: DDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    ),
    "x0, trailing": lambda: DDIMScheduler(
        clip_sample=False, prediction_type="sample", timestep_spacing="trailing", set_alpha_to_one=False
    ),
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A fresh random pipeline, quiet, and its policy."""

    def make(scheduler=None, **kwargs):
        pipe = build_pipeline(tmp_path_factory.mktemp("sd"), **kwargs)
        pipe.set_progress_bar_config(disable=True)
        if scheduler is not None:
            pipe.scheduler = scheduler  # afterwards: the constructor rewrites configs it finds outdated
        return pipe, StableDiffusion(pipe)

    return make


@pytest.fixture
def share_noise(monkeypatch):
    """Lets diffusers' schedulers draw noise(1), noise(2), … where they would draw their own."""

    def share(noise):
        steps = iter(range(1, 100))
        for module in ("scheduling_ddim", "scheduling_lcm"):
            draw = lambda shape, **kwargs: noise(next(steps))  # noqa: E731
            monkeypatch.setattr(getattr(diffusers.schedulers, module), "randn_tensor", draw)

    return share


def pipeline_samples(pipe, noise, size, guidance, steps, negatives=True, **kwargs) -> tuple[Tensor, Tensor]:
    """(latents, images) of the pipeline's own __call__."""
    given = {
        "prompt": [p.text for p in PROMPTS],
        "height": size[0],
        "width": size[1],
        "guidance_scale": guidance,
        "num_inference_steps": steps,
        "latents": noise(0),
        **kwargs,
    }
    if negatives:
        given["negative_prompt"] = [p.negative for p in PROMPTS]
    latents = pipe(**given, output_type="latent").images
    with torch.no_grad():  # what output_type="pt" does with them
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return latents, pipe.image_processor.postprocess(images, output_type="pt")


def agree(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the scale of the latents: those of a random network grow to hundreds."""
    assert bool(theirs.isfinite().all())
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("size", [(16, 16), (24, 16)], ids=str)
def test_rollouts_equal_the_pipeline(build, share_noise, scheduler, eta, guidance, size):
    pipe, policy = build(SCHEDULERS[scheduler]())
    noise = SeededNoise([0, 1], policy.shape(size))
    share_noise(noise)
    latents, images = pipeline_samples(pipe, noise, size, guidance, 5, eta=eta)
    kernel = DDIM(eta) if eta else ODE()
    run = rollout(policy, kernel, policy.encode(PROMPTS).with_guidance(guidance), policy.levels(5), noise)
    agree(run.x0, latents)
    torch.testing.assert_close(policy.decode(run.x0), images, rtol=0, atol=1e-4)
    assert images.shape == (2, 3, *size)


@pytest.mark.parametrize("guidance", [1.0, 8.5])
@pytest.mark.parametrize("steps", [1, 4])
def test_latent_consistency_with_guidance_embedding_equals_its_pipeline(build, share_noise, guidance, steps):
    pipe, policy = build(LCMScheduler(), guidance_embedding=True, pipeline="LatentConsistencyModelPipeline")
    assert policy.prediction == "consistency"
    noise = SeededNoise([2, 3], policy.shape((16, 24)))
    share_noise(noise)
    latents, images = pipeline_samples(pipe, noise, (16, 24), guidance, steps, negatives=False)
    cond = policy.encode(PROMPTS).with_guidance(guidance)
    run = rollout(policy, Consistency(), cond, policy.levels(steps), noise)
    agree(run.x0, latents)
    torch.testing.assert_close(policy.decode(run.x0), images, rtol=0, atol=1e-4)
    assert run.ledger.counts["network"] == 2 * steps  # the scale is an input: no second branch


def test_the_guidance_embedding_is_heard(build):
    _, policy = build(LCMScheduler(), guidance_embedding=True, pipeline="LatentConsistencyModelPipeline")
    noise, cond = SeededNoise([2, 3], policy.shape((16, 16))), policy.encode(PROMPTS)
    runs = [rollout(policy, Consistency(), cond.with_guidance(g), policy.levels(1), noise).x0 for g in (1.0, 8.5)]
    assert float((runs[0] - runs[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_latent_consistency_without_guidance_embedding_equals_its_pipeline(build, share_noise, guidance):
    pipe, policy = build(LCMScheduler())
    noise = SeededNoise([4, 5], policy.shape((16, 16)))
    share_noise(noise)
    latents, images = pipeline_samples(pipe, noise, (16, 16), guidance, 4)
    cond = policy.encode(PROMPTS).with_guidance(guidance)
    run = rollout(policy, policy.kernel, cond, policy.levels(4), noise)
    agree(run.x0, latents)
    torch.testing.assert_close(policy.decode(run.x0), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_turbo_student_equals_its_pipeline(build, steps):
    """Euler steps from the scheduler's own start, σ_T·ε: without its little less noise they are kilter's."""
    pipe, policy = build(EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"))
    assert policy.few_step
    noise, levels = SeededNoise([6, 7], policy.shape((16, 16))), policy.levels(steps)
    latents, images = pipeline_samples(pipe, noise, (16, 16), 0.0, steps)
    start = NoiseBank([levels.sigma[0].float() * noise(0), *[torch.zeros_like(noise(0))] * steps])
    run = rollout(policy, ODE(), policy.encode(PROMPTS).with_guidance(0.0), levels, start)
    agree(run.x0, latents)
    torch.testing.assert_close(policy.decode(run.x0), images, rtol=0, atol=1e-4)


def test_a_seed_is_the_image_of_that_seed(build):
    pipe, policy = build()
    seeds = [11, 12]
    theirs = pipe(
        [p.text for p in PROMPTS],
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        num_inference_steps=4,
        guidance_scale=policy.guidance,
        output_type="pt",
    ).images
    noise, prompts = SeededNoise(seeds, policy.shape(policy.size)), [p.text for p in PROMPTS]
    ours = policy.decode(rollout(policy, ODE(), policy.encode(prompts), policy.levels(4), noise).x0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    one = pipe(
        PROMPTS[1].text, generator=torch.Generator().manual_seed(12), num_inference_steps=4, output_type="pt"
    ).images
    torch.testing.assert_close(ours[1:], one, rtol=0, atol=1e-4)


# Levels


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 7, 50])
def test_levels_are_the_schedulers_own(build, steps, spacing, offset, to_one):
    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one, clip_sample=False)
    _, policy = build(scheduler)
    levels = policy.levels(steps)
    scheduler.set_timesteps(steps)
    assert levels.t[:-1].tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(levels.alpha[:-1] ** 2, scheduler.alphas_cumprod[scheduler.timesteps].double())
    end = 1.0 if to_one else float(scheduler.alphas_cumprod[0])
    assert float(levels.alpha[-1] ** 2) == pytest.approx(end, abs=1e-12)
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(steps + 1, dtype=torch.float64))
    assert bool((levels.alpha.diff() >= 0).all())


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False, beta_schedule="scaled_linear"),
        EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        EulerDiscreteScheduler(
            timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
        ),
    ],
    ids=lambda s: type(s).__name__,
)
def test_multistep_and_sigma_schedulers_become_ddim(build, scheduler):
    ddim = DDIMScheduler.from_config(scheduler.config)
    policy, expected = build(scheduler)[1], build(ddim)[1]
    for name in ("t", "alpha", "sigma"):  # Euler keeps a trace of signal, ᾱ = 2⁻²⁴, at a level that should have none
        ours, theirs = getattr(policy.levels(10), name), getattr(expected.levels(10), name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if isinstance(scheduler, PNDMScheduler) else 2.5e-4)
    assert policy.prediction == {"epsilon": "eps", "v_prediction": "v"}[scheduler.config.prediction_type]
    ddim.set_timesteps(10)
    assert policy.levels(10).t[:-1].tolist() == ddim.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_levels_of_latent_consistency(build, steps):
    scheduler = LCMScheduler()
    _, policy = build(scheduler)
    scheduler.set_timesteps(steps)
    assert policy.levels(steps).t[:-1].tolist() == scheduler.timesteps.tolist()
    assert float(policy.levels(steps).sigma[-1]) == 0


def test_asking_for_levels_leaves_the_pipeline_alone(build):
    pipe, policy = build()
    pipe.scheduler.set_timesteps(7)
    before = pipe.scheduler.timesteps.clone()
    policy.levels(3)
    assert torch.equal(pipe.scheduler.timesteps, before)


# Parts


def chunked(policy, chunk):
    policy.decode_chunk = chunk
    return policy


def test_decode_chunk_does_not_change_pixels(build):
    pipe, policy = build()
    x0 = 3 * torch.randn(5, *policy.shape((16, 16)), generator=torch.Generator().manual_seed(0))
    whole = policy.decode(x0)
    for chunk in (1, 2, 5):
        torch.testing.assert_close(chunked(StableDiffusion(pipe), chunk).decode(x0), whole, rtol=0, atol=1e-6)
    assert 0 <= float(whole.min()) < float(whole.max()) <= 1


def test_each_distinct_text_is_encoded_once(build):
    _, policy = build()
    rows: list[int] = []
    policy.text_encoder.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    first = policy.encode(["cat", "dog", "cat", "cat"])
    assert sum(rows) == 3  # cat, dog and the empty negative
    again = policy.encode([Prompt("dog", negative="cat")])
    assert sum(rows) == 3
    assert torch.equal(again.positive["encoder_hidden_states"][0], first.positive["encoder_hidden_states"][1])
    assert torch.equal(again.negative["encoder_hidden_states"][0], first.positive["encoder_hidden_states"][3])


def test_an_encoding_does_not_depend_on_its_batch(build):
    texts = ["cat", "a much longer text", ""]
    together = build()[1].encode(texts).positive["encoder_hidden_states"]
    alone = [build()[1].encode([text]).positive["encoder_hidden_states"] for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_previews_are_cheap_and_the_result_is_not(build):
    pipe, full = build()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        small = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        )
    policy = StableDiffusion(pipe, preview_vae=small)
    x0 = torch.randn(3, *policy.shape((16, 24)), generator=torch.Generator().manual_seed(0))
    preview = policy.preview(x0)
    assert preview.shape == (3, 3, 16, 24)
    assert 0 <= float(preview.min()) < float(preview.max()) <= 1
    torch.testing.assert_close(preview, (small.decode(x0).sample / 2 + 0.5).clamp(0, 1))  # latents as they are
    assert torch.equal(policy.decode(x0), full.decode(x0))
    assert torch.equal(full.preview(x0), full.decode(x0))
    assert float((preview - policy.decode(x0)).abs().max()) > 1e-3
    noise = SeededNoise([0, 1], policy.shape((16, 16)))
    run = rollout(
        policy, DDIM(1.0), policy.encode(["cat"]), policy.levels(2), noise, particles=2, steering=BestOfN(Linear(1.0))
    )
    assert torch.equal(run.media, full.decode(run.x0))


def test_the_whole_policy_is_frozen(build):
    assert not any(p.requires_grad for p in build()[1].parameters())


def test_native_size_may_be_a_rectangle(build):
    pipe, policy = build()
    assert policy.size == (16, 16)
    pipe.unet.register_to_config(sample_size=[8, 12])
    assert StableDiffusion(pipe).size == (16, 24)
    assert policy.shape((16, 24)) == (4, 8, 12)


# Refusals


@pytest.mark.parametrize("size", [(17, 16), (16, 15), (0, 16), (16,), (1, 16, 16)], ids=str)
def test_impossible_sizes(build, size):
    with pytest.raises(ValueError, match=r"size must be \(height, width\) in multiples of 2"):
        build()[1].shape(size)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps(build, steps):
    with pytest.raises(ValueError, match="steps must lie in 1 … 1000"):
        build()[1].levels(steps)


def test_steps_that_the_offset_pushes_off_the_table(build):
    _, policy = build()
    assert policy.levels(999).steps == 999
    with pytest.raises(ValueError, match="take fewer steps"):
        policy.levels(1000)


def test_inpainting_networks(build):
    pipe, _ = build()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match="takes 9 channels, a latent has 4: inpainting"):
        StableDiffusion(pipe)


def test_unknown_predictions(build):
    with pytest.raises(ValueError, match=r"one of .*; got 'flow'"):
        build(DDIMScheduler(prediction_type="flow", clip_sample=False))
    with pytest.raises(ValueError, match=r"must predict epsilon .* got 'v_prediction'"):
        build(LCMScheduler(prediction_type="v_prediction"))


# Gradients


def test_gradient_of_the_latents_reaches_every_noise(build):
    """Central differences in float64 through two guided, noisy steps of the whole network."""
    _, policy = build()
    policy.double()
    cond, levels = policy.encode(["cat"]), policy.levels(2)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    weight = torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64)

    def value(bank, grad):
        return (weight * rollout(policy, DDIM(1.0), cond, levels, bank, grad=grad).x0).sum()

    bank = NoiseBank(tensors, [0, 1, 2])
    value(bank, always).backward()
    for i in range(3):
        direction, h = torch.randn(tensors[i].shape, generator=generator, dtype=torch.float64), 1e-5
        sides = []
        for sign in (1, -1):
            moved = [t + sign * h * direction if j == i else t for j, t in enumerate(tensors)]
            sides.append(float(value(NoiseBank(moved), lambda i, steps: False)))
        expected = (sides[0] - sides[1]) / (2 * h)
        assert abs(expected) > 1e-3
        assert float((bank.tensors[i].grad * direction).sum()) == pytest.approx(expected, rel=1e-6)


def test_gradient_of_the_pixels_reaches_the_latents(build):
    _, policy = build()
    policy.double()
    generator = torch.Generator().manual_seed(0)
    x0, direction = (torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64)
    leaf = x0.clone().requires_grad_()
    (weight * policy.decode(leaf)).sum().backward()
    sides = [float((weight * policy.decode(x0 + sign * 1e-6 * direction)).sum()) for sign in (1, -1)]
    assert float((leaf.grad * direction).sum()) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-6)


def test_the_embedded_student_equals_its_pipeline(share_noise):
    pipe = diffusers.DiffusionPipeline.from_pretrained(EMBEDDED.parent / "tiny-turbo", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    policy = load_policy("tiny-turbo", device="cpu")
    prompts, noise = ["a red circle left of a blue square", "three green stars"], SeededNoise([0, 1], (4, 8, 8))
    share_noise(noise)
    given = {"guidance_scale": 3.0, "num_inference_steps": 4, "latents": noise(0), "output_type": "latent"}
    theirs = pipe(prompts, **given).images
    ours = rollout(policy, policy.kernel, policy.encode(prompts), policy.levels(policy.steps), noise).x0
    agree(ours, theirs)
    torch.testing.assert_close(policy.decode(ours), policy.decode(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernel", [ODE(), DDIM(1.0), Consistency()], ids=repr)
def test_the_embedded_model_equals_its_pipeline(share_noise, kernel):
    """tiny-sd through the loop and through diffusers' own call: the same latents to 1e-5, the same pixels."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(EMBEDDED, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    lcm = isinstance(kernel, Consistency)
    if lcm:
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    policy = StableDiffusion(pipe)
    prompts, steps = ["a red circle left of a blue square", "three green stars"], 4 if lcm else 20
    noise = SeededNoise([0, 1], policy.shape(policy.size))
    share_noise(noise)
    given = {"guidance_scale": 3.0, "num_inference_steps": steps, "latents": noise(0), "output_type": "latent"}
    given |= {} if lcm else {"eta": float(kernel.eta) if isinstance(kernel, DDIM) else 0.0}
    theirs = pipe(prompts, **given).images
    ours = rollout(policy, kernel, policy.encode(prompts).with_guidance(3.0), policy.levels(steps), noise).x0
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(policy.decode(ours), policy.decode(theirs), rtol=0, atol=1e-4)
