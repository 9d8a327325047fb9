"""Functions as rewards and rewards as functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import align
from align.cli import main
from rewards import (
    Brightness,
    CLIPScore,
    FromCallable,
    OCRAccuracy,
    Prompt,
    Reward,
    Scores,
    as_ddpo_fn,
    as_multi_score,
    from_callable,
)
from tests.rewards import tiny

IMAGES = (255 * tiny.natural(3, 20, 24)).round() / 255
PROMPTS = ["a cat", "a dog", "a bird"]
MEANS = IMAGES.mean(dim=(1, 2, 3))


def test_each_layout_holds_the_same_images() -> None:
    def of_tensor(images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    def of_array(images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.uint8 and images.shape == (3, 20, 24, 3)
        return images.mean(axis=(1, 2, 3)) / 255

    def of_pil(images: list[Image.Image]) -> list[float]:
        return [float(np.asarray(image).mean()) / 255 for image in images]

    for function, layout in ((of_tensor, "NCHW01"), (of_array, "uint8 NHWC"), (of_pil, "pil")):
        reward = FromCallable(function, layout)
        assert not reward.needs_prompt and reward.name == function.__name__
        torch.testing.assert_close(reward(IMAGES), MEANS, rtol=0, atol=1e-6)


def test_a_function_is_given_what_it_asks_for() -> None:
    def three(images, prompts, metadata):
        return [len(text) + m.get("bonus", 0) for text, m in zip(prompts, metadata, strict=True)]

    prompts = ["a cat", Prompt("a dog", meta={"bonus": 2}), "a bird"]
    assert from_callable(three)(IMAGES, prompts).tolist() == [5, 7, 6]
    assert FromCallable(lambda *given: [len(given)] * 3)(IMAGES, prompts).tolist() == [3, 3, 3]
    assert FromCallable(lambda images, prompts, scale=2: [scale] * 3)(IMAGES, prompts).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="needs one prompt a sample"):
        FromCallable(three)(IMAGES)
    for wrong in (lambda: 0, lambda a, b, c, d: 0, lambda images, *, prompts: 0):
        with pytest.raises(TypeError, match=r"takes \(images\), \(images, prompts\) or"):
            FromCallable(wrong)


def test_failures_are_nan_and_pairs_and_dicts_are_understood() -> None:
    assert FromCallable(lambda images: [1, None, float("nan")])(IMAGES).isnan().tolist() == [False, True, True]
    assert FromCallable(lambda images: (np.array([1.0, 2, 3]), {}))(IMAGES).tolist() == [1, 2, 3]
    assert FromCallable(lambda images: torch.ones(3, 1))(IMAGES).tolist() == [1, 1, 1]
    scores = FromCallable(lambda images: ({"a": [1, 2, 3], "avg": [0.5, 1, 1.5]}, {})).score(IMAGES)
    assert scores.total.tolist() == [0.5, 1, 1.5] and scores.parts["a"].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match='without the total "avg"; it holds a'):
        FromCallable(lambda images: {"a": [1, 2, 3]})(IMAGES)
    with pytest.raises(ValueError, match=r"must return \(3,\) scores; total has \(2,\)"):
        FromCallable(lambda images: [1, 2])(IMAGES)


def test_a_gradient_is_given_where_it_is_declared_and_never_lost_silently() -> None:
    media = IMAGES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(FromCallable(lambda x: x.mean((1, 2, 3)), differentiable=True)(media).sum(), media)
    assert (slope > 0).all()
    with pytest.raises(RuntimeError, match="not differentiable"):
        FromCallable(lambda x: x.mean((1, 2, 3)))(media)
    with pytest.raises(RuntimeError, match="declared differentiable, yet its scores carry no gradient"):
        FromCallable(lambda x: x.detach().mean((1, 2, 3)), differentiable=True)(media)
    with pytest.raises(ValueError, match="no gradient passes through pil"):
        FromCallable(lambda x: x, "pil", differentiable=True)


def test_a_network_is_frozen_and_goes_along() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images.mean(dim=(2, 3)))

    reward = FromCallable(Net(), differentiable=True)
    assert reward.name == "Net" and not reward.needs_prompt
    assert len(list(reward.parameters())) == 2 and not any(p.requires_grad for p in reward.parameters())
    assert reward(IMAGES).shape == (3,)


def test_a_function_is_named_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "my_scores.py").write_text("def length(images, prompts):\n    return [len(p) for p in prompts]\n")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    monkeypatch.chdir(tmp_path)
    argv = ["score", "red.png", "--prompts", "a cat", "--reward", "FromCallable", "--reward.function"]
    assert main([*argv, "my_scores.length", "--reward.layout", "pil"]) == 0
    assert "length 5.0000" in capsys.readouterr().out
    assert main([*argv, "my_scores.width"]) == 2
    assert "cannot import 'my_scores.width'" in capsys.readouterr().err


def test_ddpo_calls_a_reward(clip_folder: str) -> None:
    reward = CLIPScore(clip_folder)
    expected = reward(IMAGES, PROMPTS).numpy()
    scores, info = as_ddpo_fn(reward)(IMAGES, tuple(PROMPTS), ({}, {}, {}))
    assert scores.dtype == np.float32 and info == {}
    np.testing.assert_array_equal(scores, expected)
    bytes_last = (255 * IMAGES).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(as_ddpo_fn(reward)(bytes_last, PROMPTS, None)[0], expected, atol=1e-3)
    assert not isinstance(as_ddpo_fn(reward)(IMAGES.clone().requires_grad_(), PROMPTS, None)[0], Tensor)


def test_metadata_reaches_the_reward_and_parts_come_back() -> None:
    function = as_ddpo_fn(OCRAccuracy(lambda image: [("cat", 1.0)]))
    scores, info = function(IMAGES, PROMPTS, [{"text": "cat"}, {"text": "bat"}, {}])
    np.testing.assert_allclose(scores, [1, 2 / 3, np.nan], atol=1e-6)
    np.testing.assert_array_equal(info["exact"], [1, 0, np.nan])


def test_flow_grpo_calls_several() -> None:
    class Constant(Reward):
        needs_prompt = False

        def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
            return Scores(torch.tensor([1.0, torch.nan, 3.0]))

    score = as_multi_score({"bright": Brightness(), "constant": Constant()}, {"bright": 2.0, "constant": 0.5})
    scores, info = score(IMAGES, PROMPTS, [{}] * 3, only_strict=True)
    assert info == {} and list(scores) == ["bright", "constant", "avg"]
    np.testing.assert_allclose(scores["avg"], 2 * scores["bright"] + [0.5, np.nan, 1.5], atol=1e-6)
    for weights in ({"bright": 1.0}, {}):
        with pytest.raises(ValueError, match="need the same names"):
            as_multi_score({"bright": Brightness(), "constant": Constant()}, weights)


def test_there_and_back_is_the_same_reward() -> None:
    reward = FromCallable(as_multi_score({"bright": Brightness()}, {"bright": 3.0}), "uint8 NHWC")
    scores = align.score(reward, list(IMAGES), PROMPTS)
    torch.testing.assert_close(scores.total, 3 * Brightness()(IMAGES), rtol=0, atol=1e-5)
    assert set(scores.parts) == {"bright"}


@pytest.mark.parametrize("returned", [None, ["good", "bad", "good"], "fine", [[1.0], [2.0, 3.0], [4.0]]])
def test_what_is_no_number_is_refused(returned) -> None:
    with pytest.raises(ValueError, match="must return one number a sample; got"):
        FromCallable(lambda images: returned)(IMAGES)
