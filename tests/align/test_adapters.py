"""Laws of adapters: fresh or switched off they are the base, and what is written is what diffusers loads."""

from __future__ import annotations

import pkgutil
import shutil
from importlib import import_module

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from align import load_policy
from align.adapters import Lora, add_lora, digest, merge, prepare_trainable, save_adapter, set_scale
from align.config import TrainConfig
from align.objectives import Backprop
from align.sources import Prompts
from align.trainer import Trainer
from rewards import Brightness, Prompt
from samplers import DDIM, ODE, SeededNoise, rollout
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from tests.samplers.families import tiny
from tests.samplers.families.tiny import pixart

PROMPTS = [Prompt("a cat"), Prompt("two dogs")]
NAMES = {
    "all": Lora(rank=3),
    "alpha": Lora(rank=2, alpha=5.0),
    "one": Lora(rank=1, targets=("to_q",)),
    "convolutions": Lora(rank=2, targets=("conv1", "proj_in", "to_v", "ff.net.2"), init="default"),
}


def output(policy, seed: int = 0) -> Tensor:
    noise = SeededNoise([seed, seed + 1], policy.shape(policy.size))
    cond = policy.encode(PROMPTS).with_guidance(3.0)
    with torch.no_grad():
        return policy.output(noise(0).to(policy.dtype), policy.levels(4, policy.size)[1], cond)


def images(policy, steps: int = 3) -> Tensor:
    noise = SeededNoise([5, 6], policy.shape(policy.size))
    cond = policy.encode(PROMPTS).with_guidance(3.0)
    with torch.no_grad():
        return policy.decode(rollout(policy, ODE(), cond, policy.levels(steps, policy.size), noise).x0)


def trained(policy, lora: Lora, size: float = 0.3):
    """As after training: B is no longer 0."""
    add_lora(policy, lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in policy.trainable.values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter)
    return policy


@pytest.fixture
def fresh(tiny_folder):
    return lambda **how: load_policy(tiny_folder, device="cpu", **how)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_adapter_changes_nothing_and_switched_off_none_does(fresh, name):
    policy = fresh()
    base = output(policy)
    add_lora(policy, NAMES[name], seed=0)
    assert torch.equal(output(policy), base)
    policy = trained(fresh(), NAMES[name])
    assert not torch.allclose(output(policy), base, atol=1e-3)
    before = digest(policy)
    with policy.acting_as("reference"):
        assert torch.equal(output(policy), base)
    set_scale(policy, 0.0)
    assert torch.equal(output(policy), base)
    assert digest(policy) == before
    assert all("lora_" in n and p.dtype == torch.float32 for n, p in policy.trainable.items())


def test_the_seed_makes_the_adapter(fresh, monkeypatch):
    """And the global generators are left alone, those of accelerators too."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(7)
    expected = torch.rand(())
    torch.manual_seed(7)
    digests = []
    for seed in (0, 0, 1):
        policy = fresh()
        state, times = torch.get_rng_state(), len(seeded)
        add_lora(policy, Lora(), seed)
        assert torch.equal(torch.get_rng_state(), state) and len(seeded) == times
        digests.append(digest(policy))
    assert digests[0] == digests[1] != digests[2]
    torch.manual_seed(7)
    assert torch.rand(()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_is_what_diffusers_loads(fresh, tiny_folder, tmp_path, name):
    """To 1e-6 of a float32 image: the network is the same, and its sums run in the same order. Alpha need not be the rank."""
    policy = trained(fresh(), NAMES[name])
    wanted = images(policy)
    save_adapter(policy, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(images(StableDiffusion(pipe)), wanted, rtol=0, atol=1e-6)
    again = fresh(lora=tmp_path)
    torch.testing.assert_close(images(again), wanted, rtol=0, atol=1e-6)
    with again.acting_as("reference"):
        assert torch.equal(output(again), output(fresh()))
    torch.testing.assert_close(
        images(fresh(lora=tmp_path / "pytorch_lora_weights.safetensors")), wanted, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", ["alpha", "one"])
def test_an_adapter_of_a_pipeline_that_loads_none_is_in_pefts_format(tmp_path, name):
    """PixArt's: peft's own loader gives the same output, ours too, and training goes on from it."""
    from peft import PeftModel

    pixart.build().save_pretrained(tmp_path / "base")
    fresh = lambda **how: load_policy(tmp_path / "base", device="cpu", **how)  # noqa: E731
    policy, base = trained(fresh(), NAMES[name]), output(fresh())
    wanted, lora = output(policy), tmp_path / "lora"
    assert [p.name for p in save_adapter(policy, lora)] == ["adapter_model.safetensors"]
    again = fresh(lora=lora)
    torch.testing.assert_close(output(again), wanted, rtol=0, atol=1e-6)
    with again.acting_as("reference"):
        assert torch.equal(output(again), base)
    prepare_trainable(again, None, 0)
    assert set(again.trainable) == set(policy.trainable)
    theirs = fresh()
    theirs.network = PeftModel.from_pretrained(theirs.network, str(lora))
    torch.testing.assert_close(output(theirs), wanted, rtol=0, atol=1e-6)
    assert float((wanted - base).abs().max()) > 1e-2


def test_the_pipelines_own_call_makes_the_same_image(fresh, tiny_folder, tmp_path):
    """To 1e-4: diffusers' DDIM rounds its coefficients to float32."""
    policy = trained(fresh(), Lora(rank=2, alpha=5.0), 0.1)
    save_adapter(policy, tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    plain = pipe.vae.decode  # what follows decodes as the pipeline does
    noise = SeededNoise([5, 6], policy.shape(policy.size))
    given = {"prompt": [p.text for p in PROMPTS], "guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "pt"}
    without = pipe(**given, latents=noise(0)).images
    pipe.load_lora_weights(tmp_path)
    assert pipe.vae.decode == plain
    theirs = pipe(**given, latents=noise(0)).images
    torch.testing.assert_close(images(policy), theirs.clamp(0, 1), rtol=0, atol=1e-4)
    assert (theirs - without).abs().max() > 1e-2


def test_merged_it_is_the_base_of_another(fresh):
    policy = trained(fresh(), Lora(rank=2, alpha=1.0))
    wanted = output(policy)
    merge(policy)
    torch.testing.assert_close(output(policy), wanted, rtol=1e-4, atol=1e-4)


def test_scaling_is_linear_in_the_weights(fresh):
    """Twice the scale of an adapter of alpha a is that of alpha 2a."""
    policy = trained(fresh(), Lora(rank=2, alpha=3.0))
    set_scale(policy, 2.0)
    torch.testing.assert_close(output(policy), output(trained(fresh(), Lora(rank=2, alpha=6.0))))
    with pytest.raises(ValueError, match="no LoRA to scale"):
        set_scale(fresh(), 1.0)


def test_the_part_of_an_adapter_in_the_text_encoder_is_scaled_and_saved_too(fresh, tmp_path):
    """And texts that were embedded before are embedded again."""
    trained_too = trained(fresh(), Lora(rank=2), 0.1)
    encoder = trained_too.text_encoder
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "default")
    encoder.to(torch.float32)
    wanted = output(trained_too)
    save_adapter(trained_too, tmp_path / "first")
    policy, base = fresh(lora=tmp_path / "first"), output(fresh())
    torch.testing.assert_close(output(policy), wanted, rtol=0, atol=1e-5)
    assert any("lora" in name for name, _ in policy.text_encoder.named_parameters())
    prepare_trainable(policy, None, 0)
    save_adapter(policy, tmp_path / "again")
    torch.testing.assert_close(output(fresh(lora=tmp_path / "again")), wanted, rtol=0, atol=1e-5)
    set_scale(policy, 0.0)
    torch.testing.assert_close(output(policy), base, rtol=0, atol=1e-5)
    assert float((base - wanted).abs().max()) > 1e-3


def test_a_policy_that_moves_embeds_its_texts_again(fresh):
    policy = fresh()
    policy.encode(PROMPTS)
    assert policy.to(torch.float64).encode(PROMPTS).positive["encoder_hidden_states"].dtype == torch.float64


@pytest.mark.parametrize(("targets", "said"), [
    (("to_qq",), r"'to_qq' matches no layer of UNet2DConditionModel; it has .*conv1.*to_out.0.*to_q.*did you mean 'to_q'"),
    (("to_k", "q_proj"), r"'q_proj' matches no layer"),
    (("o_q",), r"'o_q' matches no layer"),
    ((), r"\(none\)' matches no layer"),
])  # fmt: skip
def test_targets_that_match_nothing(fresh, targets, said):
    policy = fresh()
    with pytest.raises(ValueError, match=said):
        add_lora(policy, Lora(targets=targets), 0)
    assert not policy.trainable


@pytest.mark.parametrize("family", [m.name for m in pkgutil.iter_modules(tiny.__path__)])
def test_the_layers_of_a_family_reach_every_block(family, tmp_path):
    pipe = next(iter(import_module(f"{tiny.__name__}.{family}").VARIANTS.values()))()
    pipe.save_pretrained(tmp_path / "model")
    policy = load_policy(tmp_path / "model", device="cpu")
    add_lora(policy, Lora(rank=1), 0)
    kinds = ("attn", "attn1", "attention")
    blocks = [m for m in policy.network.modules() if any(isinstance(getattr(m, k, None), nn.Module) for k in kinds)]
    assert blocks
    assert all(any(p.requires_grad for p in block.parameters()) for block in blocks)
    save_adapter(policy, tmp_path / "adapter")
    again = load_policy(tmp_path / "model", lora=tmp_path / "adapter", device="cpu")
    prepare_trainable(again, None, 0)
    layers = [{name.partition(".lora_")[0] for name in one.trainable} for one in (policy, again)]
    assert layers[0] == layers[1]


def test_a_network_without_layers_has_nothing_to_adapt():
    with pytest.raises(ValueError, match="it has no linear or convolution layer"):
        add_lora(GaussianPolicy([0.0]), Lora(), 0)


def test_half_precision_weights_are_not_trained(fresh):
    with pytest.raises(ValueError, match=r"trainable weights must be float32, but conv_in.weight and \d+ others"):
        prepare_trainable(fresh(dtype="bfloat16"), None, 0)
    policy = fresh(dtype="bfloat16")
    prepare_trainable(policy, Lora(), 0)
    assert {p.dtype for p in policy.trainable.values()} == {torch.float32}
    assert policy.dtype == torch.bfloat16


def trainer(policy, out, **how) -> Trainer:
    quick = {
        "updates": 2,
        "batch": 2,
        "micro_batch": 1,
        "steps": 2,
        "eval_samples": 1,
        "eval_every": 0,
        "tracker": None,
    }
    config = TrainConfig(**{**quick, "out": str(out), "learning_rate": 1e-2, "kernel": DDIM(eta=1.0), **how})
    return Trainer(policy, Backprop(reward=Brightness()), Prompts(["a cat", "two dogs"]), config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_trains_an_adapter_over_a_base_of_any_precision(fresh, tmp_path, monkeypatch, dtype):
    """The base does not move, the adapter does, in float32; the run's folder is what diffusers and `load_policy` take."""
    monkeypatch.setattr("align.reports.draw_curves", lambda *args, **how: None)
    policy = fresh(dtype=dtype)
    base = {name: p.clone() for name, p in policy.network.state_dict().items()}
    run = trainer(policy, tmp_path / "run", lora=Lora(rank=2, alpha=4.0), updates=3)
    first = digest(policy)
    result = run.fit()
    assert result.digest != first
    assert [row["skipped"] for row in result.log] == [0, 0, 0]
    now = policy.network.state_dict()
    for name, weight in base.items():
        stem, _, kind = name.rpartition(".")
        assert torch.equal(now[name if name in now else f"{stem}.base_layer.{kind}"], weight)
    again = fresh(dtype=dtype, lora=tmp_path / "run")
    wanted = output(policy) if result.best == 3 else output(fresh(dtype=dtype))
    torch.testing.assert_close(output(again), wanted, rtol=0, atol=1e-5 if dtype == "float32" else 0.1)


def test_a_run_goes_on_from_an_adapter(fresh, tiny_folder, tmp_path, monkeypatch):
    """It is what is trained, where it began is the reference, and its run resumes."""
    monkeypatch.setattr("align.reports.draw_curves", lambda *args, **how: None)
    save_adapter(trained(fresh(), Lora(rank=2, alpha=5.0), 0.1), tmp_path / "given")
    policy = fresh(lora=tmp_path / "given")
    wanted = output(policy)
    whole = trainer(policy, tmp_path / "whole", updates=4, schedule="constant").fit()
    with policy.acting_as("reference"):
        torch.testing.assert_close(output(policy), wanted, rtol=0, atol=0)
    trainer(fresh(lora=tmp_path / "given"), tmp_path / "parts", updates=2, schedule="constant").fit()
    assert Trainer.resume(tmp_path / "parts", updates=4).fit().digest == whole.digest


def test_all_weights_of_a_network(fresh, tmp_path, monkeypatch):
    """lora: null; the reference is remembered, and the file holds every weight."""
    from safetensors.torch import load_file

    monkeypatch.setattr("align.reports.draw_curves", lambda *args, **how: None)
    policy = fresh()
    base = output(policy)
    result = trainer(policy, tmp_path / "run", lora=None, updates=1, learning_rate=1e-3).fit()
    assert not torch.equal(output(policy), base)
    with policy.acting_as("reference"):
        assert torch.equal(output(policy), base)
    assert load_file(tmp_path / "run" / "trainable.safetensors").keys() == policy.trainable.keys()
    shutil.rmtree(tmp_path / "run" / "samples", ignore_errors=True)
    assert Trainer.resume(tmp_path / "run").fit().digest == result.digest
