"""Heads: what turns an encoder's features into a score, for everyone or for one person.

With x the features of a sample and its prompt, standardised over the training set, c those of the prompt alone and u a person:

    MLP        r(x)                                                       K members side by side, each from its own seed
    PAL, A     -|f(x) - a_u|  or  τ cos(f(x), a_u),   a_u = Σ_k w_uk f(P_k)       w_u = softmax of K numbers a person
    PAL, B     the same with the ideal point of the prompt,   a_u = Σ_k w_uk g_k(c)
    VPL        r([x; z_u]),   z_u = q(pairs u has judged)                 an encoder reads the pairs: nothing is fitted for a person

What stands for a person is one vector, the code: the logits of w_u, or z_u. A person never met before gets one from a few judged
pairs by `infer`. `align/learning` trains heads, `Learned` uses them.

Sources. Chen et al., "PAL: Pluralistic Alignment Framework", 2024, arXiv 2406.08469, and its code: two-layer f and g with GELU,
width 512, 2 prototypes, τ = exp of a number that begins at ln(1/0.07) and is at most 100. Poddar et al., "Personalizing RLHF with
Variational Preference Learning", 2024, arXiv 2408.10075, and its code: LeakyReLU(0.2), one attention without mask over the pairs,
mean and log-variance clamped to [-1, 1], z rescaled to length sqrt(Z) in training and not in evaluation. A head with `variance`:
Siththaranjan et al., "Distributional Preference Learning", 2023, arXiv 2312.08358.

Deviations. PAL fits w_u of a new person by descent until stopped, which ends in a corner when few pairs agree; `infer` finds the
maximum of the posterior, with a Gaussian over the logits of the people known, at least as wide as their beginning. VPL's pairs
attend to one another in any order, so its codes do not depend on the order of pairs.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Configurable, Features

__all__ = ["MLP", "PAL", "VPL", "Head", "Raw"]

STEEPEST = 100.0  # τ of PAL's angles, as in CLIP
SLOPE = 0.2  # of VPL's LeakyReLU


class Raw(NamedTuple):
    """What a head says of B samples.

    Attributes:
        mean: (K, B), one row a member.
        variance: (K, B), or None where the head does not say how sure it is.
    """

    mean: Tensor
    variance: Tensor | None = None


class Head(Configurable, nn.Module, ABC):
    """Scores features; its constructor says what it is, `shape` makes its weights.

    Attributes:
        code: the length of the vector that stands for a person; 0 where all are scored alike.
        members: how many scores it gives.
    """

    code: int = 0
    members: int = 1

    def shape(self, joint: int, prompt: int, seed: int = 0) -> Head:
        """Makes the weights, deterministically, for features of these widths."""
        self.register_buffer("centre", torch.zeros(joint + prompt))
        self.register_buffer("spread", torch.ones(joint + prompt))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not those of accelerators, which are not forked
            self.make(joint, prompt)
        return self

    def fit_to(self, seen: Features) -> None:
        """Takes the mean and spread of features, by which all are standardised; what never changes is left as it is."""
        spread, centre = torch.std_mean(torch.cat(seen, dim=1).double(), dim=0, correction=0)
        self.centre.copy_(centre)  # pyright: ignore
        self.spread.copy_(torch.where(spread > 1e-6 * (1 + centre.abs()), spread, 1.0))  # pyright: ignore

    def standard(self, seen: Features) -> tuple[Tensor, Tensor]:
        """(joint, prompt) standardised, in the head's own precision."""
        together = (torch.cat(seen, dim=1).to(self.centre) - self.centre) / self.spread  # pyright: ignore
        return together[:, : seen.joint.shape[1]], together[:, seen.joint.shape[1] :]

    def forward(self, seen: Features, codes: Tensor | None = None) -> Raw:
        """Scores (K, B); `codes` (B, code) says for whom."""
        return self.judge(*self.standard(seen), codes)

    @abstractmethod
    def make(self, joint: int, prompt: int) -> None:
        """Makes the weights from the global generator."""

    @abstractmethod
    def judge(self, joint: Tensor, prompt: Tensor, codes: Tensor | None) -> Raw:
        """Scores standardised features."""

    def infer(self, better: Features, worse: Features, known: Tensor) -> Tensor:
        """The code (code,) of a person from the pairs they have judged, given the codes (U, code) of others."""
        raise TypeError(f"{type(self).__name__} scores alike for everyone: choose PAL or VPL")


class MLP(Head):
    """A multilayer perceptron, or several side by side, alike for everyone.

    Args:
        hidden: widths of the layers between; none makes it linear.
        members: scores from as many seeds: an ensemble trained in one go.
        variance: also says how sure it is, for the loss `Distributional`.
    """

    def __init__(self, hidden: Sequence[int] = (128,), members: int = 1, variance: bool = False) -> None:
        super().__init__()
        if members < 1 or any(width < 1 for width in hidden):
            raise ValueError(f"members and the widths in hidden must be at least 1; got {members} and {list(hidden)}")
        self.hidden, self.members, self.variance = tuple(hidden), members, variance

    def make(self, joint: int, prompt: int) -> None:
        widths = [joint, *self.hidden, 1 + self.variance]
        shapes = list(itertools.pairwise(widths))
        self.weights = nn.ParameterList(torch.randn(self.members, a, b) * a**-0.5 for a, b in shapes)
        self.biases = nn.ParameterList(torch.zeros(self.members, 1, b) for _, b in shapes)

    def judge(self, joint: Tensor, prompt: Tensor, codes: Tensor | None) -> Raw:
        x = joint[None]  # (1, B, D) -> (K, B, width)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (F.gelu(x) if layer else x) @ weight + bias
        return Raw(x[..., 0], F.softplus(x[..., 1]) + 1e-4 if self.variance else None)


class PAL(Head):
    """Ideal points: a person is a mixture of a few prototypes, and likes what lies near theirs.

    Args:
        prototypes: how many.
        width: of the space in which distances are taken.
        kind: "dist", minus the distance; "angle", the scaled cosine.
        ideal: where prototypes are mixed: "f(P)w" after the network, "f(Pw)" before it, "Pw" without it, "|f(P)|w" on the sphere.
        by_prompt: ideal points are read from the prompt (PAL-B) and not constant (PAL-A); needs an encoder that embeds prompts by
            themselves, such as CLIPScore. Then `ideal` says nothing.
    """

    def __init__(
        self,
        prototypes: int = 2,
        width: int = 512,
        kind: Literal["dist", "angle"] = "dist",
        ideal: Literal["f(P)w", "f(Pw)", "Pw", "|f(P)|w"] = "f(P)w",
        by_prompt: bool = False,
    ) -> None:
        super().__init__()
        if prototypes < 1 or width < 1:
            raise ValueError(f"prototypes and width must be at least 1; got {prototypes} and {width}")
        for word, value, known in (
            ("kind", kind, ("dist", "angle")),
            ("ideal", ideal, ("f(P)w", "f(Pw)", "Pw", "|f(P)|w")),
        ):
            if value not in known:
                raise ValueError(f"{word} must be one of {', '.join(known)}; got {value!r}")
        self.code, self.width, self.kind, self.ideal, self.by_prompt = prototypes, width, kind, ideal, by_prompt

    def make(self, joint: int, prompt: int) -> None:
        if self.by_prompt and not prompt:
            raise ValueError(
                "PAL(by_prompt=True) needs an encoder that embeds prompts by themselves, such as CLIPScore"
            )
        self.f = _layers((joint, self.width, self.width), nn.GELU)
        if self.by_prompt:
            self.g = nn.ModuleList(_layers((prompt, self.width, self.width), nn.GELU) for _ in range(self.code))
        else:
            self.prototypes = nn.Parameter(torch.randn(self.code, self.width if self.ideal == "Pw" else joint))
        if self.kind == "angle":
            self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def judge(self, joint: Tensor, prompt: Tensor, codes: Tensor | None) -> Raw:
        if codes is None:
            raise ValueError("PAL scores for a person: pass codes")
        point, ideal = self.f(joint), self.ideal_points(prompt, codes.softmax(dim=-1))
        if self.kind == "dist":
            return Raw(-torch.linalg.vector_norm(point - ideal, dim=-1)[None])
        return Raw((self.scale.exp().clamp(max=STEEPEST) * F.cosine_similarity(point, ideal, dim=-1))[None])

    def ideal_points(self, prompt: Tensor, weights: Tensor) -> Tensor:
        """(B, width) of people who mix the prototypes by `weights` (B, prototypes)."""
        if self.by_prompt:
            return torch.einsum("bk,bkw->bw", weights, torch.stack([g(prompt) for g in self.g], dim=1))
        if self.ideal in ("Pw", "f(Pw)"):
            mixed = weights @ self.prototypes
            return mixed if self.ideal == "Pw" else self.f(mixed)
        points = self.f(self.prototypes)
        return weights @ (F.normalize(points, dim=-1) if self.ideal == "|f(P)|w" else points)

    def infer(self, better: Features, worse: Features, known: Tensor) -> Tensor:
        centre = known.mean(dim=0)
        spread = known.std(dim=0, correction=0).clamp(min=1.0)  # logits begin as standard normal
        code = centre.detach().clone().requires_grad_()
        descent = torch.optim.LBFGS([code], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            descent.zero_grad()
            lead = (
                self(better, code.expand(len(better.joint), -1)).mean
                - self(worse, code.expand(len(worse.joint), -1)).mean
            )
            loss = -F.logsigmoid(lead).sum() + ((code - centre) / spread).square().sum() / 2
            loss.backward(inputs=[code])
            return loss

        with torch.enable_grad():
            descent.step(closure)  # pyright: ignore
        return code.detach()


class VPL(Head):
    """A latent person, read from the pairs they have judged.

    Its loss rests for some epochs where people are not yet told apart: give the fit more patience than other heads need.

    Args:
        latent: the length of what stands for a person.
        hidden: width of all layers.
        kl: weight of the divergence from a standard normal; 0 in the published script for UltraFeedback.
        cycle: steps in which that weight rises from a tenth to the whole, again and again.
        context: pairs a person is read from in training, drawn anew at each step.
        rescale: "training" gives z the length sqrt(latent) in training only, as published; "always" also afterwards.
    """

    def __init__(
        self,
        latent: int = 512,
        hidden: int = 512,
        kl: float = 0.0,
        cycle: int = 10_000,
        context: int = 8,
        rescale: Literal["training", "always"] = "training",
    ) -> None:
        super().__init__()
        if min(latent, hidden, cycle, context) < 1 or kl < 0:
            raise ValueError(
                f"latent, hidden, cycle and context must be at least 1 and kl at least 0; got {self.arguments}"
            )
        if rescale not in ("training", "always"):
            raise ValueError(f'rescale must be "training" or "always"; got {rescale!r}')
        self.code, self.hidden, self.kl, self.cycle, self.context = latent, hidden, kl, cycle, context
        self.rescale = rescale

    def make(self, joint: int, prompt: int) -> None:
        h, z = self.hidden, self.code
        self.pair = _layers((2 * joint, h, h, z), lambda: nn.LeakyReLU(SLOPE))
        self.query, self.key, self.value, self.mean, self.log_variance = (nn.Linear(z, z) for _ in range(5))
        self.decoder = _layers((joint + z, h, h, 1), lambda: nn.LeakyReLU(SLOPE))

    def judge(self, joint: Tensor, prompt: Tensor, codes: Tensor | None) -> Raw:
        if codes is None:
            raise ValueError("VPL scores for a person: pass codes")
        return Raw(self.decoder(torch.cat([joint, codes], dim=-1))[None, :, 0])

    def posterior(self, better: Tensor, worse: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (..., latent) of a person from standardised pairs (..., C, D)."""
        pairs = self.pair(torch.cat([better, worse], dim=-1))
        attention = (self.query(pairs) @ self.key(pairs).transpose(-1, -2) / self.code**0.5).softmax(dim=-1)
        read = (attention @ self.value(pairs)).mean(dim=-2)
        return self.mean(read).clamp(-1, 1), self.log_variance(read).clamp(-1, 1)

    def drawn(self, mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
        """A code from the posterior, rescaled."""
        return self.sphere(mean + (log_variance / 2).exp() * noise)

    def sphere(self, z: Tensor) -> Tensor:
        """z at the length sqrt(latent)."""
        return F.normalize(z, dim=-1) * self.code**0.5

    def divergence(self, mean: Tensor, log_variance: Tensor, step: int) -> Tensor:
        """The weighted KL a person from the standard normal, averaged over people (U, latent)."""
        within = (step % self.cycle) / self.cycle
        weight = self.kl * (0.1 + 0.9 * (1 - math.cos(math.pi * within)) / 2)
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(dim=-1)
        return weight * kl.mean()

    def infer(self, better: Features, worse: Features, known: Tensor) -> Tensor:
        with torch.no_grad():
            mean, _ = self.posterior(self.standard(better)[0], self.standard(worse)[0])
        return self.sphere(mean) if self.rescale == "always" else mean


def _layers(widths: Sequence[int], activation: type[nn.Module] | object) -> nn.Sequential:
    """Linear layers with an activation between every two."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [activation(), nn.Linear(a, b)] if layers else [nn.Linear(a, b)]  # pyright: ignore
    return nn.Sequential(*layers)
