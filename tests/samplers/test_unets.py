"""Laws of ControlNets beside a UNet: samples equal the pipelines', and the picture is heard."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torchvision.transforms.functional import to_pil_image

from align import load_policy, steer
from align.cli import main
from align.description import build_policy, describe_policy
from align.memory import Memory
from rewards import Prompt
from samplers import ODE, BestOfN, SeededNoise, rollout
from samplers.families.sd import StableDiffusion
from samplers.families.sdxl import StableDiffusionXL
from samplers.unets import control_images
from tests.conftest import Faint, saved_bytes
from tests.samplers.families.compare import agree
from tests.samplers.families.tiny.sdxl import build, build_controlled_sd

PIPELINES = {
    "SD": (build_controlled_sd, StableDiffusion),
    "SDXL": (lambda: build(controlled=True), StableDiffusionXL),
}


def shown(size, many=2, seed=0):
    """Prompts of different length with a picture each."""
    pictures = torch.rand(many, 3, *size, generator=torch.Generator().manual_seed(seed)).mul(255).round() / 255
    texts = [("a cat", "a blurry thing"), ("two dogs and one red bird", "")]
    return [Prompt(*texts[i % 2], meta={"control": picture}) for i, picture in enumerate(pictures)]


@pytest.fixture(params=PIPELINES)
def built(request):
    make, family = PIPELINES[request.param]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    return pipe, family(pipe)


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_rollouts_equal_the_pipelines(built, guidance, scale, tmp_path):
    pipe, policy = built
    if guidance > 1:
        pipe.save_pretrained(tmp_path)
        policy = load_policy(tmp_path, device="cpu")
    policy.conditioning_scale = scale
    size = (policy.size[0] + 16, policy.size[1])
    prompts, noise = shown(size), SeededNoise([0, 1], policy.shape(size))
    ours = rollout(policy, ODE(), policy.encode(prompts).with_guidance(guidance), policy.levels(2), noise).x0
    asked, seen = policy.published(prompts, guidance, 2, size, noise(0)), []
    watch = lambda pipe, i, t, state: seen.append(state["latents"]) or state  # noqa: E731
    images = pipe(**asked, output_type="pt", callback_on_step_end=watch).images
    agree(ours, seen[-1])
    torch.testing.assert_close(policy.decode(ours), images, rtol=0, atol=1e-4)


def output(policy, prompts, scale=1.0):
    policy.conditioning_scale = scale
    x = torch.randn(policy.shape(policy.size), generator=torch.Generator().manual_seed(0)).expand(
        len(prompts), -1, -1, -1
    )
    return policy.output(x, policy.levels(3)[1], policy.encode(prompts).with_guidance(3.0))


def test_the_picture_is_heard_and_by_its_own_row_alone(built):
    policy = built[1]
    prompts = shown(policy.size)
    together = output(policy, prompts)
    alone = torch.cat([output(policy, [prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    other = output(policy, [prompts[0], replace(prompts[1], meta=prompts[0].meta)])
    torch.testing.assert_close(other[0], together[0], rtol=1e-4, atol=1e-5)
    assert float((other[1] - together[1]).abs().max()) > 1e-3
    assert policy.encode(prompts).repeat(3)[[4]].positive["control"].equal(prompts[1].meta["control"][None])


def test_at_scale_zero_it_is_the_model_without(built):
    pipe, policy = built
    without = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    kind = StableDiffusionXLPipeline if isinstance(policy, StableDiffusionXL) else StableDiffusionPipeline
    plain = type(policy)(kind(**without))
    prompts = shown(policy.size)
    torch.testing.assert_close(output(policy, prompts, 0.0), output(plain, prompts), rtol=1e-5, atol=1e-6)
    assert not plain.controlled and "control" not in plain.encode(prompts).positive


def test_gradients_pass_through_the_controlnet(built):
    """The slope along a direction is that of finite differences."""
    policy = built[1].double()
    cond, at = policy.encode(shown(policy.size, 1)), policy.levels(3)[1]
    x, way = torch.randn(2, 1, *policy.shape(policy.size), generator=torch.Generator().manual_seed(0)).double()
    value = lambda x: policy.denoise(x, at, cond).x0.square().mean()  # noqa: E731
    (slope,) = torch.autograd.grad(value(x.requires_grad_()), x)
    with torch.no_grad():
        expected = (value(x + 1e-5 * way) - value(x - 1e-5 * way)) / 2e-5
    torch.testing.assert_close((slope * way).sum(), expected, rtol=1e-5, atol=0)


def test_both_networks_recompute_their_blocks(built):
    policy, slopes, held = built[1], [], []
    x = torch.randn(1, *policy.shape(policy.size), generator=torch.Generator().manual_seed(0)).requires_grad_()
    cond, at = policy.encode(shown(policy.size, 1)), policy.levels(3)[1]
    for checkpointing in ("none", "block"):
        Memory(checkpointing=checkpointing).apply(policy)
        assert policy.controlnet.is_gradient_checkpointing == (checkpointing == "block")
        with saved_bytes() as kept:
            value = policy.denoise(x, at, cond).x0.square().mean()
        held.append(sum(kept))
        slopes += torch.autograd.grad(value, x)
    torch.testing.assert_close(slopes[0], slopes[1])
    assert held[1] < 0.6 * held[0]


def test_a_controlnet_by_itself_joins_a_plain_model(built, tmp_path):
    pipe, policy = built
    pipe.save_pretrained(tmp_path / "whole")
    pipe.controlnet.save_pretrained(tmp_path / "net")
    index = tmp_path / "whole" / "model_index.json"
    config = json.loads(index.read_text())
    config["_class_name"] = config["_class_name"].replace("ControlNet", "")
    del config["controlnet"]
    index.write_text(json.dumps(config))
    joined = load_policy(tmp_path / "whole", controlnet=tmp_path / "net", device="cpu")
    prompts = shown(policy.size)
    torch.testing.assert_close(output(joined, prompts), output(policy, prompts))
    again = build_policy(describe_policy(joined))
    torch.testing.assert_close(output(again, prompts), output(policy, prompts))
    assert not load_policy(tmp_path / "whole", device="cpu").controlled


def test_steering_by_files_of_pictures(built, tmp_path):
    pipe, policy = built
    pipe.save_pretrained(tmp_path / "model")
    prompts = shown(policy.size)
    files = []
    for i, prompt in enumerate(prompts):
        files.append(tmp_path / f"{i}.png")
        to_pil_image(prompt.meta["control"]).save(files[-1])
    how = {"steps": 2, "particles": 2, "plain": False, "gold": None}
    named = [replace(p, meta={"control": str(f)}) for p, f in zip(prompts, files, strict=True)]
    one, two = (steer(policy, given, BestOfN(Faint()), **how) for given in (prompts, named))
    for sample, other in zip(one.samples, two.samples, strict=True):
        torch.testing.assert_close(sample.pixels, other.pixels)
    assert not torch.equal(one.samples[0].pixels, one.samples[2].pixels)
    given = ["a cat", "--model", str(tmp_path / "model"), "--control", str(files[0]), "--control_scale", "0.5"]
    given += ["--reward", "tests.conftest.Faint", "--steering", "BestOfN", "--steps", "1", "--particles", "1"]
    assert main(["steer", *given, "--device", "cpu", "--plain", "false", "--out", str(tmp_path / "out")]) == 0


# Refusals


@pytest.mark.parametrize("control", [None, torch.zeros(1, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8), 7], ids=str)
def test_pictures_that_are_none(control):
    with pytest.raises(ValueError, match="a ControlNet needs a picture with every prompt"):
        control_images([Prompt("a cat", meta={} if control is None else {"control": control})])


def test_pictures_of_the_wrong_size_or_nowhere(built):
    policy = built[1]
    with pytest.raises(ValueError, match=r"no control image nowhere\.png"):
        policy.encode([Prompt("a cat", meta={"control": "nowhere.png"})])
    with pytest.raises(ValueError, match="must have one size"):
        policy.encode([*shown(policy.size, 1), *shown((24, 24), 1)])
    height = policy.size[0]
    with pytest.raises(ValueError, match=rf"the size of the run.*= \({height}, {height}\); got \(24, 24\)"):
        output(policy, shown((24, 24)))


def test_controlnets_of_other_kinds(built):
    pipe, policy = built
    pipe.controlnet.register_to_config(global_pool_conditions=True)
    with pytest.raises(ValueError, match="pools its picture"):
        type(policy)(pipe)
    pipe.controlnet.register_to_config(global_pool_conditions=False)
    pipe.register_modules(controlnet=MultiControlNetModel([pipe.controlnet]))
    assert isinstance(pipe.controlnet.nets[0], ControlNetModel)
    with pytest.raises(ValueError, match=r"expected one ControlNetModel.*got a MultiControlNetModel"):
        type(policy)(pipe)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cross_attention_dim": 99}, r"another model: its cross_attention_dim is 99, the model's \d+"),
        ({"conditioning_embedding_out_channels": (8,)}, r"its pixels a latent is 1, the model's [248]"),
    ],
    ids=["network", "picture"],
)
def test_controlnets_of_other_models(built, changed, message):
    pipe, policy = built
    pipe.controlnet.register_to_config(**changed)
    with pytest.raises(ValueError, match=message):
        type(policy)(pipe)


def test_what_is_no_controlnet_is_named(tiny_folder):
    with pytest.raises(ValueError, match=r"unet holds a UNet2DConditionModel: expected a ControlNetModel"):
        load_policy(tiny_folder, controlnet=tiny_folder / "unet", device="cpu")
    with pytest.raises(FileNotFoundError, match="nowhere could not be loaded"):
        load_policy(tiny_folder, controlnet="/nowhere", device="cpu")
    with pytest.raises(ValueError, match=r"beside Stable Diffusion or .*tiny-flow is a StableDiffusion3Pipeline"):
        load_policy("tiny-flow", controlnet=tiny_folder / "unet", device="cpu")


def test_a_controlnet_has_its_shape_without_its_weights(built, tmp_path):
    pipe = built[0]
    pipe.save_pretrained(tmp_path)
    for file in (tmp_path / "controlnet").glob("*.safetensors"):
        file.unlink()
    plain = {"_class_name": type(pipe).__name__.replace("ControlNet", "")}
    config = {k: v for k, v in json.loads((tmp_path / "model_index.json").read_text()).items() if k != "controlnet"}
    (tmp_path / "model_index.json").write_text(json.dumps(config | plain))
    hollow = load_policy(tmp_path, controlnet=tmp_path / "controlnet", device="meta")
    assert {p.shape for p in hollow.controlnet.parameters()} == {p.shape for p in pipe.controlnet.parameters()}
    assert all(p.is_meta for p in hollow.controlnet.parameters())


def test_a_picture_without_a_controlnet_is_refused(tmp_path, capsys):
    given = ["a red ring", "--control", "edges.png", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(["steer", *given]) != 0
    assert "need a ControlNet" in capsys.readouterr().err
