"""Makes assets/preferences: pairs of tiny-sd's own images of one prompt, labelled by noisy readers of the gold score.

Columns follow Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569): caption, jpg_0, jpg_1 (WebP bytes), label_0, label_1 (1 for
the winner, 0.5 each for a tie), annotator, and the seeds. The winner has the higher gold total or, at equal totals, the
higher mean of its parts; each annotator contradicts gold at a rate of its own. `train` holds training prompts, `heldout` the
held-out ones with exact labels.
"""

from __future__ import annotations

import io
import random

import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from common import ASSETS, WORK, arguments, autocast, save
from evaluate import heldout, load, sample
from PIL import Image
from scenes import draw_scene, truths, word

from rewards.shapes import Shapes

NOISE = {"gold-noisy-0": 0.02, "gold-noisy-1": 0.05, "gold-noisy-2": 0.10, "gold-noisy-3": 0.15}
EACH = 4  # images a prompt: six pairs
ROWS = {"train": 3000, "heldout": 400}
SEED = {"train": 0, "heldout": 100_000}  # of the first image


def prompts(count: int, seed: int) -> list[str]:
    """Distinct prompts as training hears them, none held out."""
    rng, texts = random.Random(seed), {}
    while len(texts) < count:
        texts[word(rng.choice(truths(draw_scene(rng))), rng)] = None
    return list(texts)


def encode(image: torch.Tensor) -> bytes:
    """(3,H,W) uint8 to WebP bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "webp", quality=80, method=6)
    return buffer.getvalue()


def draw(split: str, texts: list[str]) -> dict:
    """`EACH` images of every prompt with their gold order, checkpointed a batch at a time."""
    path, (pipe, settings), gold = WORK / f"preferences_{split}.pt", load(), Shapes()
    state = torch.load(path, weights_only=False) if path.exists() else {"images": [], "order": []}
    batch = 12  # prompts
    for start in range(batch * len(state["images"]), len(texts), batch):
        rows = [text for text in texts[start : start + batch] for _ in range(EACH)]
        seeds = [SEED[split] + EACH * start + i for i in range(len(rows))]
        with autocast():
            images = sample(pipe, rows, seeds, settings)
        scores = gold.score(images, rows)
        parts = torch.stack(list(scores.parts.values())).nanmean(0)
        state["images"].append(images.mul(255).round().byte())
        state["order"].append(scores.total + 0.1 * parts)
        if len(state["images"]) % 10 == 0:
            save(state, path)
            print(split, start, torch.cat(state["order"]).gt(0.9).float().mean().item(), flush=True)
    save(state, path)
    return {key: torch.cat(values).unflatten(0, (-1, EACH)) for key, values in state.items()}


def pairs(split: str, texts: list[str], seed: int) -> list[dict]:
    """All pairs of every prompt, those that gold tells apart first, thinned to `ROWS`."""
    rng, made = random.Random(seed), draw(split, texts)
    rows: dict[bool, list[dict]] = {False: [], True: []}
    for p, text in enumerate(texts):
        files = [encode(image) for image in made["images"][p]]
        for i in range(EACH):
            for j in range(i + 1, EACH):
                first, second = rng.sample((i, j), 2)
                gap = (made["order"][p, first] - made["order"][p, second]).item()
                annotator = rng.choice(list(NOISE)) if split == "train" else "gold"
                label = 0.5 if abs(gap) < 1e-6 else float(gap > 0)
                if label != 0.5 and rng.random() < NOISE.get(annotator, 0):
                    label = 1 - label
                rows[label == 0.5].append(
                    {
                        "caption": text,
                        "jpg_0": files[first],
                        "jpg_1": files[second],
                        "label_0": label,
                        "label_1": 1 - label,
                    }
                    | {
                        "annotator": annotator,
                        "seed_0": SEED[split] + EACH * p + first,
                        "seed_1": SEED[split] + EACH * p + second,
                    }
                )
    for group in rows.values():
        rng.shuffle(group)
    ties = rows[True][: ROWS[split] // 12]
    chosen = rows[False][: ROWS[split] - len(ties)] + ties
    return sorted(chosen, key=lambda row: (row["caption"], row["seed_0"], row["seed_1"]))


def main() -> None:
    args = arguments(__doc__, minutes=0, seed=41, batch=0, lr=0, stages=("train", "heldout"))
    folder = ASSETS / "preferences"
    folder.mkdir(exist_ok=True)
    texts = prompts(760, seed=8) if args.stage == "train" else [row["prompt"] for row in heldout()]
    table = pa.Table.from_pylist(pairs(args.stage, texts, args.seed))
    parquet.write_table(table, folder / f"{args.stage}.parquet", compression="zstd")
    print(args.stage, len(table), "rows", (folder / f"{args.stage}.parquet").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
