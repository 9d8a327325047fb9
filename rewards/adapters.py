"""Rewards from plain functions, and plain functions from rewards.

`FromCallable` makes a `Reward` of a function (images, prompts, metadata) -> scores, as DDPO, TRL and flow_grpo write them;
`as_ddpo_fn` and `as_multi_score` give a `Reward` to code that expects such functions.

Sources: Black et al., DDPO, 2023, arXiv 2305.13301, and Liu et al., Flow-GRPO, 2025, arXiv 2505.05470: the calls of their released
code. There a failed judgement is a number; here it is NaN or None on the way in, and NaN on the way out: mask it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import Prompt, Reward, Scores
from .loading import imported

__all__ = ["FromCallable", "as_ddpo_fn", "as_multi_score", "from_callable"]

Layout = Literal["NCHW01", "uint8 NHWC", "pil"]


class FromCallable(Reward):
    """Your own function as a reward.

    The function is called with as many of (images, prompts, metadata) as it has parameters without a default: a batch in `layout`,
    the list of texts, the list of dicts from the prompts' `meta`. It returns one number a sample, higher is better, as a tensor, an
    array or a list, with None or NaN where it could not judge. Of a pair (scores, info), as DDPO's functions return, the scores are
    taken; a dict of scores must hold the total as "avg", as flow_grpo's does, and its other entries become parts. A network is
    frozen.

    Range: of the function
    Size: any, as far as the function goes
    Gradient: if `differentiable`

    Args:
        function: the function or network, or its dotted path, such as my_module.my_score; the working directory is looked in too.
        layout: "NCHW01", the float tensor in [0, 1]; "uint8 NHWC", a numpy array; "pil", a list of PIL images.
        differentiable: whether the scores carry a gradient to the images.

    Raises:
        ValueError: the dotted path names nothing, the layout is unknown or has no gradient; when scoring, scores of another number.
        TypeError: the function takes other than one to three arguments.
    """

    def __init__(
        self, function: str | Callable[..., Any], layout: Layout = "NCHW01", *, differentiable: bool = False
    ) -> None:
        super().__init__()
        if layout not in Layout.__args__:
            raise ValueError(f"layout must be one of {', '.join(Layout.__args__)}; got {layout!r}")
        if differentiable and layout != "NCHW01":
            raise ValueError(f"no gradient passes through {layout}: use NCHW01, or differentiable=False")
        self.function: Any = imported(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise TypeError(f"function must be callable; got {self.function!r}")
        self.layout, self.differentiable = layout, differentiable
        self.taken = taken(self.function)
        self.needs_prompt = self.taken > 1
        self.freeze()

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        given = (self.laid_out(media), [prompt.text for prompt in prompts], [dict(prompt.meta) for prompt in prompts])
        result = self.function(*given[: self.taken])
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
            result = result[0]
        if not isinstance(result, Mapping):
            result = {"avg": result}
        if "avg" not in result:
            raise ValueError(
                f'{self.name} returned a dict without the total "avg"; it holds {", ".join(map(str, result))}'
            )
        parts = {str(name): self.tensor(values, media) for name, values in result.items()}
        total = parts.pop("avg")
        if self.differentiable and torch.is_grad_enabled() and media.requires_grad and not total.requires_grad:
            raise RuntimeError(
                f"{self.name} was declared differentiable, yet its scores carry no gradient to the images"
            )
        return Scores(total, parts)

    def laid_out(self, media: Tensor) -> Any:
        """The images as the function wants them."""
        if self.layout == "NCHW01":
            return media if media.dtype == torch.float64 else media.float()
        pixels = (255 * media.float()).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        if self.layout == "uint8 NHWC":
            return pixels
        from PIL import Image

        return [Image.fromarray(image) for image in pixels]

    def tensor(self, values: Any, media: Tensor) -> Tensor:
        """(B,) scores on the device of the media; a trailing dimension of one is dropped."""
        if not isinstance(values, Tensor):
            try:
                if isinstance(values, (list, tuple)):
                    values = [torch.nan if value is None else float(value) for value in values]
                values = torch.as_tensor(values, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"{self.name} must return one number a sample; got {str(values)[:80]}") from None
        values = values.to(media.device)
        return values.squeeze(1) if values.ndim == 2 and values.shape[1] == 1 else values


def taken(function: Callable[..., Any]) -> int:
    """How many of (images, prompts, metadata) a function is given: its parameters without a default, or all for *args.

    Raises:
        TypeError: none or more than three.
    """
    parameters = inspect.signature(
        function.forward if isinstance(function, nn.Module) else function
    ).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 3
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if not 1 <= len(required) <= 3 or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise TypeError(
            "a reward function takes (images), (images, prompts) or (images, prompts, metadata); "
            f"got ({', '.join(p.name for p in required)})"
        )
    return len(required)


def from_callable(
    function: str | Callable[..., Any], layout: Layout = "NCHW01", *, differentiable: bool = False
) -> Reward:
    """A function as a reward: see `FromCallable`."""
    return FromCallable(function, layout, differentiable=differentiable)


def as_ddpo_fn(reward: Reward) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A reward as a function (images, prompts, metadata) -> (scores, info), as DDPO's and flow_grpo's trainers call it.

    Images are (B, 3, H, W) with values in [0, 1], a tensor or an array, or (B, H, W, 3) uint8; they are scored where they are,
    without a gradient. Scores are a float32 array with NaN where the reward could not judge; info holds the parts.
    """

    def score(images: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None):
        media = torch.as_tensor(images)
        if media.dtype == torch.uint8:
            media = (media.movedim(-1, -3) if media.shape[-1] == 3 else media).float() / 255
        meta = metadata if metadata else [{}] * len(prompts)
        with torch.no_grad():
            scores = reward.score(media, [Prompt(text, meta=m) for text, m in zip(prompts, meta, strict=True)])
        return scores.total.cpu().numpy(), {name: values.cpu().numpy() for name, values in scores.parts.items()}

    return score


def as_multi_score(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Callable[..., tuple[dict, dict]]:
    """Rewards as flow_grpo's `multi_score`: (images, prompts, metadata) -> ({name: scores, ..., "avg": weighted sum}, {}).

    Args:
        rewards: by name.
        weights: by the same names.

    Raises:
        ValueError: the names differ, or one is "avg".
    """
    if set(rewards) != set(weights) or not rewards or "avg" in rewards:
        raise ValueError(f'rewards and weights need the same names, not "avg"; got {list(rewards)} and {list(weights)}')
    functions = {name: as_ddpo_fn(reward) for name, reward in rewards.items()}

    def score(
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
        only_strict: bool = True,
    ):
        """`only_strict` is flow_grpo's, for its GenEval server, and changes nothing here."""
        scores = {name: function(images, prompts, metadata)[0] for name, function in functions.items()}
        return {**scores, "avg": sum(weights[name] * values for name, values in scores.items())}, {}

    return score
