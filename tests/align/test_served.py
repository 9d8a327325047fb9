"""A judge behind HTTP steers sampling, from the command line to the result, and may fail now and then."""

from __future__ import annotations

import json

import pytest

from align.cli import main
from tests.rewards.faulty import Faulty, brightness, listing, said


def steered(server: Faulty, out, *options: str) -> dict:
    judge = ["--reward", "Written", "--reward.judge", "ServedJudge", "--reward.judge.url", server.url]
    judge += ["--reward.judge.retries", "0", "--reward.question", "How bright?", "--reward.low", "0", *options]
    command = ["steer", "a red circle", *judge, "--steps", "4", "--particles", "4", "--device", "cpu"]
    assert main([*command, "--steering.beta", "0.05", "--plain", "false", "--out", str(out)]) == 0
    return json.loads((out / "result.json").read_text())


def test_a_served_judge_steers(tmp_path):
    with Faulty(lambda body, _: said(f"Score: {10 * brightness(body)[0]:.4f}")) as server:
        result = steered(server, tmp_path / "out")
        asked = len(server.bodies)
    assert asked >= 4 and all(sample["scores"]["Written"] is not None for sample in result["samples"])
    assert "ServedJudge" in json.dumps(result["config"])


def test_yes_and_no_steer(tmp_path):
    """The share of Yes is how bright the picture is."""

    def plan(body: dict, _: int) -> dict:
        (bright,) = brightness(body)
        return listing({"Yes": 0.9 * bright + 0.05, "No": 0.95 - 0.9 * bright})

    with Faulty(plan) as server:
        judge = ["--reward", "YesNo", "--reward.judge", "ServedJudge", "--reward.judge.url", server.url]
        command = [
            "steer",
            "a red circle",
            *judge,
            "--steps",
            "3",
            "--particles",
            "3",
            "--plain",
            "false",
            "--device",
            "cpu",
        ]
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
        asked = server.bodies[0]["messages"][-1]["content"][-1]["text"]
    scores = [
        sample["scores"]["YesNo"] for sample in json.loads((tmp_path / "out" / "result.json").read_text())["samples"]
    ]
    assert "a red circle" in asked and all(0.05 < score < 0.95 for score in scores)


def test_failures_do_not_stop_it(tmp_path):
    """Every third answer fails: those particles wait for the next; what is lost at the end is left out and counted."""
    with (
        pytest.warns(UserWarning, match="no answer"),
        Faulty(lambda body, n: 500 if n % 3 == 2 else said(f"Score: {10 * brightness(body)[0]:.4f}")) as server,
    ):
        result = steered(server, tmp_path / "out")
    assert result["failures"]["Written"] > 0 and result["stopped"] is None
    assert any(sample["scores"]["Written"] is not None for sample in result["samples"])


def test_a_judge_that_never_answers_is_an_error(tmp_path, capsys):
    with Faulty(lambda *_: 500) as server:
        judge = ["--reward", "Written", "--reward.judge", "ServedJudge", "--reward.judge.url", server.url]
        judge += ["--reward.judge.retries", "0", "--reward.question", "How bright?", "--plain", "false"]
        with pytest.warns(UserWarning, match="no answer to 2 of 2 questions"):
            assert (
                main(
                    [
                        "steer",
                        "a red circle",
                        *judge,
                        "--steps",
                        "2",
                        "--particles",
                        "2",
                        "--out",
                        str(tmp_path / "out"),
                    ]
                )
                == 1
            )
    assert "Written" in capsys.readouterr().err
