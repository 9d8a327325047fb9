"""Runs that begin from a picture: its latents, noised to a level on the way, take the place of pure noise.

Of T steps the last ⌊strength·T⌋ are walked, as in diffusers' image-to-image pipelines for diffusion (those of flows round the
number of steps left out, which differs where strength·T is no whole number). A file is resized until it covers the size of
the samples, and its middle is cut out; its latents are the most likely ones, where the pipelines draw them.

Source: SDEdit, 2108.01073.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from samplers import Policy

from .media import Media, fitted, load_rgb

__all__ = ["beginning", "left_out"]


def left_out(steps: int, strength: float) -> int:
    """How many of the first steps are not walked.

    Raises:
        ValueError: no step is left, or a strength that is no share.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is the share of the steps that are walked, in (0, 1]; got {strength}")
    if not (walked := int(steps * strength)):
        raise ValueError(
            f"strength {strength} of {steps} steps leaves none: take more steps, or {1 / steps:.2g} and more"
        )
    return steps - walked


def beginning(policy: Policy, image: Tensor | str | Path, size: tuple[int, ...]) -> Tensor:
    """(1, …) the clean latents of a picture.

    Args:
        image: a file, or (3, H, W) of that size with values in [0, 1].
        size: of the samples, (height, width).

    Raises:
        ValueError: it is no picture, or the model makes none.
    """
    if policy.modality != "image":
        raise ValueError(f"a run begins from a picture, but the model makes {policy.modality}s")
    if isinstance(image, Tensor):
        if tuple(image.shape) != (3, *size) or not image.is_floating_point():
            raise ValueError(
                f"the image must be {(3, *size)} in [0, 1]; got {image.dtype} {tuple(image.shape)}: resize it"
            )
        return policy.encode_media(image[None])
    return policy.encode_media(fitted(load_rgb(Media(str(image), Path(image).expanduser())), size)[None])
