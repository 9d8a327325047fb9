"""What a ControlNet is shown with the prompts of a run: their files, read as pictures are, at the size of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rewards import Prompt
from samplers import Policy, Size
from samplers.unets import control_images

from .media import Media, fitted, image_size, load_rgb

__all__ = ["check_controls", "shown"]


def shown(policy: Policy, prompts: Sequence[Prompt], size: Size) -> list[Prompt]:
    """The prompts, the file of each (`meta["control"]`) resized until it covers `size` and cut there; as they are without a
    ControlNet, or where the picture is a tensor already."""
    files = {} if not _controlled(policy) else {i: file for i, p in enumerate(prompts) if (file := _file(p))}
    pictures = {file.name: fitted(load_rgb(file), size) for file in files.values()}  # each once
    return [
        replace(p, meta={**p.meta, "control": pictures[files[i].name]}) if i in files else p
        for i, p in enumerate(prompts)
    ]


def check_controls(policy: Policy, prompts: Sequence[Prompt], size: Size) -> None:
    """Raises before any network runs unless there is a picture for each prompt, if there is a ControlNet.

    Raises:
        ValueError: no picture, none that can be read, or a tensor of another size.
    """
    for prompt in prompts if _controlled(policy) else ():
        if file := _file(prompt):
            image_size(file, verify=False)
        elif (found := tuple(control_images([prompt]).shape[2:])) != tuple(size):
            raise ValueError(
                f"the control image of {prompt.text!r} must have the size of the run, (height, width) = {tuple(size)}; "
                f"got {found}: resize it, or pass that as size"
            )


def _controlled(policy: Policy) -> bool:
    return bool(getattr(policy, "controlled", False))


def _file(prompt: Prompt) -> Media | None:
    control = prompt.meta.get("control")
    return Media(str(control), Path(control).expanduser()) if isinstance(control, (str, Path)) else None
