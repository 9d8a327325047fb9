"""Which steering helps, on the gold reward that none of them optimises, at equal network evaluations.

Every arm steers the embedded model by the embedded reward on held-out prompts from the same seeds. A gradient counts as two more
network evaluations (its backward pass), so guided arms get a third of the particles. From each population the particle with the
highest proxy is taken, as a user would; "plain" is the average unsteered sample. Intervals are 95 % paired bootstraps over prompts.

    python benchmarks/steer_shapes.py [--prompts 120] [--particles 9] [--beta 0.1]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import align
from rewards import CLIPScore, CrossEncoder
from samplers import SVDD, BestOfN, Compose, FeynmanKac, Guided

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def arms(reward, beta: float, particles: int) -> dict:
    """Name → (steering, particles)."""
    third = max(1, particles // 3)
    guided = Guided(reward, 1 / beta, tempering="linear")
    return {
        "best-of-N": (BestOfN(reward), particles),
        "FK difference": (FeynmanKac(reward, beta), particles),
        "FK max": (FeynmanKac(reward, beta, "max", every=4, start=0.2, stop=0.8), particles),
        "SVDD": (SVDD(reward, beta), particles),
        "guided": (guided, third),
        "guided + FK": (Compose(guided, FeynmanKac(reward, beta, tempering="linear")), third),
    }


def pixel_spread(population: torch.Tensor) -> float:
    """Root mean square pixel distance between the particles of a population (K, 3, H, W)."""
    flat = population.flatten(1)
    return float(torch.pdist(flat).square().mean().sqrt() / flat.shape[1] ** 0.5)


@torch.no_grad()
def feature_spread(population: torch.Tensor, clip: CLIPScore) -> float:
    """Mean cosine distance between the particles' CLIP embeddings."""
    features = torch.nn.functional.normalize(clip.encode_image(clip.preprocess(population)).float(), dim=-1)
    above = torch.triu_indices(len(features), len(features), 1)
    return float((1 - features @ features.T)[above[0], above[1]].mean())


def measure(policy, reward, clip, prompts, steering, particles, seed) -> dict[str, np.ndarray]:
    """One arm: per-prompt proxy and gold of the taken sample, unique ancestors, spreads; and its cost."""
    begin = time.perf_counter()
    result = align.steer(
        policy, prompts, steering, particles=particles, plain=False, seed=seed, rewards=[reward], progress=True
    )
    seconds = time.perf_counter() - begin
    populations = [result.arm()[i : i + particles] for i in range(0, len(result.arm()), particles)]
    taken = [next(s for s in population if s.best) for population in populations]
    spent = result.ledger
    return {
        "proxy": np.array([s.scores[reward.name] for s in taken]),
        "gold": np.array([s.scores["gold"] for s in taken]),
        "proxy_all": np.array([np.mean([s.scores[reward.name] for s in p]) for p in populations]),
        "gold_all": np.array([np.mean([s.scores["gold"] for s in p]) for p in populations]),
        "ancestors": np.array([g["unique_ancestors"] for g in result.groups]),
        "pixel_spread": np.array([pixel_spread(torch.stack([s.pixels for s in p])) for p in populations]),
        "feature_spread": np.array([feature_spread(torch.stack([s.pixels for s in p]), clip) for p in populations]),
        "nfe": spent["network_evaluations"] + 2 * spent["gradients"],
        "seconds": seconds,
    }


def interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over prompts."""
    means = rng.choice(values, (4000, len(values))).mean(1)
    return tuple(np.percentile(means, [2.5, 97.5]))


COLUMNS = (
    "arm|NFE a prompt|proxy|gold|gold − best-of-N (95 %)|gold of all|ancestors|pixel spread|feature spread|seconds"
)


def table(measured: dict[str, dict], baseline: str) -> str:
    """Markdown, with paired differences to the baseline arm."""
    rng = np.random.default_rng(0)
    rows = [COLUMNS.split("|"), ["---"] * 10]
    for name, m in measured.items():
        gap = m["gold"] - measured[baseline]["gold"]
        low, high = interval(gap, rng)
        row = [name, f"{m['nfe'] / len(gap):.0f}", f"{m['proxy'].mean():.3f}", f"{m['gold'].mean():.3f}"]
        row += [
            "–" if name == baseline else f"{gap.mean():+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{m['gold_all'].mean():.3f}",
        ]
        row += [f"{m['ancestors'].mean():.1f}", f"{m['pixel_spread'].mean():.3f}", f"{m['feature_spread'].mean():.3f}"]
        rows.append([*row, f"{m['seconds']:.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(measured: dict[str, dict], path: Path) -> None:
    """Proxy against gold of the taken samples, with intervals over prompts."""
    rng = np.random.default_rng(0)
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, m in measured.items():
        (x_low, x_high), (y_low, y_high) = interval(m["proxy"], rng), interval(m["gold"], rng)
        x, y = m["proxy"].mean(), m["gold"].mean()
        axes.errorbar(
            x, y, xerr=[[x - x_low], [x_high - x]], yerr=[[y - y_low], [y_high - y]], fmt="o", capsize=2, label=name
        )
    axes.set_xlabel("proxy reward (optimised)")
    axes.set_ylabel("gold reward (not optimised)")
    axes.set_title("Steering at equal network evaluations", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--particles", type=int, default=9)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="heldout", choices=["heldout", "train"], help="train is for choosing beta")
    parser.add_argument("--only", nargs="*", help="names of arms, for a quick look; writes nothing")
    options = parser.parse_args()
    rows = [json.loads(line) for line in (ROOT / f"assets/prompts/{options.split}.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rows[:: max(1, len(rows) // options.prompts)]][: options.prompts]
    policy, reward, clip = align.load_policy(), CrossEncoder(), CLIPScore(str(ROOT / "assets/tiny-clip"))
    measured: dict[str, dict] = {}
    for name, (steering, particles) in arms(reward, options.beta, options.particles).items():
        if options.only and name not in options.only:
            continue
        measured[name] = measure(policy, reward, clip, prompts, steering, particles, options.seed)
        if name == "best-of-N":  # the same samples before the choice
            m = measured[name]
            measured = {"plain": {**m, "proxy": m["proxy_all"], "gold": m["gold_all"]}, **measured}
        print(table(measured, "best-of-N") if "best-of-N" in measured else table(measured, name))
    if options.only:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "steer_shapes.md").write_text(table(measured, "best-of-N") + "\n")
    values = {name: {k: np.asarray(v).tolist() for k, v in m.items()} for name, m in measured.items()}
    (RESULTS / "steer_shapes.json").write_text(
        json.dumps({"options": vars(options), "prompts": prompts, "arms": values}) + "\n"
    )
    plot(measured, RESULTS / "steer_shapes.png")


if __name__ == "__main__":
    main()
