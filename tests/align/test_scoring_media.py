"""Videos and sounds go the way of images: from every source, in rows, with reasons where there is no score."""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import tarfile

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import align
from align.cli import main
from align.decoding import Decoder
from align.media import Media
from align.tables import read_tables
from rewards import Brightness, Clipping, FrameDifference, Framewise, Loudness, Reward, Scores, Silence, Weighted

COUNT = 6


class Frames(Reward):
    """How many frames there are; its parts are the brightest level and the first."""

    modality, needs_prompt = "video", False

    def measure(self, media, prompts):
        level = (255 * media.mean((2, 3, 4))).round()
        return Scores(torch.full((len(media),), float(media.shape[1])), {"last": level[:, -1], "first": level[:, 0]})


class Peak(Reward):
    """The loudest sample."""

    modality, needs_prompt = "audio", False

    def measure(self, media, prompts):
        return media.abs().amax((1, 2))


def film(i: int, frames: int = 3, size: tuple[int, int] = (8, 8)) -> bytes:
    """A GIF whose frames have the levels i, i + 10, i + 20, …"""
    shown, data = [Image.new("L", size, i + 10 * k) for k in range(frames)], io.BytesIO()
    shown[0].save(data, "GIF", save_all=True, append_images=shown[1:])
    return data.getvalue()


def wav(values: np.ndarray, code: int, bits: int, rate: int = 48_000, extensible: bool = False, size=None) -> bytes:
    """(C, N) samples as they stand in a file, as one."""
    data = np.ascontiguousarray(values.T).tobytes()
    if bits == 24:
        data = np.ascontiguousarray(values.T.astype("<i4")).view("u1").reshape(-1, 4)[:, :3].tobytes()
    width = len(values) * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else code, len(values), rate, rate * width, width, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 3, code) + bytes(14)
    chunks = [(b"fmt ", form, None), (b"LIST", b"odd", None), (b"data", data, size)]
    body = b"".join(
        n + struct.pack("<I", len(c) if told is None else told) + c + b"\0" * (len(c) % 2) for n, c, told in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def scores(out) -> list[dict]:
    return pyarrow.parquet.read_table(out / "scores").to_pylist()


def folder(at, suffix, made):
    at.mkdir()
    for i in range(COUNT):
        (at / f"{i}{suffix}").write_bytes(made(i))
        (at / f"{i}.txt").write_text(f"film {i}")
    (at / "poster.png").write_bytes(b"is no row")
    return at


def lines(at, suffix, made, key):
    folder(at, suffix, made)
    rows = [{key: f"{i}{suffix}", "image": "poster.png", "prompt": f"film {i}"} for i in range(COUNT)]
    (at / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return at / "list.jsonl"


def shard(at, suffix, made):
    with tarfile.open(at, "w") as archive:
        for i in range(COUNT):
            for end, data in ((suffix, made(i)), (".txt", f"film {i}".encode()), (".png", b"is no row")):
                info = tarfile.TarInfo(f"{i}{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return at


def table(at, made, key):
    cells = {key: [made(i) for i in range(COUNT)], "image": [b"is no row"] * COUNT}
    pyarrow.parquet.write_table(pyarrow.table({**cells, "prompt": [f"film {i}" for i in range(COUNT)]}), at)
    return at


@pytest.mark.parametrize("layout", ["files", "folder", "lines", "tar", "parquet", "hub table"])
def test_videos_from_every_source(tmp_path, layout):
    made = lambda i: film(i, 2 + i % 2)  # noqa: E731
    source = {
        "files": lambda: sorted(map(str, folder(tmp_path / "in", ".gif", made).glob("*.gif"))),
        "folder": lambda: folder(tmp_path / "in", ".gif", made),
        "lines": lambda: lines(tmp_path / "in", ".gif", made, "video"),
        "tar": lambda: shard(tmp_path / "in.tar", ".gif", made),
        "parquet": lambda: table(tmp_path / "in.parquet", made, "video"),
        "hub table": lambda: features(tmp_path / "in.parquet", made),
    }[layout]()
    result = align.score_set(Frames(), source, tmp_path / "out", batch=2, part=2)
    rows = scores(tmp_path / "out")
    assert (result.rows, result.errors) == (COUNT, 0)
    assert [r["Frames"] for r in rows] == [2 + i % 2 for i in range(COUNT)]
    assert [r["prompt"] for r in rows] == [f"film {i}" for i in range(COUNT)]
    assert all("video" in r and "image" not in r for r in rows)
    parts = [{p["name"]: p["value"] for p in r["parts"]} for r in rows]
    assert [p["Frames.last"] - p["Frames.first"] for p in parts] == [10 + 10 * (i % 2) for i in range(COUNT)]


def features(at, made):
    """As `datasets` writes videos: bytes with a path."""
    videos = [{"bytes": made(i), "path": f"{i}.gif"} for i in range(COUNT)]
    rows = {"video": videos, "prompt": [f"film {i}" for i in range(COUNT)]}
    kinds = datasets.Features({"video": datasets.Video(decode=False), "prompt": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(str(at))
    return at


def test_frames_are_spread_evenly_and_fitted(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.gif").write_bytes(film(0, 9, (12, 8)))
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "in" / "b.webp")
    seen = []

    class Seen(Framewise):
        def measure(self, media, prompts):
            seen.append([*(255 * media[:, :, 0, 0, 0]).round().int().tolist(), list(media.shape)])
            return super().measure(media, prompts)

    told = [r["scores"] for r in align.score_rows(Seen(Brightness()), tmp_path / "in", frames=3, size=(4, 4))]
    assert seen == [
        [[0, 40, 80], [1, 3, 3, 4, 4]],
        [[255], [1, 1, 3, 4, 4]],
    ]  # a picture is a film of one, laid on white
    assert [next(iter(t.values())) for t in told] == pytest.approx([40 / 255, 1])
    mean = sum(range(0, 90, 10)) / 9 / 255
    told = align.score(Framewise(Brightness()), [tmp_path / "in" / "a.gif", torch.zeros(2, 3, 8, 8)])
    assert told.total.tolist() == pytest.approx([mean, 0], abs=1e-5)
    assert align.score(Frames(), [tmp_path / "in" / "a.gif"], frames=4).total.tolist() == [4]


def test_runs_go_on_only_with_as_many_frames(tmp_path):
    source = folder(tmp_path / "in", ".gif", film)
    align.score_set(Frames(), source, tmp_path / "out", frames=2)
    assert align.score_set(Frames(), source, tmp_path / "out", frames=2).scored == 0
    with pytest.raises(ValueError, match=r"settings.frames: 2 → 16"):
        align.score_set(Frames(), source, tmp_path / "out")
    (source / "poster.png").write_bytes(film(1))
    align.score_set(Brightness(), [source / "poster.png"], tmp_path / "still", on_error="nan")
    assert "frames" not in json.loads((tmp_path / "still" / "manifest.json").read_text())["settings"]


def test_broken_videos_are_rows_with_a_reason(tmp_path):
    source = folder(tmp_path / "in", ".gif", film)
    (source / "1.gif").write_bytes(film(1)[:40])
    (source / "2.gif").write_bytes(b"")
    (source / "3.gif").write_bytes(film(3, 1))
    result = align.score_set(FrameDifference(), source, tmp_path / "out")
    rows = scores(tmp_path / "out")
    assert [math.isnan(r["FrameDifference"]) for r in rows] == [False, True, True, True, False, False]
    assert "not a video that can be read, it may be truncated" in rows[1]["error"]
    assert "is empty" in rows[2]["error"]
    assert "needs at least 2 frames; got 1" in rows[3]["error"]
    assert result.errors == 3
    with pytest.raises(ValueError, match=r"row 1, 1.gif: "):
        list(align.score_rows(FrameDifference(), source))


def test_what_reads_encoded_videos_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    with pytest.raises(ImportError, match=r"a.mp4 needs a reader of videos: pip install 'kilter\[video\]'"):
        align.score_set(Frames(), tmp_path / "a.mp4", tmp_path / "out")
    argv = ["score", tmp_path / "a.mp4", "--reward", "tests.align.test_scoring_media.Frames", "--device", "cpu"]
    assert main([str(a) for a in argv]) == 2
    assert "pip install 'kilter[video]'" in capsys.readouterr().err


def test_encoded_videos_by_the_extra(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 48, 32
        for value in range(0, 250, 10):
            picture = Image.new("RGB", (48, 32), (value,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:200])
    whole, cut = align.score_rows(Frames(), tmp_path, on_error="nan", frames=5)
    assert (whole["video"], whole["scores"]["Frames"]) == ("a.mp4", 5)
    assert whole["parts"] == pytest.approx({"Frames.first": 0, "Frames.last": 240}, abs=4)
    assert "b.mp4 is not a video that can be read" in cut["error"]


def test_images_are_not_taken_for_videos_nor_videos_for_images(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    with pytest.raises(FileNotFoundError, match=r"holds no images.* but 1 videos: wrap the reward in Framewise"):
        align.score_set(Brightness(), tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match=r"a.mp4 is a video, and images are scored: wrap the reward in Framewise"):
        list(align.score_rows(Brightness(), tmp_path / "in" / "a.mp4"))
    (tmp_path / "b.gif").write_bytes(film(0))
    with pytest.raises(ValueError, match=r"animation of 3 frames: save the frame .* such as Framewise"):
        align.score(Brightness(), [tmp_path / "b.gif"])
    table(tmp_path / "in.parquet", film, "video")
    with pytest.raises(ValueError, match="no columns of sounds among video, image, prompt"):
        align.score_set(Peak(), tmp_path / "in.parquet", tmp_path / "out")
    with pytest.raises(ValueError, match=r"Brightness of image, Peak of audio: .*score by each alone"):
        align.score_set([Brightness(), Peak()], tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="one or more for video, and one"):
        align.score_set(Frames(), tmp_path / "in", tmp_path / "out", columns={"image": "x"})
    with pytest.raises(ValueError, match="frames must be ≥ 1; got 0"):
        align.score_set(Frames(), tmp_path / "in", tmp_path / "out", frames=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize(("code", "bits"), [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_sounds_of_every_width(code, bits, extensible):
    exact = np.array([[0.0, 0.5, -1.0, 0.25], [0.125, -0.5, 0.75, -0.25]])
    if code == 3:
        values = exact.astype(f"<f{bits // 8}")
    elif bits == 8:
        values = (128 + 128 * exact).astype("u1")
    else:
        values = (exact * 2 ** (bits - 1)).astype({16: "<i2", 24: "<i4", 32: "<i4"}[bits])
    data = wav(values, code, bits, extensible=extensible)
    sound = Decoder("audio")(Media("a.wav", fetch=lambda: data))
    assert sound.dtype == torch.float32
    assert sound.tolist() == exact.tolist()


def test_sounds_that_cannot_be_read():
    values = np.zeros((1, 4), "<i2")
    open_ended = wav(values, 1, 16, size=0xFFFFFFFF)
    assert Decoder("audio")(Media("a.wav", fetch=lambda: open_ended)).shape == (1, 4)
    cases = {
        b"ID3": "is not a .wav file: convert it, as ffmpeg -i a.mp3",
        wav(values, 1, 16)[:-1]: "is cut off: 8 bytes expected at 56, 7 there",
        wav(values, 1, 16)[:30]: "is cut off",
        wav(values, 1, 16)[:36]: "is not a .wav file that can be read",
        wav(values, 6, 8): "samples of 8 bits in format 6: convert it",
        wav(values[:, :0], 1, 16): "holds 0 bytes",
        b"": "is empty",
    }
    for data, message in cases.items():
        with pytest.raises(ValueError, match=message):
            Decoder("audio")(Media("a.mp3", fetch=lambda data=data: data))


def test_sounds_in_rows_of_their_own_length_and_rate(tmp_path):
    def tone(i):
        return wav(np.full((1 + i % 2, 24_000 + 100 * (i % 3)), (i + 1) / 8, "<f4"), 3, 32)

    source = lines(tmp_path / "in", ".wav", tone, "audio")
    (tmp_path / "in" / "1.wav").write_bytes(wav(np.zeros((1, 24_000), "<i2"), 1, 16, rate=44_100))
    panel = [Peak(), Clipping(), Weighted([Loudness(), Silence()])]
    result = align.score_set(panel, source, tmp_path / "out")
    rows = scores(tmp_path / "out")
    assert [r["Peak"] for r in rows if r["row"] != 1] == [(i + 1) / 8 for i in range(COUNT) if i != 1]
    assert "44100 samples a second, but the reward expects 48000: make it with sample_rate=44100" in rows[1]["error"]
    assert (rows[0]["audio"], rows[0]["prompt"], result.errors) == ("0.wav", "film 0", 1)
    fits = align.score(Silence(sample_rate=44_100), [tmp_path / "in" / "1.wav"])
    assert fits.total.tolist() == [-1]
    with pytest.raises(ValueError, match=r"expect \[44100, 48000\] samples a second: give them one sample_rate"):
        align.score_set([Loudness(), Silence(sample_rate=44_100)], source, tmp_path / "other")
    with pytest.raises(ValueError, match="size fits images and videos"):
        align.score_set(Peak(), source, tmp_path / "other", size=(8, 8))


def test_the_command_prints_videos_and_their_tables_join(tmp_path, capsys):
    source = folder(tmp_path / "in", ".gif", film)
    reward = ["--reward", "Framewise", "--reward.reward", "Brightness", "--device", "cpu", "--frames", "2"]
    assert main(["score", str(source), *reward, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [list(row) for row in rows] == [["video", "prompt", "Framewise(Brightness)"]] * COUNT
    assert [r["Framewise(Brightness)"] for r in rows] == pytest.approx([(i + 10) / 255 for i in range(COUNT)])
    assert main(["score", str(source), *reward, "--out", str(tmp_path / "out")]) == 0
    other = ["--reward", "FrameDifference", "--device", "cpu", "--out", str(tmp_path / "two")]
    assert main(["score", str(source), *other]) == 0
    joined = read_tables([tmp_path / "out", tmp_path / "two"])
    assert list(joined.scores) == ["Framewise(Brightness)", "FrameDifference"]
    assert len(joined.prompts) == COUNT
