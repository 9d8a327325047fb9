"""A reward learned from preferences, and the folder it lives in.

    config.json         the encoder (a reward of this package and its arguments), the head, who is known, and the calibration
    model.safetensors   "head.*", "codes" (U, code), "reference" (features of some samples), "probe", and "encoder.*" where a LoRA
                        was trained on the encoder

`kilter train-reward` writes such folders. A score is (r - mean) / std, both taken over the samples the reward was trained on, for
each member of an ensemble and each person known: rewards for different people otherwise differ in scale. Sample a is preferred to b
with probability sigmoid((score_a - score_b) / T); "temperature" in config.json is T, fitted on pairs held out.

The probe is what the encoder said of two pictures when the head was trained. If it says something else now, other weights or other
processing stand behind the same name, and the folder is refused: the head would score at random.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from . import heads
from .base import Features, Prompt, Reward, Scores
from .files import whole
from .heads import Head
from .loading import expand, fill, imported, loading, read_weights
from .specimens import example

__all__ = ["Learned", "add_lora", "encoded", "probe", "write_learned"]

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
ANYONE = 0  # the row of the calibration for the average of all people
ALIKE = 0.05  # relative distance of probes that half precision explains


class Learned(Reward):
    """A reward learned from preferences by `kilter train-reward`, for everyone or for one person.

    Range: z-scores over the samples it was trained on; 0 is average there
    Size: its encoder's
    Gradient: as its encoder
    Weights: its folder, or owner/name on the hub in the same layout
    Licence: of the data and the encoder it was trained on

    Of a reward that knows people, each row is scored for `user`, else for `prompt.meta["annotator"]`, else for the average of all
    people; NaN for a person it does not know. `parts` holds the members of an ensemble and their "spread", and "sigma" where the
    head says how sure it is.

    Args:
        model: the folder or hub id.
        user: the person to score for.
        member: of an ensemble, the one to score by; None takes their mean.
        encoder: in place of the recorded one, where that lies elsewhere now or is a class of your own.

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the weights do not fill the head, the encoder is not the one it was trained on, or there is no such user or
            member.
    """

    codes: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, model: str, user: Optional[str] = None, member: Optional[int] = None, encoder: Optional[Reward] = None
    ) -> None:
        super().__init__()
        with loading(model, f"{CONFIG} and {WEIGHTS}, as kilter train-reward writes them"):
            folder = _folder(model)
            config = json.loads((folder / CONFIG).read_text())
            weights = read_weights(folder / WEIGHTS)
        if config.get("format") != FORMAT:
            raise ValueError(
                f"{model} has format {config.get('format')!r}; this version reads {FORMAT}: train it again, or update"
            )
        self.folder, self.config = str(folder), config
        self.users: list[str] = config["users"]
        self.head = _head(config["head"], model).shape(*config["widths"])
        self.encoder = encoder if encoder is not None else _encoder(config["encoder"], model)
        if lora := config.get("lora"):
            self.encoder = copy.deepcopy(self.encoder) if encoder is not None else self.encoder
            add_lora(self.encoder, **lora)
        self._take(weights, model)
        self.user, self.member = self._known(user), member
        if member is not None and not 0 <= member < self.head.members:
            raise ValueError(f"{model} has members 0 to {self.head.members - 1}; got member {member}")
        self.modality, self.differentiable = self.encoder.modality, self.encoder.differentiable
        self.needs_prompt = self.encoder.needs_prompt
        self.freeze()
        recorded, now = weights["probe"], probe(self.encoder)
        if recorded.shape != now.shape or (recorded - now).norm() > ALIKE * recorded.norm():
            raise ValueError(
                f"{self.encoder.name} is not the encoder {model} was trained on: it sees other features. Pass the right one as "
                "encoder=, or train again"
            )

    def _take(self, weights: Mapping[str, Tensor], model: str) -> None:
        own = {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
        fill(self.head, {k[5:]: v for k, v in weights.items() if k.startswith("head.")}, model)
        adapters = {f"encoder.{k}": v for k, v in self.encoder.state_dict().items() if "lora_" in k}
        if set(own) != set(adapters):
            raise ValueError(
                f"{model} holds adapters for {sorted(own)[:4]}, but its encoder takes {sorted(adapters)[:4]}"
            )
        self.encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in own.items()}, strict=False)
        self.register_buffer("codes", weights["codes"].float())
        joint, _ = self.config["widths"]
        self.reference = Features(weights["reference"][:, :joint], weights["reference"][:, joint:])
        self.register_buffer("mean", torch.tensor(self.config["mean"]), persistent=False)  # (K, 1 + U)
        self.register_buffer("std", torch.tensor(self.config["std"]), persistent=False)

    def _known(self, user: str | None) -> int | None:
        """The row of a person in the calibration."""
        if user is None:
            return None
        if user not in self.users:
            some = ", ".join(self.users[:8]) or "nobody: it scores alike for everyone"
            raise ValueError(
                f"{self.folder} knows no {user!r}; it knows {some}; judged pairs of theirs add one (--adapt)"
            )
        return 1 + self.users.index(user)

    @property
    def name(self) -> str:
        told = [f"user={self.users[self.user - 1]}"] if self.user else []
        told += [f"member={self.member}"] if self.member is not None else []
        return f"Learned({', '.join(told)})" if told else "Learned"

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        seen = self.encoder.embed(media, prompts)
        people, unknown = self.people(prompts, len(media))
        raw = self.head(seen, self.codes_of(people))
        mean, std = (t[:, people.to(t.device)] for t in (self.mean, self.std))  # (K, B)
        scores = (raw.mean - mean) / std
        scores = torch.where(unknown.to(scores.device), torch.nan, scores) if bool(unknown.any()) else scores
        parts = {f"member_{k}": row for k, row in enumerate(scores)} if len(scores) > 1 else {}
        if len(scores) > 1:
            parts["spread"] = scores.detach().std(dim=0)
        if raw.variance is not None:
            parts["sigma"] = (raw.variance.sqrt() / std).mean(dim=0)
        return Scores(scores.mean(dim=0) if self.member is None else scores[self.member], parts)

    def people(self, prompts: list[Prompt], count: int) -> tuple[Tensor, Tensor]:
        """(B,) rows of the calibration, and (B,) who is not known, both on the CPU."""
        if self.user is not None or not self.users or not prompts:
            return torch.full((count,), self.user or ANYONE), torch.zeros(count, dtype=torch.bool)
        rows = {str(user): 1 + row for row, user in enumerate(self.users)}
        asked = [p.meta.get("annotator") for p in prompts]
        found = [ANYONE if who is None else rows.get(str(who), -1) for who in asked]
        return torch.tensor(found).clamp(min=0), torch.tensor(found) < 0

    def codes_of(self, people: Tensor) -> Tensor | None:
        """(B, code) of people by their rows, or None for a head that scores alike for everyone."""
        if not self.head.code:
            return None
        return torch.cat([self.codes.mean(dim=0, keepdim=True), self.codes])[people.to(self.codes.device)]


def encoded(encoder: Reward, media: Tensor, prompts: Sequence[Prompt]) -> Features:
    """The features of checked media, in float32 at least; of the graph where gradients are on."""
    encoder.check(media)
    with torch.autocast(media.device.type, enabled=False):
        seen = encoder.embed(media, list(prompts))
    return Features(*(t if t.dtype == torch.float64 else t.float() for t in seen))


@torch.no_grad()
def probe(encoder: Reward) -> Tensor:
    """(2, D) what an encoder sees in two pictures made by rule."""
    media, prompts = example(encoder)
    device = next((p.device for p in encoder.parameters()), media.device)
    return encoded(encoder, media[:2].to(device), prompts[:2]).joint.float().cpu()


def add_lora(encoder: Reward, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Puts low-rank adapters on layers of an encoder; at first they change nothing.

    Args:
        targets: full names of linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))  # pyright: ignore
    inject_adapter_in_model(config, encoder)
    for name, parameter in encoder.named_parameters():
        if "lora_" in name:  # learned in full precision over a base of any
            parameter.data = parameter.data.float()
    encoder.freeze()


def write_learned(
    folder: Path, config: Mapping[str, Any], head: Head, encoder: Reward, codes: Tensor, reference: Features
) -> None:
    """Writes the folder's two files, each whole or not at all, the config last: without it there is no reward.

    Args:
        config: all of config.json but "format".
        codes: (U, code).
        reference: by which people who come later are standardised.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {f"head.{k}": v for k, v in head.state_dict().items()}
    tensors |= {f"encoder.{k}": v for k, v in encoder.state_dict().items() if "lora_" in k}
    tensors |= {"codes": codes, "reference": torch.cat(reference, dim=1), "probe": probe(encoder)}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (
        (WEIGHTS, save(tensors)),
        (CONFIG, (json.dumps({"format": FORMAT, **config}, indent=1) + "\n").encode()),
    ):
        whole(folder / name, lambda file, data=data: file.write_bytes(data))


def _folder(model: str) -> Path:
    """The folder of a name; hub ids are downloaded."""
    folder = Path(expand(model))
    if folder.is_dir() or model.count("/") != 1 or folder.is_absolute():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=[CONFIG, WEIGHTS]))


def _head(description: Mapping[str, Any], model: str) -> Head:
    """The recorded head."""
    path = description["class_path"]
    cls = getattr(heads, path.removeprefix(f"{heads.__name__}."), None)
    if not (isinstance(cls, type) and issubclass(cls, Head) and cls is not Head):
        raise ValueError(f"{model} has a head {path}, which this version does not know: train it again, or update")
    return cls(**description["init_args"])


def _encoder(description: Mapping[str, Any], model: str) -> Reward:
    """The recorded encoder; a class of this package that shows features, so that a folder runs no one else's code."""
    path = description["class_path"]
    cls = imported(path) if path.startswith(f"{__package__}.") else None
    if not (isinstance(cls, type) and issubclass(cls, Reward) and cls.embed is not Reward.embed):
        raise ValueError(
            f"{model} was trained on {path}, which is not a reward of kilter: make it and pass it as encoder="
        )
    try:
        return cls(**description["init_args"])
    except OSError as error:
        raise OSError(
            f"the encoder of {model} cannot be loaded; if it lies elsewhere now, pass it as encoder=: {error}"
        ) from error


def linear_layers(module: nn.Module) -> list[str]:
    """Full names of the plain linear layers; of a dual encoder, those of its image tower, whose text embeddings are remembered."""
    names = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    return [n for n in names if "visual" in n or "vision" in n] if hasattr(module, "text_features") else names
