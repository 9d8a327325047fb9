"""The `Judge`: a vision-language model that answers questions about media, for the rewards that ask some.

    Ask     media and a question
    Judge   odds(asks, choices)    how probable each given answer is    (probability of yes, expected rating)
            write(asks)            the answer in words                   (critiques, scores in prose, rankings)

A judge runs in this process (`LocalJudge`) or behind an OpenAI-compatible server (`ServedJudge`); rewards do not know which. It
gives a gradient if and only if `differentiable`, through `odds`. What it cannot answer is NaN or None, never a number.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .base import Configurable

__all__ = ["Ask", "Judge", "checked", "prompted", "published"]


@dataclass(frozen=True)
class Ask:
    """One question.

    Attributes:
        text: the question. It stands behind the media, unless it holds `<media>` once for each of them, which says where they go.
        media: each (3, H, W), an image, or (F, 3, H, W), a video, with values in [0, 1].
        system: what the judge is told beforehand.
        start: words that the answer begins with, as if the judge had said them.
        seed: of the draw, where answers are drawn.
        schema: JSON schema of the answer, for judges that can be held to one; others pass it over.
    """

    text: str
    media: tuple[Tensor, ...] = ()
    system: str = ""
    start: str = ""
    seed: int = 0
    schema: str = ""

    @property
    def pieces(self) -> list[str]:
        """The text before, between and behind the media: one piece more than there are media.

        Raises:
            ValueError: `<media>` stands in the text, but not once for each of them.
        """
        pieces = self.text.split("<media>")
        if len(pieces) == 1:
            return [""] * len(self.media) + pieces
        if len(pieces) != len(self.media) + 1:
            raise ValueError(f"the question names <media> {len(pieces) - 1} times, but shows {len(self.media)} media")
        return pieces


@cache
def published(file: str, name: str) -> str:
    """A question that a model was trained on, word for word, with `{prompt}` for the prompt.

    Args:
        file: in the folder `questions`, which says source and licence, without its .json.
        name: of the question.
    """
    text = (Path(__file__).parent / "questions" / f"{file}.json").read_text(encoding="utf-8")
    return json.loads(text)["questions"][name]


def prompted(question: str, prompt: str) -> str:
    """A question with the prompt in its place; a `<media>` in the prompt is no place for media, and becomes `< media >`."""
    return question.replace("{prompt}", prompt.replace("<media>", "< media >"))


class Judge(Configurable, nn.Module, ABC):
    """Answers questions about media.

    A judge is frozen and always in eval mode. Questions of one call may differ in everything: the implementation batches what can
    be. Answers do not depend on what else is asked.

    Attributes:
        differentiable: whether `odds` gives a gradient with respect to the media.
    """

    differentiable: bool = False

    @abstractmethod
    def odds(self, asks: Sequence[Ask], choices: Sequence[Sequence[str]]) -> Tensor:
        """How probable it is that the answer begins with each choice.

        Args:
            asks: B questions.
            choices: C answers, each in all its spellings, such as [["Yes", "yes"], ["No", "no"]]. A spelling counts by its first
                token.

        Returns:
            (B, C) float32 natural logarithms of the probabilities among all that could be said; a row of NaN where there is no
            answer.

        Raises:
            ValueError: two choices begin with the same token.
        """

    @abstractmethod
    def write(self, asks: Sequence[Ask], *, temperature: float = 0.0, max_tokens: int = 512) -> list[str | None]:
        """The answers in words, without `start`; None where there is none.

        Args:
            asks: the questions; the same one with another `seed` is another draw.
            temperature: 0 takes the most probable word each time; above, words are drawn.
            max_tokens: at which an answer is cut.
        """

    @property
    def name(self) -> str:
        """How messages and result files call this judge."""
        return type(self).__name__

    def train(self, mode: bool = True) -> Judge:
        """Keeps eval mode whatever is asked."""
        return super().train(False)


def checked(judge: Any, modality: str = "image") -> Any:
    """A reward's judge.

    Raises:
        TypeError: it is none.
        ValueError: `modality` is neither image nor video.
    """
    if not isinstance(judge, Judge):
        raise TypeError(
            f"judge must be a Judge, such as LocalJudge or ServedJudge; got {type(judge).__name__}: {judge!r:.80}"
        )
    if modality not in ("image", "video"):
        raise ValueError(f"modality must be one of image, video; got {modality!r}")
    return judge
