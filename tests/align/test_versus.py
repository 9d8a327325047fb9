"""Methods at one budget: the same prompts and seeds, paired differences, refused before anything runs if they cannot."""

import json
import math

import pytest
import torch
from PIL import Image

import align
from align.versus import bootstrap, compare_steerings
from rewards import Brightness, Colour
from samplers import Auto, BestOfN, FeynmanKac, Guided
from tests.samplers.test_outer import Redraw

PROMPTS = ["a cat", "two dogs", "rain"]
HOW = {"budget": "90nfe", "steps": 3}


@pytest.fixture(scope="module")
def policy(tiny_folder):
    return align.load_policy(tiny_folder)


@pytest.fixture(scope="module")
def compared(policy):
    bright = Brightness()
    methods = [
        BestOfN(bright),
        FeynmanKac(bright, 0.01),
        FeynmanKac(bright, 0.1),
        Auto(bright),
        Redraw(bright, rounds=9),
    ]
    return compare_steerings(policy, PROMPTS, methods, rewards=[Colour()], **HOW)


def test_every_method_keeps_the_budget_and_differs_from_the_first_by_prompt(compared):
    rows = {row["method"]: row for row in compared.rows()}
    assert list(rows) == ["unsteered", "BestOfN", "FeynmanKac", "FeynmanKac-2", "Auto", "Redraw"]
    assert all(row["spent"] == row["nfe"] == 90 for name, row in rows.items() if name != "unsteered")
    for name, row in rows.items():
        values, first = compared.scores(name, "Brightness"), compared.scores("BestOfN", "Brightness")
        assert row["Brightness"]["mean"] == pytest.approx(float(values.mean()))
        if name != "BestOfN":
            assert row["Brightness"]["difference"] == pytest.approx(float((values - first).mean()))
            low, high = row["Brightness"]["interval"]
            assert low <= row["Brightness"]["difference"] <= high
    assert "difference" not in rows["BestOfN"]["Colour"]
    for name in ("unsteered", "Auto"):  # too little for a race: the same samples
        assert (compared.scores(name, "Brightness") <= compared.scores("BestOfN", "Brightness") + 1e-6).all()
    torch.testing.assert_close(compared.scores("Auto", "Brightness"), compared.scores("BestOfN", "Brightness"))


def test_what_a_comparison_writes(compared, tmp_path):
    compared.save(tmp_path)
    written = json.loads((tmp_path / "result.json").read_text())
    assert set(written) == {"config", "versions", "budget", "table", "methods", "samples"}
    assert written["budget"] == "90nfe"
    assert set(written["methods"]) == {"unsteered", *compared.runs}
    taken = [s for s in written["samples"] if s["image"]]
    assert len(taken) == 6 * 3
    assert all((tmp_path / s["image"]).is_file() for s in taken)
    table = (tmp_path / "comparison.md").read_text()
    assert all(f"| {name} |" in table for name in ("unsteered", "FeynmanKac-2"))
    with Image.open(tmp_path / "grid.png") as image:
        assert len(json.loads(image.text["kilter-tiles"])) == 3


def test_the_interval_is_the_bootstrap_of_the_mean():
    values = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap(values)
    error = 1.96 * float(values.std()) / 200**0.5
    assert low == pytest.approx(float(values.mean()) - error, abs=0.2 * error)
    assert high == pytest.approx(float(values.mean()) + error, abs=0.2 * error)
    assert bootstrap(torch.cat([values, torch.tensor([math.nan])])) == (low, high)
    assert all(math.isnan(end) for end in bootstrap(torch.tensor([1.0])))


class Blunt(Brightness):
    differentiable = False


@pytest.mark.parametrize(
    ("methods", "budget", "said"),
    [
        ([BestOfN(Brightness())], "90nfe", "two methods or more; got BestOfN"),
        ([], "90nfe", "got none"),
        ([BestOfN(Brightness()), FeynmanKac()], "90nfe", "FeynmanKac: .*needs a reward"),
        ([BestOfN(Brightness()), Guided(Blunt())], "9s", "Guided: .*needs the gradient"),
        ([BestOfN(Brightness()), Guided(Brightness())], "40nfe", "Guided: the budget of 40nfe is less than one sample"),
        ([BestOfN(Brightness()), Auto(Brightness())], "0nfe", "above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(policy, monkeypatch, methods, budget, said):
    monkeypatch.setattr(type(policy), "predict", lambda *a: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=said):
        compare_steerings(policy, PROMPTS, methods, steps=3, budget=budget)


def test_an_interrupted_comparison_keeps_what_there_is(policy):
    def press(ctx):
        if len(ctx.ess) > 1:
            raise KeyboardInterrupt

    methods = {"first": BestOfN(Brightness()), "second": FeynmanKac(Brightness(), 0.1), "third": BestOfN(Brightness())}
    result = compare_steerings(policy, PROMPTS, methods, watch=press, **HOW)
    assert list(result.runs) == ["first", "second"]
    assert result.interrupted
    assert result.stopped.startswith("second: ")
