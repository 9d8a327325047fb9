"""Scores tiny-sd, tiny-turbo or tiny-flow by gold on the held-out prompts.

`python evaluate.py [guidance ...]` and `python evaluate.py tiny-flow [guidance ...]` print a table; work/samples.png shows it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict

import torch
from common import ASSETS, WORK, grid
from diffusers import DiffusionPipeline

sys.path.insert(0, str(ASSETS.parent))
from rewards.shapes import Shapes

SETTINGS = ("num_inference_steps", "guidance_scale", "max_sequence_length")


def load(name: str = "tiny-sd") -> tuple[DiffusionPipeline, dict]:
    """The pipeline in float32, quiet, and its default generation settings."""
    index = json.loads((ASSETS / name / "model_index.json").read_text())
    absent = {part: None for part, entry in index.items() if entry == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(ASSETS / name, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    config = json.loads((ASSETS / name / "generation_config.json").read_text())
    return pipe, {key: config[key] for key in SETTINGS if key in config}


@torch.no_grad()
def sample(pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], settings: dict) -> torch.Tensor:
    """Images (B,3,H,W) in [0,1], one a prompt and seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, output_type="pt", **settings).images.float()


def heldout() -> list[dict[str, str]]:
    """The held-out prompts."""
    return [json.loads(line) for line in (ASSETS / "prompts" / "heldout.jsonl").read_text().splitlines()]


def table(pipe: DiffusionPipeline, settings: dict, seeds: int = 1) -> tuple[dict[str, float], torch.Tensor]:
    """Mean gold a task and overall, and the images of the first seed."""
    rows, gold, scores, sheets = heldout(), Shapes(), defaultdict(list), []
    for seed in range(seeds):
        for start in range(0, len(rows), 40):
            part = rows[start : start + 40]
            images = sample(
                pipe, [r["prompt"] for r in part], [1000 * seed + start + i for i in range(len(part))], settings
            )
            sheets.append(images[:16])
            for row, value in zip(part, gold(images, [r["prompt"] for r in part]).tolist(), strict=True):
                scores[row["task"]].append(value)
    means = {task: round(sum(values) / len(values), 4) for task, values in scores.items()}
    return means | {"overall": round(sum(means.values()) / len(means), 4)}, torch.cat(sheets[: len(rows) // 40])


def main() -> None:
    given = sys.argv[1:]
    pipe, settings = load(given.pop(0)) if given and given[0].startswith("tiny") else load()
    for guidance in map(float, given or [settings["guidance_scale"]]):
        means, images = table(pipe, settings | {"guidance_scale": guidance})
        print(guidance, means, flush=True)
        grid(images, WORK / "samples.png", columns=16)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
