"""Rewards that put a question to a judge and read how probable its answers are, instead of what it writes.

With log p(a) the judge's log-probability that its answer begins with a, all spellings of a taken together:

    probability  p(yes) / (p(yes) + p(no)) = sigmoid(log p(yes) - log p(no))      0 to 1
    log_odds     log p(yes) - log p(no)                                           unbounded; its sum over questions is calibrated
    vqascore     p(yes) among all that could be said                              0 to 1
    rating       sum_k v_k p(k) / sum_k p(k) over the labels k of a scale         between the smallest and the largest v

These are smooth where a written score comes in steps, take one forward pass, and have a gradient where the judge has one.

Sources: Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation" (VQAScore), 2024, arXiv 2404.01291. Wu et
al., "Q-Align", 2023, arXiv 2312.17090. You et al., "DeQA-Score", 2025, arXiv 2501.11561. Several questions about one prompt: Cho et
al., "Davidsonian Scene Graph", 2023, arXiv 2310.18235.

Deviations: VQAScore's CLIP-FlanT5 averages the log-probability over "Yes" and the end of the answer, the square root of
p(Yes) p(end | Yes); chat models, and all judges here, are asked for p(Yes). Questions of one prompt are taken as independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .base import Prompt, Reward, Scores
from .judging import Ask, Judge, checked, prompted, published

__all__ = ["QAlign", "Rating", "VQAScore", "YesNo"]

Score = Literal["probability", "log_odds", "vqascore"]
Kind = Literal["image", "video"]

YES, NO = (tuple(space + word for word in words for space in ("", " ")) for words in (("Yes", "yes"), ("No", "no")))
SHOWS = 'Does this {media} show "{prompt}"? Answer Yes or No.'
RATE = 'How well does this {media} show "{prompt}"? Answer with a number from 1 (not at all) to 5 (perfectly).'
WORDS = ("excellent", "good", "fair", "poor", "bad")


class Asked(Reward):
    """A reward that asks a judge about each sample and reads the odds of its answers."""

    def __init__(self, judge: Judge, system: str, modality: Kind, *questions: str) -> None:
        super().__init__()
        self.judge, self.system, self.modality = checked(judge, modality), system, modality
        self.differentiable = judge.differentiable
        self.needs_prompt = any("{prompt}" in question for question in questions)

    def odds(
        self, media: Tensor, questions: Sequence[Sequence[str]], choices: Sequence[Sequence[str]], start: str = ""
    ) -> list[Tensor]:
        """Log-probabilities of the choices, (questions, choices) for each sample."""
        asks = [
            Ask(text, (medium,), self.system, start)
            for medium, texts in zip(media, questions, strict=True)
            for text in texts
        ]
        odds = self.judge.odds(asks, choices).to(media.device)
        return list(odds.split([len(texts) for texts in questions]))

    def worded(self, question: str, prompt: Prompt | None) -> str:
        """A question about one sample."""
        text = question.replace("{media}", self.modality)
        return text if prompt is None else prompted(text, prompt.text)


class YesNo(Asked):
    """The probability that a judge says yes to a question about image or video and prompt.

    Range: 0 to 1; unbounded for "log_odds"
    Size: as the judge
    Gradient: as the judge

    Answers to several questions are multiplied, log-odds added, and stand in `parts` as question_1, question_2, ... A prompt whose
    `meta` holds a list `questions` is asked those instead.

    Args:
        judge: who is asked.
        question: one or several; `{prompt}` stands for the prompt and `{media}` for "image" or "video".
        score: what is made of the odds, see the module docstring.
        system: what the judge is told beforehand.
        modality: what is judged.

    Raises:
        ValueError: no question, or `meta` holds something else than a list of questions.
    """

    def __init__(
        self,
        judge: Judge,
        question: list[str] | str = SHOWS,
        score: Score = "probability",
        *,
        system: str = "",
        modality: Kind = "image",
    ) -> None:
        questions = [question] if isinstance(question, str) else list(question)
        if not all(questions) or not questions:
            raise ValueError("YesNo needs at least one question, and none may be empty")
        if score not in Score.__args__:
            raise ValueError(f"score must be one of {', '.join(Score.__args__)}; got {score!r}")
        super().__init__(judge, system, modality, *questions)
        self.questions, self.rule = questions, score
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        asked = [self.texts(prompts[i] if prompts else None) for i in range(len(media))]
        answers = [self.spell(odds) for odds in self.odds(media, asked, [YES, NO])]
        total = torch.stack([a.sum() if self.rule == "log_odds" else a.prod() for a in answers])
        most = max(map(len, answers))
        padded = [torch.cat([a, a.new_full((most - len(a),), torch.nan)]) for a in answers]
        columns = torch.stack(padded).unbind(dim=1) if most > 1 else ()
        return Scores(total, {f"question_{i}": column for i, column in enumerate(columns, 1)})

    def texts(self, prompt: Prompt | None) -> list[str]:
        """The questions about one sample."""
        own = self.questions if prompt is None else prompt.meta.get("questions", self.questions)
        if isinstance(own, str) or not own or not all(isinstance(question, str) for question in own):
            raise ValueError(f"a prompt's questions must be a list of texts; got {own!r} for {prompt}")
        return [self.worded(question, prompt) for question in own]

    def spell(self, odds: Tensor) -> Tensor:
        """(questions, 2) log-probabilities of yes and no -> the score of each question."""
        yes, no = odds.unbind(dim=-1)
        return {"probability": (yes - no).sigmoid(), "log_odds": yes - no, "vqascore": yes.exp()}[self.rule]


class VQAScore(Asked):
    """VQAScore: how probably a judge answers "Yes", the figure shows the prompt (arXiv 2404.01291).

    Range: 0 to 1
    Size: as the judge
    Gradient: as the judge

    Among all answers, with the published question. The reference for compositional prompts with a strong judge.

    Args:
        judge: who is asked.
        wording: of the question: "chat" as published for chat models, "flant5" as for CLIP-FlanT5.
        modality: what is judged.
    """

    def __init__(self, judge: Judge, wording: Literal["chat", "flant5"] = "chat", *, modality: Kind = "image") -> None:
        if wording not in ("chat", "flant5"):
            raise ValueError(f"wording must be chat or flant5; got {wording!r}")
        question = published("vqascore", wording)
        super().__init__(judge, "", modality, question)
        self.question = question
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        asked = [[self.worded(self.question, prompt)] for prompt in prompts]
        return torch.cat(self.odds(media, asked, [("Yes", " Yes")])).squeeze(-1).exp()


class Rating(Asked):
    """The rating that a judge is expected to give: the mean of a scale under the odds of its labels.

    Range: the smallest to the largest of `values`
    Size: as the judge
    Gradient: as the judge

    `parts` holds `mass`, the probability that the answer is on the scale at all: where it is small, ask in other words.

    Args:
        judge: who is asked.
        question: put to it; `{prompt}` stands for the prompt, `{media}` for "image" or "video".
        scale: labels, each with a first token of its own; None means the digits 1 to 5.
        values: what the labels are worth; None reads them as numbers.
        start: words that the answer begins with; labels stand behind them and a space.
        system: what the judge is told beforehand.
        modality: what is judged.

    Raises:
        ValueError: fewer than two labels, or values that do not match them.
    """

    def __init__(
        self,
        judge: Judge,
        question: str = RATE,
        scale: list[str] | None = None,
        values: list[float] | None = None,
        *,
        start: str = "",
        system: str = "",
        modality: Kind = "image",
    ) -> None:
        super().__init__(judge, system, modality, question)
        labels = list(scale) if scale is not None else list("12345")
        if values is None:
            if not all(label.replace(".", "", 1).isdigit() for label in labels):
                raise ValueError(f"a scale of words needs values, one a label; got {labels} without")
            values = [float(label) for label in labels]
        if len(labels) < 2 or len(values) != len(labels):
            raise ValueError(f"a scale needs at least 2 labels and a value for each; got {labels} and {values}")
        self.question, self.start, self.labels, self.values = question, start, labels, values
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        asked = [[self.worded(self.question, prompts[i] if prompts else None)] for i in range(len(media))]
        odds = torch.cat(self.odds(media, asked, self.choices(), self.start.replace("{media}", self.modality)))
        return Scores(expected(odds, self.values), {"mass": odds.exp().sum(dim=-1)})

    def choices(self) -> list[list[str]]:
        """The labels as they can follow: behind a space if words stand before, capitalised or not if none do."""
        if self.start and not self.start[-1].isspace():
            return [[f" {label}"] for label in self.labels]
        return [list(dict.fromkeys([label, label.capitalize()])) for label in self.labels]


class QAlign(Rating):
    """Q-Align's and DeQA-Score's rating in five words from excellent to bad (arXiv 2312.17090).

    Range: 0 to 1, or 1 to 5
    Size: as the judge
    Gradient: as the judge

    The published question on any judge, whose answer begins with "The quality of the image is". The published weights
    (q-future/one-align, zhiyuanyou/DeQA-Score-Mix3; S-Lab licence, not for commercial use) come with code of their own for an old
    transformers: serve them, or ask a general judge.

    Args:
        judge: who is asked.
        aspect: what is rated; "aesthetics" of images only.
        scale: "0-1" as in the released scorer, "1-5" as mean opinion scores and DeQA-Score.
        modality: what is judged.
    """

    needs_prompt = False
    claims_quality = True

    def __init__(
        self,
        judge: Judge,
        aspect: Literal["quality", "aesthetics"] = "quality",
        scale: Literal["0-1", "1-5"] = "0-1",
        *,
        modality: Kind = "image",
    ) -> None:
        worth = {"0-1": [1.0, 0.75, 0.5, 0.25, 0.0], "1-5": [5.0, 4.0, 3.0, 2.0, 1.0]}
        if (
            scale not in worth
            or aspect not in ("quality", "aesthetics")
            or (aspect, modality) == ("aesthetics", "video")
        ):
            raise ValueError(f"no rating of the {aspect} of a {modality} on the scale {scale!r}: see the arguments")
        name = f"{modality}_{aspect}"
        question, start = published("qalign", name), published("qalign", f"{name}_start")
        super().__init__(judge, question, list(WORDS), worth[scale], start=start, modality=modality)


def expected(odds: Tensor, values: Sequence[float]) -> Tensor:
    """The mean of K values under (B, K) log-probabilities, taken among themselves."""
    return (odds.softmax(dim=-1) * odds.new_tensor(values)).sum(dim=-1)
