"""Win rates: closed forms, position bias, ties, failures."""

from __future__ import annotations

import pytest
import torch

from rewards import Ask, WinRate
from tests.rewards import tiny
from tests.rewards.scribe import Scribe, bright

NAN = pytest.approx(float("nan"), nan_ok=True)


def levels(*values: float) -> torch.Tensor:
    return torch.stack([torch.full((3, 8, 8), v) for v in values])


def brighter(ask: Ask) -> str:
    first, second = map(bright, ask.media)
    if first == second:
        return "Both images are equally good."
    return f"Image {1 if first > second else 2} is better."


def test_the_order_of_a_transitive_judge():
    scores = WinRate(Scribe(brighter)).score(levels(0.1, 0.9, 0.5, 0.5), ["a cat"] * 4)
    torch.testing.assert_close(scores.total, torch.tensor([0, 3, 1.5, 1.5]) / 3)
    assert scores.parts["inconsistent"].tolist() == [0, 0, 0, 0]


def test_samples_are_compared_within_their_prompt():
    judge = Scribe(brighter)
    scores = WinRate(judge).score(levels(0.1, 0.2, 0.9, 0.3), ["a cat", "a dog", "a cat", "a bird"])
    assert scores.total.tolist() == [0, NAN, 1, NAN]
    assert [ask.text.partition("Text Caption: ")[2] for ask in judge.asks] == ["[a cat]"] * 2


def test_a_preference_for_a_position_cancels():
    first = Scribe(lambda _: "Image 1 is better.")
    scores = WinRate(first).score(levels(0.1, 0.9, 0.5), ["a cat"] * 3)
    assert scores.total.tolist() == [0.5] * 3 and scores.parts["inconsistent"].tolist() == [1.0] * 3
    once = WinRate(first, swap=False).score(levels(0.1, 0.9, 0.5), ["a cat"] * 3)
    assert once.total.tolist() == [1, 0.5, 0] and not once.parts  # as published


def test_a_failed_pair_is_no_tie():
    def picky(ask: Ask) -> str | None:
        return None if abs(bright(ask.media[0]) - bright(ask.media[1])) < 0.3 else brighter(ask)

    total = WinRate(Scribe(picky))(levels(0.1, 0.9, 0.85, 0.5), ["a cat"] * 4)
    torch.testing.assert_close(total, torch.tensor([0, 1, 1, 1 / 3]))
    half = Scribe(lambda ask: brighter(ask) if bright(ask.media[0]) < 0.5 else None)  # one order of the two
    assert WinRate(half)(levels(0.1, 0.9), ["a cat"] * 2).isnan().all()


def test_shares_count_as_they_are():
    text = "".join(
        f"{axis} Score:\n Image 1: {a}\n Image 2: {1 - a:.1f}\n" for axis, a in zip("ACS", (0.7, 0.6, 0.8), strict=True)
    )
    text = (
        text.replace("A Score", "Alignment Score")
        .replace("C Score", "Coherence Score")
        .replace("S Score", "Style Score")
    )
    total = WinRate(Scribe(lambda _: text), "share", swap=False)(levels(0.1, 0.9), ["a cat"] * 2)
    torch.testing.assert_close(total, torch.tensor([0.7, 0.3]))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("think", "<think>Image 1 is better</think><answer>Image 2 is better</answer>"),
        ("think3", "<think>Image 1 is better</think><answer>Image 2 is better</answer>"),
        ("flex", '{"categories": [{"cat_winner": "Image 1"}], "winner": "Image 2"}'),
    ],
)
def test_other_forms(form, text):
    judge = Scribe(lambda _: text)
    total = WinRate(judge, form, swap=False)(levels(0.1, 0.9), ["a cat"] * 2)
    assert total.tolist() == [0, 1]
    assert "a cat" in judge.asks[0].text and judge.how["max_tokens"] >= 4096


def test_draws_are_averaged():
    judge = Scribe(lambda ask: f"Image {1 + (ask.seed == 2)} is better.")
    total = WinRate(judge, samples=3, temperature=0.5, swap=False)(levels(0.1, 0.9), ["a cat"] * 2)
    torch.testing.assert_close(total, torch.tensor([2 / 3, 1 / 3]))


@pytest.mark.parametrize(
    ("form", "shown"), [("rank", [4, 4]), ("think", [4, 4]), ("share", [3] * 16), ("think3", [3] * 16)]
)
def test_videos_are_shown_as_published(form, shown):
    judge = Scribe(lambda _: "<answer>Video 1 is better</answer>")
    total = WinRate(judge, form, modality="video")(tiny.natural(20, 8, 8).unflatten(0, (2, 10)), ["a cat"] * 2)
    assert [media.ndim for media in judge.asks[0].media] == shown
    assert total.isnan().all() if form == "share" else total.tolist() == [0.5, 0.5]


def test_errors():
    with pytest.raises(ValueError, match="form must be one of rank"):
        WinRate(Scribe(brighter), "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drawn at a temperature"):
        WinRate(Scribe(brighter), samples=2)
