"""GenEval: whether the objects that a prompt names are in the image, as many, as coloured and as placed as it says.

A detector finds objects (class, score, box, mask). What the prompt asks for stands in its `meta`, in GenEval's own format:

    {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "color": "red",
     "position": ["left of", 0]}], "exclude": [{"class": "cat", "count": 2}], "prompt": "a photo of a red cat left of a dog"}

Objects count from a score above 0.3 (0.9 for the tag "counting"), the 16 surest of a class. `correct` is the published rule: every
include clause holds, its `count` surest objects taken, and no exclude clause has `count` objects or more. Colour is CLIP's choice
among ten for the object's crop, grey outside its mask. Position is read from the boxes of every pair of the two groups: with o the
offset of their centres and d the sum of their extents, per axis,

    r = sign(o) max(|o| - 0.1 d, 0) / |o|₂      left of: r_x < -0.5    right of: r_x > 0.5    above: r_y < -0.5    below: r_y > 0.5

flow_grpo's two variants take all objects and want the number exactly. `strict` is 0 or 1, without the exclude clauses. `dense`
is the mean of 1 - |count - found| / count for every include clause; then, if that is 1, the same for the number of objects of the
right colour; then, if that is 1, 1 or 0 for the position; and 0 once for colour and position where the number was wrong.

Sources: Ghosh et al., "GenEval", 2023, arXiv 2310.11513, and its code (MIT). Liu et al., "Flow-GRPO", 2025, arXiv 2505.05470, and
its reward server (MIT). Cheng et al., "Mask2Former", 2022, arXiv 2112.01527.

Deviations: GenEval's detector is MMDetection's Mask2Former Swin-S, trained anew; its original of Meta AI is used here, with
MMDetection's sizes and scores, so single images may be judged differently. Of `dense`, one detail is not followed: a failed
position adds 0 here, 0 and 1 there. Another detector makes other numbers than GenEval's: say so where you report them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Prompt, Reward, Scores
from .loading import expand, imported, precision, pretrained, pretrained_tokenizer
from .preprocess import IMAGENET_MEAN, IMAGENET_STD, pretrained_preprocess

__all__ = ["Found", "GenEval", "Verdict", "benchmark", "judge", "relations"]

THRESHOLD, COUNTING_THRESHOLD, MOST = 0.3, 0.9, 16  # of a score; objects of a class
MARGIN, CERTAIN, TINY = 0.1, 0.5, 1e-3  # of positions
SHORT, LONG, DIVISOR, CANDIDATES = (
    800,
    1333,
    32,
    100,
)  # MMDetection's sides of the detector's input, and objects an image
GREY = 0x99 / 255
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
NAMES = (  # of COCO's classes in their order, as GenEval calls them
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,"
    "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,"
    "toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,"
    "clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
CLASSES = tuple(NAMES.split(","))


@dataclass(frozen=True, eq=False)
class Found:
    """An object that a detector found.

    Attributes:
        name: its class.
        score: how sure the detector is, 0 to 1.
        box: left, top, right and bottom in pixels, right and bottom outside.
        mask: (H, W) which pixels belong to it; None if the detector cannot tell.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


Detector = Callable[[Any], Sequence[Any]]
Colours = Callable[[Sequence[Found]], Sequence[str]]


@dataclass(frozen=True)
class Verdict:
    """What became of a prompt's clauses.

    Attributes:
        correct: GenEval's rule.
        strict: flow_grpo's rule.
        dense: flow_grpo's score.
        kinds: which clauses hold by GenEval's rule, by kind: "count", "color", "position", "exclude".
    """

    correct: bool
    strict: bool
    dense: float
    kinds: Mapping[str, Sequence[bool]]


KINDS = ("count", "color", "position", "exclude")
UNREAD = (r".*\.swin\.layernorm\..*", r"criterion\..*")  # transformers 5 has added the one; the other is for training


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a stands relative to box b: of "left of", "right of", "above" and "below" none, one or two."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    extent = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    beyond = [max(abs(o) - MARGIN * d, 0) * (1 if o > 0 else -1) for o, d in zip(offset, extent, strict=True)]
    if max(map(abs, beyond)) < TINY:
        return set()
    x, y = (value / (offset[0] ** 2 + offset[1] ** 2) ** 0.5 for value in beyond)
    holds = (x < -CERTAIN, x > CERTAIN, y < -CERTAIN, y > CERTAIN)
    return {name for name, held in zip(POSITIONS, holds, strict=True) if held}


def counted(found: Sequence[Found], counting: bool) -> dict[str, list[Found]]:
    """The objects that count, by class, the surest first."""
    least, groups = COUNTING_THRESHOLD if counting else THRESHOLD, {}
    for one in sorted(found, key=lambda one: -one.score):
        if one.score > least and len(groups.setdefault(one.name, [])) < MOST:
            groups[one.name].append(one)
    return groups


def judge(found: Sequence[Found], meta: Mapping[str, Any], colours: Colours) -> Verdict:
    """Applies the rules to what a detector found.

    Args:
        found: all objects, in any order.
        meta: the clauses, in GenEval's format.
        colours: says the colours of objects of one class.
    """
    objects = counted(found, meta.get("tag") == "counting")
    kinds: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for number, color, place in include(objects, meta["include"], colours, exact=False):
        kinds["count"].append(number == 1)
        kinds["color"] += [color == 1] if color is not None else []
        kinds["position"] += [place == 1] if place is not None else []
    for clause in meta.get("exclude", ()):
        kinds["exclude"].append(len(objects.get(clause["class"], ())) < clause["count"])
    terms, strict = [], True
    for number, color, place in include(objects, meta["include"], colours, exact=True):
        asked = [value for value in (color, place) if value is not None]
        strict &= number == 1 and all(value == 1 for value in asked)
        if number != 1:
            asked = asked[:1]
        elif color is not None and color != 1:
            asked = [color]
        terms += [number, *asked]
    return Verdict(all(map(all, kinds.values())), strict, sum(terms) / len(terms), kinds)


def include(
    objects: Mapping[str, Sequence[Found]], clauses: Sequence[Mapping[str, Any]], colours: Colours, exact: bool
) -> list[tuple[float, float | None, float | None]]:
    """How far each include clause holds, 1 fully: in number, in colour and in position; None for what it does not ask.

    Args:
        objects: by class, the surest first.
        clauses: the include clauses.
        colours: see `judge`.
        exact: whether more objects than asked for are as wrong as fewer; else the surest are taken.
    """
    outcomes, groups = [], []
    for clause in clauses:
        count, group = clause["count"], objects.get(clause["class"], [])
        group = group if exact else group[:count]
        number = 1 - abs(count - len(group)) / count
        holds = number == 1
        color = place = None
        if "color" in clause:
            color = 0.0 if not holds else 1 - (count - list(colours(group)).count(clause["color"])) / count
            holds = color == 1
        if "position" in clause:
            name, target = clause["position"]
            others = groups[target]
            holds = holds and others is not None and all(name in relations(a.box, b.box) for a in group for b in others)
            place = float(holds)
        outcomes.append((number, color, place))
        groups.append(group if holds else None)
    return outcomes


def benchmark(correct: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
    """GenEval's table: the share of correct images by tag, and "overall", the mean of those (not of the images).

    Args:
        correct: (B,) the part `correct` of the scores; NaN is left out.
        prompts: one an image, with its tag in `meta`.

    Raises:
        ValueError: a prompt has no tag, or there are more or fewer than images.
    """
    tags = [prompt.meta.get("tag") for prompt in prompts]
    if len(tags) != len(correct) or None in tags:
        raise ValueError(
            f"benchmark needs one prompt an image, each with its tag; got {len(tags)} for {len(correct)}, "
            f"{tags.count(None)} without"
        )
    rows = {tag: [i for i, t in enumerate(tags) if t == tag] for tag in dict.fromkeys(tags)}
    table = {str(tag): correct[mine].double().nanmean().item() for tag, mine in rows.items()}
    return {**table, "overall": sum(table.values()) / len(table)}


class Mask2Former(nn.Module):
    """The detector: COCO's 80 classes, found as MMDetection does."""

    def __init__(self, model: str, dtype: torch.dtype, short: int) -> None:
        super().__init__()
        from transformers import Mask2FormerForUniversalSegmentation

        self.network = pretrained(Mask2FormerForUniversalSegmentation, model, unread=UNREAD).to(dtype)
        self.short = short
        labels = self.network.config.num_labels
        if labels != len(CLASSES):
            raise ValueError(f"the detector must know COCO's {len(CLASSES)} classes; {model} knows {labels}")

    def forward(self, media: Tensor) -> list[list[Found]]:
        height, width = media.shape[-2:]
        scale = min(self.short / min(height, width), self.short * LONG / SHORT / max(height, width))
        size = [max(1, int(side * scale + 0.5)) for side in (height, width)]
        mean, std = (media.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        x = (F.interpolate(media, size, mode="bilinear", align_corners=False) - mean) / std
        x = F.pad(x, (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR))
        out = self.network(pixel_values=x.to(self.network.dtype))
        probability = out.class_queries_logits.float().softmax(-1)[..., :-1]

        def whole(mask: Tensor) -> Tensor:
            padded = F.interpolate(mask.float()[None, None], x.shape[-2:], mode="bilinear", align_corners=False)
            inside = padded[..., : size[0], : size[1]]
            return F.interpolate(inside, (height, width), mode="bilinear", align_corners=False)[0, 0]

        return [instances(p, m, whole) for p, m in zip(probability, out.masks_queries_logits, strict=True)]


def instances(probability: Tensor, masks: Tensor, whole: Callable[[Tensor], Tensor]) -> list[Found]:
    """The objects of one image: the score is that of the class times the mean of the mask inside itself.

    Args:
        probability: (Q, classes) of each query.
        masks: (Q, h, w) logits.
        whole: enlarges a mask's logits to the image.
    """
    query, label = (probability > THRESHOLD).nonzero(as_tuple=True)  # none below can reach it
    sure, best = probability[query, label].sort(descending=True)
    found, columns = [], (values[:CANDIDATES].tolist() for values in (sure, query[best], label[best]))
    for p, q, c in zip(*columns, strict=True):
        logits = whole(masks[q])
        mask = (logits > 0).cpu()
        if not bool(mask.any()):
            continue
        score = p * logits.sigmoid().cpu()[mask].mean().item()
        y, x = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        box = (int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1)
        found.append(Found(CLASSES[c], score, box, mask))
    return found


class GenEval(Reward):
    """Whether the named objects are there, as many, as coloured and as placed as the prompt says.

    Range: 0 or 1; "dense" up to 1, negative with more than twice the objects
    Size: any; the shorter side is fitted to 800
    Gradient: no
    Weights: facebook/mask2former-swin-small-coco-instance and openai/clip-vit-large-patch14
    Licence: MIT (rules, Mask2Former, CLIP)

    Prompts carry GenEval's metadata in `meta`; a .jsonl file of GenEval's or flow_grpo's is read as it is. Parts: `correct`,
    `strict` and `dense`, the three variants; `count`, `color`, `position` and `exclude`, the share of such clauses that hold, NaN
    where there is none. The benchmark's number is `rewards.geneval.benchmark`.

    Args:
        variant: which is the score; see the module docstring.
        detector: folder or hub id of a Mask2Former trained on COCO's instances; or a function, or its dotted path: an RGB PIL image
            to a list of (class, score, (left, top, right, bottom), mask or None).
        clip: folder or hub id of the CLIP that names colours, in the transformers layout.
        short: shorter side of the detector's input; the longer is at most 5/3 of it.
        dtype: type the networks run in.

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the detector knows other classes; when scoring, a prompt without clauses or with wrong ones.
    """

    differentiable = False

    def __init__(
        self,
        variant: Literal["correct", "strict", "dense"] = "correct",
        detector: str | Detector = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        *,
        short: int = SHORT,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        super().__init__()
        kind = precision(dtype)
        from transformers import CLIPModel

        if variant not in ("correct", "strict", "dense"):
            raise ValueError(f"variant must be correct, strict or dense; got {variant!r}")
        self.variant = variant
        if isinstance(detector, str) and ("/" in detector or Path(expand(detector)).is_dir()):
            self.detector: Any = Mask2Former(detector, kind, short)
        else:
            self.detector = imported(detector) if isinstance(detector, str) else detector
        self.clip = pretrained(CLIPModel, clip).to(kind)
        self.tokenizer: Any = pretrained_tokenizer(clip)
        self.preprocess = pretrained_preprocess(clip, "hard")
        self.remembered: dict[str, Tensor] = {}
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        known = CLASSES if isinstance(self.detector, Mask2Former) else None
        for prompt in prompts:
            check(prompt, known)
        media = (255 * media.float()).round().clamp(0, 255) / 255
        rows: dict[str, list[float]] = {name: [] for name in ("correct", "strict", "dense", *KINDS)}
        for image, found, prompt in zip(media, self.detect(media), prompts, strict=True):
            verdict = judge(found, prompt.meta, lambda group, image=image: self.colours(image, group))
            for name in ("correct", "strict", "dense"):
                rows[name].append(float(getattr(verdict, name)))
            for kind, held in verdict.kinds.items():
                rows[kind].append(sum(held) / len(held) if held else torch.nan)
        parts = {name: torch.tensor(values, device=media.device) for name, values in rows.items()}
        return Scores(parts[self.variant], parts)

    def detect(self, media: Tensor) -> list[list[Found]]:
        """What is in each image."""
        if isinstance(self.detector, Mask2Former):
            return self.detector(media)
        from PIL import Image

        pixels = (255 * media).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        answers = [self.detector(Image.fromarray(image)) for image in pixels]
        return [[one if isinstance(one, Found) else Found(*one) for one in found] for found in answers]

    def colours(self, image: Tensor, group: Sequence[Found]) -> list[str]:
        """The likeliest of ten colours of each object of one class."""
        crops = []
        for one in group:
            mask = None if one.mask is None else torch.as_tensor(one.mask, device=image.device)
            seen = image if mask is None else torch.where(mask, image, GREY)
            left, top, right, bottom = (round(side) for side in one.box)
            crops.append(self.preprocess(seen[None, :, max(top, 0) : bottom, max(left, 0) : right]))
        features = embedding(self.clip.get_image_features(pixel_values=torch.cat(crops).to(self.clip.dtype)))
        return [COLORS[i] for i in (features @ self.classifier(group[0].name).T).argmax(1).tolist()]

    def classifier(self, name: str) -> Tensor:
        """(10, D) unit embeddings of the colours of a class: the mean over the templates."""
        if name not in self.remembered:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
            features = embedding(self.clip.get_text_features(tokens["input_ids"], tokens["attention_mask"]))
            self.remembered[name] = F.normalize(features.unflatten(0, (len(COLORS), -1)).mean(1), dim=1)
        return self.remembered[name]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.remembered.clear()  # what was computed on another device or in another precision
        return super()._apply(fn, recurse)


def embedding(output: Any) -> Tensor:
    """Unit rows in float32."""
    return F.normalize((output if isinstance(output, Tensor) else output.pooler_output).float(), dim=1)


def check(prompt: Prompt, known: Sequence[str] | None) -> None:
    """Raises unless the clauses of a prompt can be judged."""
    clauses = prompt.meta.get("include")
    if not clauses:
        raise ValueError(
            f'GenEval needs the clauses of a prompt in its meta, {{"include": [...]}}; {prompt.text!r} has none'
        )
    for i, clause in enumerate([*clauses, *prompt.meta.get("exclude", ())]):
        wrong = [k for k in ("class", "count") if k not in clause]
        if wrong or clause["count"] < 1 or (known and clause["class"] not in known):
            raise ValueError(f"a clause needs a class of COCO and a count of at least 1; {prompt.text!r} has {clause}")
        if clause.get("color", COLORS[0]) not in COLORS:
            raise ValueError(f"color must be one of {', '.join(COLORS)}; {prompt.text!r} has {clause}")
        name, target = clause.get("position", (POSITIONS[0], -1))
        if name not in POSITIONS or target >= i:
            raise ValueError(
                f"position must be one of {', '.join(POSITIONS)} and the number of an earlier clause; {prompt.text!r} has {clause}"
            )
