"""Text rendering: how much of the text that a prompt puts in quotes can be read in the image.

With t the quoted text, r what the OCR engine reads (its lines joined), both without white space and in lower case, and d(·,·) the
Levenshtein distance,

    score = 1                            if r holds t
            1 - min(d(r, t), |t|) / |t|  else
    strict: 1 - d(r, t) / max(|r|, |t|)

The first is flow_grpo's reward (Liu et al., "Flow-GRPO", 2025, arXiv 2505.05470, and its released code). It forgives whatever is
written beside t, which a policy will find out; the strict score does not.

Deviations from flow_grpo: several quoted texts are joined instead of taking the first alone; curly quotes, guillemets and CJK
brackets are quotes too; both texts are normalised (NFKC, straight apostrophes, any white space removed); the engine is RapidOCR,
which runs PaddleOCR's networks without PaddlePaddle, by default; a prompt that quotes nothing is NaN instead of an exception, and
an engine that fails is NaN or an exception instead of 0. Videos: `Framewise` (flow_grpo takes the mean over every fourth frame).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from .base import Prompt, Reward, Scores
from .loading import imported

__all__ = ["OCRAccuracy", "edit_distance", "normal", "quoted"]

Engine = Callable[[Any], Optional[Sequence[tuple[str, float]]]]

STRAIGHT = str.maketrans(dict.fromkeys("“”„‟＂", '"'))
QUOTES = re.compile(r'"([^"]*)"|«([^»]*)»|「([^」]*)」|『([^』]*)』')
APOSTROPHE = str.maketrans("‘’", "''")


def quoted(text: str) -> str:
    """What a prompt puts in double quotes, curly quotes, guillemets or CJK brackets, joined; "" if nothing."""
    return "".join(
        match[match.lastindex or 0] for match in QUOTES.finditer(text.translate(STRAIGHT)) if match.lastindex
    )


def normal(text: str) -> str:
    """Text as it is compared: compatible characters made one, lower case, no white space."""
    return "".join(unicodedata.normalize("NFKC", text).translate(APOSTROPHE).lower().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and substitutions that make one string the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def accuracy(read: str, target: str, strict: bool) -> float:
    """The score of two normalised texts; `target` is not empty."""
    if not strict and target in read:
        return 1.0
    distance = edit_distance(read, target)
    return 1 - distance / max(len(read), len(target)) if strict else 1 - min(distance, len(target)) / len(target)


class OCRAccuracy(Reward):
    """How much of the text in the prompt's quotes an OCR engine reads in the image.

    Range: 0 to 1
    Size: any; the letters of RapidOCR should be some 10 pixels high
    Gradient: no

    The text is what the prompt puts in quotes, or `meta["text"]`. NaN where there is none, or where the engine returns None. Parts:
    `contained` and `exact`, 1 or 0, whether the text was read among others and alone.

    Args:
        engine: "rapidocr", or a function, or its dotted path: an RGB PIL image to a list of (text, confidence), one a line in
            reading order; None if it cannot tell.
        strict: whether what is written beside the text costs; see the module docstring.
        confidence: lines of no more are not read.

    Raises:
        ImportError: RapidOCR is not installed.
        ValueError: the dotted path names nothing.
    """

    differentiable = False

    def __init__(self, engine: str | Engine = "rapidocr", *, strict: bool = False, confidence: float = 0.0) -> None:
        super().__init__()
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence must be at least 0 and less than 1; got {confidence}")
        if isinstance(engine, str):
            engine = rapidocr() if engine == "rapidocr" else imported(engine)
        if not callable(engine):
            raise ValueError(f"engine must be a function of an image; got {engine!r}")
        self.engine, self.strict, self.confidence = engine, strict, confidence
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        from PIL import Image

        pixels = (255 * media.float()).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        rows = [self.judge(Image.fromarray(image), prompt) for image, prompt in zip(pixels, prompts, strict=True)]
        total, contained, exact = torch.tensor(rows, device=media.device).unbind(1)
        return Scores(total, {"contained": contained, "exact": exact})

    def judge(self, image: Any, prompt: Prompt) -> tuple[float, float, float]:
        """Score, contained and exact of one image."""
        target = normal(str(prompt.meta.get("text") or quoted(prompt.text)))
        lines = self.engine(image) if target else None
        if lines is None:
            return torch.nan, torch.nan, torch.nan
        read = normal("".join(text for text, confidence in lines if confidence > self.confidence))
        return accuracy(read, target, self.strict), float(target in read), float(target == read)


def rapidocr() -> Engine:
    """RapidOCR with the networks that its package brings along (PP-OCR, Apache-2.0), Latin and Chinese.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import onnxruntime  # noqa: F401  # RapidOCR runs on several and installs none
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError("reading text needs RapidOCR and onnxruntime: pip install 'kilter[ocr]'") from error
    engine = RapidOCR(params={"Global.log_level": "error"})

    def read(image: Any) -> list[tuple[str, float]]:
        found: Any = engine(image)
        return list(zip(found.txts or (), found.scores or (), strict=True))

    return read
