"""Pictures of samples: sheets of tiles with captions.

A sheet has a row for each prompt and one or more blocks of tiles. It remembers where its tiles lie (PNG text `TILES`), so that a
later picture can be cut from earlier ones: a resumed run no longer has the samples it began with, but it has their sheet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rewards.files import whole

__all__ = [
    "INKS",
    "Block",
    "Tile",
    "is_drawable",
    "read_tiles",
    "resized",
    "sheet",
    "sheet_of",
    "to_pil",
    "write_sheet",
]

# Okabe and Ito's colours, which the colour-blind can tell apart; the same reward has the same one in every picture.
INKS = {"optimised": "#0072B2", "judge": "#C04E00"}
INK, SOFT, LINE = "#1F2328", "#66707B", "#DFE3E8"
TILES = "kilter-tiles"
MOST_PROMPTS, MOST_SAMPLES = 8, 8
SMALLEST, LARGEST = 128, 256  # width of a tile
MARGIN, LABEL, GAP, BLOCK_GAP, LINE_HEIGHT = 28, 168, 8, 36, 17


@dataclass(frozen=True)
class Tile:
    """An image and the lines under it: a name, which is shortened where it must be, a value, and the ink of both."""

    image: Image.Image
    lines: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True)
class Block:
    """Tiles side by side, prompt by prompt, under a heading."""

    rows: Sequence[Sequence[Tile]]
    heading: str = ""


def to_pil(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to an 8-bit image."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def resized(image: Image.Image, width: int) -> Image.Image:
    """An image at another width; pixels stay crisp where each becomes a whole number of them."""
    height = max(1, round(width * image.height / image.width))
    resample = Image.Resampling.NEAREST if width % image.width == 0 else Image.Resampling.LANCZOS
    return image.resize((width, height), resample)


def is_drawable(media: Tensor) -> bool:
    """Whether media are a batch of RGB images."""
    return media.ndim == 4 and media.shape[1] == 3 and media.numel() > 0


def sheet_of(
    media: Tensor,
    scores: Mapping[str, Tensor],
    prompts: Sequence[str],
    samples: int,
    inks: Mapping[str, str],
    title: str,
    subtitle: str = "",
) -> tuple[Image.Image, list[list[list[int]]]]:
    """The sheet of an evaluation, and where its tiles lie.

    Args:
        media: (P·samples, 3, H, W), prompt by prompt; the first 8 prompts and 8 samples of each are shown.
        scores: (P·samples,) of each reward, of which those in `inks` are written under the tiles.
    """
    width = tile_width(media.shape[-1])
    rows = []
    for p in range(min(len(prompts), MOST_PROMPTS)):
        places = range(p * samples, p * samples + min(samples, MOST_SAMPLES))
        # What is not finite has no colour; it is shown black rather than as whatever a cast makes of it.
        images = [to_pil(media[i].float().nan_to_num(0.0, 1.0, 0.0)) for i in places]
        rows.append([Tile(resized(im, width), captions(scores, i, inks)) for i, im in zip(places, images, strict=True)])
    return sheet(title, subtitle, prompts[: len(rows)], [Block(rows)])


def tile_width(native: int) -> int:
    """Small images grow by a whole factor, large ones shrink."""
    return native * -(-SMALLEST // native) if native < SMALLEST else min(native, LARGEST)


def captions(scores: Mapping[str, Tensor], i: int, inks: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """What sample `i` scored, one line a reward."""
    values = {name: float(scores[name][i]) for name in inks if name in scores}
    return [(name, shown(value), inks[name]) for name, value in values.items()]


def shown(value: float) -> str:
    """A number with three digits that count."""
    if value != value:
        return "–"
    if abs(value) < 0.0005 or abs(value) >= 1000:
        return f"{value:.0e}".replace("-", "−") if value else "0"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}".replace("-", "−")


def sheet(
    title: str, subtitle: str, prompts: Sequence[str], blocks: Sequence[Block]
) -> tuple[Image.Image, list[list[list[int]]]]:
    """Draws blocks side by side, the prompts to their left.

    Returns:
        The picture, and [left, top, width, height] of every tile, prompt by prompt, block after block.
    """
    tiles = [t for b in blocks for row in b.rows for t in row]
    wide, high = max(t.image.width for t in tiles), max(t.image.height for t in tiles)
    row_height = high + 6 + LINE_HEIGHT * max(len(t.lines) for t in tiles) + 14
    columns = [max(len(row) for row in b.rows) for b in blocks]
    widths = [n * (wide + GAP) - GAP for n in columns]
    headed = any(b.heading for b in blocks)
    across = LABEL + sum(widths) + BLOCK_GAP * (len(blocks) - 1)
    told = wrapped(subtitle, font(13), across, 4)
    top = MARGIN + 38 + (22 + LINE_HEIGHT * told.count("\n") if told else 0) + (28 if headed else 0)
    size = (across + 2 * MARGIN, top + row_height * len(prompts) + MARGIN - 14)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 4), clipped(title, font(19, True), across), INK, font(19, True))
    draw.multiline_text((MARGIN, MARGIN + 26), told, SOFT, font(13), spacing=4)
    boxes: list[list[list[int]]] = [[] for _ in prompts]
    for p, prompt in enumerate(prompts):
        lines = wrapped(prompt, font(13), LABEL - 20, max(2, high // LINE_HEIGHT))
        draw.multiline_text((MARGIN, top + p * row_height - 2), lines, INK, font(13), spacing=4)
    left = MARGIN + LABEL
    for block, width in zip(blocks, widths, strict=True):
        if block.heading:
            draw.text((left, top - 30), clipped(block.heading, font(14, True), width), INK, font(14, True))
            draw.line((left, top - 8, left + width - 1, top - 8), LINE)
        for p, row in enumerate(block.rows):
            for c, tile in enumerate(row):
                corner = (left + c * (wide + GAP), top + p * row_height)
                paste(canvas, draw, tile, corner)
                boxes[p].append([*corner, *tile.image.size])
        left += width + BLOCK_GAP
    return canvas, boxes


def paste(canvas: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, corner: tuple[int, int]) -> None:
    """One tile with its lines; a hair line keeps a white image apart from the paper."""
    (x, y), (w, h) = corner, tile.image.size
    canvas.paste(tile.image, corner)
    draw.rectangle((x - 1, y - 1, x + w, y + h), outline=LINE)
    for j, (name, value, ink) in enumerate(tile.lines):
        line = f"{clipped(name, font(12), w - font(12).getlength(f' {value}'))} {value}"
        draw.text((x, y + h + 5 + LINE_HEIGHT * j), line, ink, font(12))


@lru_cache
def font(size: int, bold: bool = False) -> Any:
    """A face that knows Latin, Greek and Cyrillic; it comes with matplotlib."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def clipped(text: str, face: Any, width: float) -> str:
    """As much of a line as fits, with an ellipsis for the rest."""
    text = " ".join(text.split())
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def wrapped(text: str, face: Any, width: float, most: int) -> str:
    """A text broken into at most so many lines."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < most:
        taken = next((n for n in range(len(words), 0, -1) if face.getlength(" ".join(words[:n])) <= width), 1)
        if len(lines) == most - 1:
            taken = len(words)
        lines.append(clipped(" ".join(words[:taken]), face, width))
        words = words[taken:]
    return "\n".join(lines)


def write_sheet(picture: Image.Image, boxes: Sequence[Sequence[Sequence[int]]], path: Path) -> None:
    """Writes a picture, whole or not at all, with the places of its tiles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text(TILES, json.dumps(boxes))
    whole(path, lambda file: picture.save(file, "png", pnginfo=info), durable=False)


def read_tiles(path: Path) -> list[list[Image.Image]]:
    """The tiles of a sheet, prompt by prompt.

    Raises:
        OSError, KeyError: there is no such sheet, or it is another kind of picture.
    """
    with Image.open(path) as picture:
        picture.load()
        boxes = json.loads(picture.info[TILES])
        return [[picture.crop((x, y, x + w, y + h)) for x, y, w, h in row] for row in boxes]
