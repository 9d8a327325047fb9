"""Given data: items that every process can count, and their clean latents, each encoded once.

Items are taken in an order that shuffles afresh after each pass; noise and levels are drawn from the run's seed, the iteration and
the place of the item. So a collection is a function of (seed, iteration) alone, however many processes share it. As published,
denoising losses run without guidance, and the members of an item share their noise and level.

Images are resized until they cover the model's size, the middle is cut out, and they are encoded once: latents stay in memory, or
in a folder under the hash of the file, the model and the size.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards import Prompt
from rewards.files import whole
from samplers import Policy, Size
from samplers.noise import mix

from .batches import Batch, Noised
from .data import Feedback
from .drawing import LevelLaw, noised, pick
from .media import Media, fitted, latent_shapes, load_latents, load_rgb
from .rows import Record
from .sources import Run, Source

__all__ = ["Encoded", "Given", "Item", "require_shape"]

ORDER, NOISE, DROPOUT = 1, 2, 3  # what seeds are mixed for
REMEMBERED = 2**31  # bytes of latents kept in memory


class Encoded:
    """Clean latents of media, each encoded once, and by itself, so that they depend on nothing else.

    Args:
        folder: where latents are kept between runs; in memory by default, the least recently used going first.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.latents: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = self.encoded = 0

    def __call__(self, policy: Policy, images: Sequence[Media], size: Size) -> Tensor:
        """(B, C, H, W) latents on the policy's device."""
        keys = [self._key(policy, media, size) for media in images]
        wanted = dict(zip(keys, images, strict=True))
        latents = {key: found for key in wanted if (found := self._recall(key)) is not None}
        for key in [key for key in wanted if key not in latents]:
            pixels = fitted(load_rgb(wanted[key]), size)[None]  # alone: a batch would round differently
            latents[key] = policy.encode_media(pixels.to(policy.device))[0].cpu().clone()
            self._keep(key, latents[key])
            self.encoded += 1
        return torch.stack([latents[key] for key in keys]).to(policy.device)

    def _key(self, policy: Policy, media: Media, size: Size) -> str:
        model = [type(policy).__name__, policy.source, str(policy.dtype), *map(str, size)]
        return hashlib.sha256("\n".join([media.digest, *model]).encode()).hexdigest()

    def _recall(self, key: str) -> Tensor | None:
        if self.folder is not None:
            try:
                return load_file(self.folder / f"{key}.safetensors")["x0"]
            except (FileNotFoundError, SafetensorError, KeyError):  # not there yet, or damaged: it is made again
                return None
        if key in self.latents:
            self.latents.move_to_end(key)
        return self.latents.get(key)

    def _keep(self, key: str, latent: Tensor) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = {"x0": latent.contiguous()}
            whole(self.folder / f"{key}.safetensors", lambda file: save_file(kept, file), durable=False)
            return
        self.latents[key] = latent
        self.bytes += latent.nbytes
        while self.bytes > REMEMBERED:
            self.bytes -= self.latents.popitem(last=False)[1].nbytes


@dataclass(frozen=True, eq=False)
class Item:
    """What one item of a batch is made of: a record, the order of its media, and whether they are liked."""

    record: Record
    order: tuple[int, ...] = (0,)
    label: float = math.nan


class Given(Source):
    """What sources of given data have in common."""

    kind = "data"
    makes = Noised

    def __init__(self, feedback: Feedback, draws: int, t: LevelLaw, prompt_dropout: float, size, cache) -> None:
        if draws < 1:
            raise ValueError(f"draws must be ≥ 1; got {draws}")
        if t not in get_args(LevelLaw):
            raise ValueError(f"t must be one of {', '.join(get_args(LevelLaw))}; got {t!r}")
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout must lie in [0, 1]; got {prompt_dropout}")
        self.feedback, self.draws, self.prompt_dropout = feedback, draws, prompt_dropout
        self.t: LevelLaw = t
        self.size = None if size is None else tuple(size)
        self.encoded = Encoded(cache)
        self.items: list[Item] = []
        self._metrics: dict[str, float] = {}

    def settle(self, items: list[Item], path: str) -> None:
        """Takes the items, and finds out which columns they have."""
        if not items:
            raise ValueError(
                f"{path} leaves nothing to train on: {len(self.feedback)} rows, of which none is of use here"
            )
        self.items = items
        self.group_of = {p: i for i, p in enumerate(dict.fromkeys(item.record.prompt for item in items))}
        records = [item.record for item in items]
        self.columns = ("weight", "group", "keep", *self.own_columns(records, path))

    @abstractmethod
    def own_columns(self, records: Sequence[Record], path: str) -> tuple[str, ...]:
        """Which columns its batches have besides weight, group and keep."""

    def taken(self, run: Run) -> int:
        """How many items of data an iteration takes, over all processes."""
        if run.batch % self.draws:
            raise ValueError(f"batch = {run.batch} items must be a multiple of draws = {self.draws}")
        return run.batch // self.draws

    def chosen(self, run: Run, iteration: int) -> list[Item]:
        """The items of an iteration, over all processes."""
        count = self.taken(run)
        order = pick(count, iteration * count, len(self.items), mix(run.seed, ORDER))
        return [self.items[i] for i in order]

    def check(self, run: Run) -> None:
        run.world.share(self.taken(run))
        shape = run.policy.shape(self.size or run.sampling.size)
        pictures = any(item.record.images for item in self.items)
        if pictures and type(run.policy).encode_media is Policy.encode_media:
            raise ValueError(f"{type(run.policy).__name__} cannot encode images: give it latents, or another model")
        if pictures and (run.policy.modality != "image" or len(self.size or run.sampling.size) != 2):
            raise ValueError(
                f"these data are images, but the model makes {run.policy.modality} of size {run.sampling.size}"
            )
        for latents in {item.record.latents for item in self.items if not item.record.images}:
            require_shape(latents[0], "x0", shape)  # the others of a record have the same

    def collect(self, run: Run, iteration: int) -> Batch:
        chosen = self.chosen(run, iteration)
        places = range(len(chosen))[run.world.share(len(chosen))]
        mine = [chosen[i] for i in places]
        self._metrics = {"passes": (iteration + 1) * len(chosen) / len(self.items)}
        return self._noised(run, iteration, places, mine)

    def _noised(self, run: Run, iteration: int, places: range, mine: list[Item]) -> Batch:
        members = self.members
        x0 = self._clean(run, mine)
        prompts = [item.record.prompt for item in mine for _ in range(members)]
        dropped = [self._drops(mix(run.seed, DROPOUT, iteration, place)) for place in places for _ in range(members)]
        spoken = [Prompt("", p.negative) if drop else p for p, drop in zip(prompts, dropped, strict=True)]
        with torch.no_grad():
            cond = run.policy.encode(spoken).with_guidance(1.0)
        seeds = [mix(run.seed, NOISE, iteration, place) for place in places]
        rows, origin = noised(run.policy, x0, cond, seeds, members, self.draws, self.t, run.sampling.levels)
        columns = {name: values[origin] for name, values in self.columns_of(mine).items()}
        return Batch(rows, columns, tuple(prompts[i] for i in origin.tolist()), members)

    def _drops(self, seed: int) -> bool:
        return float(torch.rand((), generator=torch.Generator().manual_seed(seed))) < self.prompt_dropout

    def _clean(self, run: Run, mine: list[Item]) -> Tensor:
        """(B, …) clean latents: of the images, or read where a record has latents only."""
        policy, size = run.policy, tuple(self.size or run.sampling.size)
        pictures = [item.record.images[i] for item in mine if item.record.images for i in item.order]
        encoded = iter(self.encoded(policy, pictures, size) if pictures else ())
        dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
        rows = [
            next(encoded) if item.record.images else load_latents(item.record.latents[i], whole=False)
            for item in mine for i in item.order
        ]  # fmt: skip
        return torch.stack([row.to(policy.device, dtype) for row in rows])

    def columns_of(self, mine: list[Item]) -> dict[str, Tensor]:
        """The columns of items, one row a member."""
        rows = [(item.record, i) for item in mine for i in item.order]
        values: dict[str, list] = {
            "weight": [record.weight for record, _ in rows],
            "group": [self.group_of[record.prompt] for record, _ in rows],
            "keep": [True for _ in rows],
            "quality": [record.quality[i] if record.quality else 0.0 for record, i in rows],
            "reward": [record.scores[i] if record.scores else 0.0 for record, i in rows],
            "margin": [record.margin[i] if record.margin else 0.0 for record, i in rows],
            "label": [item.label for item in mine for _ in item.order],
        }
        return {name: torch.tensor(values[name]) for name in self.columns if name in values}

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def prompts_for_evaluation(self) -> list[Prompt]:
        return list(self.group_of)


def require_shape(media: Media, name: str, shape: Sequence[int]) -> None:
    """Raises unless a latent file holds "x0" or "latents" of this shape."""
    shapes = latent_shapes(media, verify=False)
    found = shapes.get(name) or (shapes["latents"][1:] if name == "x0" else None)
    if found != tuple(shape):
        what = "a clean latent" if name == "x0" else "a trajectory (T+1, …)"
        raise ValueError(f"{media.name} holds {found or shapes}, but {what} of this run has shape {tuple(shape)}")
