"""A run that is killed goes on: no row is written twice, none is left out, and nothing that was written is scored again."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter

import pyarrow.parquet
import pytest
import torchvision.transforms.functional  # noqa: F401 — once, not in every process

import align
import align.parts
import rewards.files
from rewards import Brightness, Sharpness
from tests.align import pictures
from tests.align.pictures import Diary

COUNT, PART = 60, 6


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return pictures.folder(tmp_path_factory.mktemp("pictures"), COUNT)


def check(out, count=COUNT):
    rows = pyarrow.parquet.read_table(out / "scores").to_pylist()
    assert [r["row"] for r in rows] == list(range(count))
    assert [r["Diary"] for r in rows] == [int(r["prompt"].split()[1]) for r in rows]
    assert json.loads((out / "manifest.json").read_text())["complete"]
    assert not [p for p in out.rglob(".*")]


def run(source, out, diary, pause=0.0):
    os.environ |= {"DIARY": str(diary), "PAUSE": str(pause)}
    return align.score_set(Diary(), source, out, batch=3, part=PART, threads=1)


@pytest.mark.parametrize("layout", ["folder", "lines", "table", "shard"])
def test_kill_9_at_several_moments(tmp_path, layout):
    """Real processes, real kills: at the start, between parts, within one."""
    source = getattr(pictures, layout)(tmp_path / ("in.tar" if layout == "shard" else "in"), COUNT)
    out, diary, kills = tmp_path / "out", tmp_path / "diary", 0
    diary.touch()
    for scored in (0, 1, 3, 6, 7, 9, 12, 13):  # rows since it was started at which it is killed
        before = len(diary.read_text().split())
        process = multiprocessing.get_context("fork").Process(target=run, args=(source, out, diary, 0.005))
        process.start()
        while process.is_alive() and len(diary.read_text().split()) < before + scored:
            time.sleep(0.001)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        for part in (out / "scores").glob("part-*"):
            assert pyarrow.parquet.read_metadata(part).num_rows == PART
    assert kills >= 5
    done = {level for p in (out / "scores").glob("part-*") for level in levels(p)}
    again = tmp_path / "again"
    result = run(source, out, again)
    assert not done & set(map(int, again.read_text().split()))
    assert result.scored == COUNT - len(done)
    check(out)


def levels(part):
    return [int(v) for v in pyarrow.parquet.read_table(part)["Diary"].to_pylist()]


def test_cut_off_at_every_step_of_writing(tmp_path, monkeypatch):
    """Whatever call to the file system is the last one, the next run completes."""

    class Cut(BaseException):
        pass

    folder, step = pictures.folder(tmp_path / "in", 3 * PART), 0
    while True:
        step += 1
        out, left = tmp_path / str(step), [step]
        with monkeypatch.context() as patch:
            for module, name in (
                (os, "fsync"),
                (rewards.files, "flush"),
                (align.parts.Path, "replace"),
                (align.parts.Path, "mkdir"),
            ):
                call = getattr(module, name)

                def counted(*arguments, call=call, name=name, left=left, **how):
                    left[0] -= 1
                    if left[0] == 0:
                        raise Cut
                    return None if name == "fsync" else call(*arguments, **how)

                patch.setattr(module, name, counted)
            try:
                run(folder, out, tmp_path / "diary")
            except Cut:
                pass
            else:
                break
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            run(folder, out, tmp_path / "diary")
        check(out, 3 * PART)
        shutil.rmtree(out)
    assert step > 3 * 3


def test_a_finished_run_does_nothing_again(folder, tmp_path):
    first = run(folder, tmp_path / "out", tmp_path / "diary")
    names = Counter(p.stat().st_mtime_ns for p in (tmp_path / "out" / "scores").iterdir())
    second = run(folder, tmp_path / "out", tmp_path / "diary")
    assert (second.rows, second.scored, second.rate) == (COUNT, 0, 0)
    assert len((tmp_path / "diary").read_text().split()) == first.scored == COUNT
    assert names == Counter(p.stat().st_mtime_ns for p in (tmp_path / "out" / "scores").iterdir())
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["rows_per_second"] > 0


def test_a_lost_part_is_scored_again_and_nothing_else(folder, tmp_path):
    run(folder, tmp_path / "out", tmp_path / "diary")
    (tmp_path / "out" / "scores" / "part-00004.parquet").unlink()
    assert run(folder, tmp_path / "out", tmp_path / "again").scored == PART
    check(tmp_path / "out")


def test_another_reward_source_or_setting_is_refused(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "in")
    out = tmp_path / "out"
    align.score_set(Brightness(), source, out)
    before = (out / "manifest.json").read_bytes()
    other = pictures.folder(tmp_path / "other", COUNT - 1)
    for arguments, message in (
        ({"rewards": Sharpness()}, "rewards.Sharpness"),
        ({"rewards": [Brightness(), Sharpness()]}, "rewards.Sharpness"),
        ({"sources": other}, r"source.digest: '\w+' → '\w+'"),
        ({"size": (4, 4)}, r"settings.size: None → \[4, 4\]"),
        ({"prompts": "a cat"}, "settings.prompt"),
    ):
        with pytest.raises(
            ValueError, match=rf"(?s)holds other scores, recorded → asked:.*{message}.*choose another out"
        ):
            align.score_set(**{"rewards": Brightness(), "sources": source, "out": out, **arguments})
    assert (out / "manifest.json").read_bytes() == before
    align.score_set(Brightness(), source, out, batch=5, part=7, threads=1, on_error="stop")  # how, not what
    (out / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
        align.score_set(Brightness(), source, out)
    with pytest.raises(FileExistsError, match="is not empty: choose another out"):
        align.score_set(Brightness(), source, other)


def test_a_source_that_changes_meanwhile_is_not_gone_on_with(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "in")

    class Adding(Brightness):
        def measure(self, media, prompts):
            (source / "zzz.png").write_bytes(pictures.encoded(1))
            return super().measure(media, prompts)

    align.score_set(Adding(), source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds other scores, recorded → asked:\n  source.digest"):
        align.score_set(Adding(), source, tmp_path / "out")


def test_other_versions_are_told(folder, tmp_path, caplog):
    align.score_set(Brightness(), folder, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    align.score_set(Brightness(), folder, tmp_path / "out")
    assert "begun with other versions: torch: '1.0'" in caplog.text
