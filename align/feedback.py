"""Sources of given data: human preferences, likes and captions.

    Preferences   pairs or lists of images or of recorded trajectories   (Diffusion-DPO 2311.12908, D3PO 2311.13231, MaPO, IPO)
    Likes         single images, liked or not                            (Diffusion-KTO 2404.04465)
    Captions      images to imitate                                      (supervised fine-tuning, the winners of SePPO)

`data.py` describes the files, `given.py` says how items are drawn and images encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Literal, Optional

import torch

from rewards import Prompt
from samplers.noise import mix

from .batches import Batch, Noised, Paths, Steps
from .choices import settings_of, unlike
from .data import Feedback, read_feedback
from .drawing import LevelLaw, pick, trainable_steps, unfolded
from .given import ORDER, Given, Item, require_shape
from .media import load_latents
from .rows import Record
from .sources import Run

__all__ = ["Captions", "Likes", "Preferences"]

SETTINGS = ("model", "adapter", "kernel", "guidance", "size")  # the number of steps always matters
UNLIKED = 4  # what the order of images nobody likes is mixed for
Skippable = Literal["unlabelled", "torn", "broken"]


class Preferences(Given):
    """Human preferences: pairs, or whole lists, of images or of recorded trajectories.

    Args:
        path: .jsonl, .parquet, a folder of parquet files or a hub data set; the format is described in `align/data.py`.
        evidence: "clean" encodes the images (or takes latents where there are none) and noises them; "steps" takes recorded
            trajectories, as `sample_pairs` writes them (D3PO).
        draws: noise draws an item, for "clean".
        t: how the levels of "clean" evidence are drawn: "uniform", "logit_normal", or "sampled", those of the run's own steps.
        epochs: passes over what is collected for an update.
        ties: "drop" leaves out pairs, and lists, that nobody could tell apart; "keep" gives them equal quality.
        as_list: one item of all media of a row instead of one item a pair; all rows must have equally many.
        prompt_dropout: the share of items whose prompt is replaced by the empty one, for "clean"; 0.2 in Diffusion-DPO's code.
        timestep_fraction: of "steps": the share of the stochastic steps that is trained, drawn anew for each item and epoch.
        skip_last: of "steps": leave this many last steps out.
        size: (height, width) images are fitted to; the run's by default.
        cache: a folder that keeps encoded images between runs; memory by default.
        columns, split: of parquet; see `align/parquet.py`.
        verify: read every file before training; without it a truncated image is found when its turn comes.
        skip: kinds of unusable rows to leave out rather than raise: "unlabelled", "torn", "broken".
        ignore: settings a trajectory need not share with the run: "model", "adapter", "kernel", "guidance", "size".
    """

    def __init__(
        self,
        path: str,
        evidence: Literal["clean", "steps"] = "clean",
        draws: int = 1,
        t: LevelLaw = "uniform",
        epochs: int = 1,
        ties: Literal["drop", "keep"] = "drop",
        as_list: bool = False,
        prompt_dropout: float = 0.0,
        timestep_fraction: float = 1.0,
        skip_last: int = 0,
        size: Optional[tuple[int, int]] = None,
        cache: Optional[str] = None,
        columns: Optional[dict[str, str | list[str]]] = None,
        split: str = "train",
        verify: bool = True,
        skip: Sequence[Skippable] = ("unlabelled",),
        ignore: Sequence[str] = (),
    ) -> None:
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction must lie in (0, 1]; got {timestep_fraction}")
        if skip_last < 0 or epochs < 1:
            raise ValueError(f"skip_last must be ≥ 0 and epochs ≥ 1; got {skip_last} and {epochs}")
        if evidence not in ("clean", "steps") or ties not in ("drop", "keep"):
            raise ValueError(f'evidence is "clean" or "steps" and ties "drop" or "keep"; got {evidence!r}, {ties!r}')
        if evidence == "steps" and (draws != 1 or prompt_dropout or size is not None):
            raise ValueError(
                'draws, prompt_dropout and size are for evidence="clean"; trajectories are taken as recorded'
            )
        if unknown := set(ignore) - {*SETTINGS}:
            raise ValueError(f"ignore takes {', '.join(SETTINGS)}; got {sorted(unknown)}")
        feedback = read_feedback(path, "preferences", columns=columns, split=split, verify=verify, skip=skip)
        super().__init__(feedback, draws, t, prompt_dropout, size, cache)
        self.evidence, self.epochs, self.timestep_fraction, self.skip_last = (
            evidence,
            epochs,
            timestep_fraction,
            skip_last,
        )
        self.ignore = tuple(ignore)
        self.makes = Steps if evidence == "steps" else Noised
        counts = {len(record.quality) for record in feedback}
        if as_list and len(counts) > 1:
            raise ValueError(f"as_list needs rows of equally many media; {path} has rows of {sorted(counts)}")
        self.members = counts.pop() if as_list else 2
        wanted = [
            Item(record, order)
            for record in feedback
            for order in ([tuple(range(len(record.quality)))] if as_list else record.pairs())
            if ties == "keep" or len({record.quality[i] for i in order}) > 1
        ]
        self.settle(wanted, path)

    def own_columns(self, records: Sequence[Record], path: str) -> tuple[str, ...]:
        without = [record.line for record in records if not record.margin]
        if without and len(without) < len(records):
            raise ValueError(
                f"{path} has rows with a margin and rows without, such as line {without[0]}: give all of them one"
            )
        scored = all(record.scores for record in records)
        return ("quality", *(("reward",) if scored else ()), *(() if without else ("margin",)))

    def check(self, run: Run) -> None:
        if self.evidence == "clean":
            return super().check(run)
        run.world.share(self.taken(run))
        s = run.sampling
        if not len(trainable_steps(s.kernel, s.levels, self.skip_last)):
            raise ValueError(f"{s.kernel} leaves no stochastic step to train on: use DDIM(eta=1), or fewer skip_last")
        run_has, seen = settings_of(run.policy, s), set()
        for record in {id(item.record): item.record for item in self.items}.values():
            if not record.latents:
                raise ValueError(
                    f'line {record.line} has no trajectories "latents": sample_pairs(trajectories=True) records them'
                )
            if differ := unlike(record.settings, run_has, self.ignore):
                raise ValueError(
                    f"the trajectories of line {record.line} do not fit this run: {'; '.join(differ)}. "
                    f"Give the run what was recorded, or ignore=[…] what does not matter"
                )
            for media in record.latents:
                if media.key not in seen:
                    require_shape(media, "latents", (s.levels.steps + 1, *s.shape))
                    seen.add(media.key)

    def collect(self, run: Run, iteration: int) -> Batch:
        if self.evidence == "clean":
            return super().collect(run, iteration)
        chosen = self.chosen(run, iteration)
        mine = chosen[run.world.share(len(chosen))]
        self._metrics = {"passes": (iteration + 1) * len(chosen) / len(self.items)}
        latents = torch.stack([load_latents(item.record.latents[i], whole=True) for item in mine for i in item.order])
        prompts = [item.record.prompt for item in mine for _ in item.order]
        with torch.no_grad():
            cond = run.sampling.cond(run.policy, prompts)
        rows = Paths(latents.to(run.policy.device), cond, run.sampling.kernel, run.sampling.levels)
        return Batch(rows, self.columns_of(mine), tuple(prompts), self.members)

    def choose(self, batch: Batch, seed: int) -> Batch:
        """Unfolds trajectories into `timestep_fraction` of their trainable steps, drawn anew for each item."""
        return unfolded(batch, seed, self.timestep_fraction, self.skip_last)


class Likes(Given):
    """Images that people liked or did not, in a chosen proportion.

    Args:
        path: .jsonl, .parquet, a folder of parquet files or a hub data set; the format is described in `align/data.py`.
        of: what the file holds: "likes", or "preferences", whose images are liked if they were ever preferred, as in
            Diffusion-KTO; images that only tied are left out.
        positive_ratio: the share of liked images in every batch, up to rounding; null takes the data as they are.
        draws, t, epochs, prompt_dropout, size, cache, columns, split, verify, skip: as in `Preferences`.
    """

    def __init__(
        self,
        path: str,
        of: Literal["likes", "preferences"] = "likes",
        positive_ratio: Optional[float] = 0.8,
        draws: int = 1,
        t: LevelLaw = "uniform",
        epochs: int = 1,
        prompt_dropout: float = 0.0,
        size: Optional[tuple[int, int]] = None,
        cache: Optional[str] = None,
        columns: Optional[dict[str, str | list[str]]] = None,
        split: str = "train",
        verify: bool = True,
        skip: Sequence[Skippable] = ("unlabelled",),
    ) -> None:
        if positive_ratio is not None and not 0 <= positive_ratio <= 1:
            raise ValueError(f"positive_ratio must lie in [0, 1]; got {positive_ratio}")
        if of not in ("likes", "preferences"):
            raise ValueError(f'of is "likes" or "preferences"; got {of!r}')
        feedback = read_feedback(path, of, columns=columns, split=split, verify=verify, skip=skip)
        super().__init__(feedback, draws, t, prompt_dropout, size, cache)
        self.epochs = epochs
        rated = [Item(record, label=float(record.label)) for record in feedback if record.label is not None]
        self.settle(_ever_preferred(feedback) if of == "preferences" else rated, path)
        self.liked, self.unliked = ([item for item in self.items if item.label == which] for which in (1, 0))
        self.ratio = None if positive_ratio is None else Fraction(positive_ratio).limit_denominator(10_000)
        for name, side, needed in (
            ("liked", self.liked, self.ratio),
            ("not liked", self.unliked, self.ratio and 1 - self.ratio),
        ):
            if needed and not side:
                raise ValueError(
                    f"{path} holds no image that is {name}: pass positive_ratio=None to train on what there is"
                )

    def own_columns(self, records: Sequence[Record], path: str) -> tuple[str, ...]:
        return ("label",)

    def chosen(self, run: Run, iteration: int) -> list[Item]:
        if self.ratio is None:
            return super().chosen(run, iteration)
        count = self.taken(run)
        before = [int(self.ratio * place) for place in range(iteration * count, (iteration + 1) * count + 1)]
        liked = before[-1] - before[0]  # the n-th place is liked when ratio × n passes a whole number there
        sides = []
        for side, many, start, key in (
            (self.liked, liked, before[0], ORDER),
            (self.unliked, count - liked, iteration * count - before[0], UNLIKED),
        ):
            sides.append(iter([side[i] for i in pick(many, start, len(side), mix(run.seed, key))] if many else []))
        return [next(sides[0] if after > at else sides[1]) for at, after in pairwise(before)]


class Captions(Given):
    """Images with their captions, to imitate.

    Args:
        path: .jsonl, .parquet, a folder of parquet files or a hub data set; the format is described in `align/data.py`.
        of: what the file holds: "captions"; "preferences", of which the best image of each row that is no tie is taken; or
            "likes", of which those liked are taken. An image is taken once for each of its prompts.
        draws, t, epochs, prompt_dropout, size, cache, columns, split, verify, skip: as in `Preferences`.
    """

    def __init__(
        self,
        path: str,
        of: Literal["captions", "preferences", "likes"] = "captions",
        draws: int = 1,
        t: LevelLaw = "uniform",
        epochs: int = 1,
        prompt_dropout: float = 0.0,
        size: Optional[tuple[int, int]] = None,
        cache: Optional[str] = None,
        columns: Optional[dict[str, str | list[str]]] = None,
        split: str = "train",
        verify: bool = True,
        skip: Sequence[Skippable] = ("unlabelled",),
    ) -> None:
        if of not in ("captions", "preferences", "likes"):
            raise ValueError(f'of is "captions", "preferences" or "likes"; got {of!r}')
        feedback = read_feedback(path, of, columns=columns, split=split, verify=verify, skip=skip)
        super().__init__(feedback, draws, t, prompt_dropout, size, cache)
        self.epochs = epochs
        items = [Item(record) for record in feedback if record.label is not False]
        if of == "preferences":
            items = [
                Item(r, (i,))
                for r in feedback
                if len(set(r.quality)) > 1
                for i, q in enumerate(r.quality)
                if q == max(r.quality)
            ]
        distinct: dict[tuple[Prompt, str], Item] = {}
        for item in items:
            distinct.setdefault((item.record.prompt, item.record.media[item.order[0]].key), item)
        self.settle(list(distinct.values()), path)

    def own_columns(self, records: Sequence[Record], path: str) -> tuple[str, ...]:
        return ()


def _ever_preferred(feedback: Feedback) -> list[Item]:
    """Every image that was told apart from another, once for each prompt, and whether it was ever preferred."""
    found: dict[tuple[Prompt, str], tuple[Record, int]] = {}
    preferred: dict[tuple[Prompt, str], bool] = {}
    for record in feedback:
        for better, worse in record.pairs():
            if not record.tied(better, worse):
                for i in (better, worse):
                    key = (record.prompt, record.media[i].key)
                    found.setdefault(key, (record, i))
                    preferred[key] = preferred.get(key, False) or i == better
    return [Item(record, (i,), float(preferred[key])) for key, (record, i) in found.items()]
