"""Functions of one reward: standardised, centred on what a reference policy scores, clipped.

With r the score of a sample of prompt c, and r_ref(c) what samples of a reference policy score on it:

| class          | score                             | for                                                              |
|----------------|-----------------------------------|------------------------------------------------------------------|
| `Standardised` | (r - mean) / std                  | sums and minima of rewards that have different scales             |
| `Delta`        | r - r_ref(c)                      | what was gained over the reference, comparable between prompts    |
| `LogSigmoid`   | log sigmoid((r - r_ref(c)) / T)   | no reward for being better than good enough; a sum of them is the |
|                |                                   | logarithm of the probability that all properties are good        |
| `Clipped`      | min(max(r, low), high)            | the same, with a hard edge                                        |

Sources: log-sigmoid centring: Wang et al., "Transforming and Combining Rewards for Aligning Large Language Models", 2024, arXiv
2402.00742, where r_ref is the 85th percentile of the initial policy's scores on that prompt and r is in Bradley-Terry logits:
other rewards are brought to logits by the temperature. Clip and Delta: Gao et al., "On Designing Effective RL Reward at Training
Time for LLM Reasoning", 2024, arXiv 2410.15115: `Clipped(Delta(r, threshold), high=0)` is its min(r - threshold, 0); its
difference of consecutive steps becomes, for a sample made in one go, the difference from a baseline. Saturation min(r, threshold)
is `Clipped(r, high=threshold)`. GRPO (DeepSeekMath, 2024, arXiv 2402.03300) standardises the sum of rewards within a prompt, where
the one that varies most decides; `Standardised(over="prompt")` does so to each before they are added.

An advantage that compares the samples of a prompt does not see an affine change of the whole reward; what these change is how
rewards mix, and whatever compares prompts or tilts by the absolute value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Prompt, Reward, Scores
from .composite import Adaptive, Wrapper

__all__ = ["Clipped", "Delta", "LogSigmoid", "Standardised"]

LEAST = 1e-8  # of a standard deviation that is divided by, below which samples are alike but for rounding


class Standardised(Wrapper, Adaptive):
    """A reward in standard deviations from a mean.

    over="calibration" takes given numbers and never changes. over="run" begins with them and then takes those of all samples a
    training run has collected; a collection is scored by what was known before it, and nothing but training moves the numbers.
    As long as all samples are alike the given standard deviation stays in use.
    over="prompt" takes those of the samples of the same prompt in the same call, which are constants to the gradient; samples that
    are all alike get 0.

    Range: standard deviations
    Size: as its part
    Gradient: as its part

    Args:
        reward: what to standardise.
        over: where mean and standard deviation come from.
        mean: of the calibration.
        std: of the calibration, above 0.
        scores: a table of scores to take mean and standard deviation from: .jsonl as `kilter score --json` prints, .parquet, or a
            folder of `kilter score --out`.
        column: of the table; the reward's name by default.
        memory: of over="run": how many samples the statistics reach back; all by default.
        eps: of over="prompt": added to the standard deviation.

    Raises:
        ValueError: a word or number out of its range, or numbers that `over` does not use.
        FileNotFoundError: no such table.
    """

    def __init__(
        self,
        reward: Reward,
        over: Literal["calibration", "run", "prompt"] = "calibration",
        *,
        mean: float = 0.0,
        std: float = 1.0,
        scores: Optional[str] = None,
        column: Optional[str] = None,
        memory: Optional[int] = None,
        eps: float = 1e-4,
    ) -> None:
        super().__init__(reward)
        if over not in ("calibration", "run", "prompt"):
            raise ValueError(f"over must be calibration, run or prompt; got {over!r}")
        if scores is not None and (mean, std) != (0.0, 1.0):
            raise ValueError("give mean and std, or the scores to take them from; got both")
        if over == "prompt" and (scores is not None or (mean, std) != (0.0, 1.0)):
            raise ValueError('over="prompt" takes mean and std from the samples: give none')
        if scores is not None:
            known = torch.tensor([v for values in table(scores, column or reward.name).values() for v in values])
            mean, std = known.double().mean().item(), known.double().std(correction=0).item()
        if not (std > 0 and math.isfinite(std) and math.isfinite(mean)):
            raise ValueError(f"std must be above 0 and mean finite; got mean {mean} and std {std}")
        if (memory is not None and memory < 1) or not eps > 0:
            raise ValueError(f"memory must be at least 1 and eps above 0; got {memory} and {eps}")
        self.over, self.memory, self.eps = over, memory, eps
        self.count, self.mean, self.std = 0.0, float(mean), float(std)
        self.given = self.std
        self.compares = self.compares or over == "prompt"
        self.needs_prompt = self.needs_prompt or over == "prompt"

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        scores = self.reward.score(media, prompts)
        if self.over == "prompt":
            return self.told(within(scores.total, [p.text for p in prompts], self.eps), scores)
        if self.over == "run":
            self.watch(scores.total[:, None])
        scale = self.std if self.std > LEAST * (1 + abs(self.mean)) else max(self.given, LEAST)
        return self.told((scores.total - self.mean) / scale, scores)

    def learn(self, values: Tensor) -> None:
        new = values[values.isfinite()]
        if not len(new):
            return
        before = min(self.count, self.memory or math.inf)
        mean, total = float(new.mean()), before + len(new)
        squares = before * (self.std**2 if before else 0.0) + float((new - mean).square().sum())
        squares += (mean - self.mean) ** 2 * before * len(new) / total
        self.mean = (before * self.mean + len(new) * mean) / total
        self.std, self.count = (squares / total) ** 0.5, self.count + len(new)

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "std": self.std}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean, self.std = state["count"], state["mean"], state["std"]

    def worth_watching(self) -> dict[str, float]:
        return {"mean": self.mean, "std": self.std} if self.over == "run" else {}


class Delta(Wrapper):
    """What a reward gained over a reference, prompt by prompt.

    Range: the unit of its part, 0 where the sample is as good as the reference
    Size: as its part
    Gradient: as its part

    Args:
        reward: what to measure.
        reference: one number for all prompts, or a table of the scores of reference samples: .jsonl with "prompt" and the score, as
            `kilter score --json` prints, or .parquet.
        column: of the table; the reward's name by default.
        quantile: which quantile of a prompt's reference scores counts, 0 to 1; their mean by default.
        least: reference samples a prompt must have; prompts with fewer take the number of the whole table.

    Raises:
        ValueError: the table holds no such scores, or a number is out of its range.
        FileNotFoundError: no such table.
    """

    def __init__(
        self,
        reward: Reward,
        reference: float | str = 0.0,
        *,
        column: Optional[str] = None,
        quantile: Optional[float] = None,
        least: int = 1,
    ) -> None:
        super().__init__(reward)
        if quantile is not None and not 0 <= quantile <= 1:
            raise ValueError(f"quantile must be 0 to 1; got {quantile}")
        if least < 1:
            raise ValueError(f"least must be at least 1; got {least}")
        self.known: dict[str, float] = {}
        if isinstance(reference, str):
            rows = table(reference, column or reward.name)
            self.common = summary([v for values in rows.values() for v in values], quantile)
            self.known = {text: summary(values, quantile) for text, values in rows.items() if len(values) >= least}
        else:
            self.common = float(reference)
        if not math.isfinite(self.common):
            raise ValueError(f"reference must be finite; got {self.common}")
        self.needs_prompt = self.needs_prompt or bool(self.known)

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        scores = self.reward.score(media, prompts)
        return self.told(self.transform(scores.total - self.baseline(prompts, scores.total)), scores)

    def baseline(self, prompts: list[Prompt], like: Tensor) -> Tensor:
        """The reference of each prompt: (B,), or one number for all."""
        return like.new_tensor([self.known.get(p.text, self.common) for p in prompts] if self.known else self.common)

    def transform(self, gap: Tensor) -> Tensor:
        """What becomes of the difference."""
        return gap


class LogSigmoid(Delta):
    """Log-sigmoid centred reward: log sigmoid((r - r_ref) / temperature).

    Poor samples count in proportion, good ones hardly: the slope falls from 1 / temperature to 0 as the reward passes r_ref. A
    `Weighted` of several is the logarithm of the probability that every property is good, so none can make up for another.

    Range: below 0; -0.69 at r_ref
    Size: as its part
    Gradient: as its part

    Args:
        reward: what to transform, in Bradley-Terry logits once divided by `temperature`.
        reference: r_ref: one number for all prompts, or a table of the scores of the initial policy's samples; see `Delta`.
        column: of the table; the reward's name by default.
        quantile: which quantile of a prompt's reference scores is r_ref, 0 to 1.
        least: reference samples a prompt must have; prompts with fewer take the quantile of the whole table.
        temperature: how much reward one logit is, above 0: fitted to preferences, see `kilter eval-reward`.

    Raises:
        ValueError: the table holds no such scores, or a number is out of its range.
        FileNotFoundError: no such table.
    """

    def __init__(
        self,
        reward: Reward,
        reference: float | str = 0.0,
        *,
        column: Optional[str] = None,
        quantile: float = 0.85,
        least: int = 8,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(reward, reference, column=column, quantile=quantile, least=least)
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be above 0; got {temperature}")
        self.temperature = temperature

    def transform(self, gap: Tensor) -> Tensor:
        return F.logsigmoid(gap / self.temperature)


class Clipped(Wrapper):
    """A reward kept between two numbers.

    Range: `low` to `high`
    Size: as its part
    Gradient: as its part, 0 where it is clipped

    Args:
        reward: what to clip.
        low: the least score; unbounded by default.
        high: the greatest score; unbounded by default.

    Raises:
        ValueError: neither is given, or `low` is not below `high`.
    """

    def __init__(self, reward: Reward, low: Optional[float] = None, high: Optional[float] = None) -> None:
        super().__init__(reward)
        if low is None and high is None:
            raise ValueError("Clipped needs low, high or both; got neither")
        if low is not None and high is not None and not low < high:
            raise ValueError(f"low must be below high; got {low} and {high}")
        self.low, self.high = low, high

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        scores = self.reward.score(media, prompts)
        return self.told(scores.total.clamp(self.low, self.high), scores)


def within(values: Tensor, texts: Sequence[str], eps: float) -> Tensor:
    """(B,) in standard deviations (the population's) from the mean of the same text: those of finite values, without gradient."""
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    index = torch.tensor([numbers[text] for text in texts], device=values.device)
    given = values.detach()
    judged = given.isfinite()

    def mean(of: Tensor) -> Tensor:
        kept = torch.where(judged, of, 0.0), judged.to(of)
        total, count = (given.new_zeros(len(numbers)).index_add(0, index, v) for v in kept)
        return (total / count)[index]

    centre = mean(given)
    return (values - centre) / (mean((given - centre).square()).sqrt() + eps)


def summary(values: Sequence[float], quantile: float | None) -> float:
    """The mean or a quantile."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return (numbers.mean() if quantile is None else numbers.quantile(quantile)).item()


def table(path: str, column: str) -> dict[str, list[float]]:
    """The scores in a table, by prompt, in its order; what was not judged is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a table of scores, or no score in it.
    """
    place = Path(path).expanduser()
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not (files and files[0].is_file()):
        raise FileNotFoundError(f"no table of scores {path}: make one with kilter score --json > scores.jsonl")
    if files[0].suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        rows = [row for file in files for row in ParquetFile(file).read().to_pylist()]
    else:
        try:
            rows = [json.loads(line) for line in place.read_text("utf-8").splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is not JSON lines: {error}") from error
    if lacking := next((row for row in rows if not (isinstance(row, dict) and {"prompt", column} <= row.keys())), None):
        has = ", ".join(lacking) if isinstance(lacking, dict) else type(lacking).__name__
        raise ValueError(f"every row of {path} must hold prompt and {column}; got {has}: name the score with column")
    found: dict[str, list[float]] = {}
    for row in rows:
        if row[column] is not None and math.isfinite(row[column]):
            found.setdefault(row["prompt"], []).append(float(row[column]))
    if not found:
        raise ValueError(f"{path} holds no score in {column}")
    return found
