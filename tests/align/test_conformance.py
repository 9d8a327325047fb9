"""The kit itself: each law catches the fault it is about, and a sound model passes and is left as it was."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from dataclasses import replace

import diffusers
import pytest
import torch

from align import load_policy
from align.cli import main
from align.conformance import LAWS, check, statement
from align.conformance.trial import plainly
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from tests.conftest import build_pipeline

SIZES = ((8, 8), (16, 8))
QUICK = ("levels", "samples", "guidance", "decode", "encode", "texts")


class WrongTime(StableDiffusion):
    def predict(self, x, at, cond):
        return super().predict(x, replace(at, t=at.t / 1000), cond)


class WrongSign(StableDiffusion):
    def predict(self, x, at, cond):
        return -super().predict(x, at, cond)


class WrongSpacing(StableDiffusion):
    def levels(self, steps, size=()):
        table = super().levels(steps, size)
        return replace(table, t=table.t + 20)


class WrongShift(StableDiffusion):
    """In both directions."""

    def scaled(self, z):
        return super().scaled(z - 0.3)

    def unscaled(self, x0, config):
        return super().unscaled(x0, config) + 0.3


class OneWay(StableDiffusion):
    def scaled(self, z):
        return z


class DeafToNegatives(StableDiffusion):
    def encode(self, prompts):
        return super().encode([replace(p, negative="") for p in prompts])


class GuidedTwice(StableDiffusion):
    def guided(self, negative, positive, scale):
        once = super().guided(negative, positive, scale)
        return super().guided(negative, once, scale)


class BatchMean(StableDiffusion):
    def predict(self, x, at, cond):
        output = super().predict(x, at, cond)
        return output - 0.01 * output.mean(0, keepdim=True)


class FirstTime(StableDiffusion):
    def predict(self, x, at, cond):
        return super().predict(x, replace(at, t=at.t.flatten()[0].expand(at.t.shape)), cond)


class ForgetfulOfTexts(StableDiffusion):
    def encode(self, prompts):
        self._embeddings.clear()
        return super().encode(prompts)


class Restless(StableDiffusion):
    """Noise too faint to be seen in samples."""

    def predict(self, x, at, cond):
        output = super().predict(x, at, cond)
        return output + 1e-6 * torch.randn(output.shape)


class Detached(StableDiffusion):
    def predict(self, x, at, cond):
        return super().predict(x.detach(), at, cond)


class CoarseInHalf(StableDiffusion):
    def predict(self, x, at, cond):
        return super().predict(x, at, cond) * (3 if self.dtype == torch.bfloat16 else 1)


class Hoarding(StableDiffusion):
    """Nothing is recomputed, whatever one asks for."""

    checkpointing = property(lambda self: "none", lambda self, value: None)


class Elsewhere(StableDiffusion):
    """Calls a network that is not the one adapters go on."""

    def __init__(self, pipe, preview_vae=None):
        super().__init__(pipe, preview_vae)
        self.network = copy.deepcopy(self.network)

    def predict(self, x, at, cond):
        mine, self.network = self.network, self.pipe.unet
        try:
            return super().predict(x, at, cond)
        finally:
            self.network = mine


class AlwaysAdapted(StableDiffusion):
    @contextmanager
    def acting_as(self, who):
        yield


class Unnamed(StableDiffusion):
    """Saves and loads adapters under another alpha."""

    def __init__(self, pipe, preview_vae=None):
        super().__init__(pipe, preview_vae)
        own = pipe.load_lora_weights

        def load(folder):
            own(folder)
            for module in pipe.unet.modules():
                for name in getattr(module, "scaling", {}):
                    module.scaling[name] /= 2

        pipe.load_lora_weights = load


class DecodesInPlace(StableDiffusion):
    def decode(self, x0, frames=None):
        image = super().decode(x0)
        if not torch.is_grad_enabled():
            x0.mul_(0.9)
        return image


FAULTS = {  # and all laws that each breaks
    WrongTime: {"samples"},
    WrongSign: {"samples"},
    WrongSpacing: {"levels", "samples"},
    WrongShift: {"decode"},
    OneWay: {"encode"},
    DeafToNegatives: {"guidance"},
    GuidedTwice: {"guidance", "half"},
    BatchMean: {"samples", "batches", "steering"},
    FirstTime: {"batches"},
    ForgetfulOfTexts: {"texts"},
    Detached: {"gradient", "recomputing"},
    CoarseInHalf: {"half"},
    Hoarding: {"recomputing"},
    AlwaysAdapted: {"adapter"},
    Unnamed: {"saved adapter"},
}
GRAVE = {Restless: "replay", Elsewhere: "adapter", DecodesInPlace: "steering"}  # break one law by breaking many


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """What the kit finds of a class."""

    def find(family, laws=()):
        def load(dtype):
            return family(build_pipeline(tmp_path_factory.mktemp("sd")).to(getattr(torch, dtype)))

        return {f.law: f for f in check(load("float32"), sizes=SIZES, reload=load, laws=laws)}

    return find


def broken(findings):
    return {law for law, f in findings.items() if f.holds is False}


def test_a_sound_model_breaks_no_law(findings):
    found = findings(StableDiffusion)
    assert set(found) == set(LAWS)
    assert all(f.holds and f.detail and not f.remedy for f in found.values())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_each_fault_is_caught_by_the_law_about_it(findings, fault):
    found = findings(fault, [law for law in LAWS if law in QUICK or law in FAULTS[fault]])
    assert broken(found) == FAULTS[fault], {law: f.detail for law, f in found.items()}
    for law in FAULTS[fault]:
        assert found[law].remedy == statement(law)[1] != ""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_each_fault_is_caught_by_no_other_law(findings, fault):
    assert broken(findings(fault)) == FAULTS[fault]


@pytest.mark.parametrize("fault", GRAVE, ids=lambda f: f.__name__)
def test_grave_faults_are_caught(findings, fault):
    assert broken(findings(fault, [GRAVE[fault]])) == {GRAVE[fault]}


def test_every_law_is_tried_by_a_fault():
    assert set().union(*FAULTS.values(), GRAVE.values()) == set(LAWS)


def test_what_follows_from_other_samples_is_not_held_against_a_model(findings):
    found = findings(WrongTime, ["guidance", "decode", "saved adapter"])
    assert all(f.holds is None and "samples differ already" in f.detail for f in found.values())


def test_the_kit_leaves_the_model_as_it_was(tiny_folder):
    policy = load_policy(tiny_folder, device="cpu")
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    scheduler, modules = policy.pipe.scheduler, [type(m) for m in policy.modules()]
    policy.checkpointing = "block"
    assert all(
        f.holds for f in check(policy, sizes=SIZES, laws=["gradient", "recomputing", "adapter", "saved adapter"])
    )
    after = policy.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert policy.pipe.scheduler is policy.scheduler is scheduler
    assert [type(m) for m in policy.modules()] == modules
    assert not policy.trainable and policy.checkpointing == "block"


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (
            diffusers.UniPCMultistepScheduler(),
            "UniPCMultistepScheduler compared as DDIMScheduler, timestep_spacing leading",
        ),
        (diffusers.DPMSolverMultistepScheduler(), "DPMSolverMultistepScheduler compared as solver_order 1"),
        (
            diffusers.FlowMatchHeunDiscreteScheduler(),
            "FlowMatchHeunDiscreteScheduler compared as FlowMatchEulerDiscreteScheduler",
        ),
        (diffusers.DDIMScheduler(clip_sample=True), "DDIMScheduler compared as clip_sample False"),
        (diffusers.DDIMScheduler(clip_sample=False), ""),
        (diffusers.LCMScheduler(), ""),
    ],
    ids=lambda s: type(s).__name__,
)
def test_what_replaces_a_scheduler_is_said(scheduler, told):
    made, said = plainly(scheduler)
    assert said == told
    assert (made is scheduler) == (not told)


class Blind(StableDiffusion):
    """Of an autoencoder that came without its encoder."""

    def encode_media(self, media):
        raise NotImplementedError("StableDiffusion cannot encode images")


def test_what_cannot_be_asked(findings):
    found = findings(Blind, ["encode"])["encode"]
    assert (found.holds, found.detail) == (None, "no encoder: StableDiffusion cannot encode images")
    with pytest.raises(ValueError, match="GaussianPolicy has no diffusers pipeline"):
        check(GaussianPolicy([[0.0, 0.0]]))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"laws": ["colour"]}, r"laws must be among levels, samples.*got colour"),
        ({"sizes": ((8, 9),)}, "multiples of 2"),
        ({"guidance": 1.0}, "guidance must be above 1"),
        ({"steps": 7}, "divisor of 1000"),
        ({"steps": 1}, "divisor of 1000"),
    ],
)
def test_impossible_trials_are_refused_before_the_first_law(tiny_folder, how, said):
    with pytest.raises(ValueError, match=said):
        check(load_policy(tiny_folder, device="cpu"), **how)


def test_the_command_prints_a_table_and_fails_with_the_model(tiny_folder, capsys, monkeypatch):
    asked = ["check-model", str(tiny_folder), "--device", "cpu", "--sizes", "[[8,8],[16,8]]"]
    asked += ["--laws", "[samples,guidance,decode]"]
    assert main(asked) == 0
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()] == [
        [law, "holds"] for law in ("samples", "guidance", "decode")
    ]
    assert "2/3 guidance: holds" in err and "3 laws hold, 0 are broken" in err
    monkeypatch.setattr(StableDiffusion, "guided", lambda self, negative, positive, scale: positive)
    assert main([*asked, "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["holds"] for row in rows] == [True, False, True]
    assert rows[1]["remedy"] == statement("guidance")[1]
    assert main(asked) == 1
    assert statement("guidance")[1] in capsys.readouterr().out
    assert main(["check-model", str(tiny_folder), "--laws", "[colour]"]) == 2
    assert "laws must be among levels" in capsys.readouterr().err
