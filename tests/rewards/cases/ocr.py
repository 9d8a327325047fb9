"""Text rendering, on images that hold letters as shades of grey, which a stub reads."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import rewards
from tests.rewards.cases import Case

LETTERS = "abcdefghijklmnopqrst"
WORDS = ("hallo", "gold", "ocean", "belt")


def shades(word: str) -> Tensor:
    """A word of up to 5 letters as grey columns, darker than white by the letter: (3, 20, 30)."""
    columns = torch.tensor([(LETTERS.index(letter) + 0.5) / 25 for letter in word] + [1.0] * (5 - len(word)))
    return columns.repeat_interleave(6).expand(3, 20, 30)


def read(image: Image.Image) -> list[tuple[str, float]]:
    columns = np.array_split(np.asarray(image.convert("L"), dtype=float) / 255, 5, axis=1)
    middles = [float(np.median(column)) * 25 for column in columns]
    return [("".join(LETTERS[int(m)] for m in middles if m < 20), 0.9)]


CASES = {
    "OCRAccuracy": Case(
        lambda _: rewards.OCRAccuracy(read),
        ('a sign that says "hello"', "a ring of “gold”", 'an "ocean"', 'a "belt" and a "bell"'),
        lambda: torch.stack([shades(word) for word in WORDS]),
    )
}
