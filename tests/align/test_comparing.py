"""Laws of comparing rewards: what leaves a distance alone, its ends, and the numbers that written-out formulas and scipy give."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from align import compare_rewards, comparing
from align.cli import main
from align.comparing import compare_scores
from align.pictures import to_pil
from align.tables import read_tables
from rewards import Brightness, Colour, Delta, Sharpness, Weighted
from tests.rewards.tiny import natural

PROMPTS = [f"prompt {i % 7}" for i in range(60)]


def random(count: int = 1, seed: int = 0, size: int = 60) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(count)]


def distance(a: torch.Tensor, b: torch.Tensor, prompts=PROMPTS, measure="distance") -> float:
    return float(compare_scores({"a": a, "b": b}, prompts, resamples=2)[measure][0, 1])


def test_scale_and_what_depends_on_the_prompt_alone_do_not_matter() -> None:
    a, b = random(2)
    shift = torch.tensor([10.0 * (i % 7) for i in range(60)], dtype=torch.float64)
    assert distance(a, 3 * a + shift) < 1e-14
    for measure in ("distance", "epic", "spearman", "kendall", "top1"):
        before = distance(a, b, measure=measure)
        assert distance(2 * a + shift, 0.1 * b - 2 * shift, measure=measure) == pytest.approx(before, abs=1e-12)


def test_opposites_are_two_apart() -> None:
    (a,) = random()
    assert distance(a, -a) == pytest.approx(2, abs=1e-12)
    assert distance(a, -a, measure="epic") == pytest.approx(1, abs=1e-12)
    assert distance(a, -a, measure="spearman") == pytest.approx(-1)
    assert distance(a, -a, measure="kendall") == pytest.approx(-1)


def test_it_is_a_metric_on_what_it_tells_apart() -> None:
    rewards = {str(i): r for i, r in enumerate(random(6))}
    d = compare_scores(rewards, PROMPTS, resamples=2)["distance"]
    torch.testing.assert_close(d, d.T)
    assert d.diagonal().tolist() == [0] * 6 and (d >= 0).all() and (d <= 2).all()
    assert (d[:, :, None] <= d[:, None, :] + d.T[None, :, :] + 1e-12).all()  # d(i,j) ≤ d(i,k) + d(k,j)


def test_a_distance_worked_out_by_hand() -> None:
    """Prompt x: (1, 3) and (0, 4) are (-1, 1) and (-2, 2); y: (0, 0, 3) and (3, 0, 0) are (-1, -1, 2) and (2, -1, -1).

    The products are 4 - 3 = 1, the squared lengths 2 + 6 = 8 and 8 + 6 = 14.
    """
    a = torch.tensor([1.0, 3.0, 0.0, 0.0, 3.0])
    b = torch.tensor([0.0, 4.0, 3.0, 0.0, 0.0])
    found = compare_scores({"a": a, "b": b}, ["x", "x", "y", "y", "y"], resamples=2)
    rho = 1 / math.sqrt(8 * 14)
    assert float(found["distance"][0, 1]) == pytest.approx(math.sqrt(2 - 2 * rho))
    assert float(found["epic"][0, 1]) == pytest.approx(math.sqrt((1 - rho) / 2))
    assert float(found["top1"][0, 1]) == 0.5
    assert float(found["spearman"][0, 1]) == pytest.approx((1 - 0.5) / 2)
    assert float(found["kendall"][0, 1]) == pytest.approx((1 - 0.5) / 2)
    assert found.chance == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_rank_correlations_are_those_of_scipy_averaged_over_prompts() -> None:
    a, b = ((4 * r).round() for r in random(2))  # with ties
    rows = [[i for i, p in enumerate(PROMPTS) if p == text] for text in dict.fromkeys(PROMPTS)]
    for measure, rule in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        expected = sum(rule(a[r].numpy(), b[r].numpy())[0] for r in rows) / len(rows)
        assert distance(a, b, measure=measure) == pytest.approx(expected)


@pytest.mark.parametrize("most", [comparing.MOST, 100, 1])
def test_numbers_do_not_depend_on_how_much_is_in_memory(monkeypatch, most: int) -> None:
    """Numbers of commit 5578e1d, which held all pairs of samples and all bootstrap samples at once."""
    expected = {
        "distance": (1.259650624931539, 1.1315647642026283, 1.3703731474034002),
        "epic": (0.6298253124657694, 0.5657823821013142, 0.6851865737017001),
        "spearman": (0.2595279610693794, 0.1301090464403184, 0.45320824316794067),
        "kendall": (0.20317478433674316, 0.1097183691315437, 0.3492622378155315),
        "top1": (0.07142857142857142, 0.0, 0.21428571428571427),
    }
    monkeypatch.setattr(comparing, "MOST", most)
    a, b = ((4 * r).round() for r in random(2))  # with ties
    found = compare_scores({"a": a, "b": b}, PROMPTS, resamples=50)
    for measure, numbers in expected.items():
        told = (float(found[measure][0, 1]), *found.intervals[measure][:, 0, 1].tolist())
        assert told == pytest.approx(numbers, abs=1e-12), measure


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize(("samples", "prompts"), [(20_000, 1), (6_000, 3_000)])
def test_memory_is_bounded_for_many_samples_of_a_prompt_and_for_many_prompts(samples: int, prompts: int) -> None:
    """All pairs of samples were 6.4 GB, all bootstrap samples of the prompts 24 MB."""
    a, b = ((4 * r).round() if prompts == 1 else r for r in random(2, size=samples))
    with Largest() as largest:
        found = compare_scores({"a": a, "b": a + b}, [str(i % prompts) for i in range(samples)])
    assert largest.bytes <= 8 * (comparing.MOST + 2 * samples)
    if prompts == 1:
        for measure, rule in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
            assert float(found[measure][0, 1]) == pytest.approx(rule(a.numpy(), (a + b).numpy())[0])


def test_a_reward_that_tells_nothing_apart_is_one_from_all_others() -> None:
    (a,) = random()
    flat = torch.tensor([0.1 * (i % 7) for i in range(60)], dtype=torch.float64)
    found = compare_scores({"a": a, "flat": flat, "none": 0 * a}, PROMPTS, resamples=10)
    torch.testing.assert_close(found["distance"][0, 1:], torch.ones(2, dtype=torch.float64))
    assert found["distance"][1, 2] == 0
    assert found["spearman"][0, 1].isnan()
    assert json.loads(json.dumps(found.as_dict()))["pairs"][0]["spearman"]["value"] is None


def test_what_some_reward_could_not_judge_is_left_out_of_all() -> None:
    a, b, c = random(3)
    holes = a.clone()
    holes[[0, 5]] = math.nan
    found = compare_scores({"a": holes, "b": b, "c": c}, [*PROMPTS[:-1], "alone"], resamples=2)
    kept = [i for i in range(59) if i not in (0, 5)]
    expected = compare_scores({"b": b[kept], "c": c[kept]}, [PROMPTS[i] for i in kept], resamples=2)
    assert found.left_out == 3 and found.samples == 57
    torch.testing.assert_close(found["distance"][1, 2], expected["distance"][0, 1])


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Correlation 0.6 within prompts; of forty 95% intervals two are expected to miss it."""
    truth, hits = math.sqrt(2 - 2 * 0.6), 0
    for seed in range(40):
        a, b = random(2, seed, 240)
        found = compare_scores({"a": a, "b": 0.6 * a + 0.8 * b}, [str(i // 4) for i in range(240)], resamples=200)
        low, high = found.intervals["distance"][:, 0, 1].tolist()
        hits += low <= truth <= high
    assert 33 <= hits <= 40


def test_rewards_are_scored_and_compared() -> None:
    media = natural(12, 16, 16)
    prompts = [f"p{i // 4}" for i in range(12)]
    found = compare_rewards([Brightness(), Delta(Brightness(), 0.5), Sharpness(), Colour("red")], media, prompts)
    assert found.names == ("Brightness", "Delta(Brightness)", "Sharpness", "Colour")
    assert found["distance"][0, 1] < 1e-5 < found["distance"][0, 2]
    opposite = compare_rewards([Brightness(), Weighted([Brightness()], [-1.0])], media, prompts, resamples=2)
    assert float(opposite["distance"][0, 1]) == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "prompts", "message"),
    [
        ({"a": torch.ones(2)}, ["x", "x"], "two rewards or more; got a"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, ["x", "y"], "no prompt has two samples"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, ["x"], "1 prompts for 2 samples"),
    ],
)
def test_what_cannot_be_compared_raises(scores, prompts, message) -> None:
    with pytest.raises(ValueError, match=message):
        compare_scores(scores, prompts)


def test_the_command_compares_tables_and_scores_images(tmp_path, capsys) -> None:
    table = lines(tmp_path / "scores.jsonl", rows(["A", "B", "C"]))
    assert main(["compare-rewards", str(table), "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [pair["rewards"] for pair in told["pairs"]] == [["A", "B"], ["A", "C"], ["B", "C"]]
    assert Image.open(tmp_path / "out" / "comparison.png").width > 500
    files = []
    for i, image in enumerate(natural(5, 16, 16)):
        files.append(str(tmp_path / f"{i}.png"))
        to_pil(image).save(files[-1])
    rewards = "[Brightness, Sharpness]"
    assert main(["compare-rewards", *files, "--rewards", rewards, "--prompts", "a cat", "--device", "cpu"]) == 0
    assert "5 samples of 1 prompts" in capsys.readouterr().out
    assert main(["compare-rewards", *files, "--rewards", rewards, "--device", "cpu"]) == 2
    assert "5 of 5 samples have no prompt, such as" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").touch()
    assert main(["compare-rewards", str(tmp_path / "empty.jsonl"), "--rewards", rewards]) == 2
    assert "empty.jsonl holds no rows" in capsys.readouterr().err
    assert main(["compare-rewards", "none.png", "--rewards", rewards, "--out", str(tmp_path / "out")]) == 2
    assert "out is not empty" in capsys.readouterr().err  # before anything is read
    dashed = lines(tmp_path / "named.jsonl", rows(["nano-banana", "B"])[:4])  # one prompt has no interval
    assert main(["compare-rewards", str(dashed)]) == 0
    out = capsys.readouterr().out
    assert "nano-banana – B" in out and "(    – …     –)" in out
    assert main(["compare-rewards", str(table), "--scores", "A", "D"]) == 2
    assert "no score 'D' among A, B, C" in capsys.readouterr().err


# Tables


def rows(names: list[str], seed: int = 0) -> list[dict]:
    values = random(len(names), seed, 8)
    return [
        {"image": f"{i}.png", "prompt": f"p{i // 4}", "seed": i} | {n: float(v[i]) for n, v in zip(names, values, strict=True)}
        for i in range(8)
    ]  # fmt: skip


def lines(path: Path, table: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def test_tables_of_all_kinds_hold_the_same_scores(tmp_path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = rows(["A", "B"])
    table[3]["B"] = None
    lines(tmp_path / "scores.jsonl", table)
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "scores.parquet")
    (tmp_path / "run").mkdir()
    samples = [
        {**{k: r[k] for k in ("prompt", "seed", "image")}, "arm": arm, "scores": {"A": r["A"] + shift, "B": r["B"]}}
        for arm, shift in (("plain", 0), ("steered", 1))
        for r in table
    ]
    (tmp_path / "run" / "result.json").write_text(json.dumps({"samples": samples}))
    expected = read_tables([tmp_path / "scores.jsonl"])
    assert list(expected.scores) == ["A", "B"] and expected.scores["B"].isnan().tolist() == [i == 3 for i in range(8)]
    for name in ("scores.parquet", "run", "run/result.json"):
        found = read_tables([tmp_path / name])
        assert found.prompts == expected.prompts
        torch.testing.assert_close(dict(found.scores), dict(expected.scores), equal_nan=True)
    steered = read_tables([tmp_path / "run"], ["A"], arm="steered")
    torch.testing.assert_close(steered.scores["A"], expected.scores["A"] + 1)


def test_tables_are_joined_by_the_samples_they_share(tmp_path) -> None:
    one, other = rows(["A"]), rows(["B"], seed=1)
    found = read_tables([lines(tmp_path / "a.jsonl", one), lines(tmp_path / "b.jsonl", other[::-1][:6])])
    assert len(found.prompts) == 6
    assert found.scores["B"].tolist() == [r["B"] for r in other[2:]]


@pytest.mark.parametrize(
    ("tables", "columns", "message"),
    [
        ([rows(["A"]), rows(["A"])], [], "A stands in more than one table"),
        ([rows(["A", "B"])], ["C"], "no score 'C' among A, B"),
        ([[{"image": "x"}]], [], 'is no table of scores, rows with a "prompt"'),
        ([[{"prompt": "x", "seed": 1}]], [], "holds no scores: it has prompt, seed"),
        ([[{"prompt": "x", "A": 1.0}], [{"prompt": "x", "B": 1.0}]], [], "beside"),
        ([rows(["A"]) + rows(["A"]), rows(["B"])], [], "rows with the same image and prompt"),
        ([[]], [], "holds no rows"),
    ],
)
def test_wrong_tables_raise(tmp_path, tables, columns, message) -> None:
    paths = [lines(tmp_path / f"{i}.jsonl", table) for i, table in enumerate(tables)]
    with pytest.raises(ValueError, match=message):
        read_tables(paths, columns)
