"""Quantised, offloaded, compiled: a policy that is kept otherwise says the same and can be trained over."""

import importlib.util

import accelerate
import diffusers
import pytest
import torch
from torch import nn

import align
from align import load_policy
from align.adapters import Lora, add_lora, prepare_trainable, save_adapter
from align.description import build_policy, describe_policy
from align.places import Placement, offload
from samplers import ODE, DanceSDE, SeededNoise, always, rollout
from samplers.transitions import Gaussian
from tests.samplers.families.tiny.flux import build as build_flux

CPU = torch.device("cpu")
quantised = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def walked(policy, grad=None):
    """The samples of a short deterministic run from one noise, and with `grad` the gradient at that noise."""
    cond, levels = policy.encode(["a cat", "dog"]).with_guidance(3.0), policy.levels(3, policy.size)
    noise = SeededNoise([0, 1], policy.shape(policy.size))
    if grad is None:
        return rollout(policy, ODE(), cond, levels, noise).x0
    x = noise(0).requires_grad_()
    ended = rollout(policy, ODE(), cond, levels, lambda i: x if i == 0 else noise(i), grad=always)
    policy.decode(ended.x0).square().sum().backward()
    return x.grad


@pytest.fixture(autouse=True)
def networks_alone(monkeypatch):
    """On a CPU, accelerate cannot take a text encoder apart; the network and the autoencoder it can."""

    def taken_apart(pipe, device):
        for part in (pipe.unet, pipe.vae):
            accelerate.cpu_offload(part, device)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_sequential_cpu_offload", taken_apart)


@pytest.mark.parametrize("how", ["model", "group", "sequential"])
def test_offloaded_networks_say_the_same(tiny_folder, how):
    plain, moved = load_policy(tiny_folder, device="cpu"), load_policy(tiny_folder, device="cpu")
    offload(moved, how, CPU)
    assert torch.equal(walked(moved), walked(plain))
    assert moved.device == CPU and moved.runs_on == CPU
    assert {p.device.type for p in moved.network.parameters()} == {"meta" if how == "sequential" else "cpu"}


@pytest.mark.parametrize("how", ["model", "sequential"])
@pytest.mark.parametrize("checkpointing", ["step", "none"])
def test_gradients_pass_through_offloaded_networks(tiny_folder, how, checkpointing):
    plain, moved = load_policy(tiny_folder, device="cpu"), load_policy(tiny_folder, device="cpu")
    offload(moved, how, CPU)
    moved.checkpointing = checkpointing
    calls = []
    moved.network.conv_in.register_forward_hook(lambda *_: calls.append("network"))
    moved.vae.decoder.conv_in.register_forward_hook(lambda *_: calls.append("decoder"))
    assert torch.allclose(walked(moved, grad=True), walked(plain, grad=True), atol=1e-6)
    again = 3 if checkpointing == "step" else 2  # a step is recomputed, and within it the call
    assert (calls.count("network"), calls.count("decoder")) == (3 * again, 2)


def test_offloaded_groups_say_that_no_gradient_passes(tiny_folder):
    policy = load_policy(tiny_folder, device="cpu")
    offload(policy, "group", CPU)
    policy.loaded_with = {"offload": "group"}
    with pytest.raises(
        ValueError, match="no gradient passes through offload='group': use offload='model' or 'sequential'"
    ):
        walked(policy, grad=True)


def test_adapters_stay_where_the_network_computes_and_learn_the_same(tiny_folder, tmp_path):
    """Over sequential offloading, whether they were loaded or are new."""
    first = load_policy(tiny_folder, device="cpu")
    add_lora(first, Lora(rank=2), 0)
    save_adapter(first, tmp_path)
    for lora in (None, tmp_path):
        learned = []
        for how in (None, "sequential"):
            policy = load_policy(tiny_folder, lora=lora, device="cpu")
            if how:
                offload(policy, how, CPU)
                policy.loaded_with = {"offload": how}
            prepare_trainable(policy, Lora(rank=2), 0)
            x = torch.ones(1, *policy.shape(policy.size))
            policy.denoise(x, policy.levels(2)[0], policy.encode(["a"])).x0.square().mean().backward()
            assert {p.device.type for p in policy.trainable.values()} == {"cpu"}
            learned.append({name: p.grad for name, p in policy.trainable.items()})
        assert {p.device.type for n, p in policy.network.named_parameters() if "base_layer" in n} == {"meta"}
        assert any(g.abs().max() > 0 for g in learned[0].values())
        assert all(torch.allclose(learned[1][name], g, atol=1e-7) for name, g in learned[0].items())


@pytest.mark.parametrize(
    ("how", "lora", "said"),
    [
        ({"offload": "model"}, Lora(), "moves weights in the middle of a backward pass"),
        ({"offload": "group"}, Lora(), "no gradient passes through offload='group'"),
        ({"offload": "sequential"}, None, "train a LoRA"),
        ({"quantize": "nf4"}, None, "weights in nf4 are frozen"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny_folder, how, lora, said):
    policy = load_policy(tiny_folder, device="cpu")
    policy.loaded_with = how
    with pytest.raises(ValueError, match=said):
        prepare_trainable(policy, lora, 0)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"offload": "group"}, "brings weights from the CPU to a GPU"),
        ({"quantize": "nf4"}, r"needs a GPU; on the CPU there are int8 and fp8"),
        ({"quantize": "int8", "waiting": True}, "launch without FSDP"),
        ({"quantize": "int3"}, "int8, nf4, fp8"),
        ({"quantize_text": True}, "set quantize"),
        ({"device_map": "balanced"}, "device_map must be balanced, over GPUs; got 'balanced' on cpu"),
        ({"device_map": "auto"}, "device_map must be balanced, over GPUs; got 'auto'"),
        ({"offload": "disk"}, "model, group or sequential"),
        ({"offload": "group", "compile": True}, "choose one"),
        ({"offload": "group", "device_map": "balanced"}, "choose one"),
        ({"offload": "sequential", "quantize": "int8"}, "takes quantised weights apart"),
        ({"compile": "blocks"}, "true, false or regional"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_read(tiny_folder, monkeypatch, how, said):
    monkeypatch.setattr("align.loading._pipeline", None)
    with pytest.raises(ValueError, match=said):
        load_policy(tiny_folder, device="cpu", **how)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_a_missing_package_is_named(tiny_folder, monkeypatch, quantize):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(ValueError, match=r"needs torchao: pip install 'kilter\[quant\]'"):
        load_policy(tiny_folder, device="cpu", quantize=quantize)


@quantised
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_a_quantised_base_is_near_and_a_lora_over_it_trains_and_saves(tiny_folder, tmp_path, quantize):
    base = load_policy(tiny_folder, device="cpu")
    policy = load_policy(tiny_folder, device="cpu", quantize=quantize)
    kinds = {type(m.weight).__name__ for m in policy.network.modules() if isinstance(m, nn.Linear)}
    assert kinds == {"Int8Tensor" if quantize == "int8" else "Float8Tensor"}
    near, exact = walked(policy), walked(base)
    assert 0 < (near - exact).norm() / exact.norm() < (0.02 if quantize == "int8" else 0.1)
    prepare_trainable(policy, Lora(rank=2), 0)
    assert {p.dtype for p in policy.trainable.values()} == {torch.float32}
    grown = walked(policy)
    assert torch.equal(grown, near)
    with torch.no_grad():
        for name, p in policy.trainable.items():
            if "lora_B" in name:
                p.add_(0.1)
    assert not torch.equal(walked(policy), near)
    with policy.acting_as("reference"):
        assert torch.equal(walked(policy), near)
    save_adapter(policy, tmp_path)
    again = load_policy(tiny_folder, device="cpu", quantize=quantize, lora=tmp_path)
    assert torch.allclose(walked(again), walked(policy), atol=1e-6)
    rebuilt = build_policy(describe_policy(policy))
    assert rebuilt.loaded_with == {"quantize": quantize} and torch.equal(walked(rebuilt), near)


@quantised
def test_quantised_models_obey_the_laws_of_families(tiny_folder):
    from align.conformance import check

    broken = {
        f.law: f.detail for f in check(load_policy(tiny_folder, device="cpu", quantize="int8")) if f.holds is False
    }
    assert not broken


@quantised
def test_text_encoders_are_quantised_when_asked(tiny_folder):
    base = load_policy(tiny_folder, device="cpu").encode(["a cat"]).positive["encoder_hidden_states"]
    policy = load_policy(tiny_folder, device="cpu", quantize="int8", quantize_text=True)
    near = policy.encode(["a cat"]).positive["encoder_hidden_states"]
    assert 0 < (near - base).norm() / base.norm() < 0.02


@pytest.fixture
def eagerly(monkeypatch):
    """Compilation without code generation: graphs are captured and run as they are."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled(self, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compile", [True, "regional"])
def test_compilation_is_in_place(tiny_folder, compile):
    plain = load_policy(tiny_folder, device="cpu")
    policy = load_policy(tiny_folder, device="cpu", compile=compile)
    compiled = [m for m in policy.network.modules() if m._compiled_call_impl is not None]
    assert (compiled == [policy.network]) if compile is True else (compiled and policy.network not in compiled)
    assert list(policy.network.state_dict()) == list(plain.network.state_dict())
    assert describe_policy(policy)["compile"] == compile


@pytest.mark.slow
@pytest.mark.parametrize("compile", [True, "regional"])
def test_a_compiled_network_keeps_its_samples_and_ratios_of_one(tmp_path, eagerly, compile):
    build_flux().save_pretrained(tmp_path)
    plain = load_policy(tmp_path, device="cpu")
    policy = load_policy(tmp_path, device="cpu", compile=compile)
    assert torch.allclose(walked(policy), walked(plain), atol=1e-5)
    prepare_trainable(policy, Lora(rank=2), 0)
    cond, levels = policy.encode(["a cat", "dog"]).with_guidance(3.0), policy.levels(2, policy.size)
    noise, kernel = SeededNoise([0, 1], policy.shape(policy.size)), DanceSDE()
    path = rollout(policy, kernel, cond, levels, noise, record="path")
    for i in range(2):
        law = kernel(policy.denoise(path.latents[:, i], levels[i], cond), path.latents[:, i], levels, i)
        assert isinstance(law, Gaussian)
        assert torch.equal(law.log_prob(path.latents[:, i + 1]), path.log_prob[:, i])


def test_networks_without_repeated_blocks_cannot_be_compiled_regionally(tiny_folder):
    policy = load_policy(tiny_folder, device="cpu")
    policy.network = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="names no repeated blocks"):
        Placement(compile="regional").settle(policy, CPU)


def test_options_reach_the_command_line_and_yaml(tiny_folder, tmp_path, capsys):
    from align.cli import main

    said = ["--offload", "group", "--device", "cpu", "--out", str(tmp_path / "x")]
    assert main(["steer", "a cat", "--model", str(tiny_folder), *said]) == 2
    assert "brings weights from the CPU to a GPU" in capsys.readouterr().err
    with pytest.raises(ValueError, match="needs a GPU"):
        align.train(
            "configs/tiny/grpo.yaml", model=str(tiny_folder), quantize="nf4", device="cpu", out=str(tmp_path / "y")
        )
