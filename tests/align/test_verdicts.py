"""Judging rewards by preferences: the row formats of the benchmarks, what is scored and how often, and what is made of it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from align import eval_reward
from align.charts import draw_verdicts
from align.cli import main
from align.commands.eval_reward import _table
from align.decoding import Decoder, as_float
from align.media import Media
from align.pairs import Pair, Side, read_pairs
from rewards import Prompt, Reward, Scores

ROOT = Path(__file__).resolve().parents[2]
LEVELS = (0.1, 0.5, 0.9)


class Level(Reward):
    """The mean pixel; remembers what it was shown. Black cannot be judged. Its part "VQ" is the opposite."""

    def __init__(self, modality: str = "image") -> None:
        super().__init__()
        self.modality = modality  # pyright: ignore[reportAttributeAccessIssue]
        self.seen: list[tuple[str, float]] = []

    def measure(self, media, prompts):
        mean = media.flatten(1).mean(1)
        self.seen += [(p.text, round(float(m), 2)) for p, m in zip(prompts, mean, strict=True)]
        total = mean.where(mean > 0, torch.nan)
        return Scores(total, {"VQ": -total})


def png(level: float, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size), round(255 * level)).save(file, "PNG")
    return file.getvalue()


def cell(level: float) -> dict:
    """As the hub stores an image."""
    return {"bytes": png(level), "path": f"{level}.png"}


def write(path: Path, rows: list[dict]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def pair(a: float, b: float, label: str, prompt: str = "p", **how) -> Pair:
    sides = (Side(Prompt(prompt), Media(str(level), fetch=lambda level=level: png(level))) for level in (a, b))
    return Pair(*sides, label, **how)  # pyright: ignore


def brief(pairs: list[Pair]) -> list[tuple]:
    return [(p.a.prompt.text, p.label, p.group) for p in pairs]


def level(media: Media) -> float:
    with Image.open(io.BytesIO(media.data())) as image:
        return round(image.convert("L").getpixel((0, 0)) / 255, 2)  # pyright: ignore


FORMATS = {
    "pick-a-pic": (
        [
            {"caption": "x", "jpg_0": png(0.1), "jpg_1": png(0.9), "label_0": 0.0, "label_1": 1.0},
            {"caption": "y", "jpg_0": png(0.5), "jpg_1": png(0.9), "label_0": 0.5, "label_1": 0.5},
        ],
        [("x", "b", "all"), ("y", "tie", "all")],
    ),
    "hpd": (
        [{"prompt": "x", "image": [], "images": [png(v) for v in LEVELS], "rank": [2, 1, 3]}],
        [("x", "b", "all"), ("x", "a", "all"), ("x", "a", "all")],
    ),
    "imagerewarddb": (
        [
            {"prompt_id": "1", "prompt": "x", "image": cell(v), "rank": r, "classification": c}
            for v, r, c in zip(LEVELS, (2, 2, 1), ("art",) * 3, strict=True)
        ],
        [("x", "tie", "art"), ("x", "b", "art"), ("x", "b", "art")],
    ),
    "imagerewarddb group": (
        [
            {
                "prompt_id": "1",
                "prompt": "x",
                "image": [cell(v) for v in LEVELS],
                "rank": [2, 2, 1],
                "classification": "art",
            }
        ],
        [("x", "tie", "art"), ("x", "b", "art"), ("x", "b", "art")],
    ),
    "imagerewarddb pair": (
        [{"prompt": t, "img_better": cell(0.9), "img_worse": cell(0.1), "classification": "art"} for t in "xy"],
        [("x", "a", "art"), ("y", "b", "art")],
    ),
    "vl-rewardbench": (
        [
            {"id": i, "query": "q", "response": ["r", "s"], "image": cell(0.5), "human_ranking": h}
            for i, h in (("RLAIF-V-3", [0, 1]), ("mathverse_8", [1, 0]), ("wildvision-1", [0, 1]), ("else", [0, 1]))
        ],
        [("q\nr", "a", "hallucination"), ("q\nr", "b", "reasoning"), ("q\nr", "a", "general"), ("q\nr", "a", "other")],
    ),
    "genai-bench": (
        [
            {"prompt": "x", "left_image": cell(0.1), "right_image": cell(0.9), "vote_type": vote, "left_model": "m"}
            for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote", "skipped")
        ],
        [("x", "a", "all"), ("x", "b", "all"), ("x", "tie", "all"), ("x", "tie", "all")],
    ),
    "genai-bench editing": (
        [
            {
                "instruct_prompt": "x",
                "source_image": cell(0.5),
                "left_output_image": cell(0.1),
                "right_output_image": cell(0.9),
                "vote_type": "rightvote",
            }
        ],
        [("x", "b", "all")],
    ),
    "mj-bench": (
        [
            {"caption": "x", "image0": cell(0.1), "image1": cell(0.9), "label": label, "info": info}
            for label, info in ((0, "nsfw"), (1, ""), (2, "bias"))
        ],
        [("x", "a", "nsfw"), ("x", "b", "all")],
    ),
    "videogen-rewardbench": (
        [{"prompt": "x", "path_A": "a.gif", "path_B": "b.gif", "VQ": "A", "MQ": "same", "TA": "B", "Overall": "B"}],
        [("x", "a", "VQ"), ("x", "tie", "MQ"), ("x", "b", "TA"), ("x", "b", "Overall")],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_of_published_benchmarks(tmp_path: Path, name: str) -> None:
    rows, expected = FORMATS[name]
    if name == "hpd":
        rows = [{k: v for k, v in row.items() if k != "image"} for row in rows]
    assert brief(read_pairs(write(tmp_path / "rows.parquet", rows))) == expected


def test_sides_show_what_the_row_holds(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.parquet", FORMATS["imagerewarddb"][0])
    assert [(level(p.a.media), level(p.b.media)) for p in read_pairs(file)] == [(0.1, 0.5), (0.1, 0.9), (0.5, 0.9)]
    file = write(tmp_path / "rows.parquet", FORMATS["imagerewarddb pair"][0])
    assert [(level(p.a.media), level(p.b.media)) for p in read_pairs(file)] == [(0.9, 0.1), (0.1, 0.9)]
    file = write(tmp_path / "rows.parquet", FORMATS["vl-rewardbench"][0])
    one = read_pairs(file)[0]
    assert (one.a.prompt.meta["response"], one.b.prompt.meta["response"]) == ("r", "s")
    assert one.a.media.key == one.b.media.key
    file = write(tmp_path / "rows.parquet", FORMATS["genai-bench"][0])
    assert brief(read_pairs(file, group="left_model"))[0] == ("x", "a", "m")


def test_videos_are_read_and_judged_by_aspect(tmp_path: Path) -> None:
    for name, levels in (("a", (0.2, 0.4)), ("b", (0.6, 0.8, 1.0))):
        frames = [Image.new("L", (8, 8), round(255 * v)) for v in levels]
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "rows.csv").write_text("prompt,path_A,path_B,VQ,MQ,TA,Overall\nx,a.gif,b.gif,A,same,B,B\n")
    pairs = read_pairs(tmp_path / "rows.csv")
    assert Decoder("video", frames=2)(pairs[0].b.media)[:, 0, 0, 0].tolist() == [153, 255]
    reward = Level("video")
    found = eval_reward(reward, pairs, resamples=2)
    assert found.differences.tolist() == pytest.approx([0.5, -0.5, -0.5, -0.5], abs=0.01)
    assert found.values["VQ"]["accuracy"] == found.values["Overall"]["accuracy"] == 1.0
    assert sorted(reward.seen) == [("x", 0.3), ("x", 0.8)]
    (tmp_path / "c.gif").write_bytes(b"no video")
    with pytest.raises((ValueError, ImportError), match=r"kilter\[video\]|not a video"):
        Decoder("video")(Media("c.gif", tmp_path / "c.gif"))


def test_encoded_videos_are_read_by_the_extra(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for value in (0.2, 0.4, 0.6, 0.8):
            picture = Image.new("RGB", (32, 32), (round(255 * value),) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    video = as_float(Decoder("video", frames=3)(Media("a.mp4", tmp_path / "a.mp4")))
    assert video.shape == (3, 3, 32, 32)
    assert video.mean((1, 2, 3)).tolist() == pytest.approx(
        [0.2, 0.6, 0.8], abs=0.03
    )  # of frames 0, 2 (1.5 rounded) and 3


def test_each_picture_is_scored_once_for_each_of_its_prompts() -> None:
    reward = Level()
    pairs = [pair(0.1, 0.5, "b"), pair(0.5, 0.9, "b"), pair(0.9, 0.1, "a"), pair(0.1, 0.5, "b", "q")]
    found = eval_reward(reward, pairs, batch=1, resamples=2)
    assert sorted(reward.seen) == [("p", 0.1), ("p", 0.5), ("p", 0.9), ("q", 0.1), ("q", 0.5)]
    assert found.scored == 5
    assert found.values["micro"]["accuracy"] == 1 and 0 < found.temperature < 1


def test_micro_macro_ties_and_what_could_not_be_judged() -> None:
    pairs = [
        pair(0.1, 0.9, "b", "1", group="easy"),
        pair(0.9, 0.1, "a", "2", group="easy"),
        pair(0.5, 0.52, "tie", "3", group="easy"),
        pair(0.5, 0.9, "a", "4", group="hard"),
        pair(0.0, 0.9, "b", "5", group="hard"),
        pair(0.5, 0.5, "b", "6", group="hard"),
    ]
    found = eval_reward(Level(), pairs, resamples=200)
    micro = found.values["micro"]
    assert found.unjudged == 1 and (micro["pairs"], micro["ties"]) == (5, 1)
    assert micro["accuracy"] == pytest.approx(2.5 / 4) and micro["strict"] == pytest.approx(2 / 4)
    assert micro["with_ties"] == pytest.approx(2 / 5) and micro["calibrated"] == pytest.approx(3 / 5)
    assert found.best_threshold == pytest.approx(0.02, abs=0.01)
    assert found.values["macro"]["accuracy"] == pytest.approx((1 + 0.25) / 2)
    low, high = found.intervals["micro"]["accuracy"]
    assert low < micro["accuracy"] < high
    tolerant = eval_reward(Level(), pairs, threshold=0.1, resamples=2)
    assert tolerant.values["micro"]["with_ties"] == pytest.approx(3 / 5)
    assert json.loads(json.dumps(found.as_dict()))["groups"]["easy"]["accuracy"] == 1


def test_weights_count() -> None:
    pairs = [pair(0.1, 0.9, "b", "1", weight=3.0), pair(0.1, 0.9, "a", "2")]
    assert eval_reward(Level(), pairs, resamples=2).values["micro"]["accuracy"] == pytest.approx(0.75)


def test_calibration_counts_weights() -> None:
    """A pair of weight 3 is three pairs of weight 1."""
    sides = [(0.1, 0.9, "b"), (0.1, 0.2, "a"), (0.3, 0.9, "b"), (0.5, 0.9, "a")] * 8
    heavy = [pair(*side, str(i), weight=1.0 + 2 * (i % 3 == 0)) for i, side in enumerate(sides)]
    repeated = [pair(*side, str(i)) for i, side in enumerate(sides) for _ in range(3 if i % 3 == 0 else 1)]
    one, other = (eval_reward(Level(), pairs, resamples=2) for pairs in (heavy, repeated))
    assert one.temperature == pytest.approx(other.temperature)
    assert one.nll == pytest.approx(other.nll)
    assert one.ece == pytest.approx(other.ece, abs=0.05)  # but for pairs on the edge of a bin


def test_a_wrong_pair_costs_little_more_than_the_right_ones_of_other_prompts_warrant(tmp_path: Path) -> None:
    """Nothing is wrong in one half, so that its highest likelihood is at temperature 0, which allows no error in the other."""
    pairs = [pair(0.1, 0.9, "a" if i == 0 else "b", str(i)) for i in range(40)]
    found = eval_reward(Level(), pairs, resamples=2)
    assert 0.1 < found.nll < 0.3 and found.temperature > 0.1
    assert found.as_dict()["nll"] == found.nll
    draw_verdicts(tmp_path / "verdicts.png", found)
    assert found.nll == pytest.approx(float(_table(found).split(" nats a pair")[0].split()[-1]), abs=1e-4)


class First(Level):
    """Compares the two samples of a prompt, with a liking for the first by `bias`."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias, self.compares = bias, True

    def measure(self, media, prompts):
        mean = media.flatten(1).mean(1)
        return mean - mean.mean() + self.bias * torch.tensor([1.0, 0.0])


@pytest.mark.parametrize(("bias", "swap"), [(0.0, 1.0), (0.5, 0.5), (2.0, 0.0)])
def test_a_reward_that_compares_sees_both_orders(bias: float, swap: float) -> None:
    found = eval_reward(First(bias), [pair(0.1, 0.9, "b", "1"), pair(0.9, 0.6, "a", "2")], resamples=2)
    assert found.swap == swap
    assert found.differences.tolist() == pytest.approx([-0.8, 0.3], abs=0.01)  # a bias for a place cancels
    assert found.values["micro"]["accuracy"] == 1


def test_the_embedded_rewards_on_the_embedded_preferences(tmp_path: Path, capsys) -> None:
    """What people of the world of shapes preferred among held-out samples; the exact detector never contradicts them."""
    file = str(ROOT / "assets" / "preferences" / "heldout.parquet")
    assert (
        main(["eval-reward", file, "--out", str(tmp_path / "out"), "--json", "--device", "cpu", "--resamples", "50"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out" / "verdicts.json").read_text())
    assert told["groups"]["micro"]["accuracy"] == pytest.approx(0.854, abs=0.01)
    assert told["groups"]["micro"]["pairs"] == 383 and told["groups"]["micro"]["ties"] == 33
    assert told["temperature"] == pytest.approx(0.50, abs=0.05) and told["ece"] < 0.08
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 383 and math.isfinite(rows[0]["difference"])
    assert Image.open(tmp_path / "out" / "verdicts.png").width > 1000


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no pairs"),
        ([pair(0.0, 0.5, "a")], "could judge none of 1 pairs"),
    ],
)
def test_what_cannot_be_judged_raises(pairs, message) -> None:
    with pytest.raises(ValueError, match=message):
        eval_reward(Level(), pairs)


def test_the_table_leaves_names_as_they_are(tmp_path: Path, capsys) -> None:
    """Only numbers that are not defined become dashes."""
    row = {"caption": "x", "image0": cell(0.1), "image1": cell(0.9)}
    rows = [row | {"label": "1", "info": "nano-banana"}, row | {"label": "tie", "info": "finance"}]
    assert main(["eval-reward", str(write(tmp_path / "rows.parquet", rows)), "--reward", "Brightness"]) == 0
    shown = capsys.readouterr().out
    assert "nano-banana" in shown and "finance" in shown and "nan " not in shown and "–" in shown


def test_wrong_sources_raise(tmp_path: Path, capsys) -> None:
    file = write(tmp_path / "rows.parquet", [{"text": "x", "score": 1.0}])
    assert main(["eval-reward", str(file)]) == 2
    assert "no column for prompt" in capsys.readouterr().err
    file = write(tmp_path / "rows.parquet", FORMATS["mj-bench"][0])
    assert main(["eval-reward", str(file), "--group", "model"]) == 2
    assert "no column 'model' to group by" in capsys.readouterr().err
    assert main(["eval-reward", str(tmp_path / "none.parquet")]) == 2
    assert "no parquet file" in capsys.readouterr().err
