"""Reading answers: every way in which a judge can fail to say a number."""

from __future__ import annotations

import math

import pytest
import torch

from rewards.answers import answered, field, labelled, share, spoken, spread_out, verdict, vote, winner

AXES = ("Alignment Score", "Style Score")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Final Score: 4", 4),
        ("Final Score:4.5", 4.5),
        ("final score: 2.4036", 2.4036),  # continuous, as UnifiedReward 2.0 writes
        ("cat (animal): 1\nFinal Score: 3\n", 3),
        ("**Final Score:** 4", 4),
        ("**Final Score**: **4**", 4),
        ("### Final Score: `5`", 5),
        ("Final Score (1-5): 3.5", 3.5),
        ("Final Score (1–5): “3”", 3),
        ("Final Score: 4.", 4),
        ("Final Score: 4/5", 4),
        ("Final Score:\n4", 4),
        ("Final Score: 2 ... no, Final Score: 3", 3),  # the last counts
        ("Final Score: 3 ... no, Final Score: 9", None),  # also if it cannot be
        ("Final Score: 3 ... no, Final Score: none", None),
        ("Final Score: 0", None),
        ("Final Score: 6", None),
        ("Final Score: -3", None),
        ("Final Score: 5.01", None),
        ("Final Score: 4,5", None),  # a comma may mean either
        ("Final Score: 3.4.5", None),
        ("Final Score: four", None),
        ("Final Score: nan", None),
        ("Final Score: X", None),
        ("Final Score: ٤", None),
        ("Final Score:", None),  # cut
        ("Final Sco", None),
        ("Final Score 4", None),
        ("Semifinal Score: 4", None),
        ("4", None),
        ("", None),
        (None, None),
        ("<think>Final Score: 2</think>Final Score: 4", 4),
        ("Final Score: 2</think>Final Score: 4", 4),  # the template opened the block
        ("<think>Final Score: 2", None),  # cut while thinking
        ("<think>Final Score: 2</think>", None),
        ("<think>a</think>Final Score: 4<think>Final Score: 2", None),
        ("<answer>Final Score: 4</answer>", 4),
        ("Final Score: 2 <answer>Final Score: 4", None),
    ],
)
def test_labelled(text, expected):
    assert labelled(text, "Final Score", 1, 5) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"score": 7}', 7),
        ('Here it is:\n```json\n{"reason": "a {cat}", "score": 6.5}\n```', 6.5),
        ('{"score": 2} or rather {"score": 7}', 7),
        ('{"score": 2} or rather {"other": 7}', None),
        ('{"inner": {"score": 7}}', None),
        ('{"score": "7"}', None),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ('{"score": 11}', None),
        ('{"score": NaN}', None),
        ('{"score": Infinity}', None),
        ('{"score": 7', None),  # cut
        ('{"score": 7} {"score": ', None),  # the last is cut
        ("{“score”: 7}", None),
        ("[7]", None),
        ("7", None),
        (None, None),
        ('<think>{"score": 2}</think>{"score": 7}', 7),
    ],
)
def test_field(text, expected):
    assert field(text, "score", 1, 10) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Image 1 is better.", 1),
        ("Image 2 is better.", 0),
        ("Both images are equally good.", 0.5),
        ("**Image 2** is better", 0),
        ("“Image 2 is better.”", 0),
        ("image 1 is better than Image 2", 1),
        ("Image 1 is better in colour, but all in all Image 2 is better.", 0),
        ("<think>Image 1 is better</think>Image 2 is better", 0),
        ("<think>Image 1 is better", None),
        ("Video 1 is better.", None),
        ("Image 3 is better.", None),
        ("The first image is better.", None),
        ("Image 1 is bet", None),
        ("", None),
        (None, None),
    ],
)
def test_verdict(text, expected):
    assert verdict(text, "image") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>Image 1 is better</think>\n<answer>Image 2 is better</answer>", 0),
        ("<think>...</think><answer>Image 1 is better</answer>", 1),
        ("<answer>Image 1 is better</answer><answer>Image 2 is better</answer>", 0),
        ("Image 1: 9+8=17</think><answer> Image 1 is better. </answer>", 1),
        ("<think>...</think>Image 1 is better", None),
        ("<think>Image 1 is better<answer>", None),
        ("<think>...</think><answer>Image 1 is better", None),
        ("<answer>Image 1 is better, Image 2 is worse</answer>", None),
        ("<answer>equal</answer>", None),
        ("<think>an <answer>Image 1 is better</answer> would be wrong", None),
        ("<think>an <answer>Image 1 is better</answer> would be wrong</think>Image 2 is better", None),
        (None, None),
    ],
)
def test_answered(text, expected):
    assert answered(text, "image") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"categories": [{"cat_winner": "Image 1"}], "reason": "", "winner": "Image 2"}', 0),
        ('```json\n{"winner" : "image 1"}\n```', 1),
        ('{"categories": [{"cat_winner": "Image 1"}], "rea', None),
        ('{"winner": "Image 1/2"}', None),
        ('{"winner": "Tie"}', None),
        (None, None),
    ],
)
def test_winner(text, expected):
    assert winner(text, "image") == expected


def shares(*rows: tuple[str, str]) -> str:
    return "\n\n".join(f"{label}:\n Image 1: {a}\n Image 2: {b}" for label, (a, b) in zip(AXES, rows, strict=False))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (shares(("0.435699999332428", "0.564300000667572"), ("0.4", "0.6")), 0.41785),
        (shares(("**0.4**", "0.6"), ("1", "0")), 0.7),
        (shares(("0.4", "0.6"), ("0.4", "0.4")), None),  # no shares of 1
        (shares(("0.4", "0.6"), ("1.2", "-0.2")), None),
        (shares(("0.4", "0.6")), None),
        (shares(("0.4", "0.6"), ("0.4", "")), None),
        (shares(("X", "Y"), ("X", "Y")), None),
        (shares(("0.1", "0.9"), ("0.1", "0.9")) + "\n" + shares(("0.4", "0.6"), ("0.4", "0.6")), 0.4),
        (None, None),
    ],
)
def test_share(text, expected):
    assert share(text, "image", AXES) == (None if expected is None else pytest.approx(expected, abs=1e-5))


def test_what_was_said():
    assert spoken("a<think>b</think>c") == "c"
    assert spoken("<answer>a</answer>b") == "a"
    assert spoken(None) == ""


@pytest.mark.parametrize(
    ("rule", "expected"), [("mean", 4.0), ("median", 2.5), ("sum", 40.0), ("majority", 1.0), ("trimmed", 2.25)]
)
def test_votes(rule, expected):
    """Of 1 1 1 2 3 3 5 16, with two that failed."""
    assert vote([3, 1, None, 16, 1, 2, None, 1, 3, 5], rule) == expected


def test_votes_of_failures_are_nan_and_ties_go_to_the_lower():
    assert math.isnan(vote([None, None], "sum"))
    assert vote([2, 3, 3, 2], "majority") == 2
    assert [vote([7.0], rule) for rule in ("mean", "median", "sum", "majority", "trimmed")] == [7.0] * 5


def test_frames_at_equal_distances():
    video = torch.arange(10.0).view(10, 1, 1, 1).expand(-1, 3, 2, 2)
    assert [frame[0, 0, 0].item() for frame in spread_out(video, 4)] == [0, 2, 5, 7]
    assert [frame[0, 0, 0].item() for frame in spread_out(video, 4, ends=True)] == [0, 3, 6, 9]
    assert len(spread_out(video, 16)) == len(spread_out(video, 16, ends=True)) == 10
