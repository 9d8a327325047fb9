"""The world: lays out scenes, says what is true and what is false of them, draws them, and keeps the held-out prompts apart.

`python scenes.py` writes assets/prompts/{heldout,train}.jsonl and the training sets work/*scenes.pt: images,
and for each image true captions and near-miss false ones. Held-out prompts, and for tasks with two objects or counts whole held-out
combinations, are drawn for no training caption.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from dataclasses import dataclass, replace

import torch
from common import ASSETS, SIZE, WORK
from torch import Tensor

sys.path.insert(0, str(ASSETS.parent))
from rewards.shapes import COLORS, NUMBERS, PLACES, RELATIONS, SHAPES, Noun, Scene, gauge, parse

PREFIXES = ("", "a photo of ", "a picture of ", "an image of ", "a drawing of ")
OPPOSITE = {"on the left": "on the right", "at the top": "at the bottom", "left of": "right of", "above": "below"}
OPPOSITE |= {v: k for k, v in OPPOSITE.items()}
PLACE_OF = dict(zip(RELATIONS, PLACES, strict=True))  # "left of" -> "on the left"


@dataclass(frozen=True)
class Thing:
    """One drawn object; centre and radius are shares of the image side."""

    shape: str
    color: str
    x: float
    y: float
    r: float


def describe(scene: Scene, prefix: str = "", one: str = "a") -> str:
    """Words a scene; `one` is the determiner of a lone singular."""

    def noun(n: Noun) -> str:
        words = [n.color] if n.color else []
        words.append(n.shape + ("es" if n.shape == "cross" else "s") * (n.count > 1))
        number = {v: k for k, v in NUMBERS.items()}.get(n.count, one)
        number = "an" if number == "a" and words[0] == "orange" else number
        return " ".join([number, *words, *([n.place] if n.place else [])])

    return prefix + f" {scene.relation or 'and'} ".join(map(noun, scene.nouns))


def pair_key(scene: Scene) -> frozenset:
    """The combination of a two-object scene, whatever its order and layout."""
    return frozenset((n.color, n.shape) for n in scene.nouns)


def hold_out(seed: int = 2024) -> list[dict[str, str]]:
    """The 240 held-out prompts, 40 a task."""
    rng = random.Random(seed)
    colors, rows = list(COLORS), []

    def add(task: str, texts: list[str]) -> None:
        rows.extend({"prompt": text, "task": task} for text in texts)
        assert len(texts) == 40 and all(parse(text).task == task for text in texts)

    ones = list(itertools.product(PREFIXES, ("a", "one", "a single")))
    add("single_object", rng.sample([describe(Scene((Noun(s),)), *one) for s in SHAPES for one in ones], 40))
    shape_pairs = rng.sample(list(itertools.combinations(SHAPES, 2)), 4)
    both = [order for a, b in shape_pairs for order in ((a, b), (b, a))]
    add("two_object", [describe(Scene((Noun(a), Noun(b))), p) for a, b in both for p in PREFIXES])
    counts = [Scene((Noun(s, c, n),)) for s in SHAPES for c in (None, *colors) for n in NUMBERS.values()]
    add("counting", [describe(s) for s in rng.sample(counts, 40)])
    add(
        "colors", rng.sample([describe(Scene((Noun(s, c),)), *one) for s in SHAPES for c in colors for one in ones], 40)
    )

    combos = [
        (c1, s1, c2, s2) for c1, c2 in itertools.combinations(colors, 2) for s1, s2 in itertools.permutations(SHAPES, 2)
    ]
    chosen = [tuple(map(Noun, (s1, s2), (c1, c2))) for c1, s1, c2, s2 in rng.sample(combos, 72)]
    chosen = [rng.sample(pair, 2) for pair in chosen]
    relative = [Scene(tuple(pair), rel) for pair, rel in zip(chosen[:20], itertools.cycle(RELATIONS))]
    absolute = []
    for (a, b), place in zip(chosen[20:32], itertools.cycle(PLACES)):
        absolute.append(Scene((replace(a, place=place), replace(b, place=OPPOSITE[place]))))
    singles = rng.sample([(s, c) for s in SHAPES for c in colors], 8)
    alone = [Scene((Noun(s, c, place=place),)) for (s, c), place in zip(singles, itertools.cycle(PLACES))]
    add("position", [describe(scene) for scene in (*relative, *absolute, *alone)])
    add("color_attr", [describe(Scene(tuple(pair))) for pair in chosen[32:]])
    return rows


HELD = hold_out()
HELD_TEXTS = {row["prompt"] for row in HELD}
HELD_SCENES = [parse(row["prompt"]) for row in HELD]
HELD_PAIRS = {pair_key(s) for s in HELD_SCENES if len(s.nouns) == 2}
HELD_ALONE = {s.nouns[0] for s in HELD_SCENES if s.nouns[0].count > 1 or len(s.nouns) == 1 and s.nouns[0].place}


def allowed(scene: Scene) -> bool:
    """Whether a training caption may say this."""
    return pair_key(scene) not in HELD_PAIRS if len(scene.nouns) == 2 else scene.nouns[0] not in HELD_ALONE


def word(scene: Scene, rng: random.Random) -> str:
    """Words a scene at random, never as a held-out string."""
    while True:
        prefix = rng.choice(PREFIXES) if rng.random() < 0.4 else ""
        plain = len(scene.nouns) == 2 or rng.random() < 0.6
        text = describe(scene, prefix, "a" if plain else rng.choice(("one", "a single")))
        if text not in HELD_TEXTS:
            return text


def apart(things: list[Thing]) -> bool:
    """Whether nothing touches: a star of radius r reaches 1.25 r."""
    return all(
        (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (1.2 * (a.r + b.r) + 0.03) ** 2
        for a, b in itertools.combinations(things, 2)
    )


def inside(rng: random.Random, r: float, low: float = 0.0, high: float = 1.0) -> float:
    """A coordinate in [low, high] that keeps an object of radius r inside the image."""
    edge = 1.22 * r + 0.015
    return rng.uniform(max(low, edge), min(high, 1 - edge))


def lay_alone(kind: tuple[str, str], rng: random.Random) -> list[Thing]:
    """One object: half of them large and anywhere, half of them clearly to one side."""
    if rng.random() < 0.5:
        r = rng.uniform(0.2, 0.33)
        return [Thing(*kind, inside(rng, r), inside(rng, r), r)]
    r, side = rng.uniform(0.16, 0.24), rng.choice(list(PLACES.values()))
    across = inside(rng, r, high=0.37) if sum(side) < 0 else inside(rng, r, low=0.63)
    along = inside(rng, r)
    return [Thing(*kind, *((across, along) if side[0] else (along, across)), r)]


def lay_pair(kinds: tuple, rng: random.Random) -> list[Thing]:
    """Two objects, the first left of, right of, above or below the second, clearly so."""
    dx, dy = rng.choice(list(RELATIONS.values()))
    while True:
        r1, r2 = rng.uniform(0.16, 0.205), rng.uniform(0.16, 0.205)
        low, high = (inside(rng, r, high=0.37) for r in (r1, r2)), (inside(rng, r, low=0.63) for r in (r1, r2))
        (l1, l2), (h1, h2) = low, high
        a1, a2 = (l1, h2) if dx + dy < 0 else (h1, l2)
        b1, b2 = inside(rng, r1), inside(rng, r2)
        first, second = ((a1, b1), (a2, b2)) if dx else ((b1, a1), (b2, a2))
        things = [Thing(*kinds[0], *first, r1), Thing(*kinds[1], *second, r2)]
        if abs(b1 - b2) < 0.75 * abs(a1 - a2) and apart(things):
            return things


def lay_group(shape: str, colors: list[str], rng: random.Random) -> list[Thing]:
    """Two to four objects of one shape, anywhere; smaller when they do not fit."""
    least, most = ((0.16, 0.21), (0.145, 0.18), (0.135, 0.16))[len(colors) - 2]
    r = rng.uniform(least, most)
    while True:
        r, things = max(0.995 * r, least), []
        for color in colors:
            size = r * rng.uniform(0.95, 1.05)
            things.append(Thing(shape, color, inside(rng, size), inside(rng, size), size))
        if apart(things):
            return things


def truths(things: list[Thing]) -> list[Scene]:
    """Everything the grammar can say of a scene that training may hear, with repetitions as weights."""
    first = things[0]
    if len(things) == 1:
        sides = {
            "on the left": -first.x,
            "on the right": first.x - 1,
            "at the top": -first.y,
            "at the bottom": first.y - 1,
        }
        near = [place for place, closeness in sides.items() if closeness > -0.38]
        says = [
            Scene((Noun(first.shape, c, place=p),))
            for c in (None, first.color, first.color)
            for p in (None, *near, *near)
        ]
        return [s for s in says if allowed(s)]
    if first.shape == things[1].shape and (len(things) > 2 or first.color == things[1].color or first.x > 0.5):
        same = all(t.color == first.color for t in things)
        says = [
            Scene((Noun(first.shape, c, len(things)),)) for c in ((None, first.color, first.color) if same else (None,))
        ]
        return [s for s in says if allowed(s)]
    dx, dy = first.x - things[1].x, first.y - things[1].y
    here = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    says = []
    for (a, b), relation in ((things, here), (things[::-1], OPPOSITE[here])):
        nouns, plain = (Noun(a.shape, a.color), Noun(b.shape, b.color)), (Noun(a.shape), Noun(b.shape))
        placed = (replace(nouns[0], place=PLACE_OF[relation]), replace(nouns[1], place=PLACE_OF[OPPOSITE[relation]]))
        says += [Scene(nouns)] * 3 + [Scene(nouns, relation)] * 3 + [Scene(placed)] * 3
        says += [Scene(plain)] * 2 + [Scene(plain, relation)] if a.shape != b.shape else []
    return [s for s in says if allowed(s)]


def near_miss(scene: Scene, rng: random.Random) -> Scene:
    """A scene one word (or one exchange) away, false wherever `scene` is true of a scene of this world."""
    nouns, moves = list(scene.nouns), []
    if len(nouns) == 2:
        a, b = nouns
        if scene.relation:
            moves += [replace(scene, relation=OPPOSITE[scene.relation]), Scene((b, a), scene.relation)] * 2
        if a.place:
            moves += [Scene((replace(a, place=b.place), replace(b, place=a.place)))] * 4
        if a.color != b.color and a.shape != b.shape and a.color:
            moves += [replace(scene, nouns=(replace(a, color=b.color), replace(b, color=a.color)))] * 3
    elif nouns[0].place:
        moves += [Scene((replace(nouns[0], place=OPPOSITE[nouns[0].place]),))] * 3
    elif nouns[0].count > 1:
        moves += [Scene((replace(nouns[0], count=n),)) for n in NUMBERS.values() if n != nouns[0].count] * 2
    i = rng.randrange(len(nouns))
    change = {"shape": rng.choice([s for s in SHAPES if s not in [n.shape for n in nouns]])}
    moves.append(replace(scene, nouns=tuple(replace(n, **change) if j == i else n for j, n in enumerate(nouns))))
    if nouns[i].color:
        change = {"color": rng.choice([c for c in COLORS if c not in [n.color for n in nouns]])}
        moves.append(replace(scene, nouns=tuple(replace(n, **change) if j == i else n for j, n in enumerate(nouns))))
    miss = rng.choice(moves)
    return miss if allowed(miss) else near_miss(scene, rng)


def draw_scene(rng: random.Random) -> list[Thing]:
    """Lays out one random scene of which training may say something."""
    colors = list(COLORS)
    while True:
        kind, shape, color = rng.random(), rng.choice(SHAPES), rng.choice(colors)
        if kind < 0.25:
            things = lay_alone((shape, color), rng)
        elif kind < 0.53:
            n = rng.choice((2, 3, 3, 4, 4))
            things = lay_group(shape, [color] * n if rng.random() < 0.8 else rng.choices(colors, k=n), rng)
        else:
            while (other := (rng.choice(SHAPES), rng.choice(colors))) == (shape, color):
                pass
            things = lay_pair(((shape, color), other), rng)
        if truths(things):
            return things


def render(scenes: list[list[Thing]], generator: torch.Generator, size: int = SIZE, fine: int = 4) -> Tensor:
    """Draws scenes: (B,3,size,size) uint8, antialiased by `fine` x `fine` samples a pixel, light background, jittered colours."""
    n = len(scenes)
    tint = (
        0.9
        + 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
        + 0.03 * torch.rand(n, 3, 1, 1, generator=generator)
        - 0.03
    )
    canvas = tint.clamp(0, 1).expand(n, 3, size, size).clone()
    axis = (torch.arange(size * fine) + 0.5) / (size * fine)
    for slot in range(4):
        for shape in SHAPES:
            rows = [i for i, things in enumerate(scenes) if slot < len(things) and things[slot].shape == shape]
            if not rows:
                continue
            things = [scenes[i][slot] for i in rows]
            x, y, r = torch.tensor([(t.x, t.y, t.r) for t in things]).T[:, :, None, None]
            inside = gauge(shape, (axis[None, None, :] - x) / r, (axis[None, :, None] - y) / r) <= 1
            cover = torch.nn.functional.avg_pool2d(inside[:, None].float(), fine)  # (b,1,H,W)
            paint = torch.tensor([COLORS[t.color] for t in things])
            paint = (paint + 0.08 * torch.rand(len(rows), 3, generator=generator) - 0.04).clamp(0, 1)
            canvas[rows] = torch.lerp(canvas[rows], paint[:, :, None, None].expand(-1, -1, size, size), cover)
    return canvas.mul(255).round().byte()


def build(count: int, seed: int, captions: int = 4) -> dict:
    """A training set: images (N,3,H,W) uint8, and for each the same number of true captions and of their near misses."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scenes = [draw_scene(rng) for _ in range(count)]
    images = torch.cat([render(scenes[i : i + 256], generator) for i in range(0, count, 256)])
    true, false = [], []
    for things in scenes:
        says = rng.choices(truths(things), k=captions)
        true.append([word(s, rng) for s in says])
        false.append([word(near_miss(s, rng), rng) for s in says])
    return {"images": images, "true": true, "false": false}


def training_prompts(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts for fine-tuning, `count` a task, none held out."""
    rng, rows = random.Random(seed), {}
    while len(rows) < 6 * count:
        scene = rng.choice(truths(draw_scene(rng)))
        if sum(task == scene.task for task in rows.values()) < count:
            rows[word(scene, rng)] = scene.task
    return [{"prompt": text, "task": task} for text, task in sorted(rows.items(), key=lambda row: row[1])]


def main() -> None:
    folder = ASSETS / "prompts"
    folder.mkdir(exist_ok=True)
    for name, rows in (("heldout", HELD), ("train", training_prompts(45, seed=7))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    WORK.mkdir(parents=True, exist_ok=True)
    for name, seed in (("scenes", 1), ("reward_scenes", 2), ("clip_scenes", 3)):
        if not (WORK / f"{name}.pt").exists():
            torch.save(build(40_000, seed), WORK / f"{name}.pt")


if __name__ == "__main__":
    main()
