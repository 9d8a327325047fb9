"""Asking and reading judges that write: frames to show; numbers and verdicts in an answer.

Reading is strict: what is missing, cut, doubtful or out of range is None, never a number.

Of things said twice the last counts, also if it cannot be read. What stands in a `<think>` block counts for nothing, and where
there are `<answer>` blocks only the last counts; a block that does not end says that the answer was cut. Markdown and quotation
marks, straight or curly, are passed over.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

__all__ = [
    "Rule",
    "answered",
    "field",
    "labelled",
    "matched",
    "share",
    "spoken",
    "spread_out",
    "verdict",
    "vote",
    "winner",
]

Rule = Literal["mean", "median", "sum", "majority", "trimmed"]
MARKS = "\\s*_`\"'“”‘’"  # inside a character class
NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)(?![0-9]|[.,][0-9])"
SUM_TOLERANCE = 0.02  # by which two shares may miss 1: they are printed with few digits


def spoken(text: str | None) -> str:
    """What was said, without what was thought; empty if it was cut."""
    said = after_thought(text)
    if "<answer>" not in said:
        return said
    block, end, _ = said[said.rindex("<answer>") + len("<answer>") :].partition("</answer>")
    return block if end else ""


def after_thought(text: str | None) -> str:
    """What stands behind the last `<think>` block, which may have begun in the question."""
    if text is None or text.rfind("<think>") > text.rfind("</think>"):
        return ""
    return text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text


def labelled(text: str | None, label: str, low: float, high: float) -> float | None:
    """The number behind the last `label:`, as in "**Final Score:** 4.5" or "Style Score (1-5): 3".

    Args:
        text: the answer.
        label: without its colon; case does not matter.
        low: smallest number that can be meant.
        high: largest.
    """
    heads = list(
        re.finditer(rf"(?<!\w){re.escape(label)}[{MARKS}]*(?:\([0-9 –-]+\))?[{MARKS}]*:", spoken(text), re.IGNORECASE)
    )
    if not heads:
        return None
    number = re.match(rf"[{MARKS}]*{NUMBER}", spoken(text)[heads[-1].end() :])
    return within(float(number[1]), low, high) if number else None


def matched(text: str | None, pattern: str, low: float, high: float) -> float | None:
    """The number that the first group of the last match of a regular expression holds."""
    groups = [match[1] for match in re.finditer(pattern, spoken(text))]
    number = re.fullmatch(rf"\s*{NUMBER}\s*", groups[-1] or "") if groups else None
    return within(float(number[1]), low, high) if number else None


def field(text: str | None, name: str, low: float, high: float) -> float | None:
    """The number that the last JSON object in an answer has under a name."""
    said, decoder = spoken(text), json.JSONDecoder()
    last: Any = None
    start = said.find("{")
    while start >= 0:
        try:
            last, end = decoder.raw_decode(said, start)
        except ValueError:
            last, end = None, start + 1
        start = said.find("{", end)
    value = last.get(name) if isinstance(last, dict) else None
    return within(float(value), low, high) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def verdict(text: str | None, noun: str) -> float | None:
    """1 for "Image 1 is better", 0 for "Image 2 is better", 0.5 for "Both images are equally good".

    Args:
        text: the answer.
        noun: "image" or "video".
    """
    plain = re.sub(f"[{MARKS}]+", " ", spoken(text))
    found = re.findall(rf"(?<!\w){noun} ?([12]) is better|(both) {noun}s are equally good", plain, re.IGNORECASE)
    if not found:
        return None
    return 0.5 if found[-1][1] else float(found[-1][0] == "1")


def answered(text: str | None, noun: str) -> float | None:
    """As `verdict`, of the last `<answer>` block, which must be there and say one thing."""
    once = "<answer>" in after_thought(text) and len(re.findall("[12]", spoken(text))) == 1
    return verdict(text, noun) if once else None


def winner(text: str | None, noun: str) -> float | None:
    """1 or 0 for the "winner" that a JSON answer names, "Image 1" or "Image 2"; its categories have other keys."""
    found = re.findall(rf'"winner"\s*:\s*"\s*{noun} ?([12])\s*"', spoken(text), re.IGNORECASE)
    return float(found[-1] == "1") if found else None


def share(text: str | None, noun: str, labels: Sequence[str]) -> float | None:
    """The mean share of the first of two, each dimension as "Style Score:", "Image 1: 0.4", "Image 2: 0.6" with a sum of 1."""
    shares = []
    for label in labels:
        tail = re.split(rf"(?<!\w){re.escape(label)}[{MARKS}]*:", spoken(text), flags=re.IGNORECASE)[1:]
        row = rf"[{MARKS}]*{noun} 1[{MARKS}]*:[{MARKS}]*{NUMBER}[{MARKS},;]*{noun} 2[{MARKS}]*:[{MARKS}]*{NUMBER}"
        found = re.match(row, tail[-1], re.IGNORECASE) if tail else None
        first, second = (within(float(n), 0, 1) for n in found.groups()) if found else (None, None)
        if first is None or second is None or abs(first + second - 1) > SUM_TOLERANCE:
            return None
        shares.append(first)
    return statistics.fmean(shares)


def spread_out(video: Tensor, count: int, ends: bool = False) -> tuple[Tensor, ...]:
    """At most `count` > 1 frames of a (F, 3, H, W) video at equal distances, as images; with `ends` up to the last one."""
    span, steps = (len(video) - 1, count - 1) if ends else (len(video), count)
    return tuple(video[i] for i in sorted({i * span // steps for i in range(count)}))


def within(value: float, low: float, high: float) -> float | None:
    return value if math.isfinite(value) and low <= value <= high else None


def vote(values: Sequence[float | None], rule: Rule) -> float:
    """One number of several judgements, those that failed left out; NaN if all did.

    Args:
        values: the judgements.
        rule: "sum" is the mean times their number, failed ones included; "majority" takes the lower of equally frequent ones;
            "trimmed" is the mean without the lowest and the highest quarter.
    """
    known = sorted(value for value in values if value is not None)
    if not known:
        return math.nan
    if rule == "median":
        return statistics.median(known)
    if rule == "majority":
        return min(statistics.multimode(known))
    cut = len(known) // 4 if rule == "trimmed" else 0
    mean = statistics.fmean(known[cut : len(known) - cut])
    return mean * len(values) if rule == "sum" else mean
