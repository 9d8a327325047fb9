"""The world of coloured shapes: its grammar, its geometry, and the gold reward that reads it exactly.

The world (assets/) holds plain light images with one to four upright shapes in eight colours. A prompt is one noun phrase
("three green stars", "a red circle on the left") or two ("a red circle left of a blue square"), so it falls into one of
GenEval's six tasks (Ghosh et al. 2023, arXiv 2310.11513) in miniature. Because every image can be read, alignment can be
measured instead of judged: `Shapes` is that measure.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Prompt, Reward, Scores

__all__ = ["Detection", "Noun", "Scene", "Shapes", "detect", "parse"]

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.88, 0.12),
    "green": (0.10, 0.62, 0.20),
    "cyan": (0.15, 0.82, 0.88),
    "blue": (0.12, 0.25, 0.88),
    "purple": (0.60, 0.15, 0.78),
    "black": (0.08, 0.08, 0.10),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NUMBERS = {"two": 2, "three": 3, "four": 4}
PLACES = {"on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class Noun:
    """What one noun phrase asks for: `count` objects of one shape, of any colour and at any place where those are None."""

    shape: str
    color: str | None = None
    count: int = 1
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one or two noun phrases, and where the first stands relative to the second."""

    nouns: tuple[Noun, ...]
    relation: str | None = None

    @property
    def task(self) -> str:
        """GenEval's name for what this prompt tests."""
        if any(n.count > 1 for n in self.nouns):
            return "counting"
        if self.relation or any(n.place for n in self.nouns):
            return "position"
        if len(self.nouns) == 2:
            return "color_attr" if all(n.color for n in self.nouns) else "two_object"
        return "colors" if self.nouns[0].color else "single_object"


NOUN = re.compile(
    rf"(?P<number>an?|one|a single|{'|'.join(NUMBERS)})"
    rf"(?: (?P<color>{'|'.join(COLORS)}))? (?P<shape>{'|'.join(SHAPES)})(?P<plural>e?s)?(?: (?P<place>{'|'.join(PLACES)}))?"
)
PREFIX = re.compile(r"an? (?:photo|picture|image|drawing) of ")
JOINT = re.compile(rf" (and|{'|'.join(RELATIONS)}) ")


def parse(text: str) -> Scene:
    """Reads a prompt of the world.

    Raises:
        ValueError: the text is not in the grammar.
    """
    plain = (
        " ".join(text.lower().split())
        .rstrip(".")
        .replace(" to the left of ", " left of ")
        .replace(" to the right of ", " right of ")
    )
    if start := PREFIX.match(plain):
        plain = plain[start.end() :]
    pieces = JOINT.split(plain)
    nouns = tuple(read_noun(piece, text) for piece in pieces[::2])
    relation = pieces[1] if len(pieces) == 3 and pieces[1] != "and" else None
    pair = len(nouns) == 2
    if len(nouns) > 2 or pair and any(n.count > 1 for n in nouns) or relation and any(n.place for n in nouns):
        raise ValueError(f"{text!r} is outside the world of shapes: {EXPECTED}")
    return Scene(nouns, relation)


EXPECTED = (
    "expected '[a photo of] a [color] shape [on the left]', 'three [color] shapes', or two of the former joined by "
    "'and', 'left of', 'right of', 'above' or 'below'"
)


def read_noun(piece: str, text: str) -> Noun:
    """Reads one noun phrase of `text`; a number above one goes with a plural and only with it."""
    match = NOUN.fullmatch(piece)
    count = NUMBERS.get(match["number"], 1) if match else 1
    if not match or (count > 1) != bool(match["plural"]):
        raise ValueError(f"{text!r} is outside the world of shapes: {EXPECTED}")
    return Noun(match["shape"], match["color"], count, match["place"])


def gauge(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """How far out a point lies: at most 1 inside the shape of unit radius centred at the origin, y pointing down.

    Homogeneous of degree one (but for the ring's hole), so `gauge(x / r, y / r) <= 1` is the shape of radius r.
    """
    if shape == "circle":
        return torch.hypot(x, y)
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) / 0.9
    if shape == "triangle":  # equilateral, its centroid at the origin, circumradius 1.2
        return torch.maximum(y, 0.8660254 * x.abs() - 0.5 * y) / 0.6
    if shape == "star":  # five points: fold the angle into one half-point, then a single edge decides
        outer, inner, step = 1.25, 0.55, torch.pi / 5
        angle = torch.atan2(x, -y).abs() % (2 * step)
        angle, radius = torch.minimum(angle, 2 * step - angle), torch.hypot(x, y)
        u, v = radius * angle.cos(), radius * angle.sin()
        tip_x, tip_y = inner * torch.cos(torch.tensor(step)) - outer, inner * torch.sin(torch.tensor(step))
        return (u * tip_y - v * tip_x) / (outer * tip_y)
    if shape == "cross":
        a, b = x.abs(), y.abs()
        return torch.minimum(torch.maximum(a / 1.1, b / 0.38), torch.maximum(a / 0.38, b / 1.1))
    if shape == "ring":
        radius = torch.hypot(x, y)
        return torch.where(radius < 0.55, torch.full_like(radius, 2.0), radius / 1.05)
    raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")


@dataclass(frozen=True)
class Detection:
    """One object read from an image.

    Attributes:
        shape: None where the outline fits no shape.
        color: the named colour of most of it.
        x, y: centre, as shares of the image side, from the top left.
        area: share of the image.
        fit: overlap (intersection over union) with the best shape, in [0, 1].
    """

    shape: str | None
    color: str
    x: float
    y: float
    area: float
    fit: float


CHUNK = 64  # images read at once
SIDE = 64  # pixels a side at which images are read
SPECK = 0.008  # smaller components, as a share of the image, are dirt; the smallest drawn object covers 0.035
CONTRAST = 0.35  # distance from the background at which a pixel belongs to an object; every colour is at least 0.7 away
FIT = 0.68  # overlap that makes an outline a shape
BLURS = (0.03, 0.08, 0.13, 0.18)  # standard deviations compared, in square roots of the area
FRAME, SPAN = 24, 1.05  # outlines are compared on a FRAME x FRAME grid reaching SPAN square roots of their area
MARGIN = 0.08  # how far apart two centres must be for a relation, and from the middle for a place to be certain: half


@cache
def templates() -> Tensor:
    """(shapes, blurs, FRAME, FRAME): the cover of every shape of area one, centred, sharp to blurred."""
    fine = 8
    axis = ((torch.arange(FRAME * fine) + 0.5) / (FRAME * fine) * 2 - 1) * SPAN
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    wide = torch.linspace(-1.5, 1.5, 1201)
    wy, wx = torch.meshgrid(wide, wide, indexing="ij")
    covers = []
    for shape in SHAPES:
        area = (gauge(shape, wx, wy) <= 1).float().mean() * 9
        inside = gauge(shape, x * area.sqrt(), y * area.sqrt()) <= 1
        covers.append(F.avg_pool2d(inside.float()[None], fine)[0])
    sharp, grid = torch.stack(covers), axis.view(FRAME, fine).mean(1)
    blurred = []
    for sigma in BLURS:
        kernel = torch.exp(-((grid[:, None] - grid) ** 2) / (2 * sigma**2))
        kernel = kernel / kernel.sum(1, keepdim=True)
        blurred.append(kernel @ sharp @ kernel.T)
    return torch.stack(blurred, 1)


def components(kind: Tensor) -> Tensor:
    """Labels 4-connected regions of equal kind: (B,H,W) integers, negative for background, to (B,H,W) labels.

    A region is labelled by the largest flat index in it, background by -1. Neighbours exchange labels, and every pixel
    jumps to the label of its label, so the number of passes grows with the logarithm of a region's length.
    """
    b, h, w = kind.shape
    own = torch.arange(h * w, device=kind.device).view(1, h, w).expand(b, h, w)
    label = torch.where(kind >= 0, own, -1)
    sides = [
        (slice(1, None), slice(None)),
        (slice(None, -1), slice(None)),
        (slice(None), slice(1, None)),
        (slice(None), slice(None, -1)),
    ]
    while True:
        best = label.clone()
        for here, there in ((sides[0], sides[1]), (sides[1], sides[0]), (sides[2], sides[3]), (sides[3], sides[2])):
            here, there = (slice(None), *here), (slice(None), *there)
            same = (kind[here] == kind[there]) & (kind[here] >= 0)
            best[here] = torch.where(same, torch.maximum(best[here], label[there]), best[here])
        flat = best.flatten(1)
        best = torch.where(flat >= 0, flat.gather(1, flat.clamp(min=0)), -1).view(b, h, w)
        if torch.equal(best, label):
            return label
        label = best


def detect(images: Tensor) -> list[list[Detection]]:
    """Reads every object of a batch of images.

    The background is the median of the border. A pixel's distance from it, divided by the largest distance nearby, is the
    share of the pixel an object covers; blur then changes neither an object's area nor its centre, and outlines are
    compared at equal area and centre. A silhouette that fits a shape is one object, named by the colour of most of it; any
    other is cut where the colour changes, so two touching objects are still told apart.

    Args:
        images: (B,3,H,W) in [0,1], H and W at least 32.

    Returns:
        One list an image, largest object first.
    """
    if len(images) > CHUNK:
        return [things for chunk in images.split(CHUNK) for things in detect(chunk)]
    x = F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
    border = torch.cat(
        [x[:, :, :2].flatten(2), x[:, :, -2:].flatten(2), x[:, :, :, :2].flatten(2), x[:, :, :, -2:].flatten(2)], 2
    )
    ground = border.median(2).values[:, :, None, None]
    offset = x - ground  # (B,3,S,S)
    contrast = offset.square().sum(1).sqrt()
    cover = contrast / F.max_pool2d(contrast[:, None], 9, 1, 4)[:, 0].clamp(min=CONTRAST)
    palette = torch.tensor(list(COLORS.values()), device=images.device)
    hues = F.normalize(palette - ground[:, None, :, 0, 0], dim=-1)  # (B,colors,3)
    hue = torch.einsum("bchw,bkc->bkhw", offset, hues).argmax(1)  # blending with the background keeps the direction
    figure = contrast > CONTRAST
    found: list[list[Detection]] = [[] for _ in images]
    whole = components(torch.where(figure, 0, -1))
    for row, name, thing in measure(whole, cover, hue):
        if thing.shape:
            found[row].append(thing)
            figure[row] &= whole[row] != name
    for row, _, thing in measure(components(torch.where(figure, hue, -1)), cover, hue):
        found[row].append(thing)
    return [sorted(things, key=lambda thing: -thing.area) for things in found]


def measure(label: Tensor, cover: Tensor, hue: Tensor) -> list[tuple[int, int, Detection]]:
    """Measures every region of (B,S,S) labels: (image, label, what it is)."""
    regions = []
    for row, labels in enumerate(label):
        names, sizes = labels[labels >= 0].unique(return_counts=True)
        regions += [
            (row, name) for name, size in zip(names.tolist(), sizes.tolist(), strict=True) if size > SPECK * SIDE**2
        ]
    if not regions:
        return []
    rows, names = torch.tensor(regions, device=label.device).T
    masks = label[rows] == names[:, None, None]  # (N,S,S)
    near = F.max_pool2d(masks.float()[:, None], 5, 1, 2)[:, 0] > 0  # the soft edge lies outside the mask
    taken = torch.zeros(label.shape, device=label.device).index_add_(0, rows, masks.float()) > 0
    own = cover[rows] * (masks | near & ~taken[rows])
    core = masks & (cover[rows] > 0.8)
    votes = torch.stack([(core & (hue[rows] == k)).sum((1, 2)) for k in range(len(COLORS))], 1)
    area = own.sum((1, 2))
    axis = torch.arange(SIDE, device=label.device) + 0.5
    cx, cy = (own.sum(1) @ axis) / area, (own.sum(2) @ axis) / area
    fit, shape = outlines(own, cx, cy, area).max(1)
    columns = (shape, votes.argmax(1), cx / SIDE, cy / SIDE, area / SIDE**2, fit)
    things = [
        Detection(SHAPES[s] if overlap >= FIT else None, list(COLORS)[c], x, y, size, overlap)
        for s, c, x, y, size, overlap in zip(*(column.tolist() for column in columns), strict=True)
    ]
    return [(row, name, thing) for (row, name), thing in zip(regions, things, strict=True)]


def outlines(cover: Tensor, cx: Tensor, cy: Tensor, area: Tensor) -> Tensor:
    """Overlap of N covers (N,S,S) with every shape at the same centre and area: (N, shapes)."""
    axis = ((torch.arange(FRAME, device=cover.device) + 0.5) / FRAME * 2 - 1) * SPAN
    reach = area.sqrt()[:, None] * axis  # (N,FRAME) pixels from the centre
    gx, gy = ((centre[:, None] + reach) / SIDE * 2 - 1 for centre in (cx, cy))
    where = torch.stack([gx[:, None, :].expand(-1, FRAME, -1), gy[:, :, None].expand(-1, -1, FRAME)], -1)
    seen = F.grid_sample(cover[:, None], where, align_corners=False)  # (N,1,FRAME,FRAME)
    ideal, seen = templates().to(cover.device)[None], seen[:, None]
    overlap = torch.minimum(seen, ideal).sum((-2, -1)) / torch.maximum(seen, ideal).sum((-2, -1))
    return overlap.amax(2)  # the blur that fits best


class Shapes(Reward):
    """The gold reward of the embedded world: 1 where every clause of the prompt holds, else 0.

    Range: 0 or 1
    Size: any; made for 128
    Gradient: no

    NaN for a prompt outside the grammar. The rule is GenEval's (arXiv 2310.11513). A counting prompt wants exactly that
    number of objects and no others. Any
    other prompt wants its objects among those found, each found object standing for one noun; colours and places belong to
    the object that stands for the noun. One surplus object is forgiven, more are not: so an image full of everything, or
    of debris, fails. A relation holds where the centres are at least `MARGIN` apart along its axis, at most 60 degrees off
    it; a place where the centre lies `MARGIN / 2` beyond the middle.

    `parts` holds, in [0, 1] and NaN where the prompt has no such clause: "objects" (the share of nouns whose shape is
    found), "colors" (the share of coloured nouns whose shape is found in that colour), "count" and "position" (the share
    of place or relation clauses that hold).
    """

    modality = "image"
    differentiable = False
    needs_prompt = True

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        rows = [judge(things, prompt.text) for things, prompt in zip(detect(media), prompts, strict=True)]
        columns = {name: torch.tensor([row[name] for row in rows], device=media.device) for name in ("total", *PARTS)}
        return Scores(columns.pop("total"), columns)


PARTS = ("objects", "colors", "count", "position")


def judge(things: list[Detection], text: str) -> dict[str, float]:
    """The total and the parts of one image's score; all NaN where the prompt is outside the grammar."""
    try:
        scene = parse(text)
    except ValueError:
        return dict.fromkeys(("total", *PARTS), math.nan)
    return count(things, scene.nouns[0]) if scene.nouns[0].count > 1 else match(things, scene)


def count(things: list[Detection], noun: Noun) -> dict[str, float]:
    """Scores a counting prompt."""
    alike = [thing for thing in things if thing.shape == noun.shape]
    right = [thing for thing in alike if noun.color in (None, thing.color)]
    placed = [thing for thing in right if noun.place is None or stands(thing, noun.place)]
    exact = len(placed) == noun.count == len(things)
    return {
        "total": float(exact),
        "objects": float(bool(alike)),
        "colors": len(right) / max(len(alike), 1) if noun.color else math.nan,
        "count": float(len(alike) == noun.count),
        "position": len(placed) / max(len(right), 1) if noun.place else math.nan,
    }


def match(things: list[Detection], scene: Scene) -> dict[str, float]:
    """Scores a prompt without a number, under the assignment of objects to nouns that satisfies most clauses."""
    nouns = scene.nouns
    empty: list[Detection | None] = [None] * len(nouns)  # a noun may find no object
    readings = [read(chosen, scene) for chosen in itertools.permutations([*things[:12], *empty], len(nouns))]
    objects, colors, places = max(readings, key=lambda clauses: sum(map(sum, clauses)))
    held = sum(objects) + sum(colors) + sum(places)
    complete = held == len(objects) + len(colors) + len(places) and len(things) <= len(nouns) + 1
    return {
        "total": float(complete),
        "objects": share(objects),
        "colors": share(colors),
        "count": math.nan,
        "position": share(places),
    }


def read(chosen: tuple[Detection | None, ...], scene: Scene) -> tuple[list[bool], list[bool], list[bool]]:
    """Which object, colour and position clauses hold if these objects stand for the nouns."""
    held = [
        (noun, thing if thing and thing.shape == noun.shape else None)
        for noun, thing in zip(scene.nouns, chosen, strict=True)
    ]
    colors = [thing is not None and thing.color == noun.color for noun, thing in held if noun.color]
    places = [thing is not None and stands(thing, noun.place) for noun, thing in held if noun.place]
    if scene.relation:
        (_, first), (_, second) = held
        places.append(first is not None and second is not None and relates(first, second, scene.relation))
    return [thing is not None for _, thing in held], colors, places


def share(clauses: list[bool]) -> float:
    """The share of clauses that hold; NaN where there is none."""
    return sum(clauses) / len(clauses) if clauses else math.nan


def stands(thing: Detection, place: str) -> bool:
    """Whether an object stands at an absolute place."""
    dx, dy = PLACES[place]
    return dx * (thing.x - 0.5) + dy * (thing.y - 0.5) >= MARGIN / 2


def relates(first: Detection, second: Detection, relation: str) -> bool:
    """Whether the first object stands so relative to the second."""
    dx, dy = RELATIONS[relation]
    along = dx * (first.x - second.x) + dy * (first.y - second.y)
    return along >= MARGIN and along >= 0.5 * math.hypot(first.x - second.x, first.y - second.y)
