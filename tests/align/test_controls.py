"""Laws of control pictures: files are fitted to the run, by its own prompt, and what cannot be shown is told at once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from align import load_policy, steer
from align.controls import check_controls, shown
from align.media import Media, fitted, load_rgb
from align.prompts import read_prompts
from align.sampling import Sampling
from rewards import Prompt
from samplers import BestOfN
from samplers.families.sd import StableDiffusion
from tests.conftest import Faint
from tests.samplers.families.tiny.sdxl import build_controlled_sd


@pytest.fixture(scope="module")
def policy():
    return StableDiffusion(build_controlled_sd())


@pytest.fixture
def files(tmp_path):
    """A wide picture with transparency and a high one, in a folder of prompts that names them."""
    generator = torch.Generator().manual_seed(0)
    to_pil_image(torch.rand(4, 50, 90, generator=generator)).save(tmp_path / "wide.png")
    to_pil_image(torch.rand(3, 70, 40, generator=generator)).save(tmp_path / "high.png")
    rows = [{"prompt": "a cat", "control": "wide.png"}, {"prompt": "two dogs", "control": str(tmp_path / "high.png")}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_files_of_any_size_lie_beside_their_prompts_and_are_fitted(policy, files):
    prompts = read_prompts([str(files / "prompts.jsonl")])
    pictures = [fitted(load_rgb(Media(name, files / name)), policy.size) for name in ("wide.png", "high.png")]
    by_tensor = [replace(p, meta={"control": c}) for p, c in zip(prompts, pictures, strict=True)]
    how = {"steps": 2, "particles": 2, "plain": False, "gold": None}
    one, two = (steer(policy, given, BestOfN(Faint()), **how) for given in (prompts, by_tensor))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(one.samples, two.samples, strict=True))
    assert len(one.samples) == 4 and one.stopped is None
    sampling = Sampling.of(policy, steps=2)  # of training
    ours, theirs = (sampling.cond(policy, given).positive["control"] for given in (prompts, by_tensor))
    assert torch.equal(ours, theirs)


def test_pictures_are_refused_before_the_first_of_them_is_used(policy, files):
    first = Prompt("a cat", meta={"control": str(files / "wide.png")})
    for control, message in (
        (None, "needs a picture with every prompt"),
        (str(files / "nowhere.png"), "no file"),
        (torch.zeros(3, 24, 24), r"must have the size of the run.*got \(24, 24\)"),
    ):
        second = Prompt("two dogs", meta={} if control is None else {"control": control})
        with pytest.raises(ValueError, match=message):
            steer(policy, [first, second], BestOfN(Faint()), steps=1, particles=1, batch=1, gold=None)


def test_models_without_a_controlnet_are_shown_nothing(tiny_folder, files):
    prompts = [Prompt("a cat", meta={"control": str(files / "nowhere.png")})]
    tiny_policy = load_policy(tiny_folder, device="cpu")
    check_controls(tiny_policy, prompts, tiny_policy.size)
    assert shown(tiny_policy, prompts, tiny_policy.size) == prompts
