"""What rewards learned from people of known, conflicting tastes attain, against what can be attained.

Twenty annotators judge pictures of one coloured shape; half like red, half blue, and all like yellow and dislike black
(`tastes.py`). How they choose is known, so the best accuracy on the pairs held out is known exactly: for a reward that does not see
who asks, and for one that does. Rewards are heads on the embedded CLIP. Measured are

    accuracy      each method over seeds, against both bounds
    adaptation    people never seen, from n of their pairs, in expectation over all pairs of colours
    wrong labels  one taste, 30 % of labels flipped: log-likelihood of clean choices with and without the correction
    trust         best of n by a reward learned from few pairs, against the taste it was learned from
    steering      the embedded model steered by PAL for one person and for another, from the same seeds

    python benchmarks/learn_rewards.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tastes
import torch
from torchvision.transforms.functional import pil_to_tensor

import align
from align.bestofn import best_of_n
from align.learning import MLP, PAL, VPL, BradleyTerry, FitConfig, Head, adapt_reward, train_reward
from align.media import Media, load_rgb
from rewards import CLIPScore, Prompt, Shapes
from rewards.base import Features
from rewards.learned import Learned, encoded
from rewards.shapes import COLORS, SHAPES, detect
from samplers import FeynmanKac

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEOPLE = {f"{taste}-{i}": taste for i in range(10) for taste in tastes.TASTES}
MIXTURE = dict.fromkeys(tastes.TASTES, 0.5)
FIT: dict[str, Any] = {
    "batch": 3,
    "epochs": 60,
    "patience": 12,
    "learning_rate": 3e-4,
    "weight_decay": 0.1,
    "holdout": 0.15,
}
ONE = ("a",)
COUNTS = (1, 2, 4, 8, 16, 32)
FLIPS = 0.3


def methods() -> dict[str, tuple[Head, dict[str, Any]]]:
    """Name → (head, settings)."""
    return {
        "Bradley–Terry, linear": (MLP(hidden=()), {"learning_rate": 3e-3}),
        "Bradley–Terry, MLP": (MLP(), {}),
        "Bradley–Terry, 4 members": (MLP(members=4), {"bootstrap": True}),
        "PAL-A, distance": (PAL(width=64), {}),
        "PAL-A, angle": (PAL(width=64, kind="angle"), {}),
        "PAL-B, distance": (PAL(width=64, by_prompt=True), {}),
        "VPL": (VPL(latent=16, hidden=64), {"epochs": 150, "patience": 50}),
    }


class World:
    """Pictures, preferences and the encoder, in a folder that goes away."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.encoder = folder, CLIPScore(str(ROOT / "assets" / "tiny-clip"))
        self.made = tastes.pictures(folder, variants=3)
        self.train = self.ask("train", PEOPLE, 100, tastes.PREFIXES[:4], 1)
        self.held = self.ask("held", PEOPLE, 80, tastes.PREFIXES[4:], 2)
        self.pairs = [(PEOPLE[who], a, b) for who, a, b in tastes.asked(self.held)]
        self.names = [(shape, color, name) for (shape, color), names in self.made.items() for name in names]

    def ask(
        self, name: str, people: Mapping[str, str], pairs: int, prefixes: Sequence[str], seed: int, flips: float = 0.0
    ) -> Path:
        return tastes.judged(self.folder, f"{name}.jsonl", people, pairs, self.made, prefixes, ONE, flips, seed)

    def learn(self, name: str, head: Head, train: Path | None = None, held: Path | None = None, **how: Any):
        config = {k: how.pop(k) for k in list(how) if k in FitConfig.__dataclass_fields__}
        return train_reward(
            train or self.train, self.encoder, head=head, heldout=held or self.held, config=FitConfig(**FIT | config),
            out=self.folder / name, cache=self.folder / "cache", **how,
        )  # fmt: skip

    @cached_property
    def seen(self) -> Features:
        """What the encoder sees in all pictures, each with the plain prompt of its shape."""
        pixels = torch.stack([pil_to_tensor(load_rgb(Media(name, self.folder / name))) for *_, name in self.names])
        with torch.no_grad():
            return encoded(self.encoder, pixels / 255, [Prompt(f"a {shape}") for shape, _, _ in self.names])

    def scores(self, reward: Learned, person: int = 0) -> torch.Tensor:
        """(N,) of all pictures, before they are standardised, for a person by their row."""
        return reward.head(self.seen, reward.codes_of(torch.full((len(self.names),), person))).mean.mean(0)

    def right(self, scores: torch.Tensor, taste: str) -> float:
        """The expected accuracy of scores for someone of a taste, over all pairs of one shape and two colours."""
        hits = []
        for i, (shape, a, _) in enumerate(self.names):
            for j, (other, b, _) in enumerate(self.names[:i]):
                if shape == other and a != b:
                    p = tastes.probability(taste, a, b)
                    hits.append(p if scores[i] > scores[j] else 1 - p)
        return sum(hits) / len(hits)


def accuracies(world: World, seeds: int) -> dict[str, dict[str, float]]:
    """Each method on the pairs held out: means over seeds and their spread."""
    found = {}
    for name, (head, how) in methods().items():
        begin = time.process_time()
        reports = [world.learn(f"{name}-{seed}", head, seed=seed, **how).report for seed in range(seeds)]
        accuracy = torch.tensor([r["accuracy"] for r in reports])
        found[name] = {
            "accuracy": float(accuracy.mean()),
            "spread": float(accuracy.std()) if seeds > 1 else math.nan,
            "nll": sum(r["nll_calibrated"] for r in reports) / seeds,
            "ece": sum(r["ece_calibrated"] for r in reports) / seeds,
            "seconds": (time.process_time() - begin) / seeds,
        }
        print(name, {k: round(v, 4) for k, v in found[name].items()}, flush=True)
    return found


def adaptation(world: World, each: int = 15) -> dict[str, Any]:
    """The expected accuracy for people never seen, by the number of their pairs."""
    newcomers = {f"new-{taste}-{i}": taste for i in range(each) for taste in tastes.TASTES}
    rows = world.ask("many", newcomers, max(COUNTS), tastes.PREFIXES[:4], 100).read_text().splitlines()
    found: dict[str, Any] = {}
    for name in ("PAL-A, distance", "VPL"):
        found[name] = []
        for n in COUNTS:
            few = world.folder / "few.jsonl"
            few.write_text("".join(f"{row}\n" for i, row in enumerate(rows) if i % max(COUNTS) < n))
            adapted = adapt_reward(world.folder / f"{name}-0", few, out=world.folder / f"{name}-adapted-{n}")
            reward = Learned(str(adapted), encoder=world.encoder)
            known = [(1 + reward.users.index(who), taste) for who, taste in newcomers.items()]
            rights = torch.tensor([world.right(world.scores(reward, row), taste) for row, taste in known])
            found[name].append((float(rights.mean()), float(rights.std() / len(rights) ** 0.5)))
        print("adaptation", name, [f"{m:.3f} ± {e:.3f}" for m, e in found[name]], flush=True)
    ideal = {taste: [likes.get(c, 0.0) for _, c, _ in world.names] for taste, likes in tastes.TASTES.items()}
    found["best"] = sum(world.right(torch.tensor(u), t) for t, u in ideal.items()) / 2
    shared = torch.tensor([tastes.SHARED.get(c, 0.0) for _, c, _ in world.names])
    shared = shared + 1e-6 * torch.randn(len(shared), generator=torch.Generator().manual_seed(0))
    found["without sight"] = sum(world.right(shared, t) for t in tastes.TASTES) / 2
    return found


def wrong_labels(world: World) -> dict[str, Any]:
    """Log-likelihood, per pair and as the reward states it, of clean choices of one taste."""
    people = {f"red-{i}": "red" for i in range(10)}
    train, held = (
        world.ask(f"flipped-{k}", people, n, p, s, FLIPS)
        for k, n, p, s in (("a", 240, tastes.PREFIXES[:4], 7), ("b", 80, tastes.PREFIXES[4:], 8))
    )
    pairs = [(a, b) for a in COLORS for b in COLORS if a != b]
    best = sum(
        -math.log(p) * p - math.log(1 - p) * (1 - p) for p in (tastes.probability("red", *pair) for pair in pairs)
    ) / len(pairs)
    found: dict[str, Any] = {"best": best}
    for name, loss in (("as they are", BradleyTerry()), (f"flips {FLIPS}", BradleyTerry(flips=FLIPS))):
        folder = world.learn(f"flips-{name}", MLP(hidden=(32,)), train, held, loss=loss).folder
        raw = world.scores(Learned(str(folder), encoder=world.encoder))
        by_color = {c: raw[[i for i, (_, color, _) in enumerate(world.names) if color == c]].mean() for c in COLORS}
        leads = [(float(by_color[a] - by_color[b]), tastes.probability("red", a, b)) for a, b in pairs]
        nll = sum(p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d)) for d, p in leads) / len(leads)
        found[name] = {"nll": nll, "red_over_blue": float(by_color["red"] - by_color["blue"])}
    print("wrong labels", found, flush=True)
    return found


def trust(world: World, drawn: int = 64) -> dict[str, Any]:
    """Best of n by rewards learned from few and from many pairs of one taste, in the units of that taste."""
    rng, folder = random.Random(5), world.folder / "drawn"
    folder.mkdir()
    rows = []
    for shape in SHAPES:
        for _ in range(drawn):
            color = rng.choice(list(COLORS))
            rows.append((shape, color, tastes.draw(shape, color, rng)))
    gold = torch.tensor([tastes.TASTES["red"].get(color, 0.0) for _, color, _ in rows]).view(len(SHAPES), drawn)
    found: dict[str, Any] = {"the taste itself": best_of_n(gold, gold).mean(0).tolist()}
    for pairs in (4, 16, 64):
        people = {f"red-{i}": "red" for i in range(5)}
        train = world.ask(f"trust-{pairs}", people, pairs, tastes.PREFIXES[:4], 9)
        learned = world.learn(
            f"trust-{pairs}", MLP(hidden=(32,)), train, world.ask("trust-held", people, 40, tastes.PREFIXES[4:], 10)
        )
        reward = Learned(str(learned.folder), encoder=world.encoder)
        proxy = align.score(reward, [image for *_, image in rows], [f"a {shape}" for shape, *_ in rows]).total
        found[f"{5 * pairs} pairs"] = best_of_n(proxy.view_as(gold), gold).mean(0).tolist()
    print("trust", {k: round(v[-1], 3) for k, v in found.items()}, flush=True)
    return found


def steering(world: World) -> dict[str, Any]:
    """The share of pictures in a colour, and the gold reward, steered for one person, for another, and not at all."""
    policy, found = align.load_policy(device="cpu"), {}
    prompts = [Prompt(f"a {shape}") for shape in SHAPES]
    gold = Shapes()
    for who in ("red-0", "blue-0"):
        reward = Learned(str(world.folder / "PAL-A, distance-0"), user=who, encoder=world.encoder)
        result = align.steer(
            policy, prompts, FeynmanKac(reward, beta=0.3), particles=8, seed=0, plain=who == "red-0", rewards=[reward]
        )
        arms = {f"steered for {who}": result.arm("steered")} | (
            {"plain": result.arm("plain")} if who == "red-0" else {}
        )
        for arm, samples in arms.items():
            pixels = torch.stack([s.pixels for s in samples])
            colors = [things[0].color if things else "none" for things in detect(pixels)]
            right = gold(pixels, [p for p in prompts for _ in range(8)])
            found[arm] = {"colors": {c: colors.count(c) / len(colors) for c in COLORS}, "gold": float(right.mean())}
            found[arm]["images"] = [s.pixels for s in samples][:24:4]
            print(
                arm,
                {c: round(v, 3) for c, v in found[arm]["colors"].items() if v},
                "gold",
                found[arm]["gold"],
                flush=True,
            )
    return found


def written(found: Mapping[str, Any], seconds: float) -> str:
    """Markdown."""
    blind, aware = found["bounds"]["blind"], found["bounds"]["aware"]
    lines = ["| method | accuracy | spread over seeds | nll | ece | seconds |", "|---|---|---|---|---|---|"]
    for name, m in found["methods"].items():
        lines.append(
            f"| {name} | {m['accuracy']:.3f} | {m['spread']:.3f} | {m['nll']:.3f} | {m['ece']:.3f} | {m['seconds']:.0f} |"
        )
    lines.append(
        f"| best without sight of the person | {blind['accuracy']:.3f} ± {blind['error']:.3f} | | {blind['nll']:.3f} | | |"
    )
    lines.append(
        f"| best that knows the person | {aware['accuracy']:.3f} ± {aware['error']:.3f} | | {aware['nll']:.3f} | | |"
    )
    adapted = found["adaptation"]
    lines += [
        "",
        "Expected accuracy for people never seen, from n of their pairs (± standard error over 30 people):",
        "",
    ]
    lines += [f"| n | {' | '.join(map(str, COUNTS))} | best | without sight |", "|---" * (len(COUNTS) + 3) + "|"]
    for name in ("PAL-A, distance", "VPL"):
        cells = " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in adapted[name])
        lines.append(f"| {name} | {cells} | {adapted['best']:.3f} | {adapted['without sight']:.3f} |")
    wrong = found["wrong_labels"]
    lines += [
        "",
        f"{FLIPS:.0%} of labels wrong, clean choices: nll at best {wrong['best']:.3f}; lead of red over blue 5 in truth",
        "",
    ]
    lines += ["| loss | nll of clean choices | lead of red over blue |", "|---|---|---|"]
    lines += [f"| {name} | {m['nll']:.3f} | {m['red_over_blue']:.2f} |" for name, m in wrong.items() if name != "best"]
    lines += [
        "",
        "Steering the embedded model at prompts without a colour:",
        "",
        "| arm | red or orange | blue or cyan | gold |",
        "|---|---|---|---|",
    ]
    for arm, m in found["steering"].items():
        c = m["colors"]
        lines.append(f"| {arm} | {c['red'] + c['orange']:.3f} | {c['blue'] + c['cyan']:.3f} | {m['gold']:.3f} |")
    return "\n".join([*lines, "", f"{seconds:.0f} s of CPU time, one thread."]) + "\n"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy against both bounds, adaptation, trust, and what steering makes."""
    figure = plt.figure(figsize=(13.2, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.15, 1))
    axes = figure.add_subplot(grid[0, 0])
    names = list(found["methods"])
    for y, name in enumerate(names):
        m = found["methods"][name]
        axes.errorbar(
            m["accuracy"],
            -y,
            xerr=m["spread"],
            fmt="o",
            color="#0072B2" if name.startswith("B") else "#C04E00",
            capsize=2,
        )
    for which, label in (("blind", "best without sight"), ("aware", "best that knows the person")):
        b = found["bounds"][which]
        axes.axvspan(b["accuracy"] - 2 * b["error"], b["accuracy"] + 2 * b["error"], color="#DFE3E8", zorder=0)
        axes.axvline(b["accuracy"], color="#66707B", linewidth=1, zorder=1)
        axes.text(b["accuracy"], 0.75, label, ha="center", fontsize=8, color="#66707B")
    axes.set_yticks([-y for y in range(len(names))], names, fontsize=9)
    axes.set_ylim(-len(names) + 0.4, 1.1)
    axes.set_xlabel("accuracy on pairs held out (bands: ± 2 standard errors)")
    axes.set_title("Who asks decides", loc="left")
    axes = figure.add_subplot(grid[0, 1])
    for name, ink in (("PAL-A, distance", "#C04E00"), ("VPL", "#009E73")):
        middle, error = zip(*found["adaptation"][name], strict=True)
        axes.errorbar(COUNTS, middle, error, color=ink, marker="o", markersize=4, capsize=2, label=name)
    for level in ("best", "without sight"):
        axes.axhline(found["adaptation"][level], color="#66707B", linewidth=1, linestyle=(0, (3, 2)))
        axes.text(32, found["adaptation"][level] + 0.004, level, ha="right", fontsize=8, color="#66707B")
    axes.set(xscale="log", xlabel="pairs of a person never seen", ylabel="expected accuracy")
    axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
    axes.minorticks_off()
    axes.set_title("Getting to know someone", loc="left")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
    axes = figure.add_subplot(grid[0, 2])
    for (name, values), ink in zip(found["trust"].items(), ("#66707B", "#CC79A7", "#56B4E9", "#0072B2"), strict=True):
        axes.plot(range(1, len(values) + 1), values, color=ink, label=name)
    axes.set(xscale="log", xlabel="n", ylabel="true worth")
    axes.set_xticks((1, 4, 16, 64), ["1", "4", "16", "64"])
    axes.minorticks_off()
    axes.set_title("Best of n, by pairs learned from", loc="left")
    axes.legend(frameon=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    for column, (arm, m) in enumerate(sorted(found["steering"].items())):
        axes = figure.add_subplot(grid[1, column])
        axes.imshow(
            torch.cat([torch.cat(m["images"][i : i + 3], dim=2) for i in (0, 3)], dim=1)
            .permute(1, 2, 0)
            .clamp(0, 1)
            .numpy()
        )
        axes.axis("off")
        axes.set_title(
            f"{arm}: red {m['colors']['red'] + m['colors']['orange']:.0%}, blue {m['colors']['blue'] + m['colors']['cyan']:.0%}",
            loc="left",
        )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        found: dict[str, Any] = {
            "bounds": {"blind": vars(tastes.bounds(world.pairs, MIXTURE)), "aware": vars(tastes.bounds(world.pairs))}
        }
        print(found["bounds"], flush=True)
        found["methods"] = accuracies(world, options.seeds)
        found["adaptation"] = adaptation(world)
        found["wrong_labels"] = wrong_labels(world)
        found["trust"] = trust(world)
        found["steering"] = steering(world)
    RESULTS.mkdir(exist_ok=True)
    told = written(found, time.process_time() - begin)
    print(told)
    (RESULTS / "learn_rewards.md").write_text(told)
    plot(found, RESULTS / "learn_rewards.png")
    for arm in found["steering"].values():
        del arm["images"]
    (RESULTS / "learn_rewards.json").write_text(json.dumps({"options": vars(options), **found}) + "\n")


if __name__ == "__main__":
    main()
