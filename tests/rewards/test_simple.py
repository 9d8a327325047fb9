"""Simple rewards against closed forms, and the smooth JPEG against the encoder."""

import io

import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from rewards import Brightness, Colour, JPEGSize, Sharpness, SmoothJPEGSize
from rewards.simple import TABLES, dct_matrix
from tests.rewards.tiny import natural

IMAGES = natural(3, 40, 56)


def solid(*colour: float, side: int = 16) -> torch.Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, side, side).contiguous()


def test_brightness_of_solid_colours() -> None:
    for colour, value in [
        ((1, 1, 1), 1.0),
        ((0, 0, 0), 0.0),
        ((1, 0, 0), 0.299),
        ((0, 1, 0), 0.587),
        ((0, 0, 1), 0.114),
    ]:
        torch.testing.assert_close(Brightness()(solid(*map(float, colour))), torch.tensor([value]))


def test_brightness_is_pils_luminance() -> None:
    grey = Image.fromarray((255 * IMAGES[0]).round().byte().permute(1, 2, 0).numpy()).convert("L")
    pil = sum(grey.getdata() if not hasattr(grey, "get_flattened_data") else grey.get_flattened_data())
    assert Brightness()(IMAGES)[0].item() == pytest.approx(pil / (255 * 40 * 56), abs=0.5 / 255)


def test_colour_is_one_at_its_target_and_zero_opposite() -> None:
    for name, target, opposite in [("red", (1, 0, 0), (0, 1, 1)), ("white", (1, 1, 1), (0, 0, 0))]:
        assert Colour(name)(solid(*map(float, target))).item() == 1
        assert Colour(name)(solid(*map(float, opposite))).item() == 0
    assert Colour([0.2, 0.4, 0.6])(solid(0.2, 0.4, 0.6)).item() == pytest.approx(1)


def test_redness_rises_with_red_and_falls_with_the_others() -> None:
    x = solid(0.5, 0.5, 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(Colour("red")(x).sum(), x)
    assert gradient.amin(dim=(0, 2, 3))[0] > 0
    assert gradient.amax(dim=(0, 2, 3))[1:].max() < 0


@pytest.mark.parametrize("target", ["mauve", [0.0, 1.0], [0.0, 0.5, 2.0]])
def test_wrong_colours_raise(target) -> None:
    with pytest.raises(ValueError, match="target must be"):
        Colour(target)


def test_sharpness_of_flat_ramp_edge_and_blur() -> None:
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    assert Sharpness()(solid(0.3, 0.3, 0.3)).item() == pytest.approx(0, abs=1e-12)
    assert Sharpness()(ramp).item() == pytest.approx(0, abs=1e-10)
    checkers = ((torch.arange(32)[:, None] + torch.arange(32)) % 2).float().expand(1, 3, 32, 32)
    assert Sharpness()(checkers).item() == pytest.approx(16)  # the Laplacian is ±4 everywhere
    scores = torch.cat([Sharpness()(natural(1, 64, 64, slope=s)) for s in (0.0, 0.5, 1.0, 1.5, 2.0)])
    assert (scores.diff() < 0).all()


def test_jpeg_size_is_the_files_size() -> None:
    images = (255 * IMAGES).round() / 255
    sizes = JPEGSize("incompressible")(images)
    for image, size in zip(images, sizes, strict=True):
        file = io.BytesIO()
        Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
        assert size.item() == pytest.approx(len(file.getvalue()) / 1000)
    torch.testing.assert_close(JPEGSize("compressible")(images), -sizes)


def test_jpeg_size_grows_with_noise_and_quality() -> None:
    flat, noise = solid(0.5, 0.5, 0.5, side=64), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for reward in (JPEGSize("incompressible"), SmoothJPEGSize("incompressible")):
        assert reward(flat) < reward(natural(1, 64, 64)) < reward(noise)
    for cls in (JPEGSize, SmoothJPEGSize):
        sizes = torch.cat([cls("incompressible", q)(noise) for q in (10, 30, 50, 75, 95)])
        assert (sizes.diff() > 0).all()


@pytest.mark.parametrize("cls", [JPEGSize, SmoothJPEGSize])
@pytest.mark.parametrize("wrong", [{"aim": "small"}, {"quality": 0}, {"quality": 100}])
def test_wrong_jpeg_arguments_raise(cls, wrong) -> None:
    with pytest.raises(ValueError, match="must be"):
        cls(**wrong)


def varied(count: int, height: int, width: int) -> torch.Tensor:
    """Images of random blur, contrast, noise and saturation."""
    generator = torch.Generator().manual_seed(3)
    images = []
    for i in range(count):
        slope, contrast, noise, saturation = torch.rand(4, generator=generator).tolist()
        x = 0.5 + contrast * (natural(1, height, width, seed=i, slope=2.5 * slope) - 0.5)
        x = x + 0.3 * noise**3 * torch.randn(x.shape, generator=generator)
        images.append(torch.lerp(x.mean(dim=1, keepdim=True).expand_as(x), x, saturation).clamp(0, 1))
    return torch.cat(images)


@pytest.mark.parametrize("quality", [95, 75, 30])
@pytest.mark.parametrize("shape", [(64, 64), (100, 150)])
def test_smooth_jpeg_ranks_and_measures_like_the_encoder(quality, shape) -> None:
    images = varied(48, *shape)
    true, smooth = JPEGSize("incompressible", quality)(images), SmoothJPEGSize("incompressible", quality)(images)
    assert spearmanr(true, smooth).statistic > 0.97
    error = (smooth - true).abs() / true
    assert error.mean() < 0.1
    torch.testing.assert_close(SmoothJPEGSize("compressible", quality)(images), -smooth)


@pytest.mark.parametrize("side", [16, 64, 256])
def test_smooth_jpeg_of_a_flat_image_is_nearly_exact(side: int) -> None:
    flat = solid(0.4, 0.6, 0.2, side=side)
    assert SmoothJPEGSize()(flat).item() == pytest.approx(JPEGSize()(flat).item(), rel=0.03)


@pytest.mark.parametrize("quality", [95, 75, 50, 30, 1])
def test_quantisation_tables_are_the_encoders(quality: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    tables = Image.open(io.BytesIO(file.getvalue())).quantization  # type: ignore[attr-defined]
    ours = SmoothJPEGSize(quality=quality).tables
    for index in (0, 1):
        assert ours[index].flatten().tolist() == list(tables[index])
    assert [len(table.split()) for table in TABLES] == [64, 64]


def test_dct_is_orthonormal() -> None:
    basis = dct_matrix()
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(basis[0], torch.full((8,), 8**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(16, 16), (20, 27)])
def test_smooth_jpeg_gradient_is_its_slope(shape) -> None:
    reward = SmoothJPEGSize()
    x = natural(1, *shape).double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.measure(x, []).sum(), x)
    for seed in range(5):
        direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            slope = (reward.measure(x + 1e-6 * direction, []) - reward.measure(x - 1e-6 * direction, [])) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope[0], rtol=1e-4, atol=1e-8)


def test_following_the_smooth_gradient_shrinks_the_real_file() -> None:
    x = varied(4, 64, 64)
    before = JPEGSize()(x)
    for _ in range(20):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(SmoothJPEGSize()(x).sum(), x)
        x = (x + 0.005 * gradient.sign()).detach().clamp(0, 1)
    assert (JPEGSize()(x) > before).all()
