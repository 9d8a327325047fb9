"""From a folder in the hub layout to a policy."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from align import load_policy
from align.description import build_policy, describe_policy
from samplers import ODE, SeededNoise, rollout
from tests.conftest import build_pipeline


def test_a_saved_folder_gives_the_pipelines_own_image(tiny_folder):
    """What a user sees from diffusers and from kilter at one seed is one image."""
    policy = load_policy(tiny_folder)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("a cat", num_inference_steps=5, generator=torch.Generator().manual_seed(7), output_type="pt").images
    noise = SeededNoise([7], policy.shape(policy.size))
    ended = rollout(policy, ODE(), policy.encode(["a cat"]), policy.levels(5), noise)
    assert torch.allclose(policy.decode(ended.x0), theirs, atol=1e-5)


def test_defaults_come_from_the_folder(tiny_folder, tmp_path):
    assert (load_policy(tiny_folder).steps, load_policy(tiny_folder).guidance) == (50, 7.5)
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"num_inference_steps": 6, "guidance_scale": 2.5}')
    policy = load_policy(folder)
    assert (policy.steps, policy.guidance, policy.encode(["a"]).guidance) == (6, 2.5, 2.5)


def test_weights_are_frozen_and_in_the_asked_precision(tiny_folder):
    policy = load_policy(tiny_folder, dtype="bfloat16")
    assert policy.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in policy.parameters())
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        load_policy(tiny_folder, dtype="int8")


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_any_scheduler_of_a_published_checkpoint_loads(scheduler, tmp_path):
    """Levels are those of DDIM with the checkpoint's betas and spacing, or of a scheduler that has levels of its own."""
    made = getattr(diffusers, scheduler)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    build_pipeline(tmp_path, scheduler=made).save_pretrained(tmp_path / "model")
    levels = load_policy(tmp_path / "model").levels(10)
    reference = made if "DPM" in scheduler else diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
        timestep_spacing=made.config.timestep_spacing,
    )  # fmt: skip
    reference.set_timesteps(10)
    assert torch.equal(levels.t[:-1], reference.timesteps.double())
    assert torch.allclose(levels.alpha[:-1] ** 2, reference.alphas_cumprod.double()[reference.timesteps])


def test_lora_weights_in_the_diffusers_format_speak_and_can_be_silenced(tiny_folder, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = build_pipeline(tmp_path)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    base, tuned = load_policy(tiny_folder), load_policy(tiny_folder, lora=tmp_path / "lora")
    x, at, cond = torch.randn(1, *base.shape(base.size)), base.levels(4)[1], base.encode(["a"])
    assert not torch.allclose(tuned.predict(x, at, cond), base.predict(x, at, cond))
    with tuned.acting_as("reference"):
        assert torch.equal(tuned.predict(x, at, cond), base.predict(x, at, cond))


def test_half_precision_variants_and_home_folders_load(tiny_folder, tmp_path, monkeypatch):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_policy("~/half").dtype == torch.float32


def test_folders_of_pickled_weights_load(tiny_folder, tmp_path):
    """Old checkpoints hold .bin files only."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert not list((tmp_path / "old" / "unet").glob("*.safetensors"))
    old, new = load_policy(tmp_path / "old"), load_policy(tiny_folder)
    for a, b in zip(old.network.parameters(), new.network.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("scheduler", "embeds", "defaults"),
    [
        (diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"), False, (1.0, 4, "Consistency")),
        (diffusers.LCMScheduler(), False, (1.0, 4, "Consistency")),
        (diffusers.LCMScheduler(), True, (8.5, 4, "Consistency")),
        (diffusers.EulerDiscreteScheduler(), False, (7.5, 50, "DDIM")),
    ],
    ids=["turbo", "merged LCM-LoRA", "LCM", "plain Euler"],
)
def test_distilled_students_get_their_own_defaults(tmp_path, scheduler, embeds, defaults):
    build_pipeline(tmp_path, scheduler=scheduler, guidance_embedding=embeds).save_pretrained(tmp_path / "model")
    policy = load_policy(tmp_path / "model")
    assert (policy.guidance, policy.steps, type(policy.kernel).__name__) == defaults


@pytest.mark.parametrize(("student", "levels"), [("lcm", [999, 759, 499, 259]), ("trailing", [999, 749, 499, 249])])
def test_students_that_come_as_lora_take_the_schedule_they_are_told(tiny_folder, tmp_path, student, levels):
    """LCM-LoRA and Hyper-SD over a plain checkpoint; the description makes the same policy again."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = build_pipeline(tmp_path)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.unet)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    policy = load_policy(tiny_folder, lora=tmp_path / "lora", student=student, device="cpu")
    for one in (policy, build_policy(describe_policy(policy))):
        assert one.few_step
        assert (one.guidance, one.steps, type(one.kernel).__name__) == (1.0, 4, "Consistency")
        assert one.levels(4).t.tolist() == [*levels, 0]
        assert one.prediction == ("consistency" if student == "lcm" else "eps")
    assert not load_policy(tiny_folder).few_step
    with pytest.raises(ValueError, match="lcm or trailing"):
        load_policy(tiny_folder, student="turbo")


def broken(folder, how):
    if how == "missing part":
        shutil.rmtree(folder / "unet")
    elif how == "missing weights":
        next((folder / "vae").glob("*.safetensors")).unlink()
    elif how == "missing vocabulary":
        for name in ("vocab.json", "merges.txt", "tokenizer.json"):
            (folder / "tokenizer" / name).unlink(missing_ok=True)
    elif how == "half the weights":
        file = next((folder / "text_encoder").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "missing index":
        (folder / "model_index.json").unlink()
    elif how == "half an index":
        text = (folder / "model_index.json").read_text()
        (folder / "model_index.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing part", r"incomplete; missing: unet/"),
        ("missing weights", r"vae/ weights"),
        ("missing vocabulary", r"tokenizer/ vocabulary"),
        ("half the weights", r"could not be loaded, its files may be incomplete"),
        ("missing index", r"no model_index.json"),
        ("half an index", r"is not JSON"),
    ],
)
def test_half_a_download_is_named(tiny_folder, tmp_path, how, said):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    broken(folder, how)
    with pytest.raises(FileNotFoundError, match=said):
        load_policy(folder)


def test_unknown_families_list_the_known(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "ShapEPipeline"}))
    with pytest.raises(
        ValueError, match="ShapEPipeline, which kilter cannot drive yet; supported: StableDiffusionPipeline"
    ):
        load_policy(folder)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps:7"])
def test_devices_that_are_not_here(tiny_folder, device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here, expected cpu, cuda"):
        load_policy(tiny_folder, device=device)


def test_all_weights_of_a_run_are_loaded_like_a_lora(tiny_folder, tmp_path):
    policy = load_policy(tiny_folder)
    changed = {name: w + 0.01 for name, w in policy.network.named_parameters()}
    save_file(changed, tmp_path / "trainable.safetensors")
    again = load_policy(tiny_folder, lora=tmp_path)
    assert all(torch.equal(w, changed[name]) for name, w in again.network.named_parameters())
    assert again.adapter == str(tmp_path)
    save_file({"elsewhere": torch.zeros(2)}, tmp_path / "trainable.safetensors")
    with pytest.raises(ValueError, match=r"'elsewhere', which UNet2DConditionModel has not"):
        load_policy(tiny_folder, lora=tmp_path)


def test_a_lora_that_is_not_there(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no LoRA .*nowhere: expected a folder or file"):
        load_policy(tiny_folder, lora=tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "said"), [("/no/such/folder", "no folder"), ("owner/name", "neither a folder")])
def test_missing_models(name, said):
    with pytest.raises(FileNotFoundError, match=said):
        load_policy(name)


def test_half_precision_is_that_of_the_family():
    """Flows and their language models were published in bfloat16, and some of them overflow in float16."""
    found = [load_policy(model, device="meta").dtype for model in ("tiny-sd", "tiny-flow")]
    assert found == [torch.float16, torch.bfloat16]
