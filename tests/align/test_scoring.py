"""Scoring a set: every row once, in order, with the score it has alone, whatever the sizes, batches and threads."""

from __future__ import annotations

import json
import math
import threading
import time

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import align
import rewards
from align.ahead import ahead, in_threads
from align.cli import main
from rewards import Brightness, Framewise, Sharpness, Standardised, Weighted
from tests.align import pictures
from tests.align.pictures import Best, Diary, Wordy

COUNT = 23


def scores(out) -> list[dict]:
    return pyarrow.parquet.read_table(out / "scores").to_pylist()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return pictures.folder(tmp_path_factory.mktemp("pictures"), COUNT)


@pytest.mark.parametrize(("batch", "threads", "part"), [(1, 1, 1), (4, 3, 5), (32, 2, None), (3, 1, 1000)])
def test_every_row_once_in_order_with_its_own_score(folder, tmp_path, monkeypatch, batch, threads, part):
    diary = tmp_path / "diary"
    monkeypatch.setenv("DIARY", str(diary))
    result = align.score_set(Diary(), folder, tmp_path / "out", batch=batch, threads=threads, part=part)
    rows = scores(tmp_path / "out")
    assert [r["row"] for r in rows] == list(range(COUNT))
    assert [r["id"] for r in rows] == [f"{i:04d}.png" for i in range(0, COUNT, 2)] + [
        f"deep/{i:04d}.png" for i in range(1, COUNT, 2)
    ]
    for row in rows:
        assert row["Diary"] == int(row["id"][-8:-4])
        assert row["prompt"] == f"picture {row['Diary']:.0f}"
        assert row["error"] is None
    assert sorted(map(int, diary.read_text().split())) == list(range(COUNT))
    assert (result.rows, result.scored, result.errors, dict(result.failed)) == (COUNT, COUNT, 0, {})
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["done"], manifest["rows"], manifest["complete"]) == ([[0, COUNT]], COUNT, True)
    assert manifest["rewards"] == {"Diary": {"class_path": "tests.align.pictures.Diary", "init_args": {}}}
    assert manifest["rows_per_second"] > 0


def test_the_same_as_score_and_several_rewards_at_once(folder, tmp_path):
    files = [str(p) for p in sorted(folder.rglob("*.png"))]
    panel = [Brightness(), Sharpness(), Weighted([Brightness(), Sharpness()], [1.0, 0.5])]
    align.score_set(panel, files, tmp_path / "out", batch=4)
    rows = scores(tmp_path / "out")
    for reward in panel:
        told = align.score(reward, files)
        assert [r[reward.name] for r in rows] == pytest.approx(told.total.tolist())
    for row in rows:
        parts = {p["name"]: p["value"] for p in row["parts"]}
        assert parts["Weighted(Brightness, Sharpness).Sharpness"] == row["Sharpness"]
    listed = list(align.score_rows(panel, files, batch=4))
    assert [r["scores"]["Sharpness"] for r in listed] == pytest.approx([r["Sharpness"] for r in rows])


def test_what_cannot_be_read_or_judged_has_no_score_and_a_reason(tmp_path):
    pictures.folder(tmp_path / "in", 8)
    (tmp_path / "in" / "0002.png").write_bytes(b"no image")
    (tmp_path / "in" / "0004.txt").write_text("a bad one")
    (tmp_path / "in" / "0006.txt").write_text("an odd one")
    (tmp_path / "in" / "deep" / "0001.txt").unlink()
    Image.new("I;16", (8, 8)).save(tmp_path / "in" / "deep" / "0003.png")
    result = align.score_set([Wordy(), Brightness()], tmp_path / "in", tmp_path / "out")
    rows = {r["id"]: r for r in scores(tmp_path / "out")}
    judged = {name: r["Wordy"] for name, r in rows.items() if not math.isnan(r["Wordy"])}
    assert judged == pytest.approx({"0000.png": 0, "deep/0005.png": 5, "deep/0007.png": 7}, abs=1e-4)
    assert "not an image that can be read" in rows["0002.png"]["error"]
    assert "convert it to 8 bits" in rows["deep/0003.png"]["error"]
    assert rows["0004.png"]["error"] == "Wordy: a bad prompt"
    assert rows["0006.png"]["error"] == "Wordy: it could not judge this"
    assert rows["deep/0001.png"]["error"] == "Wordy: it needs a prompt, and there is none"
    assert rows["0004.png"]["Brightness"] == pytest.approx(4 / 255)
    assert [p["value"] for p in rows["deep/0005.png"]["parts"]] == [len("picture 5")]
    assert (result.rows, result.errors) == (8, 5)
    assert result.first_error == min((r["row"], r["error"]) for r in rows.values() if r["error"])[1]
    assert result.failed == {"Wordy": 5, "Brightness": 2}


def test_rewards_that_prepare_images_alike_do_it_once(folder, tmp_path, monkeypatch):
    class Prepared(Brightness):
        def measure(self, media, prompts):
            return rewards.Preprocess(size=4)(media).mean((1, 2, 3))

    calls, resample = [], rewards.preprocess.resample
    monkeypatch.setattr(rewards.preprocess, "resample", lambda *given: calls.append(1) or resample(*given))
    align.score_set([Prepared(), Prepared()], folder, tmp_path / "out", batch=COUNT, size=(8, 8))
    assert len(calls) == 1
    assert all(r["Prepared"] == r["Prepared-2"] for r in scores(tmp_path / "out"))


@pytest.mark.parametrize(("on_error", "stops"), [("nan", ""), ("unread", "0002.png"), ("stop", "0000.png")])
def test_stopping_at_errors(tmp_path, on_error, stops):
    pictures.folder(tmp_path / "in", 3)
    (tmp_path / "in" / "0000.txt").write_text("odd")
    (tmp_path / "in" / "0002.png").write_bytes(b"")
    how = {"on_error": on_error, "batch": 1, "part": 1}
    if stops:
        with pytest.raises(ValueError, match=f"row ., {stops}: "):
            align.score_set(Wordy(), tmp_path / "in", tmp_path / "out", **how)
    else:
        assert align.score_set(Wordy(), tmp_path / "in", tmp_path / "out", **how).errors == 2


def test_pictures_are_upright_on_white_and_fitted_on_request(tmp_path):
    (tmp_path / "in").mkdir()
    tall = Image.new("RGB", (8, 4), "black")
    exif = tall.getexif()
    exif[0x0112] = 6
    tall.save(tmp_path / "in" / "a.jpg", exif=exif)
    Image.new("RGBA", (4, 8), (0, 0, 0, 0)).save(tmp_path / "in" / "b.png")
    seen = []

    class Seen(Brightness):
        def measure(self, media, prompts):
            seen.append(tuple(media.shape))
            return super().measure(media, prompts)

    align.score_set(Seen(), tmp_path / "in", tmp_path / "one")
    assert seen == [(2, 3, 8, 4)]
    assert [r["Seen"] for r in scores(tmp_path / "one")] == pytest.approx([0, 1], abs=0.02)
    (tmp_path / "in" / "c.png").write_bytes(pictures.encoded(255, (30, 40)))
    align.score_set(Seen(), tmp_path / "in", tmp_path / "two", size=(16, 16))
    assert seen[1:] == [(3, 3, 16, 16)]


def test_rewards_that_compare_see_all_rows_of_a_prompt_and_no_chunk_cuts_one(tmp_path):
    """Groups of 1, 2, 3, … rows, scored two or more groups at a time."""
    pictures.folder(tmp_path, 21, prompts=False)
    names = [f"{'deep/' if i % 2 else ''}{i:04d}.png" for i in range(21)]
    groups = [g for g in range(6) for _ in range(g + 1)]
    rows = [{"image": n, "prompt": f"group {g}"} for n, g in zip(names, groups, strict=True)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for part in (1, 4, 100):
        out = tmp_path / f"out{part}"
        align.score_set([Best(), Brightness()], tmp_path / "list.jsonl", out, batch=7, part=part, size=(8, 8))
        found = scores(out)
        assert [r["row"] for r in found] == list(range(21))
        assert [i for i, r in enumerate(found) if r["Best"] == 1] == [0, 2, 5, 9, 14, 20]
        assert all(r["Best"] in (0, 1) for r in found)
    with pytest.raises(ValueError, match=r"more than batch = 5 rows have the prompt group 5.*: raise batch"):
        align.score_set(Best(), tmp_path / "list.jsonl", tmp_path / "few", batch=5, size=(8, 8))
    with (tmp_path / "list.jsonl").open("a") as file:
        file.write(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"rows of 'group 0' are not together .*list.jsonl#22.*sort the source"):
        align.score_set(Best(), tmp_path / "list.jsonl", tmp_path / "again", batch=7, size=(8, 8))


def test_groups_with_a_broken_row_or_two_sizes(tmp_path):
    pictures.folder(tmp_path, 7, prompts=False)
    (tmp_path / "0004.png").write_bytes(b"")
    names = ["0000.png", "deep/0001.png", "0004.png", "deep/0003.png", "0002.png", "deep/0005.png"]
    rows = [{"image": n, "prompt": "abcd"[i // 2 if i > 3 else 0]} for i, n in enumerate(names)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    align.score_set(Best(), tmp_path / "list.jsonl", tmp_path / "out")
    found = scores(tmp_path / "out")
    assert [r["Best"] for r in found[:2]] + [found[3]["Best"]] == [0, 0, 1]
    assert "is empty" in found[2]["error"]
    for row in found[4:]:
        assert math.isnan(row["Best"])
        assert "have different sizes 8×8 and 8×12: give one size" in row["error"]


def test_arguments_that_cannot_work_are_refused_before_anything_is_made(folder, tmp_path):
    cases = [
        ({"batch": 0}, "must be ≥ 1; got 0"),
        ({"threads": 0}, "must be ≥ 1; got 0"),
        ({"on_error": "ignore"}, "on_error must be one of nan, unread, stop"),
        (
            {"rewards": [Brightness(), Framewise(Brightness())]},
            "look at the same media; got .*wrap those of images in Framewise",
        ),
        ({"prompts": ["a", "b"]}, "got 2 prompts"),
        ({"columns": {"picture": "x"}}, "columns names one or more"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            align.score_set(**{"rewards": Brightness(), "sources": folder, "out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="holds no rows"):
        align.score_set(Brightness(), tmp_path / "empty.jsonl", tmp_path / "none")


def test_only_what_is_ahead_is_in_memory(tmp_path, monkeypatch):
    """A slow reward, quick threads: what is decoded and not yet scored stays a few batches."""
    pictures.folder(tmp_path / "in", 100, prompts=False)
    alive, most = set(), 0
    lock = threading.Lock()
    decode = align.scoring.decode

    def counted(chunk, entry, size):
        nonlocal most
        item = decode(chunk, entry, size)
        with lock:
            alive.add(int(entry.id[-8:-4]))
            most = max(most, len(alive))
        return item

    class Slow(Brightness):
        def measure(self, media, prompts):
            time.sleep(0.01)
            alive.difference_update((255 * media.mean((1, 2, 3))).round().int().tolist())
            return super().measure(media, prompts)

    monkeypatch.setattr(align.scoring, "decode", counted)
    assert len(list(align.score_rows(Slow(), tmp_path / "in", batch=2, threads=2, size=(8, 8)))) == 100
    assert not alive
    assert 4 < most <= (2 + 2) + 2 + 2 * (2 + 2)  # begun, in buckets, in batches that wait or are at hand


def test_threads_end_with_their_consumer():
    before = threading.active_count()
    closed = []

    def endless():
        try:
            n = 0
            while True:
                yield (n := n + 1)
        finally:
            closed.append(True)

    for n in ahead(in_threads(lambda n: n, endless(), 3, 5)):
        if n == 10:
            break
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    assert closed

    def failing():
        yield 1
        raise RuntimeError("in the thread")

    with pytest.raises(RuntimeError, match="in the thread"):
        list(ahead(failing()))


def test_score_takes_files_pictures_and_tensors(tmp_path):
    Image.new("RGBA", (4, 6), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    shown = [str(tmp_path / "clear.png"), Image.new("L", (3, 3), 51), torch.zeros(3, 6, 4)]
    assert align.score(Brightness(), shown).total.tolist() == pytest.approx([1, 0.2, 0])
    with pytest.raises(FileNotFoundError, match="no image file"):
        align.score(Brightness(), [tmp_path / "gone.png"])


def kilter(capsys, *argv):
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_score_gives_a_reward_that_compares_all_samples_of_a_prompt_at_once():
    """However they lie, and never some of them by themselves."""
    reward, levels = Standardised(Brightness(), "prompt"), torch.linspace(0.1, 0.9, 6)
    media = [torch.full((3, 4, 4), float(level)) for level in levels]
    prompts = ["a", "b"] * 3
    torch.testing.assert_close(align.score(reward, media, prompts, batch=3).total, reward(torch.stack(media), prompts))
    with pytest.raises(ValueError, match="compares the 3 samples of a prompt: raise batch, now 2"):
        align.score(reward, media, prompts, batch=2)
    with pytest.raises(ValueError, match="different sizes"):
        align.score(reward, [torch.zeros(3, 4, 5), *media[1:]], prompts)


def test_the_command_writes_files_and_says_how_quickly(capsys, tmp_path):
    pictures.table(tmp_path / "in", COUNT)
    options = ["--reward", "Brightness", "--panel+=Sharpness", "--device", "cpu", "--batch", "4", "--size", "[8, 8]"]
    options += ["--columns", '{"prompt": "caption"}', "--out", tmp_path / "out"]
    code, out, err = kilter(capsys, "score", tmp_path / "in", *options, "--json")
    assert code == 0
    assert json.loads(out)["rows"] == json.loads(out)["scored"] == COUNT
    assert f"scored {COUNT} of {COUNT} rows at " in err
    assert "rows/s; 0 with errors; wrote" in err
    assert [r["prompt"] for r in scores(tmp_path / "out")] == [f"picture {i}" for i in range(COUNT)]
    code, out, err = kilter(capsys, "score", tmp_path / "in", *options)
    assert (code, out) == (0, "")
    assert f"scored 0 of {COUNT} rows" in err
    code, out, err = kilter(capsys, "score", tmp_path / "in", *options, "--batch", "5", "--size", "[4, 4]")
    assert (code, out) == (2, "")
    assert "settings.size: [8, 8] → [4, 4]" in err


def test_a_source_without_rows_is_no_success(capsys, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for out in ([], ["--out", str(tmp_path / "out")]):
        assert main(["score", str(tmp_path / "empty.jsonl"), "--reward", "Brightness", *out]) == 2
        assert "empty.jsonl holds no rows" in capsys.readouterr().err


def test_the_command_prints_rows_of_any_source(capsys, tmp_path, monkeypatch):
    lines = pictures.lines(tmp_path, 3)
    wordy = ["--reward", "tests.align.pictures.Wordy", "--device", "cpu"]
    code, out, _ = kilter(capsys, "score", lines, *wordy, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [list(r) for r in rows] == [["image", "prompt", "Wordy", "Wordy.length"]] * 3
    assert [round(r["Wordy"]) for r in rows] == [0, 1, 2]
    code, out, _ = kilter(capsys, "score", lines, *wordy, "--json", "--prompts", "odd")
    assert [json.loads(line)["Wordy"] for line in out.splitlines()] == [None] * 3
    code, out, err = kilter(capsys, "score", tmp_path / "0000.png", *wordy)
    assert (code, out) == (2, "")
    assert "Wordy: it needs a prompt, and there is none" in err
    code, out, _ = kilter(capsys, "score", tmp_path / "0000.png", *wordy, "--on_error", "nan")
    assert (code, "it needs a prompt" in out) == (0, True)
    code, _, err = kilter(capsys, "score", tmp_path / "0000.png", *wordy, "--out", tmp_path / "out")
    assert code == 1  # nothing was judged
    assert "1 with errors, 1 without Wordy" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = kilter(capsys, "score", lines, *wordy)
    assert (code, "pass --out" in err) == (2, True)
