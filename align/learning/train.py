"""`train_reward`: preferences in, a folder that `rewards.Learned` reads out.

The folder holds, beside what `rewards/learned.py` describes, report.json and report.png. While a run is on it also holds what was
asked, the features and the state of the fit; the same command goes on from there.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rewards import Reward
from rewards.heads import MLP, Head
from rewards.learned import CONFIG, WEIGHTS, add_lora, linear_layers, write_learned

from ..data import Columns, Feedback, read_feedback
from ..description import describe
from ..results import finite, remove, reopened_folder
from ..scorer import device_of
from .calibration import Calibration, calibrate, said
from .data import Comparisons, compare, digest, split
from .encodings import Cached, Encodings, Live, encode, pixels
from .fit import Fit, FitConfig, fit
from .losses import BradleyTerry, Loss
from .people import check_people, people_of
from .report import curve, draw, judged, temperature_of

__all__ = ["LearnedReward", "train_reward"]

ASKED, STATE, FEATURES = "asked.json", "fit.pt", "features-*.safetensors"  # of a run that is not done
REPORT, PICTURE = "report.json", "report.png"
REFERENCE = 4096  # samples that scores are standardised by
KEPT = 256  # of those, for people who come later
UNIMPORTANT = ("save_seconds", "encode_batch")  # settings that change no result


@dataclass(frozen=True)
class LearnedReward:
    """What was learned.

    Attributes:
        folder: for `rewards.Learned`.
        report: what report.json says.
    """

    folder: Path
    report: Mapping[str, Any]


def train_reward(
    preferences: str | Path,
    encoder: Reward,
    *,
    head: Head | None = None,
    loss: Loss | None = None,
    config: FitConfig | None = None,
    heldout: str | Path | None = None,
    gold: Reward | None = None,
    out: str | Path | None = None,
    cache: str | Path | None = None,
    columns: Columns | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> LearnedReward:
    """Learns a reward from preferences.

    Args:
        preferences: .jsonl, .parquet, a folder of parquet files or a hub data set; `align/data.py` describes the format.
        encoder: what the head reads; it stays as it is (a LoRA is trained on a copy).
        head: how features become a score; `MLP()` by default.
        loss: `BradleyTerry()` by default.
        config: how it is fitted.
        heldout: preferences on other prompts, to judge the reward by when all is decided. Without them it is judged by the prompts
            that also decided when to stop, which flatters it a little.
        gold: a reward known to be right, on the device it is on, which tells how far the learned one can be trusted as it is
            optimised.
        out: the folder; the next free runs/NNN by default. If it holds the same run cut off, that goes on.
        cache: a folder that keeps what the encoder sees for other runs; by default it is kept until the run is done.
        columns: of parquet; see `align/parquet.py`.
        overwrite: replace what is in `out`.
        progress: show bars.

    Raises:
        ValueError: the data, head, loss and encoder do not fit each other; raised before anything is fitted.
        FileExistsError: `out` holds something else.
    """
    head, loss, config = copy.deepcopy(head or MLP()), loss or BradleyTerry(), config or FitConfig()
    if loss.needs_variance and not getattr(head, "variance", False):
        raise ValueError(f"{type(loss).__name__} needs a head that says how sure it is: MLP(variance=True)")
    if encoder.modality != "image":
        raise ValueError(f"preferences are about images; {encoder.name} looks at {encoder.modality}")
    if gold is not None and (gold.modality != "image" or gold.compares):
        why = "compares pictures with one another" if gold.compares else f"looks at {gold.modality}"
        raise ValueError(f"gold must score each picture by itself; {gold.name} {why}")
    feedback = [read_feedback(p, "preferences", columns=columns) for p in (preferences, heldout) if p is not None]
    train, held, test = _divided(feedback, config)
    check_people(head, train)
    first = encode(encoder, train.samples[:1]).all
    head.shape(first.joint.shape[1], first.prompt.shape[1], config.seed)
    about = _described(feedback, encoder, head, loss, config)
    folder = reopened_folder(out, ASKED, about, CONFIG, (WEIGHTS, REPORT, PICTURE, STATE, FEATURES), overwrite)
    encoder, lora = _adapted(encoder, config)
    learner = _Learner(folder, folder if cache is None else Path(cache).expanduser(), encoder, head, config, progress)
    encodings = learner.encodings(train, lora is not None)
    people = people_of(head, train, encodings, config.seed)
    adapters = {name: p for name, p in encoder.named_parameters() if "lora_" in name}
    result = fit(head, people, loss, train, held, encodings, config, adapters, folder / STATE, progress)
    if not isinstance(encodings, Cached):
        encodings = encode(encoder, train.samples, config.encode_batch, None, progress)
    with torch.no_grad():
        codes, reference = people.final(), learner.reference(train)
        calibration = calibrate(head, encodings(reference), codes)
        report = learner.report(calibration, codes, encodings, held, test, result, gold)
    few = encodings(reference[:: -(-len(reference) // KEPT)])
    about |= {
        "lora": lora,
        "widths": [t.shape[1] for t in few],
        "users": list(train.users) if head.code else [],
        "mean": calibration.mean.tolist(),
        "std": calibration.std.tolist(),
        "temperature": finite(report["temperature"]),
    }
    write_learned(folder, about, head, encoder, codes, few)
    remove(folder, ASKED, STATE, FEATURES)
    return LearnedReward(folder, report)


@dataclass(frozen=True)
class _Learner:
    """What the steps of a run share."""

    folder: Path
    cache: Path
    encoder: Reward
    head: Head
    config: FitConfig
    progress: bool

    def reference(self, data: Comparisons) -> Tensor:
        """The samples by which features and scores are standardised."""
        samples = data.rows.unique()
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(self.config.seed))
        return samples[order[:REFERENCE]].sort().values

    def encodings(self, data: Comparisons, live: bool) -> Encodings:
        """The features, by which the head standardises what it reads."""
        batch, reference = self.config.encode_batch, self.reference(data)
        if live:  # an adapter begins without effect, so these are the frozen encoder's
            seen = encode(self.encoder, [data.samples[i] for i in reference.tolist()], batch, None, self.progress).all
            encodings: Encodings = Live(self.encoder, data.samples, batch)
        else:
            encodings = encode(self.encoder, data.samples, batch, self.cache, self.progress)
            seen = encodings(reference)
        self.head.fit_to(seen)
        return encodings

    def report(
        self,
        calibration: Calibration,
        codes: Tensor,
        encodings: Cached,
        held: Comparisons,
        test: Comparisons,
        result: Fit,
        gold: Reward | None,
    ) -> dict[str, Any]:
        """Judges by the test pairs, at the temperature of those held out; writes report.json and report.png."""
        scores, _ = self.scores(calibration, codes, encodings, held)
        temperature = temperature_of(scores, held)
        report = judged(
            *self.scores(calibration, codes, encodings, test), test, encodings.brightness[test.rows], temperature
        )
        report["judged_by"] = "pairs that decided when to stop" if test is held else "pairs that decided nothing"
        if gold is not None:
            report["gold"] = gold.name
            report["best_of_n"] = self.trusted(calibration, codes, encodings, test, gold)
        report |= {"epochs": len(result.curve), "kept": result.best + 1, "losses": result.curve}
        (self.folder / REPORT).write_text(json.dumps(finite(report), indent=1) + "\n")
        draw(self.folder / PICTURE, report, result.curve, result.best)
        return report

    def scores(
        self, calibration: Calibration, codes: Tensor, encodings: Cached, data: Comparisons
    ) -> tuple[Tensor, Tensor]:
        """(R,) of the rows, for whoever judged them: calibrated, and before."""
        people = data.people if self.head.code else torch.full_like(data.people, -1)
        raw = said(self.head, encodings(data.rows), codes, people).mean
        return calibration(raw, people).mean(dim=0), raw.mean(dim=0)

    def trusted(
        self, calibration: Calibration, codes: Tensor, encodings: Cached, held: Comparisons, gold: Reward
    ) -> dict[str, list[float]]:
        """Best of n by the learned reward, for the average of all people, judged by gold."""
        samples, at = held.rows.unique(return_inverse=True)
        prompt = torch.zeros(len(samples), dtype=torch.long).scatter_(0, at, held.prompt[held.record])
        nobody = torch.full((len(samples),), -1)
        proxy = calibration(said(self.head, encodings(samples), codes, nobody).mean, nobody).mean(dim=0)
        device = device_of([gold])
        with torch.no_grad():
            found = [
                gold(pixels(encodings.samples[i])[None].to(device), [encodings.samples[i].prompt])
                for i in tqdm(samples.tolist(), desc=gold.name, unit="image", disable=not self.progress)
            ]
        return curve(proxy, torch.cat(found).cpu(), prompt)


def _divided(feedback: Sequence[Feedback], config: FitConfig) -> tuple[Comparisons, Comparisons, Comparisons]:
    """What to learn from, what decides when to stop, and what to judge by, over the same samples and people."""
    data = compare([record for part in feedback for record in part])
    own = data.take(torch.arange(len(feedback[0])))
    train, held = split(own, config.holdout, config.seed)
    test = held if len(feedback) == 1 else data.take(torch.arange(len(own), len(data)))
    if shared := len(set(own.prompt.tolist()) & set(test.prompt.tolist())) if test is not held else 0:
        raise ValueError(f"{shared} prompts are in both files: what is held out must be new")
    for part, what, remedy in (
        (train, "to learn from", "add pairs that somebody could tell apart"),
        (held, "held out", "hold out more"),
        (test, "held out", "add pairs that somebody could tell apart"),
    ):
        if bool(part.tied.all()):
            raise ValueError(f"every pair {what} is a tie: {remedy}")
    return train, held, test


def _described(
    feedback: Sequence[Feedback], encoder: Reward, head: Head, loss: Loss, config: FitConfig
) -> dict[str, Any]:
    """What determines the result, as config.json keeps it."""
    return {
        "encoder": describe(encoder),
        "head": _whole(head),
        "loss": _whole(loss),
        "fit": {k: v for k, v in asdict(config).items() if k not in UNIMPORTANT},
        "data": [{"sha256": digest(part.records), "records": len(part)} for part in feedback],
    }


def _whole(component: Any) -> dict[str, Any]:
    """A component with all its arguments, so that other defaults later do not change what was trained."""
    signature = inspect.signature(type(component).__init__).parameters.values()
    defaults = {p.name: p.default for p in signature if p.default is not p.empty}
    told = describe(component)
    return {**told, "init_args": describe(defaults) | told["init_args"]}


def _adapted(encoder: Reward, config: FitConfig) -> tuple[Reward, dict[str, Any] | None]:
    """The encoder, or a copy of it with a LoRA and what that is."""
    if not config.lora:
        return encoder, None
    targets = linear_layers(encoder)
    if not targets:
        raise ValueError(f"{encoder.name} has no linear layers for a LoRA: train its head alone, with lora 0")
    lora = {"rank": config.lora, "alpha": float(config.lora), "targets": targets}
    encoder = copy.deepcopy(encoder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # not those of accelerators, which are not forked
        add_lora(encoder, **lora)
    return encoder, lora
