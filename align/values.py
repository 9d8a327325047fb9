"""Learning a value: what the reward of a sample will be, judged at its noisy states; see `samplers.values`.

With r the reward of a sample, V what the head says at its state x_t, and D = (r − V)/β,

    mse           (r − V)²                          V = E[r | x_t]: the Monte Carlo regression of SVDD, 2408.08252
    soft          e^D − D − 1                       V = β·log E[exp(r/β) | x_t], the soft value
    preference    −log σ(V_better − V_worse)        Bradley–Terry on states of one noise and level: Flow-NRG, 2501.13918

"soft" is the exponential loss (LINEX, Varian 1975; as a Bellman loss in Extreme Q-Learning, 2301.02328). Beyond D = 5 it goes on
as its tangent, without which one lucky sample outweighs a batch: the minimum then lies below the soft value where
outcomes rarer than e⁻⁵ make most of it. Of preferences only differences are known, and the value has their unit, not the reward's.

The head is kept as it was when it explained best what is held out, so a report is a little flattered by that choice.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rewards import Prompt, Reward
from rewards.files import whole
from samplers import Kernel, Policy
from samplers.noise import mix
from samplers.values import CONFIG, FORMAT, WEIGHTS, ValueHead, early_layers, probe

from .charts import page
from .data import read_feedback
from .description import describe, describe_policy
from .pictures import INKS, LINE
from .prompts import given_prompts, world_prompts
from .results import finite, remove, reopened_folder
from .sampling import Sampling
from .states import Kind, States, StatesOf

__all__ = ["LearnedValue", "ValueConfig", "fit_value", "train_value"]

ORDER, SPLIT = 1, 2  # what seeds are mixed for
CAP = 5.0  # D beyond which "soft" is straight
EVERY = 50  # updates between looks at what is held out
ASKED, STATES, REPORT, PICTURE = "asked.json", "states.pt", "report.json", "report.png"
MOST_ESTIMATED = 128  # samples held out whose clean estimates are judged for comparison


@dataclass(frozen=True)
class ValueConfig:
    """How a value is learned.

    Attributes:
        loss: see the module.
        beta: temperature of "soft", in units of the reward.
        states: along the policy's own trajectories ("path"), or its samples noised ("diffused"); see `align/states.py`.
        samples: of each prompt.
        levels: states of each sample, at most.
        held: whether whole "prompts" are held out, or some "samples" of every prompt, for a value of these prompts alone.
        holdout: the share of them.
        layers: of the network, that are read; a UNet's middle, or the block at a third of a transformer, by default.
        hidden: widths of the head's layers.
        updates: of the head.
        batch: states, or pairs of them, an update.
        learning_rate: of AdamW at its peak; it rises and falls over the updates.
        weight_decay: of AdamW.
        rows: states that pass the network at a time; the result does not depend on it.
        seed: of samples, noise, weights, order and split.
    """

    loss: Literal["mse", "soft", "preference"] = "mse"
    beta: float = 0.1
    states: Kind = "path"
    samples: int = 4
    levels: int = 20
    held: Literal["prompts", "samples"] = "prompts"
    holdout: float = 0.2
    layers: Optional[list[str]] = None
    hidden: tuple[int, ...] = (128, 128)
    updates: int = 1500
    batch: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "levels", "updates", "batch", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1; got {getattr(self, name)}")
        if not (self.beta > 0 and self.learning_rate > 0 and self.weight_decay >= 0 and 0 < self.holdout < 1):
            raise ValueError(
                "beta and learning_rate must be > 0, weight_decay ≥ 0 and holdout in (0, 1); got "
                f"{self.beta}, {self.learning_rate}, {self.weight_decay} and {self.holdout}"
            )
        if self.loss == "preference" and self.states == "path":
            raise ValueError('loss "preference" compares states of one noise and level: take states "diffused"')
        if self.held == "samples" and self.samples < 2:
            raise ValueError("to hold out some samples of every prompt there must be at least 2 of each")


@dataclass(frozen=True)
class LearnedValue:
    """What was learned.

    Attributes:
        folder: for `samplers.LatentValue`.
        report: what report.json says.
    """

    folder: Path
    report: Mapping[str, Any]


def train_value(
    policy: Policy,
    reward: Reward | None = None,
    *,
    prompts: Sequence[str | Prompt] = (),
    preferences: str | Path | None = None,
    config: ValueConfig | None = None,
    kernel: Kernel | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> LearnedValue:
    """Learns a value for states of a policy.

    Args:
        reward: of the policy's own samples.
        prompts: of these samples, texts or files; those that come with the embedded model by default.
        preferences: .jsonl, .parquet, a folder of them or a hub data set, instead of reward and prompts.
        config: how it is learned.
        kernel, steps, guidance, size: how the policy samples; its own by default. A value belongs to them.
        out: the folder; the next free runs/NNN by default. If it holds the same run cut off, that goes on.
        overwrite: replace what is in `out`.
        progress: show bars.

    Raises:
        ValueError: arguments that do not fit each other, before any network runs; a reward that is the same for all samples.
        FileExistsError: `out` holds something else.
    """
    if config is None:
        config = ValueConfig() if preferences is None else ValueConfig(loss="preference", states="diffused")
    listed = _checked(policy, reward, prompts, preferences, config)
    sampling = Sampling.of(policy, kernel, steps, guidance, size, config.rows)
    about = _described(policy, reward, preferences, listed, sampling, config)
    layers = early_layers(policy.network) if config.layers is None else list(config.layers)
    width, recognised = probe(policy, layers)
    rows = torch.arange(len(listed)).repeat_interleave(config.samples)
    held = None if preferences is not None else _held(rows, config)
    folder = reopened_folder(out, ASKED, about, CONFIG, (WEIGHTS, REPORT, PICTURE, STATES), overwrite)
    maker = StatesOf(policy, layers, reward, sampling, config.states, config.levels, config.seed)
    if held is None:
        assert preferences is not None
        states = maker.compared(read_feedback(preferences, "preferences").records, progress)
        held = _held(states.prompt, config)
    else:
        judged = held.nonzero()[:MOST_ESTIMATED, 0].tolist()
        states = maker.sampled(listed, config.samples, set(judged), folder / STATES, progress)
    known = states.reward.isfinite() | (preferences is not None)
    train, test = states.take((known & ~held).nonzero()[:, 0]), states.take((known & held).nonzero()[:, 0])
    _enough(train, test, config)
    head, curve = fit_value(train, test, config, progress)
    report = _judged(head, test, curve) | {"unjudged": int((~known).sum()), "samples": len(states.seen)}
    _write(folder, {**about, "layers": layers, "width": width, "hidden": list(config.hidden)}, head, recognised)
    (folder / REPORT).write_text(json.dumps(finite(report), indent=1) + "\n")
    _draw(folder / PICTURE, report, config.loss)
    remove(folder, ASKED, STATES)
    return LearnedValue(folder, report)


def _described(
    policy: Policy,
    reward: Reward | None,
    preferences: str | Path | None,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    config: ValueConfig,
) -> dict[str, Any]:
    """What determines the result, as config.json keeps it."""
    how = {"kernel": describe(sampling.kernel), "steps": sampling.levels.steps, "guidance": sampling.guidance}
    return {
        "model": policy.source,
        "policy": describe_policy(policy) if policy.source else {},
        "reward": describe(reward),
        "preferences": None if preferences is None else str(preferences),
        "prompts": [p.text for p in prompts],
        "sampling": {**how, "size": list(sampling.size)},
        "fit": {k: v for k, v in asdict(config).items() if k != "rows"},
    }


def fit_value(
    train: States, test: States, config: ValueConfig, progress: bool = False
) -> tuple[ValueHead, list[tuple[int, float, float]]]:
    """A head fitted to states, and (update, loss, held-out loss) as it was learned; the weights are those of the best look.

    Raises:
        ValueError: the loss is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        head = ValueHead(train.seen.shape[-1], config.hidden)
    features = train.seen.flatten(0, 1)
    head.mean, head.std = features.mean(0), features.std(0).clamp(min=1e-6)
    if config.loss != "preference":
        head.scale = torch.stack([train.reward.mean(), train.reward.std(correction=0).clamp(min=1e-6)])
    weights = list(head.head.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(weights, config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.updates)
    curve, best, kept, total = [], math.inf, copy.deepcopy(head.head.state_dict()), 0.0
    for i in tqdm(range(config.updates), "learning", disable=not progress):
        loss = _loss(head, *_batch(train, config, i), config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if (i + 1) % EVERY == 0 or i + 1 == config.updates:
            with torch.no_grad():
                told = float(_loss(head, *_all(test, config), config))
            curve.append((i + 1, float(total) / ((i % EVERY) + 1), told))
            total = 0.0
            if told < best:
                best, kept = told, copy.deepcopy(head.head.state_dict())
    if not math.isfinite(best):
        raise ValueError(
            f"the loss of what is held out is never finite: lower learning_rate, now {config.learning_rate:g}"
        )
    head.head.load_state_dict(kept)
    return head.requires_grad_(False), curve


def _loss(head: ValueHead, seen: Tensor, reward: Tensor, config: ValueConfig) -> Tensor:
    """The mean loss of states (B, D) and rewards (B,), or of pairs of states (2, B, D)."""
    value = head(seen.flatten(0, -2)).unflatten(0, seen.shape[:-1])
    if config.loss == "preference":
        return F.softplus(value[1] - value[0]).mean()
    if config.loss == "mse":
        return ((reward - value) / head.scale[1]).square().mean()
    ahead = (reward - value) / config.beta
    bent = ahead.clamp(max=CAP)
    return (bent.exp() * (1 + ahead - bent) - ahead - 1).mean()


def _batch(states: States, config: ValueConfig, update: int) -> tuple[Tensor, Tensor]:
    """What an update sees: a function of seed and update alone."""
    draw = torch.Generator().manual_seed(mix(config.seed, ORDER, update))
    column = torch.randint(states.seen.shape[1], (config.batch,), generator=draw)
    if config.loss == "preference":
        pairs = states.pairs[torch.randint(len(states.pairs), (config.batch,), generator=draw)].T
        return states.seen[pairs, column], pairs
    rows = torch.randint(len(states.seen), (config.batch,), generator=draw)
    return states.seen[rows, column], states.reward[rows]


def _all(states: States, config: ValueConfig) -> tuple[Tensor, Tensor]:
    """Everything at once."""
    if config.loss == "preference":
        return states.seen[states.pairs.T].flatten(1, 2), states.pairs
    return states.seen.flatten(0, 1), states.reward.repeat_interleave(states.seen.shape[1])


def _checked(
    policy: Policy,
    reward: Reward | None,
    prompts: Sequence[str | Prompt],
    preferences: str | Path | None,
    config: ValueConfig,
) -> list[Prompt]:
    """The prompts, none where there are preferences."""
    if (reward is None) == (preferences is None):
        raise ValueError("a value is learned from a reward or from preferences: give one of them")
    if policy.sharded:
        raise ValueError("a value reads single layers, which a sharded network does not have: do not shard it")
    if preferences is not None:
        if config.loss != "preference" or prompts:
            raise ValueError(
                'preferences bring their own prompts, and no reward: take loss "preference" and no prompts'
            )
        if config.held == "samples":
            raise ValueError(
                'preferences come with any number of samples a prompt: hold out whole prompts, held "prompts"'
            )
        return []
    assert reward is not None
    if reward.modality != policy.modality:
        raise ValueError(f"{reward.name} scores {reward.modality}, but the model makes {policy.modality}")
    listed = given_prompts(prompts) or world_prompts(policy.world, "train")
    if not listed:
        raise ValueError("no prompts to sample: pass some, or files of them")
    return listed


def _held(prompt: Tensor, config: ValueConfig) -> Tensor:
    """(N,) which samples are held out: all of some prompts, or some of all."""
    if config.held == "samples":
        place = torch.arange(len(prompt)) - torch.searchsorted(prompt, prompt)  # among those of its prompt
        return place >= config.samples - max(1, round(config.holdout * config.samples))
    count = int(prompt.max()) + 1
    held = round(config.holdout * count)
    if not 0 < held < count:
        raise ValueError(
            f"a share of {config.holdout} of {count} prompts cannot be held out: give more prompts, or hold out samples "
            'of each, held "samples"'
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mix(config.seed, SPLIT)))
    return torch.isin(prompt, order[:held])


def _enough(train: States, test: States, config: ValueConfig) -> None:
    for part, what in ((train, "to learn from"), (test, "held out")):
        if config.loss == "preference" and not len(part.pairs):
            raise ValueError(f"no pair {what}: somebody must have preferred one of two samples of a prompt")
        if config.loss != "preference" and (len(part.seen) < 2 or part.reward.std() == 0):
            raise ValueError(f"{len(part.seen)} samples {what}, all of one reward: nothing can be learned from them")


@torch.no_grad()
def _judged(head: ValueHead, test: States, curve: list[tuple[int, float, float]]) -> dict[str, Any]:
    """How well the value foretells the reward at each level, beside the reward of the decoded clean estimate."""
    value = head(test.seen.flatten(0, 1)).unflatten(0, test.seen.shape[:2])
    report: dict[str, Any] = {"noise": test.noise.mean(0).tolist(), "curve": curve}
    lead = (value[test.pairs[:, 0]] - value[test.pairs[:, 1]]).sign()
    report["accuracy"] = ((lead + 1) / 2).mean(0).tolist()
    if bool(test.reward.isfinite().any()):
        for name, columns in {"value": value, "estimate": test.estimate}.items():
            both = [_correlations(column, test.reward, test.prompt) for column in columns.T]
            report[name], report[f"{name}_within"] = ([pair[k] for pair in both] for k in (0, 1))
    return report


def _correlations(told: Tensor, reward: Tensor, prompt: Tensor) -> tuple[float, float]:
    """Of all samples, and of their differences within prompts; NaN where there are none."""
    kept = told.isfinite() & reward.isfinite()
    told, reward, prompt = told[kept].double(), reward[kept].double(), prompt[kept]
    if len(told) < 3:
        return math.nan, math.nan
    count = torch.zeros(int(prompt.max()) + 1, dtype=torch.float64).index_add_(0, prompt, torch.ones_like(told))

    def centred(x: Tensor) -> Tensor:
        return x - (torch.zeros_like(count).index_add_(0, prompt, x) / count.clamp(min=1))[prompt]

    pairs = ((told - told.mean(), reward - reward.mean()), (centred(told), centred(reward)))
    first, second = (float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs)
    return first, second if bool((count > 1).any()) else math.nan


def _write(folder: Path, config: Mapping[str, Any], head: ValueHead, recognised: Tensor) -> None:
    """The two files of a value, the config last: without it there is none."""
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous() for k, v in {**head.state_dict(), "probe": recognised}.items()}
    for name, data in ((WEIGHTS, save(tensors)), (CONFIG, _json({"format": FORMAT, **config}))):
        whole(folder / name, lambda file, data=data: file.write_bytes(data))


def _json(value: Any) -> bytes:
    return (json.dumps(finite(value), indent=1) + "\n").encode()


def _draw(path: Path, report: Mapping[str, Any], loss: str) -> None:
    """The loss as it was learned, and how well the reward is foretold at each level."""
    below = f"{report['samples']} samples. Within prompts: of differences from the mean of a prompt's samples."
    with page(path, "What the value knows of the reward", below, (10.4, 4.6), 2) as axes:
        updates, learned, held = zip(*report["curve"], strict=True)
        axes[0].set_title(f"Loss ({loss})")
        axes[0].plot(updates, learned, color=LINE, linewidth=2.0, label="learned from")
        axes[0].plot(updates, held, color=INKS["optimised"], linewidth=1.6, label="held out")
        axes[0].set_xlabel("updates")
        axes[0].legend()
        lines = {"value": ("value", INKS["optimised"]), "estimate": ("reward of the clean estimate", INKS["judge"])}
        drawn = {name: told for name, told in lines.items() if name in report}
        for name, (label, ink) in drawn.items():
            for key, dashes in ((f"{name}_within", "-"), (name, ":")):
                points = [(n, v) for n, v in zip(report["noise"], report[key], strict=True) if v == v]
                axes[1].plot(
                    *zip(*points, strict=True), dashes, color=ink, marker=".", label=label if dashes == "-" else None
                )
        if not drawn:
            axes[1].plot(report["noise"], report["accuracy"], color=INKS["optimised"], marker=".")
        axes[1].set_title("Correlation with the reward, held out" if drawn else "Accuracy on pairs, held out")
        axes[1].set_xlabel(
            "share of noise; solid: within prompts, dotted: of all samples" if drawn else "share of noise"
        )
        axes[1].set_xlim(1, 0)
        if drawn:
            axes[1].legend(loc="lower right")
