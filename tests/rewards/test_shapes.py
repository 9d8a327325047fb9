"""The gold reward: its grammar, its exactness on drawn scenes, and its rule."""

import random
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from rewards.shapes import COLORS, SHAPES, Noun, Scene, Shapes, detect, parse

ASSETS = Path(__file__).parents[2] / "assets"


@pytest.fixture(scope="module")
def world():
    sys.path.insert(0, str(ASSETS / "build"))
    import scenes

    yield scenes
    sys.path.remove(str(ASSETS / "build"))


@pytest.fixture(scope="module")
def drawn(world):
    """2000 scenes never used in training, drawn."""
    rng = random.Random(4242)
    things = [world.draw_scene(rng) for _ in range(2000)]
    return things, world.render(things, torch.Generator().manual_seed(4242)).float() / 255


@pytest.mark.parametrize(
    ("text", "scene", "task"),
    [
        ("a circle", Scene((Noun("circle"),)), "single_object"),
        ("A photo of one star.", Scene((Noun("star"),)), "single_object"),
        ("a circle and a square", Scene((Noun("circle"), Noun("square"))), "two_object"),
        ("three green crosses", Scene((Noun("cross", "green", 3),)), "counting"),
        ("an orange ring", Scene((Noun("ring", "orange"),)), "colors"),
        ("a red circle on the left", Scene((Noun("circle", "red", place="on the left"),)), "position"),
        (
            "a red circle to the left of a blue square",
            Scene((Noun("circle", "red"), Noun("square", "blue")), "left of"),
            "position",
        ),
        ("a red circle and a blue square", Scene((Noun("circle", "red"), Noun("square", "blue"))), "color_attr"),
        (
            "a star at the top and a black ring at the bottom",
            Scene((Noun("star", place="at the top"), Noun("ring", "black", place="at the bottom"))),
            "position",
        ),
    ],
)
def test_parse_reads_the_grammar(text, scene, task):
    assert parse(text) == scene
    assert scene.task == task


@pytest.mark.parametrize(
    "text", ["", "a dog", "three green star", "a stars", "two circles and a square", "a red circle near a ring"]
)
def test_parse_refuses_what_it_cannot_read(text):
    with pytest.raises(ValueError, match="outside the world of shapes"):
        parse(text)
    image = torch.ones(1, 3, 32, 32)
    assert Shapes()(image, [text]).isnan().all()


def test_words_and_grammar_are_inverse(world):
    rng = random.Random(1)
    for _ in range(300):
        for scene in world.truths(world.draw_scene(rng)):
            assert parse(world.word(scene, rng)) == scene


def test_detector_is_exact_on_drawn_scenes(drawn):
    scenes, images = drawn
    right = 0
    for things, found in zip(scenes, detect(images), strict=True):
        right += sorted((t.shape, t.color) for t in things) == sorted((str(d.shape), d.color) for d in found)
    assert right / len(scenes) >= 0.995


def test_true_captions_score_one_and_near_misses_zero(world, drawn):
    rng = random.Random(7)
    says = [rng.choice(world.truths(things)) for things in drawn[0]]
    true, miss = [world.describe(s) for s in says], [world.describe(world.near_miss(s, rng)) for s in says]
    gold = Shapes()
    assert gold(drawn[1], true).mean() >= 0.995
    assert gold(drawn[1], miss).mean() <= 0.005


def test_detector_bears_blur_and_noise(world, drawn):
    images = drawn[1][:300]
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(images, (1,) * 4, mode="replicate"), kernel, groups=3)
    soft = (soft + 0.02 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    rng = random.Random(3)
    texts = [world.describe(rng.choice(world.truths(things))) for things in drawn[0][:300]]
    assert Shapes()(soft, texts).mean() >= 0.97


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (48, 48)])
def test_size_does_not_matter(drawn, size):
    images = F.interpolate(drawn[1][:64], size, mode="bicubic", antialias=True).clamp(0, 1)
    for things, found in zip(drawn[0][:64], detect(images), strict=True):
        assert sorted((t.shape, t.color) for t in things) == sorted((str(d.shape), d.color) for d in found)


def picture(world, *things):
    return world.render([[world.Thing(*t) for t in things]], torch.Generator().manual_seed(0)).float() / 255


def test_rule_of_a_relation(world):
    image = picture(world, ("circle", "red", 0.25, 0.5, 0.18), ("square", "blue", 0.75, 0.5, 0.18))
    gold = Shapes()

    def score(text):
        result = gold.score(image, [text])
        return result.total.item(), {name: part.item() for name, part in result.parts.items() if not part.isnan()}

    assert score("a red circle left of a blue square") == (1, {"objects": 1, "colors": 1, "position": 1})
    assert score("a red circle right of a blue square") == (0, {"objects": 1, "colors": 1, "position": 0})
    assert score("a blue circle and a red square") == (0, {"objects": 1, "colors": 0})
    assert score("a red circle and a blue star") == (0, {"objects": 0.5, "colors": 0.5})
    assert score("a blue square on the right and a red circle on the left")[0] == 1
    assert score("a circle above a square")[0] == 0
    assert score("a red circle")[0] == 1  # one surplus object is forgiven ...
    assert score("two circles") == (0, {"objects": 1, "count": 0})  # ... but not to a count


def test_crowds_and_debris_fail(world):
    spots = [(0.2, 0.2), (0.2, 0.8), (0.8, 0.2), (0.8, 0.8)]
    crowd = picture(world, *((shape, "red", x, y, 0.14) for shape, (x, y) in zip(SHAPES, spots, strict=False)))
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blank = torch.full((1, 3, 32, 32), 0.95)
    for image in (crowd, noise, blank):
        assert Shapes()(image, ["a red circle"]).item() == 0
        assert Shapes()(image, ["two red circles"]).item() == 0


def test_batch_order_does_not_matter(world, drawn):
    images, texts = drawn[1][:32], [world.describe(world.truths(things)[0]) for things in drawn[0][:32]]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    whole = Shapes()(images, texts)
    assert torch.equal(Shapes()(images[order], [texts[i] for i in order]), whole[order])
    assert torch.equal(torch.cat([Shapes()(images[i : i + 1], texts[i : i + 1]) for i in range(32)]), whole)


def test_it_refuses_a_gradient():
    with pytest.raises(RuntimeError, match="not differentiable"):
        Shapes()(torch.ones(1, 3, 32, 32, requires_grad=True), ["a circle"])


def test_colors_are_far_apart():
    palette = torch.tensor(list(COLORS.values()))
    assert (torch.cdist(palette, palette) + torch.eye(len(palette)) * 9).min() > 0.3
