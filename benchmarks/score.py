"""What scoring files costs beside the reward: rows a second of `align.score_set` over those of its bare forward.

The bare run calls `reward.score` on the same batches, decoded beforehand and in memory; the streamed one reads, decodes, batches,
scores and writes parquet. Both alternate in one process, the reward on one thread, the decoding on others. Two ratios: of wall
clocks, which other processes disturb, and of the time the scoring thread itself was busy, which they do not. The decoder is timed
alone too: where it is slower than the reward, it decides. Rewards are CLIPs of random weights: tiny, and of the shape of ViT-S/32.

    python benchmarks/score.py [--repeats 4]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import align
from align.ahead import decode, in_threads
from align.decoding import Decoder
from align.entries import entries_of
from rewards import CLIPScore

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parent.parent
SIZES = {"tiny CLIP": (64, 128, 2, 2, 64, 16), "CLIP ViT-S/32": (384, 1536, 12, 6, 224, 32)}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    reward: str
    side: int
    format: str
    rows: int
    batch: int
    threads: int


CASES = [
    Case("tiny CLIP", 64, "png", 2048, 32, 1),
    Case("tiny CLIP", 256, "jpg", 512, 32, 1),
    Case("CLIP ViT-S/32", 512, "jpg", 320, 1, 1),
    Case("CLIP ViT-S/32", 512, "jpg", 320, 8, 1),
    Case("CLIP ViT-S/32", 512, "jpg", 320, 32, 1),
    Case("CLIP ViT-S/32", 512, "png", 320, 32, 1),
]


def clip(name: str, folder: Path) -> CLIPScore:
    """A random CLIP of a published shape, with the tokenizer of the embedded one."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

    width, inner, layers, heads, side, patch = SIZES[name]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny-clip")
    shape = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    words = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    words |= {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=words, vision_config={**shape, "image_size": side, "patch_size": patch})
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder)
    return CLIPScore(str(folder))


def pictures(case: Case, folder: Path) -> Path:
    """Files of smooth noise: their size on disk is that of photographs."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for i in range(case.rows):
        coarse = torch.rand(1, 3, 8, 8, generator=generator)
        fine = torch.rand(1, 3, case.side, case.side, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=case.side, mode="bicubic").clamp(0, 1)
        array = ((0.9 * smooth + 0.1 * fine)[0].permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(array).save(folder / f"{i:05d}.{case.format}")
    return folder


def measure(case: Case, reward: CLIPScore, source: Path, repeats: int) -> dict:
    """Seconds of each, alternating, after one round of warming up."""
    entries = list(entries_of(source).read(0, lambda start, stop: True))
    media = (
        torch.stack(
            [item.media for entry in entries if (item := decode(0, entry, Decoder())).media is not None]
        ).float()
        / 255
    )
    prompts = ["a cat"] * case.batch

    def bare() -> None:
        for batch in media.split(case.batch):
            reward.score(batch, prompts[: len(batch)]).total.tolist()

    def streamed() -> None:
        with tempfile.TemporaryDirectory() as out:
            align.score_set(reward, source, out, prompts="a cat", batch=case.batch, threads=case.threads, part=1024)

    def decoded() -> None:
        for _ in in_threads(lambda entry: decode(0, entry, Decoder()), entries, case.threads, 2 * case.batch):
            pass

    runs: dict[str, list[tuple[float, float]]] = {"bare": [], "streamed": [], "decoded": []}
    for repeat in range(repeats + 1):
        for run in (bare, streamed, decoded):
            wall, busy = time.perf_counter(), time.thread_time()
            run()
            if repeat:
                runs[run.__name__].append((time.perf_counter() - wall, time.thread_time() - busy))
    pairs = list(zip(runs["bare"], runs["streamed"], strict=True))
    rates = {name: case.rows / min(wall for wall, _ in times) for name, times in runs.items()}
    wall, busy = (statistics.median(b[k] / s[k] for b, s in pairs) for k in (0, 1))
    return {**vars(case), **rates, "wall_ratio": wall, "busy_ratio": busy, "seconds": runs}


def table(rows: list[dict], note: str) -> str:
    head = ["reward", "images", "batch", "decoding threads", "bare rows/s", "streamed rows/s", "decoder alone rows/s"]
    head += ["ratio, wall clock", "ratio, busy thread"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        cells = [r["reward"], f"{r['side']}² {r['format']}", r["batch"], r["threads"]]
        cells += [f"{r[k]:.1f}" for k in ("bare", "streamed", "decoded")]
        cells += [f"{r[k]:.3f}" for k in ("wall_ratio", "busy_ratio")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", note]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, load = [], []
    with tempfile.TemporaryDirectory() as work:
        rewards = {name: clip(name, Path(work) / name.replace("/", "-")) for name in SIZES}
        for i, case in enumerate(CASES):
            rows.append(measure(case, rewards[case.reward], pictures(case, Path(work) / f"in{i}"), options.repeats))
            load.append(os.getloadavg()[0])
            print(table(rows[-1:], "").splitlines()[2], flush=True)
    note = (
        f"{os.cpu_count()} processors at a load of {min(load):.1f} to {max(load):.1f}, the reward on one thread; rows/s are of the "
        f"fastest of {options.repeats} repeats, ratios bare over streamed are medians of neighbours. `python benchmarks/score.py`"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "score.json").write_text(json.dumps({"note": note, "runs": rows}, indent=1) + "\n")
    (RESULTS / "score.md").write_text(table(rows, note))


if __name__ == "__main__":
    main()
