"""`align.steer` and `align.score` as functions."""

import json
import math

import pytest
import torch
from PIL import Image

import align
from rewards import Brightness, JPEGSize, Prompt, Reward, Scores
from samplers import DDIM, ODE, BestOfN, CoDe, Compose, FeynmanKac, Guided
from samplers.families.gaussian import GaussianPolicy
from tests.conftest import Linear

PROMPTS = ["a cat", "two dogs", "rain"]


@pytest.fixture(scope="module")
def policy(tiny_folder):
    return align.load_policy(tiny_folder)


class Stubborn(Brightness):
    """Refuses every sample."""

    def measure(self, media, prompts):
        return torch.full((len(media),), torch.nan)


class Tipsy(Brightness):
    """Refuses samples whose first pixel is dark."""

    def measure(self, media, prompts):
        return super().measure(media, prompts).masked_fill(media[:, 0, 0, 0] < 0.5, torch.nan)


def test_rows_arms_seeds_and_weights(policy):
    result = align.steer(policy, PROMPTS, FeynmanKac(Brightness(), 0.01), particles=3, steps=4, seed=5)
    assert [s.arm for s in result.samples] == (["plain"] * 9 + ["steered"] * 9)
    for arm in ("plain", "steered"):
        rows = result.arm(arm)
        assert [s.prompt for s in rows] == [p for p in PROMPTS for _ in range(3)]
        assert [s.seed for s in rows] == [align.row_seed(5, p, k) for p in range(3) for k in range(3)]
    assert len({s.seed for s in result.arm("plain")}) == 9
    for prompt in PROMPTS:
        rows = [s for s in result.arm() if s.prompt == prompt]
        assert math.isclose(sum(s.weight for s in rows), 1, rel_tol=1e-9)
        assert [s.best for s in rows].count(True) == 1
        best = next(s for s in rows if s.best)
        assert best.scores["Brightness"] == max(s.scores["Brightness"] for s in rows)
    assert [g["prompt"] for g in result.groups] == PROMPTS
    assert len(result.best) == 3


def test_chunks_do_not_change_results(policy):
    """Prompts in flight together or one after another: the same samples."""
    how = FeynmanKac(Brightness(), 0.01, resampler="multinomial")
    runs = [align.steer(policy, PROMPTS, how, particles=2, steps=4, batch=b) for b in (2, 4, 64)]
    for other in runs[1:]:
        for a, b in zip(sorted(runs[0].samples, key=key), sorted(other.samples, key=key), strict=True):
            assert torch.allclose(a.pixels, b.pixels, atol=1e-4)
            assert math.isclose(a.weight, b.weight, abs_tol=1e-3)


def key(sample):
    return sample.prompt, sample.arm, sample.seed


def test_the_ledger_counts_every_call(policy):
    steps, k = 4, 3
    result = align.steer(policy, "a cat", FeynmanKac(Brightness(), 0.1), particles=k, steps=steps, guidance=3.0)
    plain, steered = result.ledger["arms"]["plain"], result.ledger["arms"]["steered"]
    assert result.ledger["decodes"] == plain["decodes"] + steered["decodes"]
    assert plain["network_evaluations"] == steered["network_evaluations"] == 2 * k * steps
    assert (plain["decodes"], plain["reward_calls"]) == (k, k)
    assert (steered["decodes"], steered["reward_calls"]) == (k * (steps + 1), k * (steps + 1))
    unguided = align.steer(policy, "a cat", BestOfN(Brightness()), particles=k, steps=steps, guidance=1.0, plain=False)
    assert unguided.ledger["network_evaluations"] == k * steps
    guided = align.steer(policy, "a cat", Guided(Brightness(), 1.0), particles=k, steps=steps, plain=False)
    assert (
        guided.ledger["gradients"] == 2 * k * steps
    )  # both branches; its last level is not clean, so every step is noisy
    assert set(guided.ledger["arms"]) == {"steered"}


def test_steering_raises_what_it_steers_by(policy):
    """Brightness of a random network: the steered population is brighter than the plain one."""
    how = Compose(Guided(Brightness(), 300.0), FeynmanKac(Brightness(), 1 / 300))
    for steering in (FeynmanKac(Brightness(), 0.003), CoDe(Brightness(), block=2), how):
        result = align.steer(policy, PROMPTS, steering, particles=6, steps=6)
        assert result.mean("Brightness", "steered") > result.mean("Brightness", "plain")


def test_the_same_seed_gives_the_same_bytes(policy, tmp_path):
    for name in ("one", "two"):
        result = align.steer(policy, PROMPTS, FeynmanKac(Brightness(), 0.01), particles=2, steps=3, seed=9)
        result.save(tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.png"))
    assert len(files) == 13
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_a_run_writes(policy, tmp_path):
    result = align.steer(
        policy, PROMPTS[:2], FeynmanKac(Brightness(), 0.01), particles=2, steps=3, rewards=[Brightness()], gold=Tipsy()
    )
    folder = result.save(tmp_path / "run")
    written = json.loads((folder / "result.json").read_text())
    assert set(written) == {"config", "versions", "samples", "groups", "ledger", "failures", "stopped"}
    assert {"torch", "diffusers", "kilter"} <= set(written["versions"])
    for row, sample in zip(written["samples"], result.samples, strict=True):
        assert {"prompt", "seed", "arm", "image", "scores", "weight"} <= set(row)
        assert set(row["scores"]) == {"Brightness", "Brightness-2", "gold"}
        with Image.open(folder / row["image"]) as image:
            assert image.size == policy.size[::-1]
            assert image.text["prompt"] == row["prompt"]
            assert int(image.text["seed"]) == row["seed"]
            assert json.loads(image.text["scores"]) == row["scores"]
        assert sample.pixels.shape == (3, *policy.size)
    assert {"log_z", "ess", "unique_ancestors"} <= set(written["groups"][0])
    assert {"network_evaluations", "decodes", "reward_calls", "seconds"} <= set(written["ledger"])
    assert written["config"]["steering"]["class_path"].endswith("FeynmanKac")
    assert written["config"]["steering"]["init_args"]["beta"] == 0.01
    assert (folder / "grid.png").is_file()
    assert not list(folder.glob("*.partial"))


def test_samples_a_reward_cannot_judge_are_counted_not_scored(policy):
    result = align.steer(policy, PROMPTS, BestOfN(Brightness()), particles=4, steps=3, gold=Tipsy())
    missing = sum(s.scores["gold"] is None for s in result.samples)
    assert missing > 0
    assert result.failures == {"gold": missing}
    assert not math.isnan(result.mean("gold"))


def test_a_reward_that_fails_for_all_keeps_the_plain_arm_and_estimates(policy, tmp_path):
    result = align.steer(policy, PROMPTS, FeynmanKac(Stubborn(), 0.1), particles=2, steps=4)
    assert "Stubborn could judge no sample" in result.stopped
    assert len(result.arm("plain")) == len(result.arm("steered")) == 6
    written = json.loads((result.save(tmp_path / "run") / "result.json").read_text())
    assert written["stopped"] == result.stopped


def test_a_failure_midway_keeps_what_is_finished(policy):
    def fail(ctx):
        if len({p.text for p in ctx.prompts} & {"rain"}):
            raise torch.OutOfMemoryError("no memory left")

    result = align.steer(policy, PROMPTS, BestOfN(Brightness()), particles=2, steps=3, batch=2, watch=fail)
    assert result.stopped == "OutOfMemoryError: no memory left"
    assert not result.interrupted
    assert {s.prompt for s in result.samples} == {"a cat", "two dogs"}
    with pytest.raises(torch.OutOfMemoryError):
        align.steer(policy, ["rain"], BestOfN(Brightness()), particles=2, steps=3, watch=fail)


def test_an_image_that_is_not_finite_is_one_dead_particle(policy, monkeypatch):
    decode, calls = type(policy).decode, []

    def broken(self, x0, frames=None):
        media = decode(self, x0, frames)
        calls.append(1)
        if len(calls) == 2:
            media[1] = torch.nan
        return media

    monkeypatch.setattr(type(policy), "decode", broken)
    result = align.steer(policy, "a cat", BestOfN(Brightness()), particles=4, steps=3)
    assert result.stopped is None
    assert result.failures == {"Brightness": 1}
    assert [s.weight for s in result.arm()][1] == 0


def test_a_result_says_how_its_parts_were_made(policy):
    how = FeynmanKac(JPEGSize("incompressible", quality=80), 0.5, every=2)
    config = align.steer(policy, "a cat", how, particles=2, steps=2).config
    reward = config["steering"]["init_args"]["reward"]
    assert reward == {"class_path": "rewards.simple.JPEGSize", "init_args": {"aim": "incompressible", "quality": 80}}
    assert config["steering"]["init_args"]["every"] == 2
    assert config["kernel"]["class_path"] == "samplers.kernels.DDIM"


def test_ctrl_c_keeps_what_there_was(policy):
    def press(ctx):
        if ctx.step == 2 and ctx.ess:
            raise KeyboardInterrupt

    result = align.steer(policy, PROMPTS, FeynmanKac(Brightness(), 0.1), particles=2, steps=4, batch=2, watch=press)
    assert result.stopped.startswith("stopped at step 2 of 4")
    assert len(result.arm("plain")) == len(result.arm("steered")) == 2


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"prompts": []}, ValueError, "no prompts"),
        ({"prompts": ["  "]}, ValueError, "is empty"),
        ({"prompts": [3]}, TypeError, "str or Prompt"),
        ({"particles": 0}, ValueError, "particles"),
        ({"batch": 0}, ValueError, "batch"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 5000}, ValueError, "steps"),
        ({"size": (15, 16)}, ValueError, "size"),
        ({"steering": FeynmanKac()}, ValueError, "needs a reward"),
        ({"kernel": ODE()}, ValueError, "deterministic"),
        ({"kernel": DDIM(1.0, noisy_steps=[True])}, ValueError, "noisy_steps"),
    ],
)
def test_bad_input_fails_before_the_network_runs(policy, monkeypatch, changed, error, said):
    monkeypatch.setattr(type(policy), "predict", lambda *a: pytest.fail("the network ran"))
    arguments = {"prompts": ["a"], "steering": FeynmanKac(Brightness(), 0.1), "particles": 2, "steps": 3, **changed}
    with pytest.raises(error, match=said):
        align.steer(policy, **arguments)


def test_guidance_by_a_reward_without_gradient_is_refused(policy):
    reward = Brightness()
    reward.differentiable = False
    with pytest.raises(ValueError, match="Guided needs the gradient"):
        align.steer(policy, "a", Guided(reward), particles=2, steps=3)


def test_long_prompts_are_truncated_as_diffusers_does(policy):
    result = align.steer(policy, "cat " * 10_000, BestOfN(Brightness()), particles=1, steps=2, plain=False)
    assert result.samples[0].pixels.isfinite().all()


def test_scores_of_files_images_and_tensors_agree(tmp_path):
    pixels = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    eight_bit = [align.results.to_pil(p) for p in pixels]
    for i, image in enumerate(eight_bit):
        image.save(tmp_path / f"{i}.png")
    reward = Brightness()
    files = align.score(reward, [tmp_path / f"{i}.png" for i in range(3)]).total
    assert torch.equal(files, align.score(reward, eight_bit).total)
    assert torch.allclose(files, align.score(reward, pixels).total, atol=1 / 255)
    odd = [eight_bit[0], eight_bit[1].resize((9, 7)), eight_bit[2]]
    assert torch.equal(align.score(reward, odd, batch=1).total[[0, 2]], files[[0, 2]])


def test_transparent_and_grey_images_are_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 128).save(tmp_path / "grey.png")
    total = align.score(Brightness(), [tmp_path / "clear.png", tmp_path / "grey.png"]).total
    assert torch.allclose(total, torch.tensor([1.0, 128 / 255]), atol=1e-6)


def test_score_refuses_what_is_not_an_image(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"nothing of the kind")
    with pytest.raises(ValueError, match=r"broken\.png is not an image"):
        align.score(Brightness(), [tmp_path / "broken.png"])
    with pytest.raises(FileNotFoundError, match="no image file"):
        align.score(Brightness(), [tmp_path / "absent.png"])
    with pytest.raises(ValueError, match="2 prompts for 1 images"):
        align.score(Brightness(), torch.rand(1, 3, 4, 4), ["a", "b"])


def test_steering_works_on_any_policy():
    """`steer` knows no family: the Gaussian oracle goes through the same door."""
    policy = GaussianPolicy([0.5, 0.5], [0.8])
    result = align.steer(policy, ["x"], FeynmanKac(Linear(), 0.5), particles=256, steps=10, gold=None)
    plain, steered = (torch.stack([s.pixels for s in result.arm(a)]).mean() for a in ("plain", "steered"))
    assert steered > plain + 0.3
    assert isinstance(Linear(), Reward)
    assert isinstance(Linear().score(torch.zeros(1, 2), [Prompt("x")]), Scores)
