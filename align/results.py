"""What a steering run leaves behind, in memory and on disk."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .pictures import resized, to_pil

__all__ = ["Sample", "Steered", "finite", "number", "prepare_folder", "to_pil", "versions"]

PROBE = ".kilter"
PLAIN, STEERED = "plain", "steered"
MOST_PROMPTS_IN_GRID, MOST_COLUMNS_IN_GRID = 16, 16


@dataclass
class Sample:
    """One image, of the `group`-th prompt.

    `scores` maps reward names to values, the gold reward under "gold"; None where it could not be judged.
    """

    prompt: str
    seed: int
    arm: str
    pixels: Tensor = field(repr=False)
    scores: dict[str, float | None]
    weight: float
    best: bool = False
    group: int = 0


@dataclass
class Steered:
    """The result of `align.steer`.

    Attributes:
        samples: prompt by prompt, the plain arm and the steered arm, particle by particle. `weight` is the normalised weight of
            a particle; `best` marks the particle a user would take: the highest reward of its group.
        groups: one entry a prompt: `log_z`, `ess` (at each event), `unique_ancestors`.
        ledger: network evaluations, decodes, reward calls, gradients and their seconds: of the run, and of each of its "arms".
        config: everything needed to repeat the run.
        failures: samples that a reward could not judge, by its name.
        stopped: why the run ended early, or None; `interrupted` if it was by Ctrl-C.
    """

    samples: list[Sample]
    groups: list[dict[str, Any]]
    ledger: dict[str, Any]
    config: dict[str, Any]
    failures: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None
    interrupted: bool = False

    def arm(self, name: str = STEERED) -> list[Sample]:
        """The samples of one arm: "steered" or "plain"."""
        return [s for s in self.samples if s.arm == name]

    @property
    def best(self) -> list[Sample]:
        """The steered sample to take, one a prompt."""
        return [s for s in self.arm(STEERED) if s.best]

    def mean(self, score: str, arm: str = STEERED, best: bool = False) -> float:
        """The mean of a score over an arm, or over its best samples; NaN if nothing was judged."""
        values = [s.scores.get(score) for s in self.arm(arm) if s.best or not best]
        judged = [v for v in values if v is not None]
        return sum(judged) / len(judged) if judged else math.nan

    def draw(self, generator: torch.Generator) -> list[Sample]:
        """One steered sample a prompt, drawn by weight: unlike `best`, a sample of the tilted law."""
        families = [[s for s in self.arm() if s.group == g] for g in range(len(self.groups))]
        return [
            f[int(torch.multinomial(torch.tensor([s.weight for s in f]), 1, generator=generator))] for f in families
        ]

    def as_dict(self) -> dict[str, Any]:
        """What `result.json` holds."""
        rows = []
        for i, sample in enumerate(self.samples):
            row = {k: v for k, v in vars(sample).items() if k != "pixels"}
            rows.append({**row, "image": self._file(i)})
        result = {"config": self.config, "versions": versions(), "samples": rows, "groups": self.groups}
        result |= {"ledger": self.ledger, "failures": self.failures, "stopped": self.stopped}
        return finite(result)

    def _file(self, i: int) -> str:
        return f"images/{i:05d}-{self.samples[i].arm}-{self.samples[i].seed}.png"

    def save(self, folder: str | Path) -> Path:
        """Writes images, then `result.json` at once, then `grid.png`; the results of an earlier run are replaced."""
        folder = Path(folder)
        fresh = folder / "images.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for i, sample in enumerate(self.samples):
            info = PngInfo()
            for key in ("prompt", "seed", "arm", "weight"):
                info.add_text(key, str(getattr(sample, key)))
            info.add_text("scores", json.dumps(finite(sample.scores)))
            to_pil(sample.pixels).save(fresh / Path(self._file(i)).name, pnginfo=info)
        partial = folder / "result.json.partial"
        with partial.open("w") as file:
            json.dump(self.as_dict(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        (folder / "result.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "images", ignore_errors=True)
        fresh.rename(folder / "images")
        partial.replace(folder / "result.json")
        if self.samples:
            self.grid().save(folder / "grid.png")
        return folder

    def grid(self, tile: int | None = None) -> Image.Image:
        """Unsteered on the left, steered on the right, same seeds in the same places, scores under each image."""
        prompts = dict(list({s.group: s.prompt for s in self.samples}.items())[:MOST_PROMPTS_IN_GRID])
        blocks = {
            (g, a): [s for s in self.samples if (s.group, s.arm) == (g, a)] for g in prompts for a in (PLAIN, STEERED)
        }
        arms = [a for a in (PLAIN, STEERED) if any(blocks[g, a] for g in prompts)]
        most = max(len(block) for block in blocks.values())
        columns = min(most, MOST_COLUMNS_IN_GRID)
        lines = -(-most // columns)
        native = self.samples[0].pixels.shape[-1]
        tile = tile or max(96, min(native, 256))
        row = round(tile * self.samples[0].pixels.shape[-2] / native) + 13 * len(self.samples[0].scores) + 10
        pad, gap, title = 6, 28, 26
        width, height = columns * (tile + pad), lines * row + title
        canvas = Image.new("RGB", (gap + len(arms) * (width + gap), title + len(prompts) * height + pad), "white")
        draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(15), ImageFont.load_default(11)
        for a, arm in enumerate(arms):
            left = gap + a * (width + gap)
            draw.text((left, 5), "unsteered" if arm == PLAIN else "steered", "black", font)
            for p, (group, prompt) in enumerate(prompts.items()):
                top = title + p * height
                if a == 0:
                    draw.text((left, top + 4), prompt[:120], "#555555", small)
                for c, sample in enumerate(blocks[group, arm]):
                    corner = (left + c % columns * (tile + pad), top + 22 + c // columns * row)
                    _paste(canvas, draw, small, sample, corner, tile)
        return canvas


def _paste(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, font: Any, sample: Sample, corner: tuple[int, int], tile: int
) -> None:
    """One sample with its scores; the one to take has a frame."""
    (x, y), image = corner, resized(to_pil(sample.pixels), tile)
    high = image.height
    canvas.paste(image, corner)
    if sample.best and sample.arm == STEERED:
        draw.rectangle((x - 2, y - 2, x + tile + 1, y + high + 1), outline="#2a7d2a", width=2)
    for j, (name, value) in enumerate(sample.scores.items()):
        shown = "–" if value is None else f"{value:.2f}"
        ink = ("#1f7a1f" if value else "#b3261e") if name == "gold" else "#333333"
        draw.text((x, y + high + 3 + 13 * j), f"{name[:10]} {shown}", ink, font)


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    packages = ("kilter", "torch", "diffusers", "transformers", "open-clip-torch", "peft", "accelerate")
    found = {name: next((d.version for d in metadata.distributions(name=name)), "not installed") for name in packages}
    return {"python": platform.python_version(), **found}


def prepare_folder(
    folder: str | Path | None,
    overwrite: bool = False,
    remedy: str = "choose another --out, or pass --overwrite to replace its results",
) -> Path:
    """Checks, before any work, that results can be written; without a name takes the next free `runs/NNN`.

    Raises:
        FileExistsError: the folder holds another run.
        OSError: it cannot be written.
    """
    if folder is None:
        taken = [int(p.name) for p in Path("runs").glob("[0-9]*") if p.name.isdigit()]
        folder = Path("runs") / f"{max(taken, default=0) + 1:03d}"
    folder = Path(folder).expanduser()
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / PROBE
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


def reopened_folder(
    out: str | Path | None, asked: str, about: Mapping[str, Any], finished: str, files: Sequence[str], overwrite: bool
) -> Path:
    """The folder of a learning run: an empty one, or one in which the same run was cut off. Says in it what is asked.

    Args:
        asked: the file that says what a run that is not finished was asked for, `about`.
        finished: the file that only a finished run has.
        files: what else a run may leave, as glob patterns; `overwrite` removes all of it.

    Raises:
        FileExistsError: it holds something else.
    """
    folder = None if out is None else Path(out).expanduser()
    text = json.dumps(about)
    if folder is not None and overwrite:
        remove(folder, asked, finished, *files)
    if folder is not None and not (folder / finished).is_file() and (folder / asked).is_file():
        if (folder / asked).read_text() != text:
            raise FileExistsError(
                f"{folder} holds another run that was cut off: choose another --out, or pass --overwrite"
            )
    else:
        folder = prepare_folder(out, overwrite)
    (folder / asked).write_text(text)
    return folder


def remove(folder: Path, *names: str) -> None:
    """Removes files, by name or glob pattern, that are there."""
    for path in [path for name in names for path in folder.glob(name)]:
        path.unlink()


def number(value: float, width: int = 0, digits: int = 3) -> str:
    """A number in a table; a dash where it is not defined."""
    return f"{'–' if math.isnan(value) else f'{value:.{digits}f}':>{width}}"


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
