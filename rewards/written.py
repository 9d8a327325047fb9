"""Scores that a judge writes in words: any question of one's own, and the published ones of UnifiedReward.

UnifiedReward is a vision-language model tuned to score and compare generated media: Wang et al., "Unified Reward Model for
Multimodal Understanding and Generation", 2025, arXiv 2503.05236. Its questions are those of the released inference scripts, word
for word (`questions/unifiedreward.json`); comparisons are in `winrate`.

With `samples` above one, judgements are drawn at a temperature and put to the vote: Liu et al., "Inference-Time Scaling for
Generalist Reward Modeling", 2025, arXiv 2504.02495, sums 32 of them at 0.5. There each draw also shuffles the candidates; here a
sample is judged by itself. What could not be read leaves the vote, and does not become the worst score.

Deviations: the released scripts send JPEG at quality 95, judges here get the media without loss; flow_grpo divides the score by 5
and calls a failure 0, Pref-GRPO fills it with the mean of the group.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import pstdev
from typing import Literal

import torch
from torch import Tensor

from .answers import Rule, field, labelled, matched, spread_out, vote
from .base import Prompt, Reward, Scores
from .judging import Ask, Judge, checked, prompted, published

__all__ = ["Spoken", "UnifiedReward", "Written"]

Reading = Mapping[str, float | None]


class Spoken(Reward):
    """A reward that asks a judge one question a sample and reads numbers from its answers."""

    differentiable = False

    def __init__(self, judge: Judge, samples: int, temperature: float, aggregate: Rule, max_tokens: int) -> None:
        super().__init__()
        if samples < 1 or max_tokens < 1 or temperature < 0:
            raise ValueError(
                f"samples and max_tokens must be ≥ 1, temperature ≥ 0; got {samples}, {max_tokens}, {temperature}"
            )
        if samples > 1 and temperature == 0:
            raise ValueError(f"{samples} samples at temperature 0 are the same one: set temperature, such as 0.5")
        if aggregate not in Rule.__args__:
            raise ValueError(f"aggregate must be one of {', '.join(Rule.__args__)}; got {aggregate!r}")
        self.judge, self.samples, self.temperature = checked(judge), samples, temperature
        self.aggregate: Rule = aggregate
        self.max_tokens = max_tokens

    @abstractmethod
    def ask(self, media: Tensor, prompt: Prompt | None, seed: int) -> Ask:
        """The question about one sample."""

    @abstractmethod
    def read(self, text: str | None) -> tuple[float | None, Reading]:
        """The score in an answer, and its parts."""

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        rows = [(m, prompts[i] if prompts else None) for i, m in enumerate(media)]
        asks = [self.ask(m, prompt, seed) for m, prompt in rows for seed in range(self.samples)]
        texts = self.judge.write(asks, temperature=self.temperature, max_tokens=self.max_tokens)
        read = [self.read(text) for text in texts]
        groups = [read[i : i + self.samples] for i in range(0, len(read), self.samples)]

        def column(of: Callable[[list[tuple[float | None, Reading]]], float]) -> Tensor:
            return torch.tensor([of(group) for group in groups], dtype=torch.float32, device=media.device)

        parts = {
            name: column(lambda group, name=name: vote([parts[name] for _, parts in group], self.aggregate))
            for name in read[0][1]
        }
        if self.samples > 1:
            parts["spread"] = column(lambda group: pstdev(known) if (known := numbers(group)) else torch.nan)
            parts["answered"] = column(lambda group: len(numbers(group)) / len(group))
        return Scores(column(lambda group: vote([total for total, _ in group], self.aggregate)), parts)


def numbers(group: list[tuple[float | None, Reading]]) -> list[float]:
    return [total for total, _ in group if total is not None]


class Written(Spoken):
    """A score that a judge writes in answer to a question of one's own.

    Range: `low` to `high`; times `samples` where they are summed
    Size: as the judge
    Gradient: no

    Args:
        judge: who is asked.
        question: put to it; `{prompt}` stands for the prompt, `<media>` for the media, which otherwise come first.
        label: what the score stands behind in the answer, as in "Score: 7"; with `form` "json" its name there.
        low: smallest score that counts.
        high: largest.
        form: of the answer: "text", or "json" for an object, which a served judge is held to by a schema.
        pattern: regular expression whose first group is the score, instead of the label; the last match counts.
        system: what the judge is told beforehand.
        start: words that its answer begins with.
        samples: judgements a sample.
        temperature: at which they are drawn; 0 takes the most probable words.
        aggregate: how they become one score; "trimmed" leaves the lowest and the highest quarter out.
        max_tokens: length at which an answer is cut.
        modality: what is judged.

    Raises:
        ValueError: values that make no sense.
    """

    def __init__(
        self,
        judge: Judge,
        question: str,
        label: str = "Score",
        low: float = 1.0,
        high: float = 10.0,
        *,
        form: Literal["text", "json"] = "text",
        pattern: str | None = None,
        system: str = "",
        start: str = "",
        samples: int = 1,
        temperature: float = 0.0,
        aggregate: Rule = "mean",
        max_tokens: int = 512,
        modality: Literal["image", "video"] = "image",
    ) -> None:
        super().__init__(checked(judge, modality), samples, temperature, aggregate, max_tokens)
        if form not in ("text", "json"):
            raise ValueError(f"form must be text or json; got {form!r}")
        if not low < high or not label:
            raise ValueError(f"Written needs a label and low < high; got {label!r}, {low}, {high}")
        if pattern is not None and (form == "json" or re.compile(pattern).groups < 1):
            raise ValueError(f"pattern must hold a group, and form must be text; got {pattern!r} and {form!r}")
        self.question, self.label, self.low, self.high, self.form = question, label, low, high, form
        self.pattern = pattern
        self.system, self.start, self.modality = system, start, modality
        self.needs_prompt = "{prompt}" in question
        number = {"type": "number", "minimum": low, "maximum": high}
        schema = {"type": "object", "properties": {label: number}, "required": [label], "additionalProperties": False}
        self.schema = json.dumps(schema) if form == "json" else ""
        self.freeze()

    def ask(self, media: Tensor, prompt: Prompt | None, seed: int) -> Ask:
        text = prompted(self.question, prompt.text) if prompt else self.question
        return Ask(text, (media,), self.system, self.start, seed, self.schema)

    def read(self, text: str | None) -> tuple[float | None, Reading]:
        whole = None if text is None else self.start + text
        if self.pattern is not None:
            return matched(whole, self.pattern, self.low, self.high), {}
        return (field if self.form == "json" else labelled)(whole, self.label, self.low, self.high), {}


@dataclass(frozen=True)
class Form:
    """How a question of UnifiedReward is answered.

    Attributes:
        parts: the label, lowest and highest score of each part.
        final: the same of the score; None means the mean of the parts.
        max_tokens: length of an answer.
        frames: of a video, sent as images; 0 sends the video.
    """

    parts: Mapping[str, tuple[str, float, float]]
    final: tuple[str, float, float] | None
    max_tokens: int
    frames: int = 0


def axes(*names: str) -> dict[str, tuple[str, float, float]]:
    return {name: (f"{name} Score", 1, 5) for name in names}


VIDEO = ("visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment", "factual consistency")
FORMS = {
    "image": Form({}, ("Final Score", 1, 5), 512),
    "image_words": Form(axes("Alignment", "Coherence", "Style"), None, 4096),
    "image_acs": Form(axes("Alignment", "Coherence", "Style"), None, 4096),
    "video": Form({name: (name, 1, 4) for name in VIDEO}, ("Final Score", 1, 10), 1024),
    "video_aps": Form(axes("Alignment", "Physics", "Style"), None, 4096, frames=16),
}


class UnifiedReward(Spoken):
    """UnifiedReward's score of one image or video (Wang et al. 2025, arXiv 2503.05236).

    Range: 1 to 5; "video" 1 to 10; times `samples` where they are summed
    Size: as the judge
    Gradient: no
    Weights: CodeGoat24/UnifiedReward-qwen-7b, CodeGoat24/UnifiedReward-2.0-qwen-7b and their siblings, in a judge
    Licence: MIT (code and questions); weights: see their pages

    | form          | made for | score                                                                                  |
    |---------------|----------|----------------------------------------------------------------------------------------|
    | `image`       | 1.0      | "Final Score" after a list of the caption's elements                                   |
    | `image_words` | 1.0      | mean of Alignment, Coherence and Style, after a score of each word                     |
    | `image_acs`   | 2.0      | mean of Alignment, Coherence and Style, which are continuous                           |
    | `video`       | 1.0      | "Final Score" after five dimensions from 1 to 4                                        |
    | `video_aps`   | 2.0      | mean of Alignment, Physics and Style, of 16 frames sent as images                      |

    Parts hold the dimensions. A judge that is not UnifiedReward is asked the same and answers by its own standards.

    Args:
        judge: the model, local or served.
        form: of the question; it says what is judged.
        samples: judgements a sample.
        temperature: at which they are drawn; 0 takes the most probable words, as published.
        aggregate: how they become one score; "trimmed" leaves the lowest and the highest quarter out.
        max_tokens: length at which an answer is cut; None takes the published one.
    """

    def __init__(
        self,
        judge: Judge,
        form: Literal["image", "image_words", "image_acs", "video", "video_aps"] = "image_acs",
        *,
        samples: int = 1,
        temperature: float = 0.0,
        aggregate: Rule = "mean",
        max_tokens: int | None = None,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
        how = FORMS[form]
        super().__init__(judge, samples, temperature, aggregate, how.max_tokens if max_tokens is None else max_tokens)
        self.form, self.question = how, published("unifiedreward", form)
        self.modality = "video" if form.startswith("video") else "image"
        self.freeze()

    def ask(self, media: Tensor, prompt: Prompt | None, seed: int) -> Ask:
        shown = spread_out(media, self.form.frames) if self.form.frames else (media,)
        return Ask(prompted(self.question, str(prompt)), shown, seed=seed)

    def read(self, text: str | None) -> tuple[float | None, Reading]:
        parts = {name: labelled(text, *how) for name, how in self.form.parts.items()}
        if self.form.final:
            return labelled(text, *self.form.final), parts
        known = [value for value in parts.values() if value is not None]
        return (sum(known) / len(known) if len(known) == len(parts) else None), parts
