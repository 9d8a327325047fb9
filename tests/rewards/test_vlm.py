"""Questions to judges: the formulas on a judge of known odds, the rest on tiny real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards import Ask, Judge, LocalJudge, Prompt, QAlign, Rating, VQAScore, YesNo
from rewards.vlm import NO, YES
from tests.rewards import tiny

IMAGES = 0.1 + 0.8 * tiny.natural(3, 40, 50)


class Oracle(Judge):
    """Knows the log-probabilities; remembers what it was asked."""

    differentiable = True

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.rows, self.asked, self.choices = torch.tensor(rows), [], []

    def odds(self, asks: Sequence[Ask], choices: Sequence[Sequence[str]]) -> Tensor:
        self.asked, self.choices = list(asks), [list(c) for c in choices]
        return self.rows[: len(asks), : len(choices)]

    def write(self, asks: Sequence[Ask], *, temperature: float = 0.0, max_tokens: int = 512) -> list[str | None]:
        return [None] * len(asks)


def logs(*rows: Sequence[float]) -> list[list[float]]:
    return torch.tensor(rows).log().tolist()


@pytest.mark.parametrize(
    ("score", "expected"),
    [("probability", (0.75, 0.2)), ("log_odds", (1.0986123, -1.3862944)), ("vqascore", (0.6, 0.1))],
)
def test_one_question(score: str, expected: tuple[float, float]) -> None:
    oracle = Oracle(logs((0.6, 0.2), (0.1, 0.4)))
    scores = YesNo(oracle, 'Is "{prompt}" in the {media}?', score).score(IMAGES[:2], ["a {cat}", "a dog"])  # type: ignore[arg-type]
    torch.testing.assert_close(scores.total, torch.tensor(expected))
    assert [ask.text for ask in oracle.asked] == ['Is "a {cat}" in the image?', 'Is "a dog" in the image?']
    assert oracle.choices == [["Yes", " Yes", "yes", " yes"], ["No", " No", "no", " no"]]
    assert not scores.parts


def test_questions_are_multiplied_and_log_odds_added() -> None:
    oracle = Oracle(logs((0.6, 0.2), (0.1, 0.4), (0.3, 0.3), (0.2, 0.1)))
    asked = ["Is it a {prompt}?", "Is it red?"]
    scores = YesNo(oracle, asked).score(IMAGES[:2], ["cat", "dog"])
    torch.testing.assert_close(scores.total, torch.tensor([0.75 * 0.2, 0.5 * 2 / 3]))
    torch.testing.assert_close(scores.parts["question_2"], torch.tensor([0.2, 2 / 3]))
    total = YesNo(oracle, asked, "log_odds")(IMAGES[:2], ["cat", "dog"])
    torch.testing.assert_close(total, torch.tensor([3 / 4, 2.0]).log())


def test_a_prompt_brings_its_own_questions() -> None:
    oracle = Oracle(logs((0.6, 0.2), (0.1, 0.4), (0.3, 0.3)))
    prompts = [Prompt("cat", meta={"questions": ["Is it a {prompt}?", "Is it red?"]}), "dog"]
    scores = YesNo(oracle, "Is it {prompt}?").score(IMAGES[:2], prompts)
    assert [ask.text for ask in oracle.asked] == ["Is it a cat?", "Is it red?", "Is it dog?"]
    torch.testing.assert_close(scores.total, torch.tensor([0.75 * 0.2, 0.5]))
    assert scores.parts["question_2"].isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="must be a list of texts; got 'Is it red"):
        YesNo(oracle)(IMAGES[:1], [Prompt("cat", meta={"questions": "Is it red?"})])


def test_no_prompt_is_needed_where_none_is_asked_for() -> None:
    oracle = Oracle(logs((0.6, 0.2), (0.1, 0.4)))
    assert YesNo(oracle).needs_prompt
    for reward in (YesNo(oracle, "Is it good?"), Rating(oracle, "How good is it?", ["1", "2"]), QAlign(oracle)):
        assert not reward.needs_prompt
    assert YesNo(oracle, "Is it good?")(IMAGES[:2]).tolist() == pytest.approx([0.75, 0.2])


def test_vqascore_is_the_probability_of_yes_among_all() -> None:
    oracle = Oracle(logs((0.6,), (0.1,)))
    scores = VQAScore(oracle)(IMAGES[:2], ["a cat", "a dog"])
    torch.testing.assert_close(scores, torch.tensor([0.6, 0.1]))
    assert oracle.asked[0].text == 'Does this figure show "a cat"? Please answer Yes or No.'
    assert oracle.choices == [["Yes", " Yes"]]
    VQAScore(oracle, "flant5")(IMAGES[:1], ["a cat"])
    assert oracle.asked[0].text.endswith("Please answer yes or no.")


def test_q_align_of_known_logits() -> None:
    """Goldens: softmax of (2, 1, 0, -1, -2) with the weights of the released scorer, and of mean opinion scores."""
    rows = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]]) - 7
    oracle = Oracle(rows.tolist())
    scores = QAlign(oracle).score(IMAGES[:1])
    assert scores.total.item() == pytest.approx(0.862985, abs=1e-6)
    assert QAlign(oracle, scale="1-5")(IMAGES[:1]).item() == pytest.approx(4.451942, abs=1e-6)
    assert scores.parts["mass"].item() == pytest.approx(rows.exp().sum().item())
    (ask,) = oracle.asked
    assert (ask.text, ask.start) == (
        "How would you rate the quality of this image?\n<media>",
        "The quality of the image is",
    )
    assert oracle.choices == [[" excellent"], [" good"], [" fair"], [" poor"], [" bad"]]


def test_q_align_of_aesthetics_and_video() -> None:
    oracle = Oracle([[0.0] * 5])
    assert QAlign(oracle, "aesthetics")(IMAGES[:1]).item() == pytest.approx(0.5)
    assert oracle.asked[0].start == "The aesthetics of the image is"
    assert QAlign(oracle, modality="video")(IMAGES[None]).item() == pytest.approx(0.5)
    assert oracle.asked[0].text.startswith("How would you rate the quality of this video?")
    assert oracle.asked[0].media[0].shape == IMAGES.shape
    with pytest.raises(ValueError, match="no rating of the aesthetics of a video"):
        QAlign(oracle, "aesthetics", modality="video")


def test_ratings_are_expected_values() -> None:
    oracle = Oracle(logs((0.1, 0.1, 0.2, 0.2, 0.2)))
    scores = Rating(oracle).score(IMAGES[:1], ["a cat"])
    assert scores.total.item() == pytest.approx((0.1 + 0.2 + 0.6 + 0.8 + 1.0) / 0.8)
    assert scores.parts["mass"].item() == pytest.approx(0.8)
    assert oracle.choices == [["1"], ["2"], ["3"], ["4"], ["5"]]
    words = Rating(oracle, "Well?", ["low", "high"], [0.0, 10.0])
    assert words(IMAGES[:1]).item() == pytest.approx(5.0)
    assert oracle.choices == [["low", "Low"], ["high", "High"]]


def test_what_cannot_be_judged_is_nan() -> None:
    missing = [[float("nan")] * 5, [-1.0] * 5]
    for reward in (YesNo(Oracle(missing), "Good?"), QAlign(Oracle(missing)), Rating(Oracle(missing), "How good?")):
        scores = reward.score(IMAGES[:2])
        assert scores.total.isnan().tolist() == [True, False]
    both = YesNo(Oracle(missing), ["Good?", "Red?"]).score(IMAGES[:1])
    assert both.total.isnan().all()


def test_rewards_have_the_gradient_of_their_judge(vlm_folders: dict[str, Path]) -> None:
    qwen, llava = (LocalJudge(str(vlm_folders[k]), dtype="float32") for k in ("qwen2_5_vl", "llava_onevision"))
    for build in (YesNo, VQAScore, Rating, QAlign):
        assert build(qwen).differentiable and not build(llava).differentiable
        media = IMAGES.clone().requires_grad_()
        (slope,) = torch.autograd.grad(build(qwen)(media, ["a cat"] * 3).sum(), media)
        assert (slope.flatten(1).abs().amax(dim=1) > 0).all()
        with pytest.raises(RuntimeError, match="not differentiable"):
            build(llava)(media, ["a cat"] * 3)


def test_odds_of_a_local_judge_are_those_of_the_reward(vlm_folders: dict[str, Path]) -> None:
    judge = LocalJudge(str(vlm_folders["qwen2_vl"]), dtype="float32")
    odds = judge.odds([Ask('Does this image show "a cat"? Answer Yes or No.', (IMAGES[0],))], [YES, NO])
    assert YesNo(judge)(IMAGES[:1], ["a cat"]).item() == pytest.approx((odds[0, 0] - odds[0, 1]).sigmoid().item())


def test_wrong_settings_are_named() -> None:
    oracle = Oracle([[0.0]])
    for build, message in (
        (lambda: YesNo(oracle, []), "at least one question"),
        (lambda: YesNo(oracle, score="odds"), "score must be one of probability, log_odds, vqascore; got 'odds'"),  # type: ignore[arg-type]
        (lambda: YesNo(oracle, modality="audio"), "modality must be one of image, video; got 'audio'"),  # type: ignore[arg-type]
        (lambda: VQAScore(oracle, "llava"), "wording must be chat or flant5"),  # type: ignore[arg-type]
        (lambda: Rating(oracle, "?", ["low", "high"]), "a scale of words needs values"),
        (lambda: Rating(oracle, "?", ["1"]), "at least 2 labels"),
        (lambda: Rating(oracle, "?", ["1", "2"], [1.0]), "a value for each"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
