"""Preprocessing against PIL, torchvision, and the geometry of the published pipelines."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocess,
    budget_size,
    resample,
    sharing,
    smart_size,
)
from tests.rewards.tiny import natural

UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SHAPES = [((64, 96), (30, 45)), ((33, 47), (70, 99)), ((90, 40), (32, 32)), ((40, 90), (60, 50)), ((50, 50), (50, 21))]


def levels(images: torch.Tensor) -> torch.Tensor:
    """The 8-bit image as floats that hold exactly its values."""
    return (255 * images).round() / 255


def pil_resize(images: torch.Tensor, size: tuple[int, int], kernel: Image.Resampling) -> torch.Tensor:
    """PIL on 8-bit images, width first; two calls, because Pillow 13 chooses the order by the shape."""
    rows = []
    for image in (255 * images).round().byte().permute(0, 2, 3, 1).numpy():
        wide = Image.fromarray(image).resize((size[1], image.shape[0]), kernel)
        rows.append(np.asarray(wide.resize(size[::-1], kernel)))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("source", ["noise", "natural"])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_resize_agrees_with_pil(source, shape, size, kernel) -> None:
    generator = torch.Generator().manual_seed(1)
    images = levels(torch.rand(2, 3, *shape, generator=generator) if source == "noise" else natural(2, *shape))
    expected = pil_resize(images, size, Image.Resampling[kernel.upper()])

    floats = resample(images, size, kernel, store=Preprocess().store)
    error = 255 * (floats - expected).abs()
    assert error.max() < 1.2  # PIL rounds twice, and the second pass weighs the first's rounding by up to 1.3
    assert error.mean() < 0.33

    eight_bit = resample(images, size, kernel, store=Preprocess(quantize="hard").store)
    error = (255 * (eight_bit - expected)).abs().round()
    assert error.max() <= 2  # ties only: fixed-point weights against floats, in either pass
    assert (error == 0).float().mean() > 0.9


def test_one_call_of_pil_agrees_for_a_square() -> None:
    images = levels(natural(1, 80, 80))
    expected = np.asarray(Image.fromarray((255 * images[0]).byte().permute(1, 2, 0).numpy()).resize((33, 33), 3))
    ours = resample(images, (33, 33), store=Preprocess(quantize="hard").store)
    assert (255 * ours[0].permute(1, 2, 0) - torch.from_numpy(expected.copy())).abs().max() < 1.01


def test_clamping_between_the_passes_is_what_agrees() -> None:
    images = (torch.rand(1, 3, 40, 90, generator=torch.Generator().manual_seed(2)) > 0.5).float()  # strong overshoots
    expected = pil_resize(images, (90, 200), Image.Resampling.BICUBIC)
    once = F.interpolate(images, size=(90, 200), mode="bicubic", antialias=True).clamp(0, 1)
    twice = resample(images, (90, 200), store=Preprocess().store)
    assert 255 * (twice - expected).abs().max() < 1.2
    assert 255 * (once - expected).abs().max() > 5


def test_without_antialiasing_the_result_is_torchs_own() -> None:
    images = natural(1, 60, 44)
    expected = F.interpolate(images, size=(20, 20), mode="bicubic", antialias=False)
    torch.testing.assert_close(resample(images, (20, 20), antialias=False), expected)


@pytest.mark.parametrize("shape", [(50, 77), (77, 50), (40, 41), (33, 32), (32, 32), (20, 90)])
def test_shortest_crop_is_torchvisions(shape) -> None:
    images = levels(natural(1, *shape))
    steps = [v2.Resize(32, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(32)]
    expected = v2.Compose(steps)((255 * images).round().byte()) / 255
    ours = Preprocess(size=32, offset="round", quantize="hard", **UNIT)(images)
    assert ours.shape == (1, 3, 32, 32)
    assert 255 * (ours - expected).abs().max() < 1.01


def test_an_odd_margin_goes_where_the_convention_says() -> None:
    images = torch.arange(7.0).div(7).expand(1, 3, 4, 7)  # a crop of 4 leaves 3 columns: 1 before (floor), 2 (round)
    floor = Preprocess(size=4, offset="floor", **UNIT)(images)
    half_even = Preprocess(size=4, offset="round", **UNIT)(images)
    torch.testing.assert_close(floor[0, 0, 0], torch.arange(1.0, 5.0) / 7)
    torch.testing.assert_close(half_even[0, 0, 0], torch.arange(2.0, 6.0) / 7)


def test_the_other_side_is_floored_or_rounded() -> None:
    assert Preprocess(size=224).resized(480, 641) == (224, 299)  # 299.13
    assert Preprocess(size=224).resized(640, 427) == (335, 224)  # 335.7
    assert Preprocess(size=224, sides="round").resized(640, 427) == (336, 224)
    assert Preprocess("longest_pad", size=224, sides="round").resized(427, 640) == (149, 224)  # 149.45
    assert Preprocess("longest_pad", size=224).resized(2, 640) == (1, 224)
    assert Preprocess(size=224, resize=256).resized(300, 400) == (256, 341)
    assert Preprocess("squash", size=384).resized(100, 900) == (384, 384)


def test_longest_pad_is_black_before_normalising() -> None:
    images = torch.full((2, 3, 20, 40), 0.7)
    out = Preprocess("longest_pad", size=40, clamp=False)(images)
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(out[:, :, :10], black.view(3, 1, 1).expand(2, 3, 10, 40))
    torch.testing.assert_close(out[:, :, 30:], black.view(3, 1, 1).expand(2, 3, 10, 40))
    inside = (0.7 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(out[:, :, 10:30], inside.view(3, 1, 1).expand(2, 3, 20, 40))


def test_expand2square_fills_with_the_mean_and_keeps_the_aspect() -> None:
    images = torch.ones(1, 3, 30, 10)
    out = Preprocess("expand2square", size=30)(images)
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    grey = (torch.floor(255 * mean) / 255 - mean) / std
    torch.testing.assert_close(out[0, :, :, :10], grey.view(3, 1, 1).expand(3, 30, 10))
    torch.testing.assert_close(out[0, :, :, 10:20], ((1 - mean) / std).view(3, 1, 1).expand(3, 30, 10))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((512, 512), (448, 448)),
        ((1024, 512), (616, 308)),
        ((480, 832), (336, 588)),
        ((480, 640), (364, 504)),
        ((100, 100), (112, 112)),
        ((30, 30), (56, 56)),
    ],
)
def test_smart_size_table(shape, expected) -> None:
    assert smart_size(*shape, 28, 3136, 200704) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((512, 512), (256, 256)), ((480, 832), (192, 336)), ((100, 300), (144, 432)), ((1, 900), (16, 4096))],
)
def test_budget_size_is_that_of_siglip_2(shape, expected) -> None:
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    assert budget_size(*shape, 16, 256 * 16**2) == expected
    for height, width in ((7, 23), (333, 1000), (shape[1], shape[0])):
        for patch, count in ((8, 12), (14, 576), (16, 1)):
            theirs = get_image_size_for_max_num_patches(height, width, patch, count)
            assert budget_size(height, width, patch, count * patch**2) == theirs


def test_smart_size_with_the_larger_budget_and_its_limit() -> None:
    assert smart_size(1024, 1024, 28, 3136, 1003520) == (980, 980)
    assert smart_size(512, 512, 28, 3136, 1003520) == (504, 504)
    assert Preprocess("smart_resize", max_pixels=200704, mean=HALF, std=HALF)(torch.rand(1, 3, 120, 50)).shape[2:] == (
        112,
        56,
    )
    with pytest.raises(ValueError, match="aspect ratio of at most 200"):
        smart_size(10, 2001, 28, 3136, 200704)


@pytest.mark.parametrize("policy", ["shortest_crop", "longest_pad", "squash", "expand2square", "smart_resize"])
@pytest.mark.parametrize("shape", [(33, 32), (61, 24), (24, 61)])
def test_every_policy_has_the_right_gradient(policy, shape) -> None:
    prepare = Preprocess(policy, size=32, factor=8, min_pixels=256, max_pixels=2048)
    x = (0.2 + 0.6 * natural(1, *shape)).double().requires_grad_()
    weight = torch.randn(prepare(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((prepare(x) * weight).sum(), x)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-5 * direction
    slope = ((prepare(x + step) - prepare(x - step)) * weight).sum() / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-6)


def test_white_and_black_images_keep_their_gradient() -> None:
    for value in (0.0, 1.0):
        x = torch.full((1, 3, 50, 70), value, requires_grad=True)
        (gradient,) = torch.autograd.grad(Preprocess(size=32, **UNIT)(x).sum(), x)
        torch.testing.assert_close(gradient.sum(), torch.tensor(3.0 * 32 * 32), rtol=0.1, atol=0)


def test_quantize_modes() -> None:
    x = natural(1, 32, 32).requires_grad_()
    none, ste, hard = (Preprocess(size=32, quantize=q, **UNIT) for q in ("none", "ste", "hard"))
    torch.testing.assert_close(none(x), x)
    assert torch.equal(ste(x).detach(), hard(x).detach()) or (ste(x) - hard(x)).abs().max() < 1e-6
    torch.testing.assert_close(255 * hard(x), (255 * x.detach()).round(), rtol=0, atol=1e-3)
    assert torch.equal(torch.autograd.grad(ste(x).sum(), x)[0], torch.ones_like(x))
    assert not hard(x).requires_grad
    assert (none.differentiable, ste.differentiable, hard.differentiable) == (True, True, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_resized_in_float32(dtype) -> None:
    images = natural(1, 50, 60).to(dtype)
    out = Preprocess(size=32)(images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, Preprocess(size=32)(images.float()))
    assert Preprocess(size=32)(images.double()).dtype == torch.float64


def test_constants_are_those_of_the_libraries() -> None:
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert tuple(OPENAI_CLIP_MEAN) == CLIP_MEAN
    assert tuple(OPENAI_CLIP_STD) == CLIP_STD
    assert tuple(IMAGENET_DEFAULT_MEAN) == IMAGENET_MEAN
    assert tuple(IMAGENET_DEFAULT_STD) == IMAGENET_STD


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "crop"},
        {"quantize": "soft"},
        {"resize": 16, "size": 32},
        {"policy": "squash", "resize": 64, "size": 32},
        {"std": (1.0, 0.0, 1.0)},
    ],
)
def test_wrong_fields_raise(wrong) -> None:
    with pytest.raises(ValueError, match="got"):
        Preprocess(**wrong)


def test_what_is_shared_is_prepared_once_with_the_same_values_and_gradients(monkeypatch) -> None:
    made = []
    prepared = Preprocess.prepared
    monkeypatch.setattr(Preprocess, "prepared", lambda self, x: made.append(self) or prepared(self, x))
    one, same, other = Preprocess(size=8), Preprocess(size=8), Preprocess(size=8, policy="squash")
    images = natural(2, 20, 30).requires_grad_()

    def slope() -> torch.Tensor:
        return torch.autograd.grad(sum(p(images).square().sum() for p in (one, same, other)), images)[0]

    alone = slope()
    made.clear()
    with sharing():
        torch.testing.assert_close(slope(), alone)
        assert made == [one, other]
        with sharing():  # an inner one joins
            one(images)
        assert len(made) == 2
        assert not one(images.detach()).requires_grad  # another tensor
        with torch.no_grad():
            assert not one(images).requires_grad
            images += 0.1  # changed in place
            assert not torch.equal(one(images), one(images - 0.1))
    made.clear()
    one(images), one(images)
    assert len(made) == 2
