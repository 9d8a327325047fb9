"""Feedback files: every way a row can be broken is found and named, and what is written is read back."""

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from align.data import append_feedback, read_feedback, validate, write_feedback
from align.media import Media, fitted, image_size, load_latents, load_rgb
from align.rows import KEYS, Record, parse

SHIPPED = "assets/preferences/heldout.parquet"


def picture(path, size=(8, 8), colour=(200, 30, 30), mode="RGB", **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **how)
    return path


@pytest.fixture
def folder(tmp_path):
    """Images a.png … d.png that differ, and a latent file of each kind."""
    for i, name in enumerate("abcd"):
        picture(tmp_path / f"{name}.png", colour=(60 * i, 10, 10))
        save_file({"x0": torch.full((2, 3, 3), float(i))}, tmp_path / f"{name}.safetensors")
        save_file({"latents": torch.randn(5, 2, 3, 3)}, tmp_path / f"{name}-path.safetensors")
    return tmp_path


def lines(folder, *rows):
    path = folder / "feedback.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD = {"prompt": "a cat", "images": ["a.png", "b.png"], "winner": 0}


def reasons(folder, *rows, kind="preferences", **how):
    return [(p.line, p.reason) for p in validate(lines(folder, *rows), kind, **how)]


# Rows that are fine


@pytest.mark.parametrize(
    ("answer", "quality"),
    [
        ({"winner": 1}, (0.0, 1.0, 0.0)),
        ({"winner": None}, (0.5,) * 3),
        ({"winner": "tie"}, (0.5,) * 3),
        ({"ranking": [2, 0, 1]}, (0.5, 0.0, 1.0)),
        ({"ranking": [[0, 2], 1]}, (1.0, 0.0, 1.0)),
        ({"ranking": [[0, 1, 2]]}, (0.5,) * 3),
        ({"scores": [1, 5, 3.0]}, (0.0, 1.0, 0.5)),
        ({"scores": [2, 2, 2]}, (0.5,) * 3),
    ],
)
def test_answers_become_qualities(folder, answer, quality):
    row = {"prompt": "a cat", "images": ["a.png", "b.png", "c.png"], **answer}
    (record,) = read_feedback(lines(folder, row), "preferences")
    assert record.quality == quality


def test_a_winner_among_many_says_nothing_about_the_others():
    def pairs(**answer):
        return parse({"prompt": "p", "images": ["a", "b", "c"], **answer}, "preferences", Path("nowhere")).pairs()

    assert pairs(winner=1) == [(1, 0), (1, 2)]
    assert pairs(ranking=[2, 1, 0]) == [(1, 0), (2, 0), (2, 1)]
    assert len(pairs(winner=None)) == 3


def test_optional_keys_are_kept(folder):
    row = GOOD | {
        "negative": "blur",
        "annotator": 7,
        "seeds": [1, 2],
        "margin": 0.5,
        "weight": 2,
        "settings": {"steps": 4},
    }
    (record,) = read_feedback(lines(folder, row), "preferences")
    assert (record.prompt.negative, record.annotator, record.seeds) == ("blur", "7", (1, 2))
    assert (record.margin, record.weight, dict(record.settings), record.line) == ((0.5, 0.0), 2.0, {"steps": 4}, 1)


@pytest.mark.parametrize("label", [1, 0, True, False])
def test_likes_and_captions(folder, label):
    like = {"prompt": "a cat", "image": "a.png", "label": label, "seed": 3}
    (record,) = read_feedback(lines(folder, like), "likes")
    assert record.label is bool(label) and record.seeds == (3,)
    (record,) = read_feedback(lines(folder, {"prompt": "a cat", "latent": "a.safetensors"}), "captions")
    assert torch.equal(load_latents(record.latents[0], whole=False), torch.zeros(2, 3, 3))


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline_are_fine(folder):
    path = folder / "feedback.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n" + json.dumps(GOOD | {"prompt": "x"}).encode()
    )
    assert [r.line for r in read_feedback(path, "preferences")] == [1, 3]


def test_line_separators_inside_a_prompt_do_not_break_lines(folder):
    write_feedback(folder / "f.jsonl", [GOOD | {"prompt": "two\u2028lines\x85"}])
    assert read_feedback(folder / "f.jsonl", "preferences")[0].prompt.text == "two\u2028lines\x85"


# Rows that are broken


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{oops", "not JSON"),
        ("[1, 2]", "must be a JSON object; got list"),
        ('{"prompt": "a", "prompt": "b"}', '"prompt" appears more than once'),
        ({"images": ["a.png", "b.png"], "winner": 0}, 'no "prompt"'),
        (GOOD | {"prompt": "  "}, 'needs a "prompt"'),
        (GOOD | {"prompt": 3}, 'needs a "prompt"; got 3'),
        (GOOD | {"negative": 3}, '"negative" must be text'),
        (GOOD | {"wimmer": 0}, "did you mean 'winner'?"),
        (GOOD | {"label": 1}, '"label" belongs to likes'),
        ({"prompt": "a", "winner": 0}, 'no "images": two or more paths'),
        (GOOD | {"images": "a.png"}, "must list two or more paths"),
        (GOOD | {"images": ["a.png"]}, "must list two or more paths"),
        (GOOD | {"images": ["a.png", 3]}, "must hold paths; got 3"),
        (GOOD | {"images": ["a.png", "a.png"]}, "same file twice"),
        (GOOD | {"images": ["a.png", "./x/../a.png"]}, "same file twice"),
        (GOOD | {"images": ["a.png", "no.png"]}, "no file no.png"),
        (GOOD | {"images": ["a.png", "/etc/b.png"]}, "is absolute"),
        (GOOD | {"images": ["a.png", "C:\\b.png"]}, "is absolute"),
        (GOOD | {"images": ["a.png", "~/b.png"]}, "is absolute"),
        (GOOD | {"images": ["a.png", "https://x.org/b.png"]}, "is an address"),
        (GOOD | {"latents": ["a.safetensors", "b.safetensors", "c.safetensors"]}, "2 images but 3 latents"),
        (GOOD | {"winner": 2}, "winner must be an index 0 … 1"),
        (GOOD | {"winner": -1}, "winner must be an index"),
        (GOOD | {"winner": True}, "winner must be an index"),
        (GOOD | {"winner": "b"}, "winner must be an index"),
        ({**GOOD, "winner": 0, "scores": [1, 0]}, "has winner and scores: keep one of them"),
        ({**GOOD, "winner": 0, "scores": [0, 1]}, "contradict each other"),
        ({"prompt": "a", "images": ["a.png", "b.png"], "ranking": [0, 1], "scores": [0, 1]}, "contradict each other"),
        ({"prompt": "a", "images": ["a.png", "b.png"], "ranking": [0, 0]}, "ranking must hold each of 0 … 1 once"),
        ({"prompt": "a", "images": ["a.png", "b.png"], "ranking": [1]}, "ranking must hold each"),
        ({"prompt": "a", "images": ["a.png", "b.png"], "ranking": [0, [], 1]}, "ranking must hold each"),
        ({"prompt": "a", "images": ["a.png", "b.png"], "ranking": 0}, "ranking must hold each"),
        ('{"prompt": "a", "images": ["a.png", "b.png"], "scores": [NaN, 1]}', "scores must be 2 finite numbers"),
        ({"prompt": "a", "images": ["a.png", "b.png"], "scores": [1]}, "scores must be 2 finite numbers"),
        (GOOD | {"seeds": [1]}, '"seeds" must hold 2 whole numbers'),
        (GOOD | {"margin": "much"}, "margin must be a finite number"),
        (GOOD | {"images": ["a.png", "b.png", "c.png"], "margin": 1}, "in lists and ties give one a medium"),
        (GOOD | {"winner": None, "margin": 1}, "in lists and ties give one a medium"),
        (GOOD | {"margin": [1]}, "margin must be a finite number, or 2 of them"),
        (GOOD | {"weight": -1}, "weight must be a number ≥ 0"),
        (GOOD | {"annotator": ["x"]}, "annotator must be a name"),
        (GOOD | {"settings": 3}, "settings must be an object"),
    ],
)
def test_every_broken_preference_is_named(folder, row, reason):
    found = reasons(folder, GOOD | {"prompt": "fine"}, row)
    assert [line for line, _ in found] == [2]
    assert reason in found[0][1]


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("likes", {"prompt": "a", "image": "a.png", "label": 0.5}, "label must be 1 (liked) or 0"),
        ("likes", {"prompt": "a", "image": "a.png", "label": "yes"}, "label must be 1 (liked) or 0"),
        ("likes", {"prompt": "a", "label": 1}, 'no "image": a path'),
        ("likes", {"prompt": "a", "image": "a.png", "label": 1, "seed": "x"}, '"seed" must hold 1 whole'),
        ("likes", GOOD, '"images" belongs to preferences'),
        ("captions", {"prompt": "a", "image": "a.png", "caption": "b"}, 'unknown key "caption"'),
        ("captions", {"prompt": "a", "image": "a.png", "label": 1}, '"label" belongs to likes'),
    ],
)
def test_every_broken_like_or_caption_is_named(folder, kind, row, reason):
    ((line, found),) = reasons(folder, row, kind=kind)
    assert line == 1 and reason in found


def test_several_things_wrong_with_a_row_are_all_named(folder):
    ((_, reason),) = reasons(folder, {"images": ["a.png", "b.png"], "winner": 5, "who": 1})
    assert "unknown key" in reason and "prompt" in reason and "winner" in reason


def test_text_that_is_not_utf8(folder):
    path = folder / "feedback.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"prompt": "caf\xe9"}\n')
    ((line, reason, status),) = validate(path, "preferences")
    assert line == 2 and "not UTF-8" in reason and status == "broken"


@pytest.mark.parametrize("kind", sorted(KEYS))
def test_an_empty_file(folder, kind):
    ((line, reason),) = reasons(folder, kind=kind)
    assert line == 0 and "empty" in reason
    with pytest.raises(ValueError, match="the file is empty"):
        read_feedback(lines(folder), kind, skip=("unlabelled", "torn", "broken"))


def test_a_file_that_is_not_there_or_of_no_known_format(folder):
    with pytest.raises(FileNotFoundError, match=r"no feedback file .*no\.jsonl"):
        validate(folder / "no.jsonl", "preferences")
    with pytest.raises(FileNotFoundError, match="no parquet file"):
        validate(folder / "no.parquet", "preferences")
    with pytest.raises(FileNotFoundError, match=r"holds no \.parquet files"):
        validate(folder, "preferences")
    with pytest.raises(ValueError, match=r"expected \.jsonl"):
        validate(folder / "a.png", "preferences")
    with pytest.raises(ValueError, match="kind must be"):
        validate(lines(folder, GOOD), "pairs")
    with pytest.raises(ValueError, match="columns and split are for parquet"):
        validate(lines(folder, GOOD), "preferences", columns={"prompt": "text"})


# Media that are broken


def png(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken_images(folder):
    noisy = Image.effect_noise((64, 64), 90).convert("RGB")
    noisy.save(folder / "whole.png")
    data = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "nothing.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"hello")
    (folder / "large.png").write_bytes(png(10_001, 10_000))
    (folder / "vast.png").write_bytes(png(100_000, 100_000))
    (folder / "flat.png").write_bytes(png(0, 4))
    picture(folder / "ink.jpg", mode="CMYK", colour=(1, 2, 3, 4))
    picture(folder / "deep.png", mode="I;16", colour=1000)
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut.png", "may be truncated"),
        ("nothing.png", "is empty (0 bytes)"),
        ("text.png", "is not an image that can be read"),
        ("large.png", "more than 100 megapixels: it has 10001×10000"),
        ("vast.png", "more than 100 megapixels"),
        ("flat.png", "is not an image that can be read"),
        ("ink.jpg", "colour mode CMYK, which has no exact RGB"),
        ("deep.png", "convert it to 8 bits"),
        ("film.gif", "an animation of 2 frames"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_broken_image_is_named(folder, name, reason):
    broken_images(folder)
    ((line, found),) = reasons(folder, GOOD | {"images": [name, "b.png"]})
    assert line == 1 and reason in found and name in found
    ((line, found),) = reasons(folder, {"prompt": "a", "image": name}, kind="captions")
    assert reason in found


def test_headers_alone_do_not_find_truncation(folder):
    broken_images(folder)
    row = GOOD | {"images": ["cut.png", "whole.png"]}
    assert reasons(folder, row, verify=False) == []
    assert len(reasons(folder, row)) == 1


def test_images_of_different_sizes_in_one_row(folder):
    picture(folder / "wide.png", size=(16, 8))
    assert "different sizes: 8×8, 16×8" in reasons(folder, GOOD | {"images": ["a.png", "wide.png"]})[0][1]


@pytest.mark.parametrize(("mode", "colour", "seen"), [("L", 7, 7), ("1", 1, 255), ("P", 0, 0), ("LA", (9, 0), 255)])
def test_modes_that_rgb_holds_exactly_are_converted(tmp_path, mode, colour, seen):
    media = Media("x", picture(tmp_path / "x.png", mode=mode, colour=colour))
    image_size(media)
    assert load_rgb(media).getpixel((0, 0)) == (seen,) * 3


def test_transparency_is_laid_on_white(tmp_path):
    media = Media("x", picture(tmp_path / "x.png", mode="RGBA", colour=(255, 0, 0, 0)))
    assert load_rgb(media).getpixel((0, 0)) == (255, 255, 255)


def test_orientation_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    media = Media("x", picture(tmp_path / "x.jpg", size=(8, 16), exif=exif))
    assert image_size(media) == load_rgb(media).size == (16, 8)


def test_fitting_covers_and_cuts_the_middle():
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (10, 0, 30, 20))
    assert torch.equal(fitted(image, (20, 20)), torch.ones(3, 20, 20))
    assert fitted(image, (10, 10)).mean() > 0.9
    assert fitted(image, (30, 7)).shape == (3, 30, 7)
    assert torch.equal(fitted(image, (20, 40))[:, :, 0], torch.zeros(3, 20))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"y": torch.zeros(2, 3)}, "holds ['y']: expected"),
        ({"x0": torch.full((2, 3, 3), torch.nan)}, "holds NaN"),
        ({"latents": torch.zeros(1, 2, 3, 3)}, "has shape (1, 2, 3, 3)"),
        ({"x0": torch.zeros(2, 4, 4)}, "different sizes"),
    ],
)
def test_every_broken_latent_is_named(folder, tensors, reason):
    save_file(tensors, folder / "bad.safetensors")
    row = {"prompt": "a", "latents": ["bad.safetensors", "b.safetensors"], "winner": 0}
    ((line, found),) = reasons(folder, row)
    assert line == 1 and reason in found


def test_truncated_latents(folder):
    data = (folder / "a.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[:-7])
    row = {"prompt": "a", "latents": ["cut.safetensors", "b.safetensors"], "winner": 0}
    assert "may be truncated" in reasons(folder, row, verify=False)[0][1]
    with pytest.raises(ValueError, match="no trajectory"):
        load_latents(Media("a", folder / "a.safetensors"), whole=True)
    assert load_latents(Media("a", folder / "a-path.safetensors"), whole=False).shape == (2, 3, 3)


# Rows that contradict one another


SWAPPED = GOOD | {"images": ["b.png", "a.png"], "winner": 0}


@pytest.mark.parametrize(
    "other",
    [
        GOOD | {"winner": 1},
        SWAPPED,
        GOOD | {"winner": None},
        {"prompt": "a cat", "images": ["a.png", "b.png"], "scores": [0, 1]},
        {"prompt": "a cat", "images": ["c.png", "b.png", "a.png"], "ranking": [0, 1, 2]},
    ],
)
def test_labels_that_contradict_each_other(folder, other):
    found = reasons(folder, GOOD, other)
    assert [line for line, _ in found] == [1, 2]
    assert "contradicts line 2" in found[0][1] and "contradicts line 1" in found[1][1]


@pytest.mark.parametrize("other", [GOOD, GOOD | {"images": ["b.png", "a.png"], "winner": 1}])
def test_repeated_rows(folder, other):
    ((line, reason),) = reasons(folder, GOOD, other)
    assert line == 2 and "repeats line 1" in reason


def test_other_people_and_other_prompts_may_disagree(folder):
    rows = [
        GOOD | {"annotator": "x"},
        SWAPPED | {"annotator": "y"},
        SWAPPED | {"prompt": "a dog"},
        GOOD | {"annotator": "z"},
    ]
    assert reasons(folder, *rows) == []


def test_likes_that_contradict_or_repeat(folder):
    like = {"prompt": "a", "image": "a.png", "label": 1}
    found = reasons(folder, like, like | {"label": 0}, like | {"prompt": "b"}, like | {"prompt": "b"}, kind="likes")
    assert [line for line, _ in found] == [1, 2, 4]
    assert "contradicts" in found[0][1] and "repeats line 3" in found[2][1]


def test_a_row_left_out_for_another_reason_contradicts_nothing(folder):
    found = reasons(folder, GOOD, GOOD | {"winner": 1, "images": ["a.png", "b.png", "no.png"]})
    assert [line for line, _ in found] == [2]


# Reading


def test_all_broken_rows_come_in_one_error(folder):
    path = lines(folder, GOOD, *({"prompt": f"p{i}"} for i in range(60)), "{oops")
    with pytest.raises(ValueError) as raised:  # noqa: PT011 — looked at below
        read_feedback(path, "preferences")
    text = str(raised.value).splitlines()
    assert "61 of 62 rows" in text[0] and "preferences" in text[0]
    assert text[1].startswith("  line 2:") and len(text) == 53 and text[-2] == "  … and 11 more"
    assert "skip=['broken']" in text[-1]


def test_broken_rows_are_left_out_only_on_request(folder, caplog):
    feedback = read_feedback(lines(folder, GOOD, "{oops"), "preferences", skip=("broken",))
    assert len(feedback) == 1 and [p.line for p in feedback.skipped] == [2]
    assert "left out 1 of 2 rows: 1 broken" in caplog.text
    with pytest.raises(ValueError, match="skip takes"):
        read_feedback(lines(folder, GOOD), "preferences", skip=("all",))


def test_unlabelled_rows_are_counted_not_broken(folder, caplog):
    open_row = {"prompt": "a cat", "images": ["a.png", "b.png"]}
    path = lines(folder, open_row, GOOD)
    assert [(p.line, p.status) for p in validate(path, "preferences")] == [(1, "unlabelled")]
    feedback = read_feedback(path, "preferences")
    assert len(feedback) == 1 and feedback.unlabelled == 1 and "1 unlabelled" in caplog.text
    with pytest.raises(ValueError, match="no choice yet"):
        read_feedback(path, "preferences", skip=())
    with pytest.raises(ValueError, match="none of the 1 rows"):
        read_feedback(lines(folder, open_row), "preferences")
    assert validate(lines(folder, {"prompt": "a", "image": "a.png"}), "likes")[0].status == "unlabelled"


def test_an_unlabelled_row_may_still_be_broken(folder):
    ((_, _, status),) = validate(lines(folder, {"prompt": "a cat", "images": ["a.png"]}), "preferences")
    assert status == "broken"


# Writing


def test_written_records_are_read_back(folder):
    rows = [
        GOOD | {"negative": "blur", "annotator": "x", "seeds": [1, 2], "margin": [0.5, 0.25], "weight": 2.0},
        {"prompt": "ünï", "images": ["a.png", "b.png", "c.png"], "ranking": [[1, 2], 0], "settings": {"steps": 3}},
        {"prompt": "t", "latents": ["a.safetensors", "b.safetensors"], "winner": "tie"},
        {"prompt": "s", "images": ["c.png", "d.png"], "latents": ["a.safetensors", "b.safetensors"], "scores": [1, 2]},
    ]
    path = write_feedback(folder / "one.jsonl", rows)
    records = read_feedback(path, "preferences").records
    assert [r.row(folder) for r in records] == rows
    there = write_feedback(folder / "deeper" / "two.jsonl", records)
    assert read_feedback(there, "preferences").records == tuple(
        Record(
            **{**vars(r), "images": tuple(moved(m) for m in r.images), "latents": tuple(moved(m) for m in r.latents)}
        )
        for r in records
    )
    assert not list(folder.rglob("*.partial"))


def moved(media):
    return Media(f"../{media.name}", media.path)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "image": "a.png", "label": 1},
        {"prompt": "a", "image": "a.png", "label": False, "seed": 4},
        {"prompt": "a", "latent": "a.safetensors"},
    ],
)
def test_written_likes_and_captions_are_read_back(folder, row):
    kind = "likes" if "label" in row else "captions"
    path = write_feedback(folder / "one.jsonl", [row])
    (record,) = read_feedback(path, kind)
    assert record.row(folder) == row


@pytest.mark.parametrize("row", [{"prompt": ""}, GOOD | {"winner": 7}, GOOD | {"images": ["/a", "b"]}, {"x": 1}])
def test_nothing_is_written_that_could_not_be_read(folder, row):
    path = write_feedback(folder / "one.jsonl", [GOOD])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cannot write row 2"):
        write_feedback(path, [GOOD, row])
    with pytest.raises(ValueError, match="cannot write"):
        append_feedback(path, row)
    assert path.read_bytes() == before


def test_numbers_that_json_lacks_are_not_written(folder):
    row = GOOD | {"settings": {"guidance": float("nan")}}
    with pytest.raises(ValueError, match="cannot write row 1"):
        write_feedback(folder / "one.jsonl", [row])


def test_rows_are_appended_one_by_one(folder):
    path = folder / "deep" / "er.jsonl"
    for i in range(3):
        append_feedback(path, {"prompt": f"p{i}", "images": ["../a.png", "../b.png"], "winner": 0})
        assert len(read_feedback(path, "preferences")) == i + 1
    path.write_bytes(path.read_bytes()[:-1])  # an editor may leave out the last newline
    append_feedback(path, {"prompt": "p3", "images": ["../a.png", "../b.png"], "winner": 0})
    assert len(read_feedback(path, "preferences")) == 4


@pytest.mark.parametrize("kept", [1, 20, 40])
def test_a_torn_last_line(folder, kept):
    path = write_feedback(folder / "one.jsonl", [GOOD])
    with path.open("ab") as file:
        file.write(json.dumps(GOOD | {"prompt": "p" * 100_000}).encode()[:kept])
    ((line, reason, status),) = validate(path, "preferences")
    assert (line, status) == (2, "torn") and "cut short" in reason
    with pytest.raises(ValueError, match="cut short"):
        read_feedback(path, "preferences")
    assert len(read_feedback(path, "preferences", skip=("torn",))) == 1
    with pytest.raises(ValueError, match="torn"):
        append_feedback(path, GOOD | {"prompt": "new"})
    append_feedback(path, GOOD | {"prompt": "new"}, repair=True)
    assert [r.prompt.text for r in read_feedback(path, "preferences")] == ["a cat", "new"]


def test_a_long_torn_line_is_cut_off_whole(folder):
    path = write_feedback(folder / "one.jsonl", [GOOD])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"prompt": "' + b"p" * 200_000)
    append_feedback(path, GOOD | {"prompt": "new"}, repair=True)
    assert path.read_bytes().startswith(whole) and len(read_feedback(path, "preferences")) == 2


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    path = write_feedback(folder / "one.jsonl", [GOOD])
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_feedback(path, [GOOD, GOOD | {"prompt": "x"}])
    assert path.read_bytes() == before


# Parquet


def parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def pair(folder, label_0=1.0, label_1=0.0, **more):
    images = {"jpg_0": (folder / "a.png").read_bytes(), "jpg_1": (folder / "b.png").read_bytes()}
    return {"caption": "a cat", **images, "label_0": label_0, "label_1": label_1, **more}


def test_pickapic_columns(folder):
    rows = [
        pair(folder, user_id=1, has_label=True),
        pair(folder, 0.0, 1.0, user_id=2, has_label=True),
        pair(folder, 0.5, 0.5, user_id=3, has_label=True),
        pair(folder, 0.5, 0.5, user_id=4, has_label=False),
    ]
    feedback = read_feedback(parquet(folder / "p.parquet", rows), "preferences")
    assert [r.quality for r in feedback] == [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    assert [r.annotator for r in feedback] == ["1", "2", "3"] and feedback.unlabelled == 1
    assert load_rgb(feedback[0].images[0]).size == (8, 8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label_1": 1.0}, "add up to 1"),
        ({"label_0": 0.7, "label_1": 0.3}, "a single 1 and 0"),
        ({"label_0": None}, "got none and 0"),
        ({"jpg_0": b""}, "is empty"),
        ({"jpg_0": None}, "is empty"),
        ({"jpg_0": b"junk"}, "not an image"),
        ({"caption": ""}, "prompt"),
        ({"jpg_1": "same"}, "the same image twice"),
    ],
)
def test_every_broken_parquet_row_is_named(folder, change, reason):
    fine = pair(folder, annotator="fine")
    row = pair(folder, annotator="x") | change
    row["jpg_1"] = row["jpg_0"] if row["jpg_1"] == "same" else row["jpg_1"]
    ((line, found, status),) = validate(parquet(folder / "p.parquet", [fine, row]), "preferences")
    assert line == 2 and reason in found and status == "broken"


def test_contradictions_and_repetitions_in_parquet(folder):
    path = parquet(
        folder / "p.parquet",
        [pair(folder), pair(folder, 0.0, 1.0), pair(folder, caption="b"), pair(folder, caption="b")],
    )
    assert [p.line for p in validate(path, "preferences")] == [1, 2, 4]
    assert validate(path, "preferences", verify=False) == []  # bytes are not compared unless they are read


def test_columns_are_mapped_by_name(folder):
    row = pair(folder)
    theirs = {"text": row["caption"], "left": row["jpg_0"], "right": row["jpg_1"], "l": 0.0, "r": 1.0, "who": "x"}
    path = parquet(folder / "p.parquet", [theirs])
    columns = {"prompt": "text", "images": ["left", "right"], "labels": ["l", "r"], "annotator": "who"}
    (record,) = read_feedback(path, "preferences", columns=columns)
    assert (record.prompt.text, record.quality, record.annotator) == ("a cat", (0.0, 1.0), "x")
    with pytest.raises(ValueError, match="no column for prompt and images"):
        read_feedback(path, "preferences")
    with pytest.raises(ValueError, match=r"maps 'prompt' to \['txt'\]"):
        read_feedback(path, "preferences", columns=columns | {"prompt": "txt"})
    with pytest.raises(ValueError, match="did you mean 'prompt'"):
        read_feedback(path, "preferences", columns=columns | {"promt": "text"})
    both = parquet(folder / "q.parquet", [pair(folder, prompt="other")])
    with pytest.raises(ValueError, match="say which is 'prompt'"):
        read_feedback(both, "preferences")


def test_hpd_columns(folder):
    base = {"prompt": "a cat", "image_path": ["a.png", "b.png", "c.png"]}
    train = parquet(folder / "p.parquet", [base | {"human_preference": [0, 1, 0]}])
    assert read_feedback(train, "preferences")[0].answer == {"winner": 1}
    test = parquet(folder / "q.parquet", [base | {"rank": [2, 1, 2]}])
    (record,) = read_feedback(test, "preferences")
    assert record.answer == {"ranking": [[1], [0, 2]]} and record.images[0].path == folder / "a.png"


def test_hub_image_features_and_likes(folder):
    import datasets

    rows = {"prompt": ["a", "b"], "image": [str(folder / "a.png"), str(folder / "b.png")], "label": [1, 0]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "p.parquet")
    records = read_feedback(folder / "p.parquet", "likes").records
    assert [r.label for r in records] == [True, False]
    assert load_rgb(records[1].images[0]).getpixel((0, 0)) == (60, 10, 10)
    lists = {"prompt": ["a"], "images": [[str(folder / "a.png"), str(folder / "b.png")]], "rank": [[1, 0]]}
    features = datasets.List(datasets.Image())
    datasets.Dataset.from_dict(lists).cast_column("images", features).to_parquet(folder / "q.parquet")
    (record,) = read_feedback(folder / "q.parquet", "preferences")
    assert record.quality == (0.0, 1.0) and load_rgb(record.images[1]).getpixel((0, 0)) == (60, 10, 10)
    with pytest.raises(ValueError, match=r"images\[0\] of row 1 have no files|images\[0\] of row 1, images\[1\]"):
        write_feedback(folder / "one.jsonl", [record])


def test_the_hub_out_of_reach_and_damaged_files(folder):
    with pytest.raises(FileNotFoundError, match=r"could not be loaded.*download its parquet files"):
        validate("kilter-tests/not-there", "preferences")
    (folder / "cut.parquet").write_bytes((parquet(folder / "p.parquet", [pair(folder)])).read_bytes()[:200])
    with pytest.raises(ValueError, match="could not be read as parquet"):
        validate(folder / "cut.parquet", "preferences")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_shipped_preferences_are_sound(split):
    feedback = read_feedback(f"assets/preferences/{split}.parquet", "preferences")
    assert len(feedback) == {"train": 1892, "heldout": 383}[split] and not feedback.skipped


def test_parquet_and_json_lines_give_the_same_records(tmp_path):
    shipped = read_feedback(SHIPPED, "preferences", split="train[:12]")
    rows = []
    for n, record in enumerate(shipped):
        names = [f"{n}-{k}.webp" for k in range(2)]
        for name, media in zip(names, record.images, strict=True):
            (tmp_path / name).write_bytes(media.data())
        winner = {1.0: 0, 0.0: 1, 0.5: None}[record.quality[0]]
        row = {"prompt": record.prompt.text, "images": names, "winner": winner, "annotator": record.annotator}
        rows.append(row | {"seeds": list(record.seeds)})
    again = read_feedback(write_feedback(tmp_path / "f.jsonl", rows), "preferences")

    def facts(record):
        return (
            record.prompt,
            record.quality,
            record.annotator,
            record.seeds,
            record.line,
            [m.digest for m in record.images],
        )

    assert [facts(r) for r in again] == [facts(r) for r in shipped]
