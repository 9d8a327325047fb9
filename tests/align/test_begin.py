"""Laws of runs that begin from a picture: diffusers' image-to-image samples at the same noise, and steering from there."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import diffusers
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import align
from align.begin import beginning, left_out
from align.cli import main
from rewards import Prompt
from samplers import (
    DDIM,
    DNO,
    ODE,
    PCN,
    Auto,
    BestOfN,
    Cond,
    FeynmanKac,
    FlowSDE,
    NoiseBank,
    PathSearch,
    RandomSearch,
    RolloverBudget,
    SeededNoise,
    ShiftedNoise,
    TreeSampling,
    diffuse,
    rollout,
    run,
)
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from samplers.families.sd3 import StableDiffusion3
from samplers.families.sdxl import StableDiffusionXL
from samplers.outer import Problem
from tests.conftest import Faint, Linear, build_pipeline, z_score
from tests.oracles import ddim_coefficients, gaussian_chain, gaussian_continuation
from tests.samplers.families.tiny.sd3 import build as build_sd3
from tests.samplers.families.tiny.sdxl import build as build_xl

PROMPTS = [Prompt("a cat", negative="a blurry thing"), Prompt("two dogs", negative="bad")]
BETAS = {"beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS = {
    "DDIM": lambda: diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
}
CASES = [(kind, name, strength) for kind in ("SD", "SDXL") for name in SCHEDULERS for strength in (0.3, 0.65, 1.0)]
CASES += [("SD3", "", strength) for strength in (0.25, 1.0)]


def pipelines(kind, scheduler, folder):
    """A policy, and the image-to-image pipeline of the same parts."""
    if kind == "SD3":
        pipe = build_sd3()
        return StableDiffusion3(pipe), diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components)
    pipe = build_xl() if kind == "SDXL" else build_pipeline(folder)
    pipe.scheduler = SCHEDULERS[scheduler]()
    if kind == "SDXL":
        return StableDiffusionXL(pipe), diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components)
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    return StableDiffusion(pipe), other


@pytest.mark.parametrize(("kind", "scheduler", "strength"), CASES)
def test_a_run_from_a_picture_is_that_of_the_image_to_image_pipeline(kind, scheduler, strength, tmp_path, monkeypatch):
    policy, pipe = pipelines(kind, scheduler, tmp_path)
    media = torch.rand(3, *policy.size, generator=torch.Generator().manual_seed(0))
    noise, levels = SeededNoise([3, 4], policy.shape(policy.size)), policy.levels(8, policy.size)
    begin = beginning(policy, media, policy.size).repeat(2, 1, 1, 1)
    cond = replace(policy.encode(PROMPTS).with_guidance(5.0), begin=begin)
    ours = rollout(policy, ODE(), cond, levels[left_out(8, strength) :], noise).x0
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(sys.modules[type(pipe).__module__], "randn_tensor", lambda *args, **kwargs: noise(0))
    theirs = pipe(
        [p.text for p in PROMPTS],
        negative_prompt=[p.negative for p in PROMPTS],
        image=begin,  # latents, where its own are drawn
        strength=strength,
        num_inference_steps=8,
        guidance_scale=5.0,
        output_type="latent",
        **({"height": policy.size[0], "width": policy.size[1]} if kind == "SD3" else {}),
    ).images
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.fixture(scope="module")
def tiny():
    return align.load_policy(device="cpu")


# Exact laws: Gaussian data, so that the law of a run from any latent is known

POLICY, STEPS, SKIPPED = GaussianPolicy([0.5], [0.8]), 8, 3
LEVELS = POLICY.levels(STEPS)[SKIPPED:]
BEGIN = torch.tensor([[-2.0], [1.5]], dtype=torch.float64)


def from_latents(z):
    """(mean, variance) of samples that begin from clean latents z."""
    chain = gaussian_chain(LEVELS.alpha, LEVELS.sigma, 0.5, 0.8, ddim_coefficients(LEVELS.alpha, LEVELS.sigma, 1.0))
    slope, offset, var = (float(v[0]) for v in gaussian_continuation(chain))
    return slope * float(LEVELS.alpha[0]) * z + offset, (slope * float(LEVELS.sigma[0])) ** 2 + var


def given(particles, seed=0):
    """Two prompts that begin from latents of their own."""
    cond = replace(POLICY.encode(["a", "b"]), begin=BEGIN)
    return cond, SeededNoise(range(seed, seed + 2 * particles), (1,), dtype=torch.float64)


def test_samples_have_the_law_of_what_they_begin_from():
    cond, noise = given(4000)
    run = rollout(POLICY, DDIM(1.0), cond, LEVELS, noise, particles=4000)
    for rows, z in zip(run.x0.reshape(2, -1), BEGIN.flatten().tolist(), strict=True):
        mean, var = from_latents(z)
        assert abs(z_score(rows, mean)) < 4
        assert abs(z_score((rows - mean) ** 2, var)) < 4


def test_weights_and_evidence_are_those_of_what_they_begin_from():
    """Each prompt's particles are resampled among themselves, and log Z = λ·m + λ²·v/2."""
    cond, noise = given(4000, seed=7)
    steering = FeynmanKac(Linear(1.0), beta=1.0)
    run = rollout(POLICY, DDIM(1.0), cond, LEVELS, noise, particles=4000, steering=steering)
    for p, z in enumerate(BEGIN.flatten().tolist()):
        mean, var = from_latents(z)
        assert float(run.log_z[p]) == pytest.approx(mean + var / 2, abs=0.05)
    assert torch.equal(run.cond.begin, BEGIN.repeat_interleave(4000, 0))


def test_rows_of_conditions_keep_what_they_begin_from():
    cond = replace(POLICY.encode(["a", "b"]), begin=BEGIN)
    assert cond[[1]].begin.tolist() == [[1.5]]
    assert cond.repeat(2).begin.flatten().tolist() == [-2.0, -2.0, 1.5, 1.5]
    assert Cond.joined([cond[[1]], cond[[0]]]).begin.flatten().tolist() == [1.5, -2.0]
    assert cond.with_guidance(2.0).begin is cond.begin
    with pytest.raises(ValueError, match="one row a sample"):
        replace(cond, begin=BEGIN[:1])


def test_a_run_in_two_parts_begins_once():
    cond, noise = given(3)
    problem = Problem(POLICY, DDIM(1.0), cond, LEVELS, noise, particles=3)
    bank = problem.bank()
    middle = problem.sample(bank, stop=2).x0
    whole = problem.sample(bank).x0
    torch.testing.assert_close(problem.sample([middle, *bank[3:]], start=2).x0, whole)
    start = diffuse(BEGIN.repeat_interleave(3, 0), bank[0], LEVELS[0])
    alone = rollout(POLICY, DDIM(1.0), replace(problem.cond, begin=None), LEVELS, NoiseBank([start, *bank[1:]]))
    torch.testing.assert_close(whole, alone.x0)


@pytest.mark.parametrize(
    "search", [RandomSearch(Linear(), rounds=3), PCN(Linear(), rounds=3), DNO(Linear(), rounds=3)], ids=str
)
def test_a_search_finds_noise_that_makes_its_samples_from_there(search):
    cond, noise = given(2)
    found = run(Problem(POLICY, DDIM(1.0), cond, LEVELS, noise, particles=2), search)
    again = rollout(POLICY, DDIM(1.0), found.cond, LEVELS, NoiseBank(found.noise))
    torch.testing.assert_close(again.x0, found.x0)
    plain = rollout(POLICY, DDIM(1.0), cond, LEVELS, noise, particles=2)
    torch.testing.assert_close(found.history["reward"][0].flatten(), plain.x0.flatten())


def test_a_tree_grows_from_there():
    """Untilted, its draws have the law of plain samples."""
    many = 150
    cond = replace(POLICY.encode(["a"] * many), begin=BEGIN[:1].expand(many, 1))
    noise = SeededNoise(range(many), (1,), dtype=torch.float64)
    tree = TreeSampling(Linear(), beta=float("inf"), rounds=6, width=0.6)
    found = run(Problem(POLICY, DDIM(1.0), cond, LEVELS, noise), tree)
    mean, var = from_latents(-2.0)
    assert abs(z_score(found.x0.flatten(), mean)) < 4
    assert abs(z_score((found.x0.flatten() - mean) ** 2, var)) < 4


@pytest.mark.parametrize(
    "steering",
    [
        PathSearch(Faint()),
        RolloverBudget(Faint(), initial=2),
        ShiftedNoise(Faint()),
        Auto(Faint(), rivals=[PathSearch(Faint())]),
    ],
    ids=lambda s: type(s).__name__,
)
def test_methods_that_take_noise_for_a_state_are_refused(tiny, steering):
    image = torch.zeros(3, *tiny.size)
    with pytest.raises(ValueError, match="cannot begin from given latents"):
        align.steer(tiny, "a red ring", steering, image=image, steps=4)


# Steering


def test_steering_from_a_picture(tiny, tmp_path):
    media = torch.rand(3, *tiny.size, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    to_pil_image(media).save(tmp_path / "image.png")
    how = {"steps": 8, "strength": 0.5, "particles": 2, "gold": None, "seed": 3}
    result = align.steer(tiny, ["a red ring", "a star"], BestOfN(Faint()), image=tmp_path / "image.png", **how)
    assert result.config["image"] == str(tmp_path / "image.png") and result.config["strength"] == 0.5
    assert result.config["steps"] == 4
    assert result.ledger["network_evaluations"] == 2 * 2 * 2 * 4 * 2  # arms, prompts, particles, steps, guidance
    cond = replace(tiny.encode(["a star"]), begin=tiny.encode_media(media[None]))
    noise = SeededNoise([align.steering.row_seed(3, 1, k) for k in range(2)], tiny.shape(tiny.size))
    ours = tiny.decode(rollout(tiny, tiny.kernel, cond, tiny.levels(8)[4:], noise, particles=2).x0)
    plain = torch.stack([s.pixels for s in result.samples if s.arm == "plain" and s.group == 1])
    torch.testing.assert_close(plain, ours, rtol=0, atol=1e-4)
    tensor = align.steer(tiny, ["a red ring", "a star"], BestOfN(Faint()), image=media, **how)
    assert torch.equal(tensor.samples[0].pixels, result.samples[0].pixels)
    assert tensor.config["image"] is None


def test_the_less_is_walked_the_nearer_samples_stay(tiny):
    """And next to nothing gives the picture back, as the autoencoder sees it."""
    x0 = rollout(tiny, ODE(), tiny.encode(["a red ring"]), tiny.levels(10), SeededNoise([5], tiny.shape(tiny.size))).x0
    media = tiny.decode(x0)[0]
    seen = tiny.decode(beginning(tiny, media, tiny.size))[0]
    gaps = []
    for strength in (0.01, 0.2, 0.5, 1.0):
        how = {"image": media, "strength": strength, "steps": 100 if strength < 0.1 else 10, "kernel": ODE()}
        run = align.steer(tiny, "a red ring", BestOfN(Faint()), particles=2, gold=None, plain=False, **how)
        gaps.append(float(torch.stack([s.pixels - seen for s in run.samples]).square().mean().sqrt()))
    assert gaps == sorted(gaps) and gaps[0] < 0.05 < gaps[-1]


def test_a_kernel_noisy_at_some_steps_keeps_them(tiny):
    kernel = FlowSDE(noisy_steps=[False] * 5 + [True] * 3)
    asked, _ = align.steering.prepared(
        tiny, "a red ring", BestOfN(Faint()), kernel=kernel, steps=8, image=torch.zeros(3, *tiny.size), strength=0.5
    )
    assert asked.kernel.noisy_steps == (False, True, True, True)


def test_the_command_begins_from_a_picture(tmp_path):
    to_pil_image(torch.rand(3, 40, 90, generator=torch.Generator().manual_seed(0))).save(tmp_path / "wide.png")
    given = [
        "a red ring",
        "--image",
        str(tmp_path / "wide.png"),
        "--strength",
        "0.5",
        "--steps",
        "4",
        "--device",
        "cpu",
    ]
    given += ["--steering", "BestOfN", "--particles", "1", "--plain", "false", "--out", str(tmp_path / "out")]
    assert main(["steer", *given]) == 0
    config = json.loads((tmp_path / "out" / "result.json").read_text())["config"]
    assert config["strength"] == 0.5 and config["resolved"]["steps"] == 2


def test_a_strength_without_a_picture_is_refused(tmp_path, capsys):
    assert main(["steer", "a red ring", "--strength", "0.5", "--out", str(tmp_path / "out")]) == 2
    assert "pass --image" in capsys.readouterr().err


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, 0.1, float("nan")])
def test_strengths_that_leave_nothing(strength):
    with pytest.raises(ValueError, match="strength"):
        left_out(8, strength)


def test_pictures_that_are_none(tiny, tmp_path):
    height, width = tiny.size
    with pytest.raises(ValueError, match=rf"must be \(3, {height}, {width}\)"):
        beginning(tiny, torch.zeros(3, 8, 8), tiny.size)
    with pytest.raises(ValueError, match="no file"):
        align.steer(tiny, "a red ring", BestOfN(Faint()), image=tmp_path / "nowhere.png")
