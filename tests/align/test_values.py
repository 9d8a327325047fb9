"""Values learned from rollouts and from preferences, against exact soft values; what a run leaves, refuses and continues."""

import json
import math

import pytest
import torch
from PIL import Image

import align
from align import values
from align.cli import main
from align.prompts import world_prompts
from align.sampling import Sampling
from align.states import States, StatesOf
from align.values import ValueConfig, fit_value, train_value
from rewards import JPEGSize, as_prompts
from samplers import DDIM, Compose, FeynmanKac, Guided, LatentValue, SeededNoise, rollout
from samplers.families.gaussian import GaussianPolicy
from samplers.values import early_layers
from tests.align.test_cli import kilter
from tests.conftest import Linear
from tests.oracles import ddim_coefficients, gaussian_chain, gaussian_continuation, tilted_linear

MEAN, STD, STEPS = 0.5, 0.8, 6
SMALL = {"hidden": (32, 32), "updates": 400, "batch": 256, "learning_rate": 5e-3, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def policy():
    policy = GaussianPolicy([MEAN], [STD])
    policy.steps = STEPS
    return policy


class Noise(Linear):
    modality = "audio"


def exact(policy):
    """The law of every state of the chain, and what the chain makes of one."""
    levels = policy.levels(STEPS)
    law = gaussian_chain(levels.alpha, levels.sigma, MEAN, STD, ddim_coefficients(levels.alpha, levels.sigma, 1.0))
    return levels, law, gaussian_continuation(law)


@pytest.mark.parametrize(("loss", "beta"), [("mse", 1.0), ("soft", 0.5)])
def test_the_exact_value_of_the_chain_is_learned(loss, beta, policy, tmp_path):
    """E[r | x_t] by squares, β·log E[exp(r/β) | x_t] by the exponential loss: they differ by up to 0.35 here."""
    config = ValueConfig(loss=loss, beta=beta, held="samples", samples=2000, rows=2000, **SMALL)
    learned = train_value(policy, Linear(), prompts=["any"], config=config, out=tmp_path)
    value = LatentValue(str(learned.folder))
    value.attach(policy)
    levels, law, (slope, offset, var) = exact(policy)
    extra = torch.zeros_like(var) if loss == "mse" else var / (2 * beta)
    assert extra[0] == 0 or extra[0] > 0.3
    for i in range(STEPS):
        x = (law.mean[i] + law.var[i].sqrt() * torch.linspace(-1.5, 1.5, 7, dtype=torch.float64))[:, None]
        told = value(x, levels[i], policy.encode([""] * 7), [])
        assert (told - (slope[i] * x[:, 0] + offset[i] + extra[i])).abs().max() < 0.12, i


def test_a_learned_value_steers_without_bias_and_with_less_variance(policy, tmp_path):
    """Guided by its gradient and weighed by it, the evidence is right; resampling has less to do than without guidance."""
    config = ValueConfig(loss="soft", beta=0.5, held="samples", samples=2000, rows=2000, **SMALL)
    value = LatentValue(str(train_value(policy, Linear(), prompts=["any"], config=config, out=tmp_path).folder))
    _, law, _ = exact(policy)
    log_z, _, _ = tilted_linear(float(law.mean[-1]), float(law.var[-1]), 2.0)
    noise, spread = SeededNoise(range(8000), (1,), dtype=torch.float64), {}
    weigh = FeynmanKac(Linear(), 0.5, value=value)
    for name, how in {"weighed": weigh, "guided": Compose(Guided(value=value, scale=2.0), weigh)}.items():
        ended = rollout(
            policy, DDIM(1.0), policy.encode([""] * 1000), policy.levels(STEPS), noise, particles=8, steering=how
        )
        ratio = (ended.log_z - log_z).exp()
        assert abs((ratio.mean() - 1) / (ratio.std() / 1000**0.5)) < 3.5
        spread[name] = float(ratio.var())
    assert spread["guided"] < 0.3 * spread["weighed"], spread


def preferences(count=4000):
    """States of one level whose winners differ in the first feature only, by a logistic law of slope 2."""
    g = torch.Generator().manual_seed(0)
    seen = torch.randn(2 * count, 1, 3, generator=g)
    pairs = torch.arange(2 * count).view(count, 2)
    lead = 2 * (seen[pairs[:, 0], 0, 0] - seen[pairs[:, 1], 0, 0])
    first = torch.rand(count, generator=g) < lead.sigmoid()
    pairs = torch.where(first[:, None], pairs, pairs.flip(1))
    unknown = torch.full((2 * count, 1), torch.nan)
    return States(seen, unknown, unknown, unknown[:, 0], torch.arange(2 * count) // 2, pairs)


def test_preferences_are_learned_up_to_a_constant():
    states = preferences()
    config = ValueConfig(loss="preference", states="diffused", **{**SMALL, "hidden": (16,)})
    head, curve = fit_value(states.take(torch.arange(6000)), states.take(torch.arange(6000, 8000)), config)
    x = torch.zeros(2, 3)
    x[1, 0] = 1.0
    low, high = head(x)
    assert 1.6 < high - low < 2.4
    assert min(held for _, _, held in curve) < 0.5 < math.log(2)


def test_the_same_seed_learns_the_same_and_a_cut_off_run_goes_on(policy, tmp_path, monkeypatch):
    how = {"prompts": ["a", "b", "c", "d", "e"], "config": ValueConfig(samples=3, rows=4, **{**SMALL, "updates": 20})}
    whole = train_value(policy, Linear(), out=tmp_path / "whole", **how)

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(values, "fit_value", cut)
        with pytest.raises(KeyboardInterrupt):
            train_value(policy, Linear(), out=tmp_path / "cut", **how)
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {"asked.json", "states.pt"}
    with pytest.raises(FileExistsError, match="another run that was cut off"):
        train_value(policy, Linear(2.0), out=tmp_path / "cut", **how)
    monkeypatch.setattr(StatesOf, "_chunk", cut)  # nothing is sampled again
    resumed = train_value(policy, Linear(), out=tmp_path / "cut", **how)
    names = {"config.json", "model.safetensors", "report.json", "report.png"}
    assert {p.name for p in resumed.folder.iterdir()} == names
    for name in names - {"report.png"}:
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes()


def test_states_do_not_depend_on_the_batch_and_what_is_compared_shares_its_noise(policy):
    def made(kind, rows):
        sampling = Sampling.of(policy, rows=rows)
        maker = StatesOf(policy, [], Linear(), sampling, kind, 4, seed=3)
        return maker.sampled(as_prompts(["a", "b"]), 3, {4}, None, False)

    for kind in ("path", "diffused"):
        one, other = made(kind, 1), made(kind, 5)
        assert torch.equal(one.seen, other.seen) and torch.equal(one.reward, other.reward)
        assert one.estimate[4].isfinite().all() and one.estimate[:4].isnan().all()
        better, worse = one.reward[one.pairs].T
        assert (better > worse).all() and len(one.pairs) == 6
    x = one.seen[:, :, 0]  # "diffused": alpha·x0 + sigma·eps, of which only x0 differs within a prompt
    assert torch.equal(one.noise[0], one.noise[2]) and not torch.equal(one.noise[0], one.noise[3])
    at = policy.training_levels(torch.zeros(1))
    assert at.alpha[0] > 0.9 and (one.noise.diff(dim=1) < 0).all()
    ratio = one.noise / (1 - one.noise)  # sigma / alpha
    alpha = (1 + ratio.square()).rsqrt()
    assert torch.allclose(x[1] - x[0], alpha[0] * (one.reward[1] - one.reward[0]), atol=1e-5)


@pytest.fixture(scope="module")
def learned(tiny_folder, tmp_path_factory):
    """A value of the random model, with the prompts it was learned from."""
    out = tmp_path_factory.mktemp("value") / "run"
    argv = [
        "train-value",
        "a cat",
        "two dogs",
        "a red box",
        "--model",
        tiny_folder,
        "--reward",
        "Brightness",
        "--steps",
        3,
    ]
    argv += [
        "--samples",
        4,
        "--held",
        "samples",
        "--holdout",
        0.5,
        "--updates",
        60,
        "--device",
        "cpu",
        "--out",
        out,
        "--json",
    ]
    assert main([str(a) for a in argv]) == 0
    return out


def test_the_command_writes_what_steer_reads(learned, tiny_folder, tmp_path, capsys):
    report = json.loads((learned / "report.json").read_text())
    assert report["samples"] == 12 and report["unjudged"] == 0
    assert all(len(report[name]) == 3 for name in ("noise", "value", "value_within", "estimate", "accuracy"))
    for how in (["FeynmanKac"], ["SVDD"], ["Guided", "--steering.form", "score", "--kernel", "ODE"]):
        code, out, err = kilter(
            capsys, "steer", "a cat", "--model", tiny_folder, "--steps", 3, "--particles", 2, "--plain", "false",
            "--reward", "Brightness", "--steering", *how, "--steering.value", "LatentValue", "--steering.value.model", learned,
            "--device", "cpu", "--overwrite", "--out", tmp_path / "steered", "--json",
        )  # fmt: skip
        assert code == 0, err
        assert json.loads(out)["ledger"]["decodes"] == 2  # of the result alone


def test_a_call_runs_the_early_layers_alone_and_has_the_gradient_of_what_it_says(learned, tiny_folder):
    policy = align.load_policy(tiny_folder, device="cpu", dtype="float32")
    value = LatentValue(str(learned))
    assert value.config["layers"] == ["mid_block"]
    value.attach(policy)
    late = []
    for block in policy.network.up_blocks:
        block.register_forward_hook(lambda *_: late.append(1))
    cond, at = policy.encode(["a cat", "two dogs"]).with_guidance(5.0), policy.levels(3)[1]
    x = torch.randn(2, *policy.shape(policy.size), generator=torch.Generator().manual_seed(0), requires_grad=True)
    told = value(x, at, cond, [])
    (slope,) = torch.autograd.grad(told.sum(), x)
    assert not late and not any(module._forward_hooks for module in policy.network.mid_block.modules())
    step = 1e-2 * slope / slope.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        rise = value(x + step, at, cond, []) - value(x - step, at, cond, [])
    assert torch.allclose(rise, 2e-2 * slope.flatten(1).norm(dim=1), rtol=2e-2)
    with torch.no_grad():
        alone = [value(x[[i]], at, cond[[i]], []) for i in range(2)]
    assert torch.allclose(torch.cat(alone), told, atol=1e-5)
    assert not torch.allclose(value(x, at, cond[[1, 0]], []), told)  # the condition matters
    rows = torch.tensor([1, 1])
    assert torch.allclose(value(x, policy.levels(3)[rows], cond, []), told, atol=1e-5)


def test_a_value_refuses_what_it_was_not_trained_on(learned, tiny_folder, tmp_path):
    other = align.load_policy(tiny_folder, device="cpu", dtype="float32")
    with torch.no_grad():
        other.network.conv_in.weight.mul_(1.5)
    with pytest.raises(ValueError, match="was trained on another model"):
        LatentValue(str(learned)).attach(other)
    with pytest.raises(ValueError, match="has no layer"):
        LatentValue(str(learned)).attach(GaussianPolicy([0.5]))
    with pytest.raises(OSError, match="is no value: it needs config"):
        LatentValue(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((learned / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden": [4]}))
    with pytest.raises(ValueError, match="does not hold the weights"):
        LatentValue(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        LatentValue(str(tmp_path))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({}, "from a reward or from preferences"),
        ({"reward": Linear(), "preferences": "x"}, "from a reward or from preferences"),
        ({"reward": Linear()}, "no prompts"),
        ({"reward": Linear(), "prompts": ["a", "b"]}, "cannot be held out"),
        ({"reward": Linear(0.0), "prompts": ["a"], "config": ValueConfig(held="samples", rows=8)}, "all of one reward"),
        ({"reward": Linear(), "prompts": ["a"], "config": ValueConfig(layers=["nowhere"], held="samples")}, "no layer"),
        ({"preferences": "x", "config": ValueConfig()}, "take loss"),
        (
            {"preferences": "x", "config": ValueConfig(loss="preference", states="diffused", held="samples")},
            "hold out whole prompts",
        ),
        ({"reward": Noise(), "prompts": ["a"]}, "scores audio, but the model makes image"),
    ],
)
def test_what_does_not_fit_is_refused(how, named, policy, tmp_path):
    with pytest.raises(ValueError, match=named):
        train_value(policy, how.pop("reward", None), out=tmp_path, **how)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"updates": 0}, "updates"),
        ({"holdout": 1.0}, "holdout"),
        ({"loss": "preference"}, "diffused"),
        ({"held": "samples", "samples": 1}, "at least 2"),
    ],
)
def test_settings_out_of_range(arguments, named):
    with pytest.raises(ValueError, match=named):
        ValueConfig(**arguments)


def test_preferences_of_people_teach_a_value(tiny_folder, tmp_path):
    """Images are encoded and noised alike; a file of our own preferences."""
    policy = align.load_policy(tiny_folder, device="cpu", dtype="float32")
    lines = []
    for i in range(6):
        names = [f"{i}-{side}.png" for side in "ab"]
        for name, level in zip(names, (40, 200), strict=True):
            Image.new("RGB", (16, 16), (level + i, level, level)).save(tmp_path / name)
        lines.append({"prompt": f"cat {i % 3}", "images": names, "winner": 1})
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = ValueConfig(loss="preference", states="diffused", levels=4, holdout=0.4, updates=50, learning_rate=1e-2)
    learned = train_value(policy, preferences=tmp_path / "told.jsonl", config=config, out=tmp_path / "run")
    assert learned.report["accuracy"][-1] == 1.0
    assert "value" not in learned.report


def test_the_layers_that_are_read_by_default():
    stack = torch.nn.Module()
    stack.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(9))
    stack.few = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    assert early_layers(stack) == ["blocks.2"]
    assert early_layers(torch.nn.Linear(2, 2)) == []


@pytest.mark.slow
def test_the_embedded_model_tells_early_how_its_samples_will_compress(tmp_path):
    """On prompts it has not seen: beyond chance within prompts, and better than the clean estimate where there is most noise."""
    policy = align.load_policy(device="cpu")
    config = ValueConfig(samples=3, updates=300, holdout=0.3)
    report = train_value(
        policy, JPEGSize(), prompts=world_prompts("shapes", "train")[::3], config=config, out=tmp_path
    ).report
    noisy = [i for i, noise in enumerate(report["noise"]) if noise > 0.5]
    assert report["value"][0] > report["estimate"][0] + 0.05
    assert min(report["value_within"][i] for i in noisy[-4:]) > 0.35  # of 54 differences: a standard error is 0.14
