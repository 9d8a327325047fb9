"""Image, video and latent files: what may be wrong with them, and how an image is fitted to a model.

An image is RGB, or something that becomes RGB without loss of meaning: grey, black and white or a palette, and anything with
transparency, which is laid on white. Files that need a decision (CMYK, Lab, 16 bits or floats a channel, several frames) are
refused with the remedy. The camera's orientation tag is obeyed, as it is by the viewers people judge images in.

A video is what Pillow reads, such as GIF and WebP, transparency laid on white; or what FFmpeg reads, by the extra `video`.

A latent file is a .safetensors file that holds "x0" (C, H, W), a clean latent, or "latents" (T+1, C, H, W), a whole trajectory
from noise to clean; or both.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = [
    "SUFFIXES",
    "Media",
    "as_rgb",
    "fitted",
    "image_size",
    "latent_shapes",
    "load_latents",
    "load_rgb",
    "load_video",
]

SUFFIXES: Mapping[str, frozenset[str]] = {  # of files, by modality
    "image": frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}),
    "video": frozenset({".mp4", ".m4v", ".webm", ".mkv", ".mov", ".avi", ".mpg", ".mpeg", ".gif", ".webp"}),
    "audio": frozenset({".wav"}),
}

MOST_PIXELS = 100_000_000
EXACT = {"RGB", "RGBA", "L", "LA", "P", "PA", "1"}  # modes that RGB over white represents exactly
REMEDY = {
    "CMYK": "convert it to RGB with its colour profile",
    "I;16": "convert it to 8 bits a channel",
    "I;16B": "convert it to 8 bits a channel",
    "I": "convert it to 8 bits a channel",
    "F": "convert it to 8 bits a channel",
}
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Media:
    """One image, video, sound or latent: a file, or bytes that are fetched when they are needed.

    Attributes:
        name: what messages call it.
        path: the file.
        fetch: the bytes of media that have no file of their own.
    """

    name: str
    path: Path | None = None
    fetch: Callable[[], bytes | None] | None = field(default=None, compare=False, repr=False)

    def data(self) -> bytes:
        """The bytes.

        Raises:
            ValueError: there are none.
        """
        data = self.path.read_bytes() if self.path is not None else self.fetch and self.fetch()
        if not data:
            raise ValueError(f"{self.name} is empty (0 bytes)")
        return data

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes: two media of the same digest are the same, wherever they lie."""
        return hashlib.sha256(self.data()).hexdigest()

    @property
    def key(self) -> str:
        """What tells media apart: the file, or the content where there is no file."""
        return self.digest if self.path is None else str(self.path)


def image_size(media: Media, verify: bool = True) -> tuple[int, int]:
    """(width, height) of an image as it is looked at.

    Args:
        verify: also decode it, which finds truncated files; otherwise only its header is read.

    Raises:
        ValueError: it cannot be used, and why.
    """
    with _opened(media) as file:
        if verify:
            with _readable(media):
                file.load()
        turned = (verify or file.format != "PNG") and file.getexif().get(ORIENTATION) in SIDEWAYS  # PNG: would decode
        return file.size[::-1] if turned else file.size  # pyright: ignore


def load_rgb(media: Media) -> Image.Image:
    """The image: RGB, upright, transparency laid on white.

    Raises:
        ValueError: it cannot be used, and why.
    """
    with _opened(media) as file, _readable(media):
        return as_rgb(ImageOps.exif_transpose(file), media.name)


def as_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """RGB, transparency laid on white.

    Raises:
        ValueError: its colour mode has no exact RGB.
    """
    _exact(image.mode, name)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def load_video(media: Media, frames: int) -> list[Image.Image]:
    """At most `frames` frames in RGB, spread evenly from the first to the last; a picture is a video of one.

    Raises:
        ValueError: it cannot be read.
        ImportError: it is a file that Pillow does not read, and the extra `video` is missing.
    """
    _missing(media)
    data, shown = media.data(), []
    try:
        with Image.open(io.BytesIO(data)) as file:
            for i in _spread(getattr(file, "n_frames", 1), frames):
                file.seek(i)
                shown.append(as_rgb(file, f"frame {i}"))
        return shown
    except UnidentifiedImageError:
        return _filmed(media, data, frames)
    except UNREADABLE as error:
        raise ValueError(f"{media.name} is not a video that can be read, it may be truncated: {error}") from error


def _filmed(media: Media, data: bytes, frames: int) -> list[Image.Image]:
    """Frames by FFmpeg. It decodes twice, for what a container says of its length may be wrong, and all frames may be too many."""
    try:
        import av  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{media.name} needs a reader of videos: pip install 'kilter[video]'") from error
    try:
        with av.open(io.BytesIO(data)) as file:
            count = sum(1 for _ in file.decode(video=0))
        kept = set(_spread(count, frames))
        with av.open(io.BytesIO(data)) as file:
            shown = [frame.to_image() for i, frame in enumerate(file.decode(video=0)) if i in kept]
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{media.name} is not a video that can be read, it may be truncated: {error}") from error
    if not shown:
        raise ValueError(f"{media.name} has no frames")
    if len({frame.size for frame in shown}) > 1:
        raise ValueError(f"{media.name} changes its size on the way: encode it at one size")
    return shown


def _spread(count: int, most: int) -> list[int]:
    """At most so many numbers below `count`, evenly from the first to the last."""
    kept = min(count, most)
    return [round(i * (count - 1) / max(1, kept - 1)) for i in range(kept)]


def fitted(image: Image.Image, size: tuple[int, ...]) -> Tensor:
    """(3, H, W) in [0, 1]: resized, bicubic and antialiased, until it just covers `size` = (H, W); the middle is cut out."""
    from torchvision.transforms.functional import pil_to_tensor

    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        across, down = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize((across, down), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return pil_to_tensor(image.crop((left, top, left + width, top + height))).float() / 255


def latent_shapes(media: Media, verify: bool = True) -> dict[str, tuple[int, ...]]:
    """The shapes of "x0" and "latents", whichever a latent file holds.

    Args:
        verify: also read the numbers, which finds NaN.

    Raises:
        ValueError: it cannot be used, and why.
    """
    with _latents(media) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in ("x0", "latents") if name in file.keys()}  # noqa: SIM118
        if not shapes:
            raise ValueError(
                f'{media.name} holds {sorted(file.keys())}: expected "x0" (C, H, W) or "latents" (T+1, C, H, W)'
            )
        for name, shape in shapes.items():
            if 0 in shape or len(shape) < (2 if name == "latents" else 1) or (name == "latents" and shape[0] < 2):
                raise ValueError(
                    f'"{name}" of {media.name} has shape {shape}: expected (T+1, C, H, W) or, for x0, (C, H, W)'
                )
            if verify and not bool(file.get_tensor(name).isfinite().all()):
                raise ValueError(f'"{name}" of {media.name} holds NaN or infinity')
    return shapes


def load_latents(media: Media, whole: bool) -> Tensor:
    """(T+1, …) the trajectory of a latent file, or (…) its clean latent.

    Raises:
        ValueError: it cannot be used, or holds no trajectory where one is needed.
    """
    with _latents(media) as file:
        held = set(file.keys())
        if whole and "latents" not in held:
            raise ValueError(f'{media.name} holds no trajectory "latents" (T+1, C, H, W); it holds {sorted(held)}')
        if whole or "x0" not in held:
            latents = file.get_tensor("latents")
            return latents if whole else latents[-1]
        return file.get_tensor("x0")


def _missing(media: Media) -> None:
    if media.path is not None and not media.path.is_file():
        raise ValueError(f"no file {media.name} (looked for {media.path})")


@contextmanager
def _readable(media: Media):
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, Image.DecompressionBombError):
            raise ValueError(_too_large(media.name)) from error
        raise ValueError(f"{media.name} is not an image that can be read, it may be truncated: {error}") from error


@contextmanager
def _opened(media: Media):
    """The image file after everything its header can tell was checked."""
    _missing(media)
    if media.path is not None and media.path.stat().st_size == 0:
        raise ValueError(f"{media.name} is empty (0 bytes)")
    source = media.path if media.path is not None else io.BytesIO(media.data())
    with _readable(media):
        file = Image.open(source)
    with file:
        if min(file.size) < 1:
            raise ValueError(f"{media.name} has no pixels: its size is {file.width}×{file.height}")
        if file.width * file.height > MOST_PIXELS:
            raise ValueError(_too_large(media.name, f": it has {file.width}×{file.height}"))
        _exact(file.mode, media.name)
        if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":  # MPO: a photograph with a preview beside it
            raise ValueError(
                f"{media.name} is an animation of {file.n_frames} frames: save the frame that was judged, "  # pyright: ignore
                "or give it to a reward of videos, such as Framewise around one of images"
            )
        yield file


def _exact(mode: str, name: str) -> None:
    if mode not in EXACT:
        remedy = REMEDY.get(mode, "convert it to RGB")
        raise ValueError(f"{name} is in colour mode {mode}, which has no exact RGB: {remedy}")


def _too_large(name: str, size: str = "") -> str:
    return f"{name} has more than {MOST_PIXELS // 1_000_000} megapixels{size}; make it smaller"


@contextmanager
def _latents(media: Media):
    _missing(media)
    if media.path is None:
        raise ValueError(f"{media.name} must be a .safetensors file")
    try:
        with safe_open(media.path, "pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{media.name} is not a .safetensors file that can be read, it may be truncated: {error}"
        ) from error
