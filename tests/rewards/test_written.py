"""Scores in words: what is asked is what was published, what is read is what was said, votes count what was read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import rewards
from rewards import Ask, UnifiedReward, Written
from rewards.judging import published
from tests.rewards import tiny
from tests.rewards.faulty import Faulty, brightness, said
from tests.rewards.scribe import Scribe, bright

DATA = json.loads((Path(rewards.__file__).parent / "questions" / "unifiedreward.json").read_text())


def test_published_questions_have_a_source_and_one_place_for_the_prompt():
    assert "MIT" in DATA["licence"] and "github.com/CodeGoat24/UnifiedReward at " in DATA["source"]
    assert set(DATA["questions"]) == set(DATA["files"])
    for name, text in DATA["questions"].items():
        assert text.count("{prompt}") == 1 and text.count("{") == text.count("}"), name
        assert published("unifiedreward", name) == text


IMAGE = "cat (animal): 1\nred (colour): 0\nFinal Score: 4"
ACS = "Alignment Score (1-5): 2.6947\nCoherence Score (1-5): 2.3715\nStyle Score (1-5): 2.8025"  # from the model's page
VIDEO = "visual quality: 4\ntemporal consistency: 4\ndynamic degree: 3\ntext-to-video alignment: 1\nfactual consistency: 2\n"


class TestUnifiedReward:
    @pytest.mark.parametrize(
        ("form", "answer", "total", "parts"),
        [
            ("image", IMAGE, 4.0, {}),
            ("image_acs", ACS, 2.6229, {"Alignment": 2.6947, "Coherence": 2.3715, "Style": 2.8025}),
            ("image_words", f'Word-wise Scores: [["cat", 3.2]]\n\n{ACS}', 2.6229, {"Style": 2.8025}),
            ("image_acs", ACS.partition("Style")[0], math.nan, {"Alignment": 2.6947, "Style": math.nan}),
            (
                "video",
                VIDEO + "Final Score: 6",
                6.0,
                {"visual quality": 4, "dynamic degree": 3, "factual consistency": 2},
            ),
            ("video", VIDEO + "Final Score: 11", math.nan, {"visual quality": 4}),
            ("video", VIDEO.replace("4", "5") + "Final Score: 6", 6.0, {"visual quality": math.nan}),
            ("video_aps", ACS.replace("Coherence", "Physics"), 2.6229, {"Physics": 2.3715}),
            ("image", None, math.nan, {}),
        ],
    )
    def test_goldens(self, form, answer, total, parts):
        reward = UnifiedReward(Scribe(lambda _: answer), form)
        media = tiny.natural(40, 20, 20).unflatten(0, (2, 20)) if form.startswith("video") else tiny.natural(2, 20, 20)
        scores = reward.score(media, ["a cat", "a dog"])
        assert scores.total.tolist() == pytest.approx([total] * 2, abs=1e-4, nan_ok=True)
        for name, value in parts.items():
            assert scores.parts[name].tolist() == pytest.approx([value] * 2, abs=1e-4, nan_ok=True)

    def test_what_is_asked(self):
        judge = Scribe(lambda _: IMAGE)
        media = tiny.natural(2, 20, 20)
        UnifiedReward(judge, "image").score(media, ["a {prompt} [cat]", "a dog"])
        assert judge.asks[0].text.endswith("Text Caption: [a {prompt} [cat]]")
        assert torch.equal(judge.asks[1].media[0], media[1]) and judge.how == {"temperature": 0, "max_tokens": 512}

    @pytest.mark.parametrize(("form", "shown"), [("video", [(20, 3, 8, 8)]), ("video_aps", [(3, 8, 8)] * 16)])
    def test_videos_are_shown_as_published(self, form, shown):
        judge = Scribe(lambda _: None)
        UnifiedReward(judge, form).score(tiny.natural(20, 8, 8)[None], ["a cat"])
        assert [tuple(media.shape) for media in judge.asks[0].media] == shown

    def test_unknown_forms(self):
        with pytest.raises(ValueError, match="form must be one of image, image_words"):
            UnifiedReward(Scribe(lambda _: ""), "video_acs")  # type: ignore[arg-type]


class TestWritten:
    def test_samples_are_put_to_the_vote(self):
        """Draws of 1, 2 and 6, and one that fails for the first sample only."""

        def draw(ask: Ask) -> str | None:
            said = [1, 2, 6, None if bright(ask.media[0]) < 0.5 else 7][ask.seed]
            return None if said is None else f"Score: {said}"

        media = torch.stack([torch.full((3, 8, 8), v) for v in (0.2, 0.8)])
        totals = {}
        for rule in ("mean", "median", "sum", "majority", "trimmed"):
            judge = Scribe(draw)
            scores = Written(judge, "{prompt}?", samples=4, temperature=0.5, aggregate=rule).score(media, ["a", "b"])
            totals[rule] = scores.total.tolist()
            assert judge.how["temperature"] == 0.5
            assert scores.parts["answered"].tolist() == [0.75, 1.0]
            assert scores.parts["spread"].tolist() == pytest.approx([math.sqrt(14 / 3), math.sqrt(6.5)])
        assert totals == {"mean": [3, 4], "median": [2, 4], "sum": [12, 16], "majority": [1, 1], "trimmed": [3, 4]}

    def test_all_failed_is_nan(self):
        scores = Written(Scribe(lambda _: "well"), "?", samples=2, temperature=1.0).score(torch.rand(2, 3, 8, 8))
        assert scores.total.isnan().all() and scores.parts["spread"].isnan().all()
        assert scores.parts["answered"].tolist() == [0, 0]

    def test_json_is_asked_for_by_a_schema(self):
        judge = Scribe(lambda _: '{"beauty": 3}')
        reward = Written(judge, "How beautiful?", "beauty", 0, 5, form="json")
        assert reward(torch.rand(1, 3, 8, 8)).item() == 3
        assert json.loads(judge.asks[0].schema)["properties"] == {
            "beauty": {"type": "number", "minimum": 0, "maximum": 5}
        }

    def test_a_pattern_of_ones_own(self):
        """flow_grpo's Qwen-VL reward asks for <Score>."""
        says = iter(
            ["<Thought>2</Thought><Score>4</Score>", "<Score>4</Score><Score>?</Score>", "<Score>6</Score>", "4"]
        )
        reward = Written(Scribe(lambda _: next(says)), "?", high=5, pattern="<Score>(.*?)</Score>")
        assert reward(torch.rand(4, 3, 8, 8)).tolist() == pytest.approx([4, *[math.nan] * 3], nan_ok=True)

    def test_a_start_is_part_of_the_answer(self):
        judge = Scribe(lambda _: " 7, I think")
        assert Written(judge, "?", start="Score:")(torch.rand(1, 3, 8, 8)).item() == 7
        assert judge.asks[0].start == "Score:"

    def test_the_prompt_is_needed_where_the_question_names_it(self):
        assert not Written(Scribe(lambda _: ""), "How good?").needs_prompt
        assert Written(Scribe(lambda _: ""), "Is it {prompt}?").needs_prompt

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"samples": 3}, "3 samples at temperature 0 are the same one"),
            ({"samples": 0}, "samples and max_tokens must be ≥ 1"),
            ({"low": 5, "high": 5}, "low < high"),
            ({"label": ""}, "needs a label"),
            ({"pattern": "Score"}, "pattern must hold a group"),
            ({"pattern": "(.)", "form": "json"}, "form must be text"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            Written(Scribe(lambda _: ""), "?", **options)

    def test_served(self):
        """Through HTTP: a judge that says how bright a picture is, and is out of order every third time."""
        plan = lambda body, _: said(f"Score: {10 * brightness(body)[0]:.3f}") if brightness(body)[0] > 0.3 else 400  # noqa: E731
        media = torch.stack([torch.full((3, 8, 8), v) for v in (0.8, 0.2, 0.4)])
        with Faulty(plan) as server, pytest.warns(UserWarning, match="1 of 3 questions"):
            total = Written(rewards.ServedJudge(server.url), "How bright?", low=0)(media)
        assert total.tolist() == pytest.approx([8, math.nan, 4], abs=0.02, nan_ok=True)
