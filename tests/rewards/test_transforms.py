"""Transforms: published numbers, what reference tables say, slopes, and statistics that follow a run."""

import json
import math
from pathlib import Path

import pytest
import torch

from rewards import Brightness, Clipped, Delta, JPEGSize, LogSigmoid, Reward, Sharpness, Standardised, Weighted
from rewards.transforms import within
from tests.rewards.tiny import natural

IMAGES = natural(6, 12, 12)


class Plain(Reward):
    """The mean pixel, scaled: 0 to `scale`; NaN for black images."""

    needs_prompt = False

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def measure(self, media, prompts):
        mean = media.flatten(1).mean(1)
        return (self.scale * mean).where(mean > 0, torch.nan)


def grey(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4)


@pytest.fixture
def scores(tmp_path: Path) -> str:
    """Ten samples of one prompt, two of another, one that was not judged."""
    rows = [{"image": f"{i}.png", "prompt": "many", "Plain": i / 10} for i in range(10)]
    rows += [{"image": "x.png", "prompt": "few", "Plain": 5.0}, {"image": "y.png", "prompt": "few", "Plain": None}]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("gap", "expected"), [(0.5, -0.474077), (-2.5, -2.578890)])
def test_log_sigmoid_centring_has_the_published_values(gap, expected) -> None:
    reward = LogSigmoid(Plain(10.0), 5.0)
    assert reward(grey((5 + gap) / 10)).item() == pytest.approx(expected, abs=1e-5)


def test_log_sigmoid_flattens_where_good_is_good_enough() -> None:
    x = grey(0.1, 0.5, 0.9).clone().requires_grad_()
    (slope,) = torch.autograd.grad(LogSigmoid(Plain(100.0), 50.0, temperature=2.0)(x).sum(), x)
    per_reward = slope.sum((1, 2, 3)) / 100
    torch.testing.assert_close(per_reward, torch.sigmoid(torch.tensor([40.0, 0.0, -40.0]) / 2) / 2)


def test_a_sum_of_log_sigmoids_is_the_probability_that_all_is_well() -> None:
    both = Weighted([LogSigmoid(Plain(3.0), 1.0), LogSigmoid(Brightness(), 0.2)])
    expected = torch.sigmoid(Plain(3.0)(IMAGES) - 1) * torch.sigmoid(Brightness()(IMAGES) - 0.2)
    torch.testing.assert_close(both(IMAGES).exp(), expected)


def test_references_are_quantiles_of_the_prompt_or_of_all(scores: str) -> None:
    reward = LogSigmoid(Plain(), scores)
    assert reward.needs_prompt and not LogSigmoid(Plain(), 0.3).needs_prompt
    rows = torch.arange(10, dtype=torch.float64) / 10
    every = torch.cat([rows, torch.tensor([5.0], dtype=torch.float64)])
    known = [float(rows.quantile(0.85)), float(every.quantile(0.85)), float(every.quantile(0.85))]
    got = reward(grey(0.5, 0.5, 0.5), ["many", "few", "unseen"])
    torch.testing.assert_close(got, torch.nn.functional.logsigmoid(0.5 - torch.tensor(known)))


def test_delta_is_the_gain_over_the_mean_reference(scores: str) -> None:
    got = Delta(Plain(), scores).score(grey(0.5, 0.5), ["many", "few"])
    torch.testing.assert_close(got.total, torch.tensor([0.05, -4.5]))
    assert got.parts["Plain"].tolist() == [0.5, 0.5]
    median = Delta(Plain(), scores, quantile=0.5, least=2)(grey(0.5, 0.5), ["many", "few"])
    torch.testing.assert_close(median, torch.tensor([0.05, 0.0]))


def test_tables_may_be_parquet_and_name_their_column(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"prompt": ["a", "a", "b"], "HPSv2": [0.1, 0.3, 0.4]})
    parquet.write_table(table, tmp_path / "scores.parquet")
    got = Delta(Plain(), str(tmp_path / "scores.parquet"), column="HPSv2")(grey(0.5, 0.5), ["a", "b"])
    torch.testing.assert_close(got, torch.tensor([0.3, 0.1]))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "make one with kilter score --json"),
        ("not json", ValueError, "not JSON lines"),
        ('{"prompt": "a", "Other": 1}', ValueError, "must hold prompt and Plain; got prompt, Other"),
        ("[1]", ValueError, "got list"),
        ('{"prompt": "a", "Plain": null}', ValueError, "holds no score in Plain"),
    ],
)
def test_wrong_tables_raise(tmp_path: Path, content, error, message) -> None:
    path = tmp_path / "scores.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=message):
        Delta(Plain(), str(path))


def test_clip_of_a_delta_is_the_published_clip() -> None:
    """min(r - threshold, 0)."""
    got = Clipped(Delta(Plain(), 0.4), high=0.0)(grey(0.1, 0.4, 0.9))
    torch.testing.assert_close(got, torch.tensor([-0.3, 0.0, 0.0]))


def test_clipping_stops_the_gradient_and_keeps_what_was_not_judged() -> None:
    x = grey(0.1, 0.5, 0.9, 0.0).clone().requires_grad_()
    scores = Clipped(Plain(), 0.2, 0.8)(x)
    assert scores[:3].tolist() == pytest.approx([0.2, 0.5, 0.8])
    assert scores[3].isnan()
    (slope,) = torch.autograd.grad(scores[:3].sum(), x)
    assert slope[:3].sum((1, 2, 3)).tolist() == pytest.approx([0, 1, 0])


def test_calibration_is_affine_and_given_or_read(scores: str) -> None:
    given = Standardised(Plain(), mean=0.3, std=0.2)
    torch.testing.assert_close(given(IMAGES), (Plain()(IMAGES) - 0.3) / 0.2)
    known = torch.tensor([*(i / 10 for i in range(10)), 5.0], dtype=torch.float64)
    read = Standardised(Plain(), scores=scores)
    assert (read.mean, read.std) == pytest.approx((known.mean().item(), known.std(correction=0).item()))


def test_within_a_prompt_scores_have_mean_0_and_std_1() -> None:
    prompts = ["a", "b", "a", "b", "a", "c"]
    reward = Standardised(Plain(), "prompt", eps=1e-9)
    assert reward.compares and reward.needs_prompt
    got = reward(IMAGES, prompts)
    for text in "ab":
        mine = got[[i for i, p in enumerate(prompts) if p == text]]
        assert mine.mean().item() == pytest.approx(0, abs=1e-5)
        assert mine.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert got[5] == 0
    torch.testing.assert_close(Standardised(Plain(7.0), "prompt", eps=1e-9)(IMAGES, prompts), got, atol=1e-4, rtol=0)


def test_within_a_prompt_what_was_not_judged_counts_for_nothing() -> None:
    got = Standardised(Plain(), "prompt")(grey(0.2, 0.0, 0.4), ["a", "a", "a"])
    torch.testing.assert_close(got[[0, 2]], torch.tensor([-1.0, 1.0]), atol=2e-3, rtol=0)
    assert got[1].isnan()


def test_within_a_prompt_each_sample_keeps_its_own_slope() -> None:
    """With the statistics in the graph the slopes of a group would add up to 0."""
    x = grey(0.2, 0.4).clone().requires_grad_()
    (slope,) = torch.autograd.grad(Standardised(Plain(), "prompt", eps=1e-9)(x, ["a", "a"]).sum(), x)
    torch.testing.assert_close(slope.sum((1, 2, 3)), torch.tensor([10.0, 10.0]), rtol=1e-4, atol=0)


def learnt(reward: Standardised, *parts: torch.Tensor) -> tuple[float, float]:
    for part in parts:
        reward.learn(part[:, None].double())
    return reward.mean, reward.std


def test_running_statistics_are_those_of_all_samples_however_they_come() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    expected = (values.mean().item(), values.std(correction=0).item())
    for parts in ([values], [values[:1], values[1:7], values[7:]]):
        assert learnt(Standardised(Plain(), "run"), *parts) == pytest.approx(expected, rel=1e-9)
    holes = torch.cat([values, torch.full((3,), math.nan, dtype=torch.float64)])
    assert learnt(Standardised(Plain(), "run"), holes) == pytest.approx(expected, rel=1e-9)


def test_a_short_memory_forgets() -> None:
    old, new = torch.zeros(1000, dtype=torch.float64), torch.full((10,), 5.0, dtype=torch.float64)
    short = Standardised(Plain(), "run", memory=10)
    learnt(short, old, *[new] * 20)
    assert short.mean == pytest.approx(5, abs=1e-4) and learnt(Standardised(Plain(), "run"), old, new)[0] < 0.1


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1])
def test_samples_that_are_all_alike_say_nothing_about_the_spread(value: float) -> None:
    """A reward that is 0 for all pictures at first must not drown all others as soon as one picture has some."""
    reward = Standardised(Plain(), "run", std=0.5)
    learnt(reward, torch.full((33,), value, dtype=torch.float64))
    assert reward(grey(0.6)).item() == pytest.approx((0.6 - value) / 0.5, rel=1e-5)
    learnt(reward, torch.tensor([value, value + 10.0], dtype=torch.float64))
    assert reward(grey(0.6)).item() == pytest.approx((0.6 - reward.mean) / reward.std, rel=1e-5) and reward.std > 1


def test_running_statistics_stay_until_a_trainer_moves_them_and_survive_it() -> None:
    reward = Standardised(Plain(), "run", mean=0.5, std=0.25)
    before = reward(IMAGES)
    torch.testing.assert_close(reward(IMAGES), before)
    torch.testing.assert_close(before, (Plain()(IMAGES) - 0.5) / 0.25)
    reward.learn(torch.tensor([[0.1], [0.3]]))
    again = Standardised(Plain(), "run")
    again.restore(reward.state())
    torch.testing.assert_close(again(IMAGES), (Plain()(IMAGES) - 0.2) / 0.1)
    assert again.worth_watching() == pytest.approx({"mean": 0.2, "std": 0.1})


def test_what_transforms_inherit() -> None:
    assert not Clipped(JPEGSize(), high=0.0).differentiable
    assert Clipped(Sharpness(), high=0.0).name == "Clipped(Sharpness)"
    assert Clipped(Standardised(Plain(), "prompt"), -3.0, 3.0).compares


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clipped(Plain()), "low, high or both"),
        (lambda: Clipped(Plain(), 1.0, 0.0), "low must be below high"),
        (lambda: Standardised(Plain(), std=0.0), "std must be above 0"),
        (lambda: Standardised(Plain(), "batch"), "over must be calibration"),  # pyright: ignore[reportArgumentType]
        (lambda: Standardised(Plain(), "prompt", mean=1.0), "give none"),
        (lambda: Standardised(Plain(), mean=1.0, scores="x.jsonl"), "got both"),
        (lambda: Standardised(Plain(), "run", memory=0), "memory must be at least 1"),
        (lambda: LogSigmoid(Plain(), temperature=0.0), "temperature must be above 0"),
        (lambda: LogSigmoid(Plain(), quantile=85), "quantile must be 0 to 1"),
        (lambda: Delta(Plain(), math.nan), "reference must be finite"),
        (lambda: Delta(Plain(), least=0), "least must be at least 1"),
    ],
)
def test_wrong_transforms_raise(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_score_without_end_stays_one_and_spoils_no_mean() -> None:
    values = torch.tensor([1.0, 3.0, -torch.inf, torch.nan, 5.0])
    scores = within(values, ["a", "a", "a", "a", "b"], 0.0)
    assert scores[:2].tolist() == [-1.0, 1.0]
    assert scores[2] == -torch.inf and scores[3].isnan()
