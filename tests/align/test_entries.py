"""Every source yields the same rows, whatever its layout; what is broken is a row that says so."""

from __future__ import annotations

import json
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from align.entries import entries_of
from align.media import load_rgb
from rewards import Prompt
from tests.align import pictures

COUNT = 20


def everything(start, stop):
    return True


def read(entries, wanted=everything):
    reader, found = entries.read(0, wanted), []
    while True:
        try:
            found.append(next(reader))
        except StopIteration as end:
            return found, end.value


def levels(found):
    return [load_rgb(e.media).getpixel((0, 0))[0] for e in found]


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    at = tmp_path_factory.mktemp("sources")
    (at / "tars").mkdir()
    pictures.shard(at / "tars" / "0.tar", 12)
    pictures.shard(at / "tars" / "1.tar", 8, first=12)
    return {
        "folder": pictures.folder(at / "folder", COUNT),
        "lines": pictures.lines(at / "lines", COUNT),
        "parquet": pictures.table(at / "table", COUNT),
        "tars": at / "tars",
    }


@pytest.fixture(params=["folder", "lines", "parquet", "tars"])
def source(request, sources):
    return sources[request.param]


def test_every_layout_holds_the_same_rows(source):
    found, total = read(entries_of(source))
    assert total == COUNT
    assert [e.row for e in found] == list(range(COUNT))
    assert len({e.id for e in found}) == COUNT
    assert sorted(levels(found)) == list(range(COUNT))
    assert [e.asked().text for e in found] == [f"picture {level}" for level in levels(found)]


def test_passing_over_rows_changes_no_numbers(source):
    whole = {e.row: e for e in read(entries_of(source))[0]}
    some, total = read(entries_of(source), lambda start, stop: start <= 9 < stop or start <= 17 < stop)
    assert total == COUNT
    assert {9, 17} <= {e.row for e in some}
    for entry in some:
        assert (entry.id, entry.name) == (whole[entry.row].id, whole[entry.row].name)
    assert levels(some) == levels([whole[e.row] for e in some])


def test_the_fingerprint_is_of_what_is_there_not_of_where(sources, tmp_path):
    for name, source in sources.items():
        moved = tmp_path / name
        shutil.copytree(source if source.is_dir() else source.parent, moved)
        place = moved if source.is_dir() else moved / source.name
        assert entries_of(place).fingerprint() == entries_of(source).fingerprint()
    (tmp_path / "folder" / "0000.txt").write_text("something else")
    assert entries_of(tmp_path / "folder").fingerprint() != entries_of(sources["folder"]).fingerprint()
    (tmp_path / "lines" / "list.jsonl").open("a").write('{"image": "0000.png"}\n')
    assert entries_of(tmp_path / "lines" / "list.jsonl").fingerprint() != entries_of(sources["lines"]).fingerprint()
    pictures.shard(tmp_path / "tars" / "1.tar", 8, first=13)
    assert entries_of(tmp_path / "tars").fingerprint() != entries_of(sources["tars"]).fingerprint()
    pictures.table(tmp_path / "parquet", COUNT, group=8)
    assert entries_of(tmp_path / "parquet").fingerprint() != entries_of(sources["parquet"]).fingerprint()


def test_ids_are_relative_to_a_single_source_and_told_apart_between_several(sources):
    assert read(entries_of(sources["folder"]))[0][-1].id == "deep/0019.png"
    assert read(entries_of(sources["parquet"]))[0][3].id == "train.parquet#3"
    assert read(entries_of(sources["lines"]))[0][3].id == "list.jsonl#4"  # lines count from 1
    assert read(entries_of(sources["tars"]))[0][12].id == "1.tar#0012"
    both, total = read(entries_of([sources["folder"], sources["parquet"], sources["tars"] / "0.tar"]))
    assert total == 2 * COUNT + 12
    assert len({e.id for e in both}) == [e.row for e in both][-1] + 1 == total
    assert both[-1].id == f"{sources['tars']}/0.tar#0011"


def test_one_prompt_for_all_or_one_a_file(sources):
    found, _ = read(entries_of(sources["folder"], [Prompt("a cat")]))
    assert {e.asked().text for e in found} == {"a cat"}
    files = [str(sources["folder"] / f"{i:04d}.png") for i in (0, 2)]
    assert [e.asked().text for e in read(entries_of(files, [Prompt("x"), Prompt("y")]))[0]] == ["x", "y"]
    assert [e.asked().text for e in read(entries_of(files))[0]] == [
        "picture 0",
        "picture 2",
    ]  # from the files beside them
    for given, count in ((files, 3), (sources["folder"], 2), ([*files, sources["parquet"]], 3)):
        with pytest.raises(ValueError, match="pass one for each image file, or one for all"):
            entries_of(given, [Prompt("x")] * count)


def test_what_a_row_holds_beside_the_prompt_is_its_meta(sources):
    for name in ("lines", "parquet", "tars"):
        assert read(entries_of(sources[name]))[0][3].asked().meta["n"] == 3


def test_files_beside_an_image(tmp_path):
    pictures.folder(tmp_path, 7, prompts=False)
    (tmp_path / "0000.json").write_text('{"caption": "a cat", "negative": "dog", "seed": 3}')
    (tmp_path / "0002.json").write_text('{"seed": 3}')
    (tmp_path / "0002.txt").write_text("﻿ a bird\n")
    (tmp_path / "0004.json").write_text("[1]")
    (tmp_path / "0006.txt").write_text("\n")
    (tmp_path / ".hidden").mkdir()
    shutil.copy(tmp_path / "0000.png", tmp_path / ".hidden" / "0.png")
    cat, bird, broken, blank, *bare = read(entries_of(tmp_path))[0]
    assert cat.asked() == Prompt("a cat", "dog", {"seed": 3})
    assert bird.asked() == Prompt("a bird", meta={"seed": 3})
    assert [e.asked() for e in (blank, *bare)] == [None] * 4
    with pytest.raises(ValueError, match="must hold an object"):
        broken.asked()


def test_a_list_in_a_folder_says_what_to_take(tmp_path):
    pictures.folder(tmp_path, 4)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "deep/0003.png", "text": "three"}\n')
    (only,), total = read(entries_of(tmp_path))
    assert (total, only.name, only.asked()) == (1, "deep/0003.png", Prompt("three"))


def test_lines_that_cannot_be_used_are_rows_with_a_reason(tmp_path):
    pictures.folder(tmp_path, 3)
    rows = ['{"image": "0000.png"}', "no json", '{"prompt": "x"}', '{"image": 3}', '{"image": "0000.png", "prompt": 3}']
    rows += ['{"prompt": "both", "images": ["0000.png", "0002.png"]}', "", '{"image": "gone.png"}', '{"image": "00']
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    found, total = read(entries_of(tmp_path / "list.jsonl"))
    assert total == len(found) == 9
    assert [bool(e.problem) for e in found] == [False, True, True, True, False, False, False, False, True]
    assert "not JSON" in found[1].problem
    assert "no image: a row needs one of image, file_name, images; it has prompt" in found[2].problem
    assert "its writing was cut short" in found[8].problem
    assert [e.id for e in found[5:7]] == ["list.jsonl#6.0", "list.jsonl#6.1"]
    with pytest.raises(ValueError, match="prompt must be text; got 3"):
        found[4].asked()
    with pytest.raises(ValueError, match=r"no file .*gone.png"):
        load_rgb(found[7].media)


def test_columns_with_other_names(tmp_path, sources):
    pair = {"left": [pictures.encoded(i) for i in range(3)], "right": [pictures.encoded(10 + i) for i in range(3)]}
    pyarrow.parquet.write_table(pyarrow.table({**pair, "words": list("abc")}), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match="has 2 columns of images among left, right, words: name one"):
        entries_of(tmp_path)
    with pytest.raises(ValueError, match="no column up; it has left, right, words"):
        entries_of(tmp_path, columns={"image": "up"})
    with pytest.raises(ValueError, match="one or more for image, and one for prompt"):
        entries_of(tmp_path, columns={"images": "left"})
    found, total = read(entries_of(tmp_path, columns={"image": ["left", "right"], "prompt": "words"}))
    assert total == 6
    assert levels(found) == [0, 10, 1, 11, 2, 12]
    assert [e.asked().text for e in found] == list("aabbcc")
    assert found[1].id == "pairs.parquet#0.right"
    (sources["lines"].parent / "other.jsonl").write_text('{"file": "0004.png", "words": "w", "prompt": "p"}\n')
    (entry,), _ = read(
        entries_of(sources["lines"].parent / "other.jsonl", columns={"image": "file", "prompt": "words"})
    )
    assert (levels([entry]), entry.asked().text) == ([4], "w")


def test_paths_and_empty_cells_in_tables(tmp_path):
    pictures.folder(tmp_path, 1)
    columns = {"image": ["0000.png", None, "gone.png"], "prompt": ["a", "b", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    there, empty, gone = read(entries_of(tmp_path / "rows.parquet"))[0]
    assert (levels([there]), there.name) == ([0], "0000.png")
    assert "holds no image in image" in empty.problem
    assert gone.asked() is None
    with pytest.raises(ValueError, match=r"gone.png"):
        load_rgb(gone.media)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    nested = {"images": [[pictures.encoded(1)], [pictures.encoded(2)] * 2]}
    pyarrow.parquet.write_table(pyarrow.table(nested), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"column images of .* holds no image a row, but list"):
        entries_of(tmp_path, columns={"image": "images"})


@pytest.mark.parametrize("cut", [100, 512 * 40, 512 * 40 + 100, 512 * 42 + 7])
def test_a_shard_that_is_cut_off_says_so_and_keeps_what_is_whole(tmp_path, cut):
    whole = pictures.shard(tmp_path / "a.tar", 12).read_bytes()
    assert len(whole) > 512 * 60
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    if cut == 100:
        with pytest.raises(ValueError, match=r"is not a .tar file that can be read"):
            entries_of(tmp_path / "a.tar")
        return
    found, total = read(entries_of(tmp_path / "a.tar"))
    assert total == len(found)
    assert "is cut off after" in found[-1].problem
    assert levels(found[:-1]) == list(range(len(found) - 1))
    assert len(found) > 5


def test_rows_of_a_shard_with_no_image_or_two(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        for name in ("dir/a.txt", "dir/b.png", "dir/b.seg.png", "dir/c.PNG", "dir/c.jpg", "notes"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"1234"))
    a, b, c = read(entries_of(tmp_path / "odd.tar"))[0]
    assert "no image: it has .txt" in a.problem
    assert b.name == "dir/b.png"
    assert "more than one image" in c.problem


def test_data_sets_of_the_hub_are_streamed(tmp_path, monkeypatch):
    """The library reads a folder as it reads the hub; only the name is looked up elsewhere."""
    table = pictures.table(tmp_path / "data", COUNT)
    rows = datasets.Dataset.from_parquet(str(table), cache_dir=str(tmp_path / "cache"))
    rows.cast_column("image", datasets.Image()).to_parquet(table)  # with the features that the hub knows
    make = datasets.load_dataset_builder
    here = str(tmp_path / "data")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: make(here, cache_dir=str(tmp_path / "cache")))
    entries = entries_of("owner/pictures")
    found, total = read(entries, lambda start, stop: start >= 5)
    assert total == COUNT
    assert levels(found) == list(range(5, COUNT))
    assert [e.asked().text for e in found] == [f"picture {i}" for i in range(5, COUNT)]
    assert found[0].id == "owner/pictures#5"
    before = entries.fingerprint()
    assert before == entries_of("owner/pictures").fingerprint()
    with pytest.raises(FileNotFoundError, match="the split 'test'"):
        entries_of("owner/pictures", split="test")
    pictures.table(tmp_path / "data", COUNT + 1)
    assert entries_of("owner/pictures").fingerprint() != before


def test_sources_that_cannot_be_read_at_all(tmp_path, sources):
    mixed = pictures.folder(tmp_path / "mixed", 2)
    shutil.copy(sources["parquet"], mixed)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.parquet").write_bytes(sources["parquet"].read_bytes()[:500])
    cases = [
        ("gone.png", FileNotFoundError, "no image file gone.png"),
        ("gone.jsonl", FileNotFoundError, "no file gone.jsonl"),
        (tmp_path / "empty", FileNotFoundError, "holds no images"),
        (mixed, ValueError, "holds 1 .parquet files and 2 images: give the one or the other by name"),
        (tmp_path / "torn.parquet", ValueError, "could not be read as parquet"),
        ("shard.tar.gz", ValueError, "is compressed, so no row can be read by itself"),
        ([], ValueError, "nothing to score"),
    ]
    for source, error, message in cases:
        with pytest.raises(error, match=message):
            entries_of(source)


def test_json_rows_written_by_others_are_read(tmp_path):
    """img2dataset writes the caption twice, and more beside it."""
    pictures.folder(tmp_path, 1)
    (tmp_path / "0000.json").write_text(json.dumps({"caption": "a cat", "url": "x", "status": "success", "key": "0"}))
    (entry,), _ = read(entries_of(tmp_path))
    assert entry.asked() == Prompt("a cat", meta={"url": "x", "status": "success", "key": "0"})
