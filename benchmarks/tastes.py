"""A world of known tastes: pictures of one coloured shape, and annotators whose choices follow from what each likes.

An annotator of taste t prefers a to b with probability σ(u_t(a) - u_t(b)), u_t a number a colour. So the best that any reward can
do on given pairs is known exactly, whether it knows who asks or not: `bounds`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from rewards.shapes import COLORS, SHAPES, gauge

SIDE = 32
PREFIXES = ("", "a photo of ", "a picture of ", "an image of ", "a drawing of ")
ONES = ("a", "one", "a single")
SHARED = {"yellow": 1.0, "black": -1.5}  # what all agree on
TASTES: dict[str, dict[str, float]] = {
    "red": {**SHARED, "red": 2.5, "orange": 1.0, "blue": -2.5, "cyan": -1.0},
    "blue": {**SHARED, "red": -2.5, "orange": -1.0, "blue": 2.5, "cyan": 1.0},
}


@dataclass(frozen=True)
class Bounds:
    """The best expected accuracy and negative log-likelihood on some pairs, and the standard error of that accuracy."""

    accuracy: float
    nll: float
    error: float


def draw(shape: str, color: str, rng: random.Random) -> Image.Image:
    """One shape on light grey, somewhere, of some size."""
    r, ground = rng.uniform(0.22, 0.34), rng.uniform(0.9, 1.0)
    x, y = (rng.uniform(1.25 * r, 1 - 1.25 * r) for _ in range(2))
    axis = (torch.arange(4 * SIDE) + 0.5) / (4 * SIDE)
    inside = gauge(shape, (axis[None] - x) / r, (axis[:, None] - y) / r) <= 1
    cover = torch.nn.functional.avg_pool2d(inside.float()[None], 4)[0, :, :, None]
    pixels = cover * torch.tensor(COLORS[color]) + (1 - cover) * ground
    return Image.fromarray((pixels * 255).round().byte().numpy())


def pictures(folder: Path, variants: int, seed: int = 0) -> dict[tuple[str, str], list[str]]:
    """Draws every shape in every colour; paths relative to the folder."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    made: dict[tuple[str, str], list[str]] = {}
    for shape in SHAPES:
        for color in COLORS:
            for v in range(variants):
                name = f"images/{shape}_{color}_{v}.png"
                draw(shape, color, rng).save(folder / name)
                made.setdefault((shape, color), []).append(name)
    return made


def judged(
    folder: Path,
    name: str,
    annotators: Mapping[str, str],
    pairs: int,
    made: Mapping[tuple[str, str], Sequence[str]],
    prefixes: Sequence[str] = PREFIXES,
    ones: Sequence[str] = ONES,
    flips: float = 0.0,
    seed: int = 0,
) -> Path:
    """Writes a file of preferences: `pairs` of each annotator, given with their taste.

    Args:
        prefixes, ones: what prompts begin with.
        flips: the rate at which an answer is written down wrongly.
    """
    rng, rows = random.Random(seed), []
    for annotator, taste in annotators.items():
        seen: set[tuple[str, frozenset[str]]] = set()  # nobody is asked the same twice
        while len(seen) < pairs:
            shape, colors = rng.choice(SHAPES), rng.sample(list(COLORS), 2)
            images = [rng.choice(made[shape, color]) for color in colors]
            first = rng.random() < probability(taste, *colors)
            first ^= rng.random() < flips
            prompt = f"{rng.choice(prefixes)}{rng.choice(ones)} {shape}"
            if (prompt, frozenset(images)) in seen:
                continue
            seen.add((prompt, frozenset(images)))
            rows.append({"prompt": prompt, "images": images, "winner": int(not first), "annotator": annotator})
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def probability(taste: str, a: str, b: str) -> float:
    """That someone of this taste prefers colour a to b."""
    likes = TASTES[taste]
    return 1 / (1 + math.exp(likes.get(b, 0.0) - likes.get(a, 0.0)))


def bounds(pairs: Sequence[tuple[str, str, str]], shares: Mapping[str, float] | None = None) -> Bounds:
    """What the best reward attains in expectation on pairs (taste, colour, colour).

    Args:
        shares: of the tastes among annotators, for a reward that does not know who asks; None for one that does.
    """
    right = nll = variance = 0.0
    for taste, a, b in pairs:
        truth = probability(taste, a, b)
        guess = truth if shares is None else sum(s * probability(t, a, b) for t, s in shares.items())
        # a reward without sight of the person answers from the mixture; over people it is right that often
        hit = truth if guess > 0.5 else 1 - truth if guess < 0.5 else 0.5
        right += hit
        nll -= truth * math.log(guess) + (1 - truth) * math.log(1 - guess)
        variance += hit * (1 - hit)
    return Bounds(right / len(pairs), nll / len(pairs), variance**0.5 / len(pairs))


def asked(path: Path) -> list[tuple[str, str, str]]:
    """(annotator, colour, colour) of every pair of a file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["annotator"], *(Path(image).stem.split("_")[1] for image in row["images"])) for row in rows]
