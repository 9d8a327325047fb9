"""Combinators: linearity, NaN, frames, micro-batches, and what they inherit from their children."""

import pytest
import torch

from rewards import (
    Batched,
    Brightness,
    CLIPScore,
    Colour,
    Framewise,
    JPEGSize,
    PickScore,
    Product,
    Reward,
    Scores,
    Sharpness,
    Weighted,
)
from rewards.preprocess import Preprocess
from tests.rewards.tiny import natural


class Spy(Reward):
    """Mean square pixel plus the length of the prompt; remembers the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def measure(self, media, prompts):
        self.calls.append(len(media))
        value = media.square().flatten(1).mean(dim=1) + torch.tensor([float(len(p.text)) for p in prompts])
        return Scores(value, {"twice": 2 * value})


class Fails(Reward):
    """Cannot judge the first sample."""

    needs_prompt = False

    def measure(self, media, prompts):
        return media.flatten(1).mean(dim=1).where(torch.arange(len(media)) > 0, torch.nan)


IMAGES = natural(5, 20, 24)
VIDEO = natural(6, 20, 24).unflatten(0, (2, 3))
PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def test_the_sum_is_linear_and_its_parts_are_unweighted() -> None:
    bright, red = Brightness(), Colour("red")
    scores = Weighted([bright, red], [2.0, -0.5]).score(IMAGES)
    torch.testing.assert_close(scores.total, 2 * bright(IMAGES) - 0.5 * red(IMAGES))
    torch.testing.assert_close(scores.parts["Brightness"], bright(IMAGES))
    torch.testing.assert_close(scores.parts["Colour"], red(IMAGES))


def test_names_of_parts() -> None:
    pair = Weighted([Colour("red"), Colour("blue")])
    assert list(pair.score(IMAGES).parts) == ["Colour", "Colour_2"]
    named = Weighted({"warm": Colour("red"), "cold": Colour("blue")}, {"cold": -1.0, "warm": 1.0})
    scores = named.score(IMAGES)
    torch.testing.assert_close(scores.total, scores.parts["warm"] - scores.parts["cold"])
    assert named.name == "Weighted(warm, cold)"


def test_weights_default_to_one_and_sums_nest() -> None:
    inner = Weighted([Brightness(), Sharpness()])
    outer = Weighted([inner, Brightness()], [3.0, 1.0])
    torch.testing.assert_close(outer(IMAGES), 4 * Brightness()(IMAGES) + 3 * Sharpness()(IMAGES))


def test_gradient_of_a_sum_is_the_sum_of_gradients() -> None:
    x = IMAGES.clone().requires_grad_()
    rewards = [Brightness(), Colour("blue"), Sharpness()]
    (whole,) = torch.autograd.grad(Weighted(rewards, [1.0, 2.0, -3.0])(x).sum(), x)
    pieces = [torch.autograd.grad(w * r(x).sum(), x)[0] for r, w in zip(rewards, (1.0, 2.0, -3.0), strict=True)]
    torch.testing.assert_close(whole, sum(pieces))


@pytest.mark.parametrize("weight", [1.0, 0.0, -1.0])
def test_nan_of_a_child_is_nan_of_the_row(weight: float) -> None:
    scores = Weighted([Brightness(), Fails()], [1.0, weight]).score(IMAGES)
    assert scores.total.isnan().tolist() == [True, False, False, False, False]
    assert not scores.parts["Brightness"].isnan().any()


def test_a_product_is_as_good_as_all_its_factors() -> None:
    bright, red = Brightness(), Colour("red")
    x = IMAGES.clone().requires_grad_()
    scores = Product({"bright": bright, "red": red}).score(x)
    torch.testing.assert_close(scores.total, bright(x) * red(x))
    assert list(scores.parts) == ["bright", "red"]
    (gradient,) = torch.autograd.grad(scores.total.sum(), x)
    expected = torch.autograd.grad((bright(x) * red(x).detach() + bright(x).detach() * red(x)).sum(), x)[0]
    torch.testing.assert_close(gradient, expected)
    assert Product([bright, Fails()])(IMAGES).isnan().tolist() == [True, False, False, False, False]


def test_a_factor_of_zero_still_has_its_slope() -> None:
    x = IMAGES.clone().requires_grad_()
    zero, two = Weighted([Brightness()], [0.0]), Weighted([Brightness()], [2.0])
    (gradient,) = torch.autograd.grad(Product([zero, two])(x).sum(), x)
    assert gradient.isfinite().all()


class Ranks(Reward):
    """Compares the samples of a call."""

    needs_prompt = False
    compares = True

    def measure(self, media, prompts):
        return media.flatten(1).mean(1).argsort().argsort().float()


def test_what_compares_samples_is_not_taken_apart() -> None:
    assert Weighted([Ranks(), Brightness()]).compares
    assert not Weighted([Sharpness(), Brightness()]).compares
    with pytest.raises(ValueError, match="put Batched around its parts"):
        Batched(Weighted([Ranks(), Brightness()]))
    with pytest.raises(ValueError, match="put it around Framewise"):
        Framewise(Ranks())


def test_what_a_sum_inherits() -> None:
    assert not Weighted([Brightness(), JPEGSize()]).differentiable
    assert Weighted([Brightness(), Spy()]).needs_prompt
    assert not Weighted([Brightness(), Sharpness()]).needs_prompt
    assert Weighted([Framewise(Brightness())]).modality == "video"
    with pytest.raises(RuntimeError, match=r"Weighted\(Brightness, JPEGSize\) is not differentiable"):
        Weighted([Brightness(), JPEGSize()])(IMAGES.clone().requires_grad_())


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ([], None, "at least one reward"),
        ({}, None, "at least one reward"),
        ([Brightness()], [1.0, 2.0], "got 2 for 1"),
        ([Brightness(), Sharpness()], [1.0], "got 1 for 2"),
        ([Brightness()], [float("nan")], "finite"),
        ({"a": Brightness()}, {"b": 1.0}, r"must name the rewards \['a'\]; got \['b'\]"),
        ([Brightness(), Framewise(Brightness())], None, "one modality.*Framewise"),
    ],
)
def test_wrong_sums_raise(rewards, weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        Weighted(rewards, weights)


@pytest.mark.parametrize("reduce", ["mean", "min", "max", "median"])
def test_framewise_is_the_image_reward_of_each_frame_reduced(reduce: str) -> None:
    spy = Spy()
    scores = Framewise(spy, reduce).score(VIDEO, ["a", "bbb"])
    assert spy.calls == [6]
    frames = torch.stack([Spy()(VIDEO[:, i], ["a", "bbb"]) for i in range(3)], dim=1)
    expected = (
        frames.median(dim=1).values if reduce == "median" else getattr(torch, f"a{reduce}", torch.mean)(frames, 1)
    )
    torch.testing.assert_close(scores.total, expected)
    torch.testing.assert_close(scores.parts["twice"], 2 * expected)


def test_framewise_gradient_reaches_every_frame_under_mean_and_one_under_min() -> None:
    x = VIDEO.clone().requires_grad_()
    (mean,) = torch.autograd.grad(Framewise(Brightness())(x).sum(), x)
    assert (mean.flatten(2).abs().sum(dim=2) > 0).all()
    (least,) = torch.autograd.grad(Framewise(Brightness(), "min")(x).sum(), x)
    assert (least.flatten(2).abs().sum(dim=2) > 0).sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize("reduce", ["mean", "min", "max", "median"])
def test_an_unjudged_frame_makes_the_video_unjudged(reduce: str) -> None:
    assert Framewise(Fails(), reduce)(VIDEO).isnan().tolist() == [True, False]


def test_wrong_lifts_raise() -> None:
    with pytest.raises(ValueError, match="looks at video"):
        Framewise(Framewise(Brightness()))
    with pytest.raises(ValueError, match="reduce must be one of"):
        Framewise(Brightness(), "sum")  # pyright: ignore[reportArgumentType]
    assert not Framewise(JPEGSize()).differentiable
    assert Framewise(Spy()).needs_prompt


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_micro_batches_change_nothing_but_the_calls(size: int, recompute: bool) -> None:
    spy = Spy()
    x = IMAGES.clone().requires_grad_()
    scores = Batched(spy, size, recompute).score(x, PROMPTS)
    assert spy.calls == [min(size, 5 - start) for start in range(0, 5, size)]
    whole = Spy().score(x, PROMPTS)
    torch.testing.assert_close(scores.total, whole.total)
    torch.testing.assert_close(scores.parts["twice"], whole.parts["twice"])
    weight = torch.arange(5.0)
    (gradient,) = torch.autograd.grad((scores.total * weight).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad((whole.total * weight).sum(), x)[0])
    if recompute:
        assert sum(spy.calls) == 10  # each sample was measured again by the backward pass


def test_micro_batches_inherit_and_check() -> None:
    assert Batched(Spy()).name == "Spy"
    assert Batched(Framewise(Brightness())).modality == "video"
    assert not Batched(JPEGSize()).differentiable
    torch.testing.assert_close(Batched(Brightness(), 2)(IMAGES), Brightness()(IMAGES))
    with pytest.raises(ValueError, match="at least 1"):
        Batched(Brightness(), 0)


def test_command_line_builds_nested_combinations() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    weighted = {
        "class_path": "rewards.Weighted",
        "init_args": {
            "rewards": [
                {"class_path": "rewards.Brightness"},
                {"class_path": "rewards.Colour", "init_args": {"target": [0.0, 0.5, 1.0]}},
            ],
            "weights": [1.0, 0.5],
        },
    }
    lifted = {"class_path": "rewards.Framewise", "init_args": {"reward": weighted, "reduce": "min"}}
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    reward = instantiate(parser.parse_object({"reward": lifted})).reward
    direct = Framewise(Weighted([Brightness(), Colour([0.0, 0.5, 1.0])], [1.0, 0.5]), "min")
    torch.testing.assert_close(reward(VIDEO), direct(VIDEO))


def test_parts_that_read_media_alike_prepare_them_once(clip_folder, monkeypatch) -> None:
    made = []
    prepared = Preprocess.prepared
    monkeypatch.setattr(Preprocess, "prepared", lambda self, x: made.append(self) or prepared(self, x))
    both = Weighted([CLIPScore(clip_folder), PickScore(clip_folder, clip_folder)])
    media = natural(2, 40, 40)
    scores = both.score(media, ["a red cat", "two dog"])
    assert len(made) == 1
    torch.testing.assert_close(scores.total, 2 * scores.parts["PickScore"])
