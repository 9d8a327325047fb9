"""Checkpoints in one file, in the names of the first release of latent diffusion."""

import re
import shutil

import pytest
import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING as MAPPED
from safetensors.torch import save_file

from align import load_policy
from align.description import build_policy, describe_policy
from samplers import ODE, SeededNoise, rollout

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name):
    """A weight of a UNet of one resnet a down block, two an up block, in the old names."""
    if name in MAPPED["unet"]["layers"]:
        return "model.diffusion_model." + MAPPED["unet"]["layers"][name]
    where, block, kind, i, rest = re.fullmatch(r"(down|mid|up)_blocks?\.?(\d*)\.(\w+)\.(\d)\.(.*)", name).groups()
    column = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 if block == "0" else 2}[kind]
    if kind == "resnets":
        rest = re.sub(r"^\w+", lambda m: RESNET[m[0]], rest)
    if where == "mid":
        return f"model.diffusion_model.middle_block.{column + 2 * int(i)}.{rest}"
    if kind == "downsamplers":
        i, rest = 1, rest.replace("conv", "op")
    if kind == "upsamplers":
        i = 1
    row = 2 * int(block) + int(i) + (where == "down")
    return f"model.diffusion_model.{'input' if where == 'down' else 'output'}_blocks.{row}.{column}.{rest}"


def vae_name(name):
    """A weight of an autoencoder of two blocks."""
    if name in MAPPED["vae"]:
        return "first_stage_model." + MAPPED["vae"][name]
    name = name.replace("conv_shortcut", "nin_shortcut")
    for new, old in ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{new}", f"mid.attn_1.{old}")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{1 - int(m[1])}.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    return "first_stage_model." + re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", name
    )


@pytest.fixture
def one_file(tiny_folder, tmp_path):
    """A file with all weights of a model, and a folder with all the rest."""
    pipe = load_policy(tiny_folder, device="cpu").pipe
    weights = {unet_name(n): w for n, w in pipe.unet.state_dict().items()}
    weights |= {vae_name(n): w for n, w in pipe.vae.state_dict().items()}
    weights |= {f"cond_stage_model.transformer.text_model.{n}": w for n, w in pipe.text_encoder.state_dict().items()}
    save_file({name: w.contiguous() for name, w in weights.items()}, tmp_path / "one.safetensors")
    like = shutil.copytree(tiny_folder, tmp_path / "like", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "one.safetensors", like


def test_one_file_is_the_model_of_its_folder(one_file, tiny_folder):
    file, like = one_file
    policy, folder = load_policy(file, like=like, device="cpu"), load_policy(tiny_folder, device="cpu")
    noise = SeededNoise([3], policy.shape(policy.size))

    def image(of):
        return of.decode(rollout(of, ODE(), of.encode(["a cat"]).with_guidance(4.0), of.levels(3), noise).x0)

    assert torch.equal(image(policy), image(folder))
    assert load_policy(file, like=like, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert torch.equal(image(build_policy(describe_policy(policy))), image(folder))


def test_a_file_says_whose_configuration_it_needs(one_file):
    with pytest.raises(
        FileNotFoundError, match=r"takes the configuration of stable-diffusion-v1-5/\S+, which is no folder"
    ):
        load_policy(one_file[0])
    with pytest.raises(FileNotFoundError, match=r"holds no model_index\.json"):
        load_policy(one_file[0], like=one_file[1] / "unet")
    with pytest.raises(ValueError, match="read whole: quantize and device_map need a folder"):
        load_policy(one_file[0], like=one_file[1], quantize="int8")


def test_half_a_file(one_file):
    file, like = one_file
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(FileNotFoundError, match="could not be loaded, its files may be incomplete"):
        load_policy(file, like=like, device="cpu")
