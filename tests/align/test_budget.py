"""A budget buys what it pays for: exactly in evaluations and calls, to the clock's best in seconds, and says so before."""

import pytest
import torch

import align
from align.budget import Purse
from align.costs import measured, seconds_of
from align.loading import EMBEDDED
from align.prompts import world_prompts
from align.versus import bootstrap, compare_steerings
from align.world import World
from rewards import Brightness, CrossEncoder, JPEGSize, Prompt
from samplers import SVDD, Auto, BestOfN, Budget, Compose, FeynmanKac, Guided, Ledger, Price
from samplers.steering import Free
from tests.samplers.test_outer import Redraw

PROMPTS = ["a cat", "two dogs", "rain"]
STEPS = 3
BEST = 2 * STEPS  # evaluations of one sample: both branches of guidance


@pytest.fixture(scope="module")
def policy(tiny_folder):
    return align.load_policy(tiny_folder)


def steer(policy, steering, budget, prompts=PROMPTS, **options):
    return align.steer(policy, prompts, steering, budget=budget, steps=STEPS, plain=False, gold=None, **options)


@pytest.mark.parametrize(
    ("steering", "budget", "particles", "spent"),
    [
        (BestOfN(Brightness()), f"{3 * 4 * BEST}nfe", 4, 3 * 4 * BEST),
        (BestOfN(Brightness()), f"{3 * 5 * BEST - 1}nfe", 4, 3 * 4 * BEST),
        (BestOfN(Brightness()), "9rewards", 3, 9),
        (FeynmanKac(Brightness(), 0.1), "30rewards", 2, 24),  # one at each of three steps, one at the end
        (SVDD(Brightness(), children=2), "100rewards", 8, 96),
        (
            Guided(Brightness(), 1.0),
            f"{2 * 3 * 3 * BEST}nfe",
            2,
            2 * 3 * 3 * BEST,
        ),  # a gradient is two evaluations more
        (Compose(Guided(Brightness(), 1.0, stop=0.5), FeynmanKac(Brightness())), "200nfe", 4, 168),
        (Redraw(Brightness(), rounds=2), f"{3 * 2 * BEST}nfe", 1, 3 * 2 * BEST),
        (Redraw(Brightness(), rounds=2), f"{3 * 5 * BEST}nfe", 2, 3 * 4 * BEST),  # two chains can finish
        (Redraw(Brightness(), rounds=9), f"{3 * 5 * BEST}nfe", 1, 3 * 5 * BEST),  # one cannot
        (Auto(Brightness()), f"{3 * 5 * BEST}nfe", 1, 3 * 5 * BEST),
    ],
)
@pytest.mark.parametrize("batch", [2, 32])
def test_what_a_budget_buys(policy, steering, budget, particles, spent, batch):
    result = steer(policy, steering, budget, batch=batch)
    assert result.config["particles"] == particles
    assert len(result.samples) == 3 * particles
    report = result.ledger["budget"]
    assert report["spent"] == spent <= report["amount"]
    unit = Budget.parse(budget).unit
    predicted = report["predicted"]
    amount = (
        predicted["network_evaluations"] + 2 * predicted["gradients"] if unit == "nfe" else predicted["reward_calls"]
    )
    assert amount == pytest.approx(spent)


def test_a_budget_is_not_charged_for_the_plain_arm_and_the_panel(policy):
    how = {"budget": "4rewards", "steps": STEPS, "rewards": [JPEGSize()]}
    result = align.steer(policy, "a cat", BestOfN(Brightness()), **how)
    assert result.ledger["budget"]["spent"] == 4
    assert result.ledger["reward_calls"] > 8
    assert len(result.arm("plain")) == len(result.arm()) == 4


@pytest.mark.parametrize(
    ("steering", "options", "said"),
    [
        (
            BestOfN(Brightness()),
            {"budget": "17nfe"},
            "less than one sample a prompt: BestOfN needs 6 .* at least 18nfe",
        ),
        (BestOfN(Brightness()), {"budget": "2rewards"}, "raise it to 3rewards"),
        (BestOfN(Brightness()), {"budget": "0.0001s"}, "less than one sample a prompt"),
        (BestOfN(Brightness()), {"budget": "0s"}, "above 0"),
        (BestOfN(Brightness()), {"budget": "-5nfe"}, "above 0"),
        (BestOfN(Brightness()), {"budget": "5 minutes ago"}, "a budget is"),
        (BestOfN(Brightness()), {"budget": "5bananas"}, "a budget is in"),
        (BestOfN(Brightness()), {"budget": "60nfe", "particles": 4}, "4 particles need 72nfe.* to take the 3 that fit"),
        (Redraw(Brightness()), {"budget": "60nfe", "particles": 4}, "4 particles need 72nfe"),
        (SVDD(Brightness(), children=4), {"budget": "9rewards"}, "for 4 samples that belong together"),
        (Free(), {"budget": "64rewards"}, "nothing to buy"),
    ],
)
def test_budgets_that_buy_nothing_are_refused_before_the_run(policy, monkeypatch, steering, options, said):
    if "0.0001s" not in options["budget"]:  # seconds must be measured
        monkeypatch.setattr(type(policy), "predict", lambda *a: pytest.fail("the network ran"))
    monkeypatch.setattr(align.steering, "run_problem", lambda *a: pytest.fail("the run began"))
    with pytest.raises(ValueError, match=said):
        steer(policy, steering, **options)


def test_an_asked_number_of_particles_is_kept(policy):
    result = steer(policy, BestOfN(Brightness()), f"{3 * 9 * BEST}nfe", particles=2)
    assert len(result.samples) == 6
    assert result.ledger["budget"]["spent"] == 3 * 2 * BEST


def test_what_fits_is_what_the_same_particles_make(policy):
    bought = steer(policy, BestOfN(Brightness()), f"{3 * 4 * BEST}nfe")
    asked = align.steer(policy, PROMPTS, BestOfN(Brightness()), particles=4, steps=STEPS, plain=False)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(bought.samples, asked.samples, strict=True))


PART = {"network": 40.0, "decode": 1.0, "reward": 1.0, "gradient": 0.0}
NONE = dict.fromkeys(PART, 0.0)
RATES = {"network": 0.01, "decode": 0.05, "reward": 0.05, "gradient": 0.0}  # half a second a sample


def test_seconds_are_planned_by_rates_and_corrected_by_the_clock():
    purse = Purse(Budget(21, "s"), Price(1, PART, NONE), BestOfN(Brightness()), 4, RATES, spent=1.0)
    assert purse.particles() == 10
    purse.pay(Ledger(), 10.0, 1, 10)  # twice as long as planned
    assert purse.particles() == 3  # ten seconds for three prompts, at one second a sample
    purse.pay(Ledger(), 9.0, 2, 3)  # 1.5 seconds a sample
    assert purse.particles() == 1  # nothing is left, and every prompt gets a sample
    report = purse.as_dict(World())
    assert report["spent"] == 20
    assert report["predicted"]["seconds"] == 4 * 10 * 0.5


def test_seconds_are_kept(policy):
    result = steer(policy, BestOfN(Brightness()), "2s")
    report = result.ledger["budget"]
    assert 0 < report["spent"] < 4  # another process may take the machine
    assert result.config["particles"] > 1
    assert set(report["predicted"]["seconds_each"]) == set(PART)


def test_the_table_is_shown_before_the_run(policy, capsys):
    steer(policy, Guided(Brightness(), 1.0), "200nfe", progress=True)
    shown = capsys.readouterr().err
    table = shown[: shown.index("step/s")]
    assert "3 particles × 3 prompts × 3 steps × 2 branches: 162 NFE, 27 decodes, 27 rewards, ≈" in table
    for part in ("network evaluations", "decodes", "reward calls", "gradients", "s each"):
        assert part in table


def test_rates_are_of_the_parts_a_run_uses(policy):
    cond, levels = policy.encode(["a"]), policy.levels(STEPS, policy.size)
    how = (policy, cond, levels, policy.shape(policy.size), Prompt("a"))
    plain = measured(*how, [Brightness()], 2, False)
    tilted = measured(*how, [Brightness()], 2, True)
    assert plain["gradient"] == 0 < min(plain[on] for on in ("network", "decode", "reward"))
    assert tilted["gradient"] > 0
    assert seconds_of({"network": 2.0}, plain) == 2 * plain["network"]


@pytest.mark.slow
def test_on_shapes_a_race_is_no_worse_than_best_of_n():
    """On a few-step model with a budget that lets rivals run: the proxy within noise of best of N's, paired by prompt."""
    policy, reward = align.load_policy(EMBEDDED.parent / "tiny-turbo"), CrossEncoder()
    prompts = [p.text for p in world_prompts("shapes", "heldout")][::7][:16]
    made = compare_steerings(policy, prompts, [BestOfN(reward), Auto(reward)], budget=f"{480 * len(prompts)}nfe")
    gap = made.scores("Auto", "CrossEncoder") - made.scores("BestOfN", "CrossEncoder")
    assert float(gap.mean()) > -0.02
    assert bootstrap(gap)[1] >= -0.005
    gold = made.scores("Auto", "gold") - made.scores("BestOfN", "gold")
    assert bootstrap(gold)[1] >= 0
