"""Memory is foreseen from shapes alone, within a few hundredths of what runs hold; what is proposed fits, as mildly as it may."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

import align
from align import Lora, Memory, TrainConfig, Trainer
from align.cli import main
from align.footprint import LiveBytes
from align.objectives import Backprop, PolicyGradient
from align.planning.kept import Kept, kept
from align.planning.phantom import Moment, Phantom
from align.planning.plan import Plan, _halved, _planned, _Run
from align.planning.targets import GIB, Target
from align.planning.walks import EightBit, Walk, _trained, steering_walk, training_walk
from align.sources import Prompts, Rollouts
from rewards import Brightness, CLIPScore, CrossEncoder, Prompt
from rewards.loading import hollow
from samplers import Compose, FeynmanKac, Guided
from tests.samplers.families.tiny.sdxl import build_controlled_sd

PROMPTS = ["a red circle", "three green stars"]
CPU, GPU = Target(), Target("some GPU", 1e12, True)


def weights(policy, reward) -> int:
    """Bytes of the weights of a loaded policy and a reward."""
    return sum(t.untyped_storage().nbytes() for part in (policy, reward) for t in (*part.parameters(), *part.buffers()))


def within(walk, measured: int, share: float = 0.02) -> bool:
    return abs(walk.peak / measured - 1) < share


def settings(folder, **how) -> TrainConfig:
    some = {
        "updates": 2,
        "batch": 4,
        "micro_batch": 2,
        "steps": 3,
        "eval_samples": 1,
        "eval_every": 0,
        "sample_rows": 2,
    }
    return TrainConfig(
        out=str(folder / "run"), eval_prompts=PROMPTS, tracker=None, **{"lora": Lora(rank=4), **some, **how}
    )


# Truth


@pytest.mark.parametrize(
    ("model", "guided"),
    [("tiny-sd", True), ("tiny-flow", False), pytest.param("tiny-flow", True, marks=pytest.mark.slow)],
)
def test_steering_holds_what_was_foreseen(model, guided):
    def steering(reward):
        chosen = FeynmanKac(reward, 0.1)
        return Compose(Guided(reward, 1.0), chosen) if guided else chosen

    policy, reward, how = align.load_policy(model, device="cpu"), CrossEncoder(), {"particles": 3, "steps": 4}
    held = weights(policy, reward)
    with LiveBytes() as live:
        align.steer(policy, PROMPTS, steering(reward), gold=None, plain=False, **how)
    hollow = align.load_policy(model, device="meta", dtype="float32")
    walk = steering_walk(hollow, [Prompt(p) for p in PROMPTS], steering(CrossEncoder()), CPU, **how)
    assert sum(walk.weights.bytes.values()) == held
    assert within(walk, held + live.peak)
    assert walk.phase == ("steer: backward" if guided else "steer: network")


CASES = {  # model, objective, source, settings
    "recomputed by step": ("tiny-sd", lambda: Backprop("last", k=2), lambda: Prompts(PROMPTS), {}),
    "recomputed by block": (
        "tiny-flow",
        lambda: Backprop("last"),
        lambda: Prompts(PROMPTS),
        {"memory": Memory("block")},
    ),
    "all kept": ("tiny-flow", lambda: Backprop("last", k=2), lambda: Prompts(PROMPTS), {"memory": Memory("none")}),
    "all weights": ("tiny-sd", lambda: PolicyGradient(), lambda: Rollouts(PROMPTS, group=2), {"lora": None}),
    "averaged": ("tiny-sd", lambda: PolicyGradient(kl_weight=0.1), lambda: Rollouts(PROMPTS, group=2), {"ema": 0.9}),
}


SLOW = ("recomputed by step", "all kept", "averaged")


@pytest.mark.parametrize(
    ("model", "objective", "source", "how"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()],
)
def test_training_holds_what_was_foreseen(model, objective, source, how, tmp_path, plain):
    policy, reward, config = align.load_policy(model, device="cpu"), CrossEncoder(), settings(tmp_path, **how)
    policy.world = ""  # the exact detector is no part of what is planned
    held = weights(policy, reward)
    with LiveBytes() as live:
        Trainer(policy, objective().bind(reward), source().bind(reward), config).fit()
    hollow = align.load_policy(model, device="meta", dtype="float32")
    walk = training_walk(hollow, objective().bind(CrossEncoder()), source().bind(CrossEncoder()), config, CPU)
    assert within(walk, held + live.peak)
    assert not hollow.trainable


def state_bytes(optimizer) -> int:
    return sum(
        v.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for name, v in state.items()
        if isinstance(v, torch.Tensor) and not name.startswith("qmap")  # one table for all
    )


def test_an_optimiser_of_eight_bits_keeps_a_quarter():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (100, 4095, 4096, 100_001)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    stand_in = EightBit(parameters)
    stand_in.step(), stand_in.step()
    assert state_bytes(stand_in) == 2 * 4 * (100 + 4095) + 2 * (4096 + 4 * 16) + 2 * (100_001 + 4 * 391)
    real = pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters)
    real.step()
    assert state_bytes(real) == state_bytes(stand_in)


def test_plans_foresee_eight_bits_without_their_package(tiny_folder, tmp_path):
    """All weights of a network: two float32 moments a weight less two bytes, in every phase of the update."""
    policy, reward = align.load_policy(tiny_folder, device="meta", dtype="float32"), Brightness()
    parts = Backprop("last").bind(reward), Prompts(PROMPTS).bind(reward)
    config = settings(tmp_path, lora=None, steps=2, batch=2)
    plain, eight = (training_walk(policy, *parts, replace(config, optimizer=o), CPU) for o in ("adamw", "adamw8bit"))
    sizes = [p.numel() for p in policy.network.parameters()]
    saved = sum(8 * n - 2 * (n + 4 * -(-n // 256)) for n in sizes if n >= 4096)
    spared = {name: plain.phases[name].total - eight.phases[name].total for name in plain.phases}
    update = [s for name, s in spared.items() if name.startswith("update") and "optimiser" not in name]
    assert max(update) == pytest.approx(saved, rel=0.02) and saved > 0.5 * 6 * sum(sizes), spared


@pytest.mark.slow
def test_a_medium_network_holds_what_was_foreseen(tmp_path, plain):
    """Stable Diffusion 1.5's shape at half its width, on 8×8 latents."""
    from benchmarks import plan as bench

    case = {"model": "half", "what": "policy gradient", "rows": 1, "mode": "block"}
    found = bench.measured(case, "cpu")["measured"]
    assert abs(bench.predicted(case, CPU)["predicted"] / found - 1) < 0.05


@pytest.mark.parametrize("mode", [pytest.param("step", marks=pytest.mark.slow), "none"])
def test_long_windows_grow_as_they_are_drawn_out(tiny_folder, tmp_path, mode):
    """A straight line through two short windows meets the long one."""
    policy, reward, steps = align.load_policy(tiny_folder, device="meta", dtype="float32"), Brightness(), 5
    config = settings(tmp_path, steps=steps, batch=1, micro_batch=1, memory=Memory(mode))
    source = Prompts(PROMPTS).bind(reward)
    line = training_walk(policy, Backprop("all").bind(reward), source, config, CPU)
    walked = _trained(policy, Backprop("last", k=steps).bind(reward), source, config, CPU)
    assert line.peak == pytest.approx(walked.peak, rel=1e-4)


def test_a_policy_without_weights_has_the_shapes_of_one_with():
    real, hollow = align.load_policy(device="cpu"), align.load_policy(device="meta", dtype="float32")
    shapes = [{n: (t.shape, t.dtype) for n, t in policy.state_dict().items()} for policy in (real, hollow)]
    assert shapes[0] == shapes[1]
    assert all(t.is_meta for t in hollow.state_dict().values())


def test_rewards_are_foreseen_without_their_weights(monkeypatch):
    folder = str(align.loading.ASSETS / "tiny-clip")
    real = CLIPScore(folder)
    from transformers import CLIPModel

    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *how, **more: pytest.fail("weights were read"))
    with hollow(), Phantom(CPU):
        reward = CLIPScore(folder)
    assert weights(reward, Brightness()) == weights(real, Brightness())

    def slope(reward, device):
        reward(torch.full((2, 3, 32, 32), 0.5, device=device, requires_grad=True), PROMPTS).sum().backward()

    with LiveBytes() as live:
        slope(real, "cpu")
    with Phantom(CPU) as phantom:
        slope(reward.to("meta"), "meta")
    assert abs(phantom.peak / live.peak - 1) < 0.02


def test_a_reward_that_is_not_here_is_left_out_and_that_is_said(tiny_folder):
    config = {
        "model": str(tiny_folder),
        "reward": {"class_path": "CrossEncoder", "init_args": {"model": "/no/such/folder"}},
    }
    (found,) = align.plan({**config, "steering": "BestOfN", "particles": 2, "steps": 2, "batch": 2}, "24GB")
    assert "not counted" in found.table() and "/no/such/folder" in found.table()


def test_weights_count_by_their_bits_and_while_they_are_there(tiny_folder):
    policy = align.load_policy(tiny_folder, device="meta", dtype="bfloat16")
    whole = kept(policy, [], CPU)
    linear = [m.weight.numel() for m in policy.network.modules() if isinstance(m, torch.nn.Linear)]
    policy.loaded_with = {"quantize": "int8"}
    few = kept(policy, [], CPU)
    assert whole.bytes["network"] - few.bytes["network"] == sum(linear)
    assert few.lifted == 2 * max(linear)
    policy.loaded_with = {"offload": "model"}
    model = kept(policy, [torch.nn.Linear(10, 10, bias=False)], CPU)
    assert model.during("steer: network") == 400 + whole.bytes["network"]
    assert model.during("steer: decoder") == 400 + whole.bytes["decoder"]
    assert model.during("steer") == 400 + max(whole.bytes.values())
    policy.loaded_with = {"offload": "sequential"}
    layers = kept(policy, [], CPU)
    assert layers.during("steer: network") == 2 * layers.layer["network"] < whole.bytes["network"]
    assert layers.during("update: backward") == whole.bytes["network"]
    policy.checkpointing = "block"
    assert layers.layer["network"] < kept(policy, [], CPU).during("update: backward") < whole.bytes["network"]


# Exactness of what is proposed


@pytest.mark.parametrize("mode", ["none", "step", "block"])
def test_decoding_in_chunks_changes_no_gradient(tiny_folder, mode):
    policy = align.load_policy(tiny_folder, device="cpu", dtype="float32").double()
    latents = torch.randn(
        5, *policy.shape(policy.size), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    found = []
    for chunk in (8, 2, 1):
        Memory(mode, decode_chunk=chunk).apply(policy)
        x = latents.clone().requires_grad_()
        media = policy.decode(x)
        found.append(
            (
                media.detach(),
                torch.autograd.grad(media.square().mul(torch.arange(5.0)[:, None, None, None]).sum(), x)[0],
            )
        )
    assert float(found[0][1].abs().max()) > 1e-3
    for media, gradient in found[1:]:
        torch.testing.assert_close(media, found[0][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-8, atol=1e-12)


# Tensors without data


def test_bytes_are_those_of_live_storages_by_who_made_them():
    with Phantom(CPU) as phantom:
        phantom.act = "work"
        kept = torch.empty(1000, device="meta")
        with phantom.doing("network"):
            gone = kept + 1
            also = gone[:500]
            del gone, also
        later = torch.empty(250, device="meta")
    assert {name: moment.total for name, moment in phantom.phases.items()} == {"work": 5000, "work: network": 8000}
    assert phantom.phases["work: network"].parts == {"states": 4000, "network": 4000}
    del kept, later
    assert phantom.now == 0


def test_gpus_hand_out_multiples_of_512_bytes():
    with Phantom(GPU) as phantom:
        kept = [torch.empty(size, device="meta", dtype=torch.uint8) for size in (1, 512, 513)]
    assert phantom.peak == 512 + 512 + 1024
    del kept


def test_a_run_is_told_that_every_number_is_a_half():
    with Phantom(CPU):
        x = torch.empty(3, 2, device="meta")
        assert bool(x.isfinite().all()) and not bool(x.isnan().any()) and not bool((~x.isfinite()).any())
        low, high = torch.aminmax(x)
        assert not (low < 0 or high > 1)
        assert float(x.mean()) == 0.5
        numbers = x.cpu()
        assert len(numbers.unique()) == 6 and bool(((numbers > 0.3) & (numbers < 0.7)).all())
        assert bool(x.flatten(1).isfinite().all(1).cpu().all())
        assert x[x[:, 0] > 0.1].shape == (3, 2) and x[x[:, 0] > 0.9].shape == (0, 2)


def test_a_call_without_a_graph_is_walked_once():
    network, calls = torch.nn.Linear(4, 4, device="meta"), []
    network.register_forward_hook(lambda *how: calls.append("hooked"))
    inner = network.forward
    network.forward = lambda x: calls.append("walked") or inner(x).relu()
    with Phantom(CPU) as phantom, phantom.repeating(network):
        for grad in (False, False, True):
            phantom.phases.clear()
            with torch.set_grad_enabled(grad):
                assert network(torch.empty(8, 4, device="meta")).shape == (8, 4)
            assert phantom.phases[""].total == 3 * 8 * 4 * 4
    assert calls == ["walked", "hooked", "hooked", "walked", "hooked"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gpu", [True, False])
def test_attention_keeps_no_matrix(gpu, dtype):
    batch, heads, length, width = 2, 3, 256, 16
    with Phantom(GPU if gpu else CPU) as phantom:
        given = [
            torch.empty(batch, heads, length, width, device="meta", dtype=dtype, requires_grad=True) for _ in range(3)
        ]
        before = phantom.now
        out = F.scaled_dot_product_attention(*given)
        kept = phantom.now - before
        out.sum().backward()
    own = out.numel() * out.element_size()
    assert own + 4 * batch * heads * length <= kept <= own + 4 * batch * heads * length + 4 * 512
    assert phantom.peak < out.element_size() * batch * heads * length * length


def test_attention_on_the_cpu_keeps_what_it_keeps():
    def attend(device):
        x = torch.ones(2, 3, 64, 16, device=device, requires_grad=True)
        mask = torch.ones(64, 64, dtype=torch.bool, device=device)
        out = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        out.sum().backward()

    with LiveBytes() as live:
        attend("cpu")
    with Phantom(CPU) as phantom:
        attend("meta")
    assert phantom.peak == live.peak


# Targets


def test_targets_are_sizes_or_names():
    assert Target.of("24GB").room == pytest.approx(24e9, rel=0.03)
    assert Target.of("24 GiB").room > Target.of("24gb").room
    assert Target.of("A100 80GB") == Target.of("a100_80") == Target.of("A100-80")
    assert Target.of("A100-80").room > 75 * GIB
    assert Target.of("h100").workspace > Target.of("a100-80").workspace > 0
    assert Target.of(None).name == Target.here().name
    for wrong in ("24 parsecs", "gtx", "-3GB", "0GB"):
        with pytest.raises(ValueError, match=r"24GB or 16GiB, or one of .*h100"):
            Target.of(wrong)


# Proposals


class Linear(_Run):
    """A run whose memory is a formula."""

    what, model = "train", "m"

    def walk(self, settings):
        rows, half = settings.get("rows", 8), settings.get("dtype") == "bfloat16"
        network = rows * (10 if settings.get("mode") == "block" else 40)
        decoder = settings.get("chunk", 8) * 10
        return Walk(Kept({"network": 50 if half else 100}), {"a": Moment(network), "b": Moment(decoder)})

    def ladders(self):
        yield from _halved("chunk", 8)
        yield from _halved("rows", 8, least=2)
        yield "mode", ["block"]
        yield "dtype", ["bfloat16"]


@pytest.mark.parametrize(
    ("room", "settings"),
    [
        (420, {}),
        (419, {"rows": 4}),  # the decoder is not the peak: its chunks stay
        (259, {"rows": 2}),
        (179, {"chunk": 4, "rows": 4, "mode": "block"}),  # 100 of weights + max(40, 40)
        (129, {"chunk": 2, "rows": 2, "mode": "block"}),
        (119, {"chunk": 4, "rows": 4, "mode": "block", "dtype": "bfloat16"}),
        (60, {"chunk": 2, "rows": 2, "mode": "block", "dtype": "bfloat16"}),  # 70 at best
    ],
)
def test_changes_are_the_cheapest_that_fit_each_as_mild_as_it_may_be(room, settings):
    target, tried = Target("x", room), []
    found = _planned(Linear(target), target, tried.append)
    assert found.fits == (room >= 70)
    assert tried[0] == "train: as asked" and len(tried) == len(set(tried))
    assert found.settings == settings


def test_settings_are_pasted_as_they_are_told():
    walk = Walk(Kept(), {"a": Moment(1)})
    found = Plan(
        "train", "m", GPU, walk, {"memory.checkpointing": "block", "memory.decode_chunk": 1, "dtype": "bfloat16"}, walk
    )
    assert yaml.safe_load(found.yaml()) == {
        "memory": {"checkpointing": "block", "decode_chunk": 1},
        "dtype": "bfloat16",
    }


def test_what_a_run_sees_to_by_itself_is_no_setting():
    walk = Walk(Kept(), {"a": Moment(1)})
    found = Plan("steer", "m", GPU, walk, {"rows_at_once": 2, "batch": 4}, walk)
    assert yaml.safe_load(found.yaml()) == {"batch": 4}
    assert "where memory is short: rows_at_once 2." in found.table()


def test_a_training_run_is_made_to_fit(tiny_folder):
    config = {
        "model": str(tiny_folder), "reward": "Brightness", "objective": "Backprop", "dtype": "float32", "steps": 2, "batch": 4,
        "source": {"class_path": "Prompts", "init_args": {"prompts": PROMPTS}}, "micro_batch": 4, "eval_prompts": PROMPTS[:1],
        "eval_samples": 1, "sample_rows": 1, "lora": {"rank": 4}, "memory": {"decode_chunk": 1},
    }  # fmt: skip
    (easy,) = align.plan(config, "24GB")
    assert easy.fits and easy.fitting is None and "to spare" in easy.table()
    (found,) = align.plan(config, f"{(0.8 * easy.walk.peak + (600 << 20)) / 1e6}MB")
    assert found.fits and list(found.settings) == ["micro_batch"]
    (pasted,) = align.plan({**config, **yaml.safe_load(found.yaml())}, "24GB")
    assert pasted.walk.peak == found.last.peak
    assert "It fits with these settings" in found.table()


def test_the_command_plans_configurations(tiny_folder, tmp_path, capsys):
    file, out = tmp_path / "config.yaml", tmp_path / "fits.yaml"
    how = {"model": str(tiny_folder), "reward": "Brightness", "steering": "FeynmanKac", "steps": 2, "batch": 2}
    file.write_text(yaml.safe_dump({**how, "particles": 2}))
    assert main(["plan", str(file), "--gpu", "24GB", "--set", "particles=1", "--json", "--write", str(out)]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["what"], found["fits"], found["settings"]) == ("steer", True, {})
    assert found["asked"]["peak"] == max(phase["total"] for phase in found["asked"]["phases"].values())
    assert yaml.safe_load(out.read_text()) == {}
    assert main(["plan", str(file), "--gpu", "601MB"]) == 1
    assert "too few" in capsys.readouterr().out


def test_networks_beside_the_model_are_counted(tmp_path):
    pipe = build_controlled_sd()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    plain = {name: entry for name, entry in index.items() if name != "controlnet"}
    run = {"reward": "Brightness", "particles": 2, "batch": 2, "steps": 2, "dtype": "float32", "model": str(tmp_path)}
    (whole,) = align.plan(run, "24GB")
    (tmp_path / "model_index.json").write_text(json.dumps(plain | {"_class_name": "StableDiffusionPipeline"}))
    (joined,) = align.plan({**run, "controlnet": str(tmp_path / "controlnet")}, "24GB")
    assert joined.walk == whole.walk
    assert joined.walk.weights.bytes["controlnet"] >= sum(p.nbytes for p in pipe.controlnet.parameters())


def test_rewards_that_are_not_here_are_named(tiny_folder):
    reward = {"class_path": "Weighted", "init_args": {"rewards": ["ImageReward"]}}
    config = {"model": str(tiny_folder), "reward": reward, "particles": 1, "batch": 1, "steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        (found,) = align.plan(config, "24GB")
    assert any("not counted: cannot load" in note for note in found.notes)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tiny-sd", "--gpu", "1.2.3GB"], "a GPU is a size such as 24GB"),
        (["no/such/folder/here", "--gpu", "24GB"], "no folder"),
        (["tiny-sd", "--gpu", "big"], "a GPU is a size such as 24GB"),
        (["tiny-sd", "--gpu", "24GB", "--set", "steps"], "--set takes key=value"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_is_named(argv, said, capsys):
    assert main(["plan", *argv]) == 2
    assert said in capsys.readouterr().err
