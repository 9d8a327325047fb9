"""`WinRate`: how often a sample is preferred to the others of its prompt, by a judge that sees two at a time.

Of G samples of one prompt all G(G-1)/2 pairs are shown. With v(a, b) in [0, 1] for how far the judge prefers a, shown first, to b,

    score(a) = mean over b of [v(a, b) + 1 - v(b, a)] / 2

where a tie is 0.5. Judges favour a position, so each pair is shown in both orders (`swap`): a preference for the position cancels.
A pair of which an answer cannot be read leaves the mean; it is no tie.

Sources: Wang et al., "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement Learning", 2025,
arXiv 2508.20751; Wang et al., "Unified Multimodal Chain-of-Thought Reward Model through Reinforcement Fine-Tuning"
(UnifiedReward-Think), 2025, arXiv 2505.03318; the questions are those of the released scripts, word for word
(`questions/unifiedreward.json`).

Deviations: Pref-GRPO shows each pair in one order, counts failures as ties and rounds to three digits; the shares of UnifiedReward
2.0 count as they are (0.56 is 0.56 of a win).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from .answers import answered, share, spread_out, verdict, winner
from .base import Prompt, Reward, Scores
from .judging import Ask, Judge, checked, prompted, published

__all__ = ["WinRate"]

AXES = ("Alignment Score", "Coherence Score", "Style Score")
READERS: dict[str, Callable[[str | None, str], float | None]] = {
    "rank": verdict,
    "share": lambda text, noun: share(text, noun, AXES),
    "think": answered,
    "think3": answered,
    "flex": winner,
}
SPOKEN, REASONED = 1024, 4096  # tokens that the released scripts allow at most
FRAMES = 8  # of each video, sent as images by the released scripts of newer models
WHOLE = ("rank", "think")  # forms that send the video itself
ENDS = ("think3", "flex")  # forms whose frames include the last


class WinRate(Reward):
    """How often a judge prefers a sample to the others of its prompt (Pref-GRPO, arXiv 2508.20751).

    Range: 0 to 1, and 0.5 on average over the samples of a prompt
    Size: as the judge
    Gradient: no
    Weights: CodeGoat24/UnifiedReward-qwen-7b, -2.0-qwen-7b, -Think-qwen-7b, -Flex-qwen3vl-8b and their siblings, in a judge
    Licence: MIT (code and questions); weights: see their pages

    Samples of one prompt must be scored in one call; a sample without a rival gets NaN. The judge is asked G(G-1) questions about G
    samples of a prompt. The part `inconsistent` says in which share of a sample's pairs the better one changed with the order.

    | form     | made for                  | answer                                                                        |
    |----------|---------------------------|-------------------------------------------------------------------------------|
    | `rank`   | UnifiedReward 1.0         | "Image 1 is better.", "Image 2 is better.", "Both images are equally good."   |
    | `share`  | UnifiedReward 2.0         | shares of 1 in alignment, coherence and style                                 |
    | `think`  | UnifiedReward-Think       | reasons in `<think>`, the better one in `<answer>`                            |
    | `think3` | UnifiedReward-Think-qwen3 | the same in a stricter form                                                   |
    | `flex`   | UnifiedReward-Flex        | JSON with the judge's own dimensions and a "winner"                           |

    Args:
        judge: the model, local or served.
        form: of the question and the answer.
        swap: whether each pair is shown in both orders.
        samples: judgements a pair and order, averaged.
        temperature: at which they are drawn; 0 takes the most probable words.
        max_tokens: length at which an answer is cut; None takes 1024 for `rank` and 4096 for the others.
        modality: what is judged.

    Raises:
        ValueError: an unknown form, or several samples at temperature 0.
    """

    differentiable = False
    compares = True

    def __init__(
        self,
        judge: Judge,
        form: Literal["rank", "share", "think", "think3", "flex"] = "rank",
        *,
        swap: bool = True,
        samples: int = 1,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        modality: Literal["image", "video"] = "image",
    ) -> None:
        super().__init__()
        if form not in READERS:
            raise ValueError(f"form must be one of {', '.join(READERS)}; got {form!r}")
        if samples < 1 or (samples > 1 and temperature <= 0):
            raise ValueError(f"samples must be 1, or drawn at a temperature above 0; got {samples} at {temperature}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1; got {max_tokens}")
        self.judge, self.swap, self.samples, self.temperature = checked(judge, modality), swap, samples, temperature
        self.max_tokens = max_tokens or (SPOKEN if form == "rank" else REASONED)
        self.modality, self.form = modality, form
        self.read = READERS[form]
        self.question = published("unifiedreward", f"{modality}_{form}")
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        shown = [self.show(m) for m in media]  # the same tensors in all questions, so that a judge reads each once
        pairs = [pair for pair in combinations(range(len(media)), 2) if prompts[pair[0]].text == prompts[pair[1]].text]
        orders = [order for a, b in pairs for order in (((a, b), (b, a)) if self.swap else ((a, b),))]
        asks = [
            Ask(prompted(self.question, prompts[a].text), shown[a] + shown[b], seed=seed)
            for a, b in orders
            for seed in range(self.samples)
        ]
        texts = self.judge.write(asks, temperature=self.temperature, max_tokens=self.max_tokens) if asks else []
        read = torch.tensor([torch.nan if (v := self.read(t, self.modality)) is None else v for t in texts])
        found = dict(zip(orders, read.view(-1, self.samples).nanmean(dim=1).tolist(), strict=True))
        wins, turned = ([[] for _ in media] for _ in range(2))
        for a, b in pairs:
            first = found[a, b]
            second = 1 - found[b, a] if self.swap else first  # how far a is preferred when it is shown behind b
            for row, win in ((a, (first + second) / 2), (b, 1 - (first + second) / 2)):
                wins[row] += [win] if win == win else []
                turned[row] += [float((first - 0.5) * (second - 0.5) < 0)] if win == win else []
        columns = [
            torch.tensor([fmean(row) if row else torch.nan for row in rows], device=media.device)
            for rows in (wins, turned)
        ]
        return Scores(columns[0], {"inconsistent": columns[1]} if self.swap else {})

    def show(self, media: Tensor) -> tuple[Tensor, ...]:
        """A sample as the judge sees it."""
        if media.ndim == 3 or self.form in WHOLE:
            return (media,)
        return spread_out(media, FRAMES, self.form in ENDS)
