"""Rewards without a network: brightness, colour, sharpness and the size of a JPEG file, exact or differentiable.

Good for tests, tutorials and sanity checks: the optimum is known, so over-optimisation and bugs are visible at once.

Sources: JPEG size as a reward: Black et al., "Training Diffusion Models with Reinforcement Learning" (DDPO), 2023,
arXiv 2305.13301. Luminance, chroma and quantisation tables: ITU-T T.81 annex K and T.871 (JFIF). Quality scaling: the
Independent JPEG Group's libjpeg. Variance of the Laplacian: Pech-Pacheco et al., "Diatom autofocusing", ICPR 2000.
"""

from __future__ import annotations

import io
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prompt, Reward
from .preprocess import at_least_float32

__all__ = ["Brightness", "Colour", "JPEGSize", "Sharpness", "SmoothJPEGSize"]

LUMA = (0.299, 0.587, 0.114)  # Rec. 601, as JFIF and PIL's "L"
LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))
COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
    "orange": (1.0, 0.5, 0.0),
    "purple": (0.5, 0.0, 0.5),
    "black": (0.0, 0.0, 0.0),
    "grey": (0.5, 0.5, 0.5),
    "white": (1.0, 1.0, 1.0),
}

Aim = Literal["compressible", "incompressible"]


def luminance(images: Tensor) -> Tensor:
    """Rec. 601 luma: (B, 3, H, W) -> (B, H, W)."""
    return torch.einsum("bchw,c->bhw", images, images.new_tensor(LUMA))


class Brightness(Reward):
    """Mean luminance (Rec. 601).

    Range: 0 to 1, black to white
    Size: any
    Gradient: yes
    """

    needs_prompt = False

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        return luminance(at_least_float32(media)).mean(dim=(1, 2))


class Colour(Reward):
    """Closeness of the mean colour to a target colour.

    1 - mean over channels of (mean colour - target)², so 1 where the mean colour is the target and 0 at the opposite
    corner of the colour cube.

    Range: 0 to 1
    Size: any
    Gradient: yes

    Args:
        target: a name (red, green, blue, yellow, cyan, magenta, orange, purple, black, grey, white) or three values in
            [0, 1].

    Raises:
        ValueError: the name is unknown, or the values are not three in [0, 1].
    """

    needs_prompt = False

    def __init__(self, target: str | list[float] = "red") -> None:
        super().__init__()
        if isinstance(target, str):
            if target not in COLOURS:
                raise ValueError(f"target must be one of {', '.join(COLOURS)} or three values; got {target!r}")
            target = list(COLOURS[target])
        if len(target) != 3 or not all(0 <= value <= 1 for value in target):
            raise ValueError(f"target must be three values in [0, 1]; got {target}")
        self.target = [float(value) for value in target]

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        mean = at_least_float32(media).mean(dim=(2, 3))
        return 1 - (mean - mean.new_tensor(self.target)).square().mean(dim=1)


class Sharpness(Reward):
    """Variance of the Laplacian of the luminance: how much fine detail there is.

    Range: 0 to 16, 0 for a flat image; noise is sharper than any picture
    Size: any from 3 x 3
    Gradient: yes

    Raises:
        ValueError: when scoring, images are smaller.
    """

    needs_prompt = False

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        if min(media.shape[-2:]) < 3:
            raise ValueError(
                f"Sharpness needs images of 3 x 3 pixels or more; got {media.shape[-2]} x {media.shape[-1]}"
            )
        luma = luminance(at_least_float32(media))[:, None]
        return F.conv2d(luma, luma.new_tensor(LAPLACIAN)[None, None]).var(dim=(1, 2, 3), correction=0)


class JPEGSize(Reward):
    """Size of the image as a JPEG file in kB (1000 bytes), counted so that higher is better.

    "compressible" returns minus the size, "incompressible" the size: DDPO's two rewards (arXiv 2305.13301, quality 95).
    The size grows with the image, so compare at one resolution only. The encoder is PIL's, with 4:2:0 chroma.

    Range: kB, negative for "compressible"
    Size: any
    Gradient: no; see `SmoothJPEGSize`

    Args:
        aim: what is rewarded.
        quality: of the encoder, 1 to 95.
    """

    differentiable = False
    needs_prompt = False

    def __init__(self, aim: Aim = "compressible", quality: int = 95) -> None:
        super().__init__()
        self.sign, self.quality = sign(aim), checked(quality)

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        from PIL import Image

        pixels = (255 * media.float()).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        sizes = []
        for image in pixels:
            with io.BytesIO() as file:
                Image.fromarray(image).save(file, format="JPEG", quality=self.quality, subsampling="4:2:0")
                sizes.append(file.tell() / 1000)
        return self.sign * torch.tensor(sizes, device=media.device)


def sign(aim: str) -> float:
    if aim not in ("compressible", "incompressible"):
        raise ValueError(f"aim must be compressible or incompressible; got {aim!r}")
    return -1.0 if aim == "compressible" else 1.0


def checked(quality: int) -> int:
    if not 1 <= quality <= 95:
        raise ValueError(f"quality must be 1 to 95; got {quality}")
    return quality


# ITU-T T.81, tables K.1 (luminance) and K.2 (chrominance)
TABLES = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99",
    "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99 " + "99 " * 32,
)

HEADER = 0.623  # kB of markers and tables that PIL writes around the data of any colour image
LUMA_BLOCK, CHROMA_BLOCK = 6, 4  # bits of a block without detail: Huffman codes for "same mean" and "end of block"
# Bits a coefficient q costs: GAIN * log2(1 + (q / KNEE)²). Fitted to PIL at qualities 95, 75 and 30 on synthetic images
# of all spectra; log2(1 + |q|), the usual proxy, needs another gain at each quality and has a kink at zero.
GAIN, KNEE = 0.85, 0.3


class SmoothJPEGSize(Reward):
    """Differentiable estimate of the size as a JPEG file in kB, counted so that higher is better.

    JPEG without its rounding and its entropy coder: YCbCr, 4:2:0 chroma, 8 x 8 DCT, quantisation tables at `quality`,
    differences of neighbouring means, then a smooth rate a coefficient. On images of varied spectrum, contrast and
    noise it ranks as `JPEGSize` does (Spearman above 0.97 at qualities 30 to 95) and is within 10% of it on average.

    Range: kB, negative for "compressible"
    Size: any
    Gradient: yes

    Args:
        aim: what is rewarded: "compressible" returns minus the size, "incompressible" the size.
        quality: of the encoder, 1 to 95.
    """

    needs_prompt = False

    def __init__(self, aim: Aim = "compressible", quality: int = 95) -> None:
        super().__init__()
        self.sign, self.quality = sign(aim), checked(quality)
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality  # libjpeg's jpeg_quality_scaling
        base = torch.tensor([[int(v) for v in table.split()] for table in TABLES])
        self.register_buffer("tables", ((base * scale + 50) // 100).clamp(1, 255).view(2, 8, 8), persistent=False)

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        x = 255 * at_least_float32(media)
        x = F.pad(x, (0, -x.shape[-1] % 16, 0, -x.shape[-2] % 16), mode="replicate")
        luma = luminance(x)
        blue, red = (x[:, 2] - luma) / 1.772, (x[:, 0] - luma) / 1.402  # T.871; zero for grey
        luma_table, chroma_table = self.get_buffer("tables")
        bits = rate(luma - 128, luma_table, LUMA_BLOCK)
        for chroma in (blue, red):
            bits = bits + rate(F.avg_pool2d(chroma, 2), chroma_table, CHROMA_BLOCK)
        return self.sign * (HEADER + bits / 8000)


def rate(plane: Tensor, table: Tensor, block: int) -> Tensor:
    """Estimated bits of one plane: (B, H, W) with sides that are multiples of 8 -> (B,)."""
    blocks = plane.unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2)  # (B, H/8 * W/8, 8, 8)
    dct = dct_matrix().to(plane)
    q = dct @ blocks @ dct.T / table
    means = F.pad(q[..., 0, 0], (1, 0)).diff(dim=1)  # JPEG stores each block's mean as a step from the block before
    coded = torch.cat([means[..., None], q.flatten(2)[..., 1:]], dim=-1)  # (B, N, 64)
    return block * q.shape[1] + GAIN * torch.log2(1 + (coded / KNEE).square()).sum(dim=(1, 2))


def dct_matrix() -> Tensor:
    """The orthonormal 8-point DCT-II, one basis vector a row, float64."""
    k = torch.arange(8, dtype=torch.float64)
    basis = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis
