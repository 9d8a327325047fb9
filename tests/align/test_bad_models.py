"""Models as people have them: parts absent, of another family, cut short, too small a number type. Each is named, or works."""

import json
import logging
import shutil
from importlib import import_module

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from align import load_policy
from samplers import ODE, SeededNoise, rollout
from tests.samplers.families.tiny.flux import build as build_flux
from tests.samplers.families.tiny.sd3 import build as build_sd3


def changed(folder, to, **index):
    """A copy of a model folder with other entries in its index."""
    folder = shutil.copytree(folder, to)
    known = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**known, **index}))
    return folder


def drawn(policy, text="cat"):
    noise = SeededNoise([0], policy.shape(policy.size))
    return rollout(policy, ODE(), policy.encode([text]), policy.levels(2, policy.size), noise).x0


# schedulers and families


def test_schedulers_of_another_family_are_refused_before_weights_are_read(tiny_folder, tmp_path, monkeypatch):
    build_sd3("3").save_pretrained(tmp_path / "sd3")
    monkeypatch.setattr("align.loading._pipeline", None)
    flow = changed(tmp_path / "sd3", tmp_path / "a", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(
        ValueError, match="StableDiffusion3Pipeline with a DDIMScheduler; such models walk the levels of FlowM"
    ):
        load_policy(flow)
    plain = changed(tiny_folder, tmp_path / "b", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    with pytest.raises(
        ValueError, match=r"StableDiffusionPipeline with a FlowMatchEulerDiscreteScheduler; such .* of DDIM"
    ):
        load_policy(plain)
    with pytest.raises(ValueError, match="student='lcm' is a schedule of diffusion models"):
        load_policy(tmp_path / "sd3", student="lcm")


def test_unknown_families_say_how_to_add_one(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r"supported: StableDiffusionPipeline, .*samplers/families/README.md"):
        load_policy(changed(tiny_folder, tmp_path / "a", _class_name="ShapEPipeline"))


# parts


@pytest.mark.parametrize("null", [True, False], ids=["null in the index", "no folder"])
@pytest.mark.parametrize("absent", ["3", "12"])
def test_stable_diffusion_3_loads_without_text_encoders(tmp_path, caplog, null, absent):
    """Saved without, or downloaded without: both are the model without them."""
    build_sd3(absent).save_pretrained(tmp_path / "without")
    folder = tmp_path / "without"
    if not null:
        folder = tmp_path / "whole"
        build_sd3().save_pretrained(folder)
        for i in absent:
            shutil.rmtree(folder / f"text_encoder{'' if i == '1' else f'_{i}'}")
            shutil.rmtree(folder / f"tokenizer{'' if i == '1' else f'_{i}'}")
    policy = load_policy(folder, device="cpu")
    assert ("going on without" in caplog.text) == (not null)
    assert torch.equal(drawn(policy), drawn(load_policy(tmp_path / "without", device="cpu")))


def test_a_text_encoder_the_family_needs_is_missed(tmp_path):
    build_flux().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "text_encoder_2")
    with pytest.raises(FileNotFoundError, match="missing: text_encoder_2/"):
        load_policy(tmp_path)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_files_that_lack_weights_are_named(tiny_folder, tmp_path, part):
    """Of a text encoder too, whose library would draw them at random."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    key = next(name for name in weights if name.endswith(("mlp.fc1.weight", "conv_in.weight")))
    del weights[key]
    save_file(weights, file, metadata={"format": "pt"})
    example = r"a \(32, 16\) " if part == "text_encoder" else key
    with pytest.raises(FileNotFoundError, match=rf"incomplete: {part}/ lacks 1 weights, such as {example}"):
        load_policy(folder, device="cpu")


def test_missing_shards_are_named(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.save_pretrained(folder, max_shard_size="100KB")
    assert torch.equal(drawn(load_policy(folder, device="cpu")), drawn(load_policy(tiny_folder, device="cpu")))
    lost = sorted((folder / "unet").glob("*-of-*"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"missing: unet/{lost.name}"):
        load_policy(folder)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("build", [build_flux, lambda: build_sd3("3")], ids=["flux", "sd3"])
def test_half_precision_variants_are_found_in_any_network_folder(tmp_path, build, variant):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    build().to(dtype).save_pretrained(tmp_path, variant=variant)
    assert load_policy(tmp_path, device="cpu").dtype == torch.float32
    with pytest.raises(FileNotFoundError, match=f"no variant 'ema'; its networks are in .*{variant}"):
        load_policy(tmp_path, device="cpu", variant="ema")


def test_a_folder_may_say_how_long_its_texts_are(tmp_path):
    build_flux().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"max_sequence_length": 9, "num_inference_steps": 3}')
    policy = load_policy(tmp_path, device="cpu")
    assert (policy.max_sequence_length, policy.steps) == (9, 3)
    (tmp_path / "generation_config.json").write_text("[9")
    with pytest.raises(FileNotFoundError, match="is not a JSON object"):
        load_policy(tmp_path, device="cpu")


# LoRAs


def adapter(layers):
    """A LoRA file of (name, in, out) layers."""
    weights = {}
    for name, width, out in layers:
        weights |= {f"{name}.lora_A.weight": torch.randn(2, width), f"{name}.lora_B.weight": torch.randn(out, 2)}
    return weights


MIDDLE = "unet.mid_block.attentions.0.transformer_blocks.0"
LORAS = {
    "FLUX.1": (
        [("transformer.single_transformer_blocks.0.attn.to_q", 16, 16)],
        r"fits 0 of its 1 layers .* one of FLUX\.1",
    ),
    "Stable Diffusion 3": ([("transformer.transformer_blocks.0.attn.add_q_proj", 16, 16)], "one of Stable Diffusion 3"),
    "Stable Diffusion XL": (
        [(f"{MIDDLE}.attn1.to_q", 32, 32), (f"{MIDDLE}.attn2.to_k", 2048, 32)],
        "fits 1 of its 2 layers .*width 2048 there.* one of Stable Diffusion XL",
    ),
    "half of one": (
        [(f"{MIDDLE}.attn1.to_q", 32, 32), (f"{MIDDLE}5.attn1.to_q", 32, 32)],
        "fits 1 of its 2 layers .* own base model",
    ),
}


@pytest.mark.parametrize("kind", LORAS)
def test_loras_of_another_family_are_refused_by_name(tiny_folder, tmp_path, kind):
    layers, said = LORAS[kind]
    save_file(adapter(layers), tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=said):
        load_policy(tiny_folder, lora=tmp_path, device="cpu")


@pytest.mark.parametrize("names", ["lora_unet_{}.lora_{}.weight", "unet.{}.lora.{}.weight", "unet.{}_lora.{}.weight"])
def test_loras_load_in_the_names_of_other_trainers(tiny_folder, tmp_path, names):
    """Those of kohya's scripts, and the two older ones of diffusers."""
    layer = f"{MIDDLE.removeprefix('unet.')}.attn1.{'processor.' if '_lora.{}' in names else ''}to_q"
    layer = layer.replace(".", "_") if names.startswith("lora") else layer
    weights = {names.format(layer, "down"): torch.randn(2, 32), names.format(layer, "up"): torch.randn(32, 2)}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    base, tuned = load_policy(tiny_folder, device="cpu"), load_policy(tiny_folder, lora=tmp_path, device="cpu")
    assert not torch.equal(drawn(tuned), drawn(base))


def test_files_that_are_no_lora(tiny_folder, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"a.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="holds no LoRA: its tensors are named such as"):
        load_policy(tiny_folder, lora=tmp_path, device="cpu")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(FileNotFoundError, match=r"LoRA .* could not be read"):
        load_policy(tiny_folder, lora=tmp_path, device="cpu")


# sizes and texts


@pytest.mark.parametrize(("size", "near"), [((60, 64), r"\(64, 64\)|\(56, 64\)"), ((3, 17), r"\(8, 16\)|\(2, 16\)")])
def test_sizes_that_cannot_be_made_get_the_nearest(tiny_folder, size, near):
    policy = load_policy(tiny_folder, device="cpu")
    policy.multiple = 8
    with pytest.raises(ValueError, match=rf"multiples of 8 pixels; got .*: ({near}) is near"):
        policy.shape(size)


@pytest.mark.parametrize("family", ["sd", "sana", "flux", "flux2", "z_image"])
def test_texts_that_are_cut_are_named_once(tiny_folder, tmp_path, caplog, family):
    """In templates and by processors too. Sana's limit counts its instruction; FLUX reads by T5 what CLIP cuts."""
    if family != "sd":
        next(iter(import_module(f"tests.samplers.families.tiny.{family}").VARIANTS.values()))().save_pretrained(
            tmp_path
        )
    policy = load_policy(tiny_folder if family == "sd" else tmp_path, device="cpu")
    if family not in ("sd", "flux"):
        policy.max_sequence_length = {"sana": 12, "z_image": 20, "flux2": 40}[family]
    long = "abcdefgh " * 4
    caplog.set_level(logging.INFO)
    policy.encode([long, "a", long])
    policy.encode([long])
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    if family == "flux":
        assert not told
        policy.max_sequence_length = 8
        policy.encode([long[:-2]])
        told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1
    assert "leaves out" in told[0] and told[0].split("leaves out ")[1].count("h") >= 1
    assert diffusers.utils.logging.get_verbosity() > logging.DEBUG


def test_what_is_left_out_is_what_the_encoder_does_not_read(tiny_folder, caplog):
    policy = load_policy(tiny_folder, device="cpu")  # 16 tokens of a letter each, the first and last of them special
    policy.encode(["abcdefghijklmnop"])
    assert "reads 16 tokens of 'abcdefghijklmnop' and leaves out 'op'" in caplog.text
    kept, longer = policy.encode(["abcdefghijklmnop"]).positive, policy.encode(["abcdefghijklmnqr"]).positive
    assert torch.equal(kept["encoder_hidden_states"], longer["encoder_hidden_states"])


# overflow


def test_networks_that_overflow_in_float16_are_named_with_their_module(tiny_folder):
    policy = load_policy(tiny_folder, device="cpu", dtype="float16")
    with torch.no_grad():
        policy.network.mid_block.resnets[0].conv1.weight.fill_(6e4)
    with pytest.raises(
        ValueError, match=r"UNet2DConditionModel overflows in float16 at mid_block\.resnets\.0\.conv1: .*bfloat16"
    ):
        drawn(policy)
    again = load_policy(tiny_folder, device="cpu", dtype="bfloat16")
    with torch.no_grad():
        again.network.mid_block.resnets[0].conv1.weight.fill_(6e4)
    assert drawn(again).isfinite().all()


@pytest.mark.parametrize("part", ["autoencoder", "text encoder"])
def test_other_parts_that_overflow_in_float16(tiny_folder, part):
    policy = load_policy(tiny_folder, device="cpu", dtype="float16")
    with torch.no_grad():
        if part == "autoencoder":
            policy.vae.decoder.conv_in.weight.fill_(6e4)
        else:
            policy.text_encoder.final_layer_norm.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="overflows in float16: load the model with dtype bfloat16"):
        policy.decode(torch.ones(1, 4, 8, 8)) if part == "autoencoder" else policy.encode(["a"])


# one file


def test_files_that_are_no_checkpoint(tiny_folder, tmp_path):
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"not recognised as a checkpoint: .*'a\.weight'.* A LoRA goes to lora="):
        load_policy(tmp_path / "a.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"takes the configuration of stable-diffusion-v1-5/.*: pass like= a folder"
    ):
        load_policy(tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_policy(tmp_path / "c.safetensors")
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        load_policy(tmp_path / "model.bin")
    with pytest.raises(ValueError, match="has its own: leave it out"):
        load_policy(tiny_folder, like="tiny-sd")
