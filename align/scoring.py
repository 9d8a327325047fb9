"""`align.score`: media and prompts in, scores out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rewards import Prompt, Reward, Scores, as_prompts

__all__ = ["load_image", "score"]

Media = Tensor | Sequence[str | Path | Image.Image | Tensor]


def score(
    reward: Reward, media: Media, prompts: Sequence[str | Prompt] | str | Prompt = (), *, batch: int = 32
) -> Scores:
    """Scores images or a batch of media.

    Args:
        reward: what to score by, on the device it is on.
        media: a tensor in the reward's layout, or a list of image files, PIL images or (3, H, W) tensors of any sizes.
        prompts: one a sample, or one for all.
        batch: samples at a time.

    Returns:
        Scores in the order of the media, on the CPU, without a graph.

    Raises:
        ValueError: a file is not an image, or the prompts do not match; raised before anything is scored.
    """
    if batch < 1:
        raise ValueError(f"batch must be ≥ 1; got {batch}")
    images = list(media) if isinstance(media, Tensor) else [_tensor(m) for m in media]
    if not images:
        raise ValueError("no images to score")
    prompts = as_prompts(prompts)
    prompts = prompts * len(images) if len(prompts) == 1 else prompts
    if prompts and len(prompts) != len(images):
        raise ValueError(f"got {len(prompts)} prompts for {len(images)} images: pass one for each, or one for all")
    if reward.needs_prompt and not prompts:
        raise ValueError(f"{reward.name} needs prompts: pass one for each image, or one for all")
    total = torch.empty(len(images))
    parts: dict[str, Tensor] = {}
    device = next(chain(reward.parameters(), reward.buffers()), torch.empty(0)).device
    with torch.no_grad():
        for rows in _batches(images, batch):
            media = torch.stack([images[i] for i in rows]).to(device)
            scores = reward.score(media, [prompts[i] for i in rows] if prompts else [])
            total[rows] = scores.total.cpu()
            for name, values in scores.parts.items():
                parts.setdefault(name, torch.full((len(images),), torch.nan))[rows] = values.cpu()
    return Scores(total, parts)


def load_image(path: str | Path) -> Image.Image:
    """An RGB image; transparency is laid on white.

    Raises:
        FileNotFoundError, ValueError: no such file, or not an image that can be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image file {path}")
    try:
        with Image.open(path) as file:
            file.load()
            image = (
                file.convert("RGBA") if "A" in file.getbands() or "transparency" in file.info else file.convert("RGB")
            )
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def _tensor(item: str | Path | Image.Image | Tensor) -> Tensor:
    if isinstance(item, Tensor):
        return item
    from torchvision.transforms.functional import pil_to_tensor

    image = item.convert("RGB") if isinstance(item, Image.Image) else load_image(item)
    return pil_to_tensor(image).float() / 255


def _batches(images: list[Tensor], batch: int) -> list[list[int]]:
    """Indices of same-sized images, at most `batch` together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        by_shape.setdefault(tuple(image.shape), []).append(i)
    return [rows[j : j + batch] for rows in by_shape.values() for j in range(0, len(rows), batch)]
