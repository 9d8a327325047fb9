"""Pictures whose brightness is their number, in every layout that can be scored, and a reward that keeps a diary."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

from rewards import Brightness, Scores


def picture(i: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (i,) * 3)


def encoded(i: int, size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    data = io.BytesIO()
    picture(i, size).save(data, format)
    return data.getvalue()


def sizes(i: int) -> tuple[int, int]:
    """Two sizes, one of them rare."""
    return (12, 8) if i % 5 == 2 else (8, 8)


def folder(at: Path, count: int, prompts: bool = True) -> Path:
    for i in range(count):
        file = at / f"{'deep/' if i % 2 else ''}{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(i, sizes(i)))
        if prompts:
            file.with_suffix(".txt").write_text(f"picture {i}\n")
    return at


def lines(at: Path, count: int) -> Path:
    folder(at, count, prompts=False)
    names = [f"{'deep/' if i % 2 else ''}{i:04d}.png" for i in range(count)]
    rows = [{"image": name, "prompt": f"picture {i}", "n": i} for i, name in enumerate(names)]
    (at / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return at / "list.jsonl"


def table(at: Path, count: int, group: int = 7) -> Path:
    at.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(i, sizes(i)), "path": f"{i}.png"} for i in range(count)]
    columns = {"image": images, "caption": [f"picture {i}" for i in range(count)], "n": list(range(count))}
    pyarrow.parquet.write_table(pyarrow.table(columns), at / "train.parquet", row_group_size=group)
    return at / "train.parquet"


def shard(at: Path, count: int, first: int = 0) -> Path:
    at.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(at, "w") as archive:
        for i in range(first, first + count):
            members = {
                "png": encoded(i, sizes(i)),
                "txt": f"picture {i}".encode(),
                "json": json.dumps({"n": i}).encode(),
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return at


class Diary(Brightness):
    """Brightness in levels, which takes its time, PAUSE seconds a batch, and writes what it was shown down in the file DIARY."""

    def measure(self, media, prompts):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        total = (255 * media.mean((1, 2, 3))).round()
        with open(os.environ["DIARY"], "a") as file:
            file.write("".join(f"{int(t)}\n" for t in total))
        return total


class Wordy(Brightness):
    """Levels; refuses "bad" prompts, and cannot judge "odd" ones. Its part is the length of the prompt."""

    needs_prompt = True

    def measure(self, media, prompts):
        if any("bad" in p.text for p in prompts):
            raise ValueError("a bad prompt")
        import torch

        total = 255 * media.mean((1, 2, 3))
        odd = torch.tensor(["odd" in p.text for p in prompts])
        return Scores(
            total.masked_fill(odd, torch.nan), {"length": torch.tensor([float(len(p.text)) for p in prompts])}
        )


class Best(Brightness):
    """1 for the brightest of a prompt among those it is shown with, else 0."""

    needs_prompt, compares = True, True

    def measure(self, media, prompts):
        import torch

        level = media.mean((1, 2, 3))
        texts = [p.text for p in prompts]
        best = [max(v for v, t in zip(level.tolist(), texts, strict=True) if t == text) for text in texts]
        return (level == torch.tensor(best)).float()
