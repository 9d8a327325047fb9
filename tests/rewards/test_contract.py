"""The battery that every reward exported from `rewards` must pass; a new class fails until it has a `Case` here.

Laws: one finite float32 score a sample; a row's score depends on that row alone (order, neighbours, micro-batches); the
same with and without a graph; frozen and in eval mode; the prompt matters if and only if the class says so; a gradient
exists if and only if the class says so, and is the slope of the score.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoTokenizer

import rewards
from rewards import Batched, Reward
from rewards.shapes import COLORS
from tests.rewards import tiny


@dataclass(frozen=True)
class Case:
    """How to build a reward offline and what to show it.

    Attributes:
        build: takes pytest's request, for fixtures.
        prompts: four prompts that the reward tells apart.
        media: four samples; None means images of natural statistics.
        tolerance: allowed difference between batch sizes, in the reward's unit.
    """

    build: Callable[[pytest.FixtureRequest], Reward]
    prompts: tuple[str, ...] = ("a red cat", "two dog on the house", "the blue bird", "photo of a car")
    media: Callable[[], Tensor] | None = None
    tolerance: float = 1e-5

    def show(self) -> Tensor:
        # away from 0 and 1, so that no clamp hides a slope
        return self.media() if self.media else 0.1 + 0.8 * tiny.natural(4, 36, 43)


def folder(name: str) -> Callable[[pytest.FixtureRequest], str]:
    return lambda request: str(request.getfixturevalue(name))


def hpsv2(request: pytest.FixtureRequest) -> Reward:
    import open_clip

    path = request.getfixturevalue("open_clip_folder")
    open_clip.add_model_config(path / "kilter-tiny.json")
    return rewards.HPSv2(checkpoint=str(path / "open_clip_model.safetensors"), model_name="kilter-tiny")


def mixed(request: pytest.FixtureRequest) -> Reward:
    return rewards.Weighted([rewards.CLIPScore(folder("clip_folder")(request), "cosine"), rewards.Brightness()], [1, 2])


GRAMMAR = ("a red circle", "a green circle", "two blue squares", "a red star")


def cross_encoder(request: pytest.FixtureRequest) -> Reward:
    """A random one in its own layout, with the embedded tokenizer."""
    from rewards.crossencoder import Network

    path = request.getfixturevalue("tmp_path")
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "assets" / "tiny-sd" / "tokenizer")
    tokenizer.save_pretrained(path)
    shape = {"vocab": len(tokenizer), "length": 12, "size": 32, "width": 32, "heads": 2}
    network = Network(**shape, image_layers=1, text_layers=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_file(network.state_dict(), path / "model.safetensors")
    config = {"network": {**shape, "image_layers": 1, "text_layers": 2}, "mean": 0.1, "std": 0.5}
    (path / "config.json").write_text(json.dumps(config))
    return rewards.CrossEncoder(path)


def shapes() -> Tensor:
    """A red and a green circle, two blue squares, a red square: what GRAMMAR asks for in order, but for the last."""
    pictures = []
    for color, marks in (("red", ["o"]), ("green", ["o"]), ("blue", ["s", "s"]), ("red", ["s"])):
        picture = Image.new("RGB", (128, 128), "white")
        draw = ImageDraw.Draw(picture)
        for i, mark in enumerate(marks):
            box = (20 + 56 * i, 40, 60 + 56 * i, 80)
            fill = tuple(round(255 * c) for c in COLORS[color])
            (draw.ellipse if mark == "o" else draw.rectangle)(box, fill=fill)
        pictures.append(pil_to_tensor(picture).float() / 255)
    return torch.stack(pictures)


CASES: dict[str, Case] = {
    "Aesthetic": Case(lambda r: rewards.Aesthetic(folder("clip_folder")(r), folder("aesthetic_head")(r))),
    "Batched": Case(lambda _: Batched(rewards.Brightness(), 3)),
    "Brightness": Case(lambda _: rewards.Brightness()),
    "CLIPScore": Case(lambda r: rewards.CLIPScore(folder("clip_folder")(r)), tolerance=1e-3),
    "Colour": Case(lambda _: rewards.Colour("blue")),
    "CrossEncoder": Case(cross_encoder, GRAMMAR, tolerance=1e-4),
    "Framewise": Case(
        lambda r: rewards.Framewise(mixed(r), "min"),
        media=lambda: (0.1 + 0.8 * tiny.natural(12, 36, 43)).unflatten(0, (4, 3)),
    ),
    "HPSv2": Case(hpsv2),
    "JPEGSize": Case(lambda _: rewards.JPEGSize()),
    "OpenCLIPScore": Case(
        lambda r: rewards.OpenCLIPScore(f"local-dir:{folder('open_clip_folder')(r)}"), tolerance=1e-3
    ),
    "PickScore": Case(lambda r: rewards.PickScore(*[folder("clip_folder")(r)] * 2), tolerance=1e-3),
    "Shapes": Case(lambda _: rewards.Shapes(), GRAMMAR, shapes),
    "Sharpness": Case(lambda _: rewards.Sharpness()),
    "SmoothJPEGSize": Case(lambda _: rewards.SmoothJPEGSize(), tolerance=1e-4),
    "Weighted": Case(mixed),
}


def exported() -> list[str]:
    found = [getattr(rewards, name) for name in rewards.__all__]
    return sorted(
        c.__name__ for c in found if inspect.isclass(c) and issubclass(c, Reward) and not inspect.isabstract(c)
    )


@pytest.fixture(params=exported())
def case(request: pytest.FixtureRequest) -> Case:
    if request.param not in CASES:
        pytest.fail(f"rewards.{request.param} has no Case in {__file__}: add one")
    return CASES[request.param]


@pytest.fixture
def reward(case: Case, request: pytest.FixtureRequest) -> Reward:
    return case.build(request)


def test_no_case_is_stale() -> None:
    assert set(CASES) <= set(exported())


def test_scores_are_finite_float32_and_of_the_right_shape(case: Case, reward: Reward) -> None:
    scores = reward.score(case.show(), case.prompts)
    for values in (scores.total, *scores.parts.values()):
        assert values.shape == (4,)
        assert values.dtype == torch.float32
    assert scores.total.isfinite().all()  # a part may be NaN: a clause that the prompt does not have
    assert scores.total.std() > 0


def test_a_row_does_not_depend_on_order_or_neighbours(case: Case, reward: Reward) -> None:
    media, prompts = case.show(), case.prompts
    scores = reward(media, prompts)
    order = [2, 0, 3, 1]
    shuffled = reward(media[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, scores[order], rtol=0, atol=case.tolerance)
    for size in (1, 3):
        torch.testing.assert_close(Batched(reward, size)(media, prompts), scores, rtol=0, atol=case.tolerance)


def test_a_graph_changes_no_score(case: Case, reward: Reward) -> None:
    media = case.show()
    plain = reward(media, case.prompts)
    assert not plain.requires_grad
    if reward.differentiable:
        traced = reward(media.requires_grad_(), case.prompts)
        assert traced.requires_grad
        torch.testing.assert_close(traced.detach(), plain, rtol=0, atol=case.tolerance)


def test_the_prompt_matters_if_and_only_if_needed(case: Case, reward: Reward) -> None:
    media, prompts = case.show(), list(case.prompts)
    scores = reward(media, prompts)
    rolled = reward(media, prompts[1:] + prompts[:1])
    if reward.needs_prompt:
        assert (rolled - scores).abs().max() > 10 * case.tolerance
        with pytest.raises(ValueError, match="one prompt a sample"):
            reward(media)
    else:
        assert torch.equal(rolled, scores)
        assert torch.equal(reward(media), scores)


def test_weights_are_frozen_and_eval_mode_stays(case: Case, reward: Reward) -> None:
    torch.nn.ModuleList([reward]).train()
    assert not any(m.training for m in reward.modules())
    assert not any(p.requires_grad for p in reward.parameters())


def test_gradient_is_the_slope_or_a_named_error(case: Case, reward: Reward) -> None:
    media = case.show().requires_grad_()
    if not reward.differentiable:
        with pytest.raises(RuntimeError, match=r"is not differentiable"):
            reward(media, case.prompts)
        return
    (gradient,) = torch.autograd.grad(reward(media, case.prompts).sum(), media)
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()
    # Scores are float32, so the step is as large as curvature allows and runs along the gradient, where it shows most.
    reward, media, gradient = reward.double(), media.detach().double(), gradient.double()
    direction = gradient / gradient.abs().max()
    expected = (gradient * direction).sum()
    slopes = []
    for step in (1e-2, 3e-3, 1e-3, 1e-4):
        up, down = (reward(media + s * direction, case.prompts).double().sum() for s in (step, -step))
        slopes.append((up - down) / (2 * step))
    assert min(abs(slope / expected - 1) for slope in slopes) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type_is_read(case: Case, reward: Reward, dtype: torch.dtype) -> None:
    media = case.show()
    scores = reward(media.to(dtype), case.prompts)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_first_docstring_line_is_a_title(case: Case, reward: Reward) -> None:
    title, _, rest = (inspect.getdoc(type(reward)) or "").partition("\n")
    assert title.endswith(".")
    assert len(title) < 100
    assert rest.startswith("\n")
