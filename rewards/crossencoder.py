"""A small cross-attention reward: image and caption are read together, and the first caption token carries the score.

The shape is ImageReward's (Xu et al. 2023, arXiv 2304.05977): an image tower, a text tower whose every layer attends to the
image, an MLP on the first token, and a z-score over the training distribution. Deviations: the image tower starts with
three convolutions in place of BLIP's patches (they learn small shapes in minutes), and all widths are a few hundred times
smaller. `assets/tiny-reward` is such a model, trained on preferences in the world of shapes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Features, Prompt, Reward
from .loading import expand, fill, loading, pretrained_tokenizer, read_weights, warn_if_cut

__all__ = ["CrossEncoder"]

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "tiny-reward"
REMEMBERED = 4096  # prompts; their tokens take 0.5 kB each


class Attention(nn.Module):
    """Multi-head attention written out: torch's fused kernel has a slow backward pass on CPUs."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.query(x), self.key(context), self.value(context))
        )
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B,heads,N,M)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], -1e4)
        return self.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer layer; with `cross`, it attends to `image` after attending to itself."""

    def __init__(self, width: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 + cross))
        self.attend = Attention(width, heads)
        self.look = Attention(width, heads) if cross else None
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attend(y, y, mask)
        if self.look is not None:
            x = x + self.look(self.norms[2](x), image)
        return x + self.mlp(self.norms[1](x))


def waves(side: int, width: int) -> Tensor:
    """(side*side, width): sines and cosines of column and row, a start from which places are learned quickly."""
    axis = (torch.arange(side) + 0.5) / side * torch.pi
    phase = axis[:, None] * torch.arange(1, width // 4 + 1) / 4
    code = torch.cat([phase.sin(), phase.cos()], 1)  # (side, width/2)
    column, row = code.expand(side, -1, -1), code[:, None].expand(-1, side, -1)
    return torch.cat([column, row], 2).flatten(0, 1)


class Network(nn.Module):
    """Image (B,3,size,size) in [0,1] and padded token ids (B,L) to one raw score each, (B,)."""

    def __init__(
        self, vocab: int, length: int, size: int, width: int, heads: int, image_layers: int, text_layers: int
    ) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.stem = nn.Sequential(
            nn.Conv2d(3, quarter, 3, 2, 1), nn.GroupNorm(8, quarter), nn.SiLU(),
            nn.Conv2d(quarter, half, 3, 1, 1), nn.GroupNorm(8, half), nn.SiLU(),
            nn.Conv2d(half, width, 3, 2, 1),
        )  # fmt: skip
        self.place = nn.Parameter(waves(size // 4, width))
        self.image = nn.ModuleList(Block(width, heads, cross=False) for _ in range(image_layers))
        self.seen = nn.LayerNorm(width)
        self.words = nn.Embedding(vocab, width)
        self.order = nn.Parameter(0.7 * torch.randn(length, width))  # as strong as a word, or order is not learned
        self.text = nn.ModuleList(Block(width, heads, cross=True) for _ in range(text_layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def see(self, pixels: Tensor) -> Tensor:
        """Image tokens (B,N,width)."""
        image = self.stem(2 * pixels - 1).flatten(2).transpose(1, 2) + self.place  # (B,width,H,W) -> (B,N,width)
        for block in self.image:
            image = block(image)
        return self.seen(image)

    def join(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The first token (B,width) of captions read with image tokens."""
        text = self.words(ids) + self.order
        for block in self.text:
            text = block(text, mask, image)
        return text[:, 0]

    def read(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw scores (B,) of image tokens read with captions."""
        return self.head(self.join(image, ids, mask)).float().squeeze(-1)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self.read(self.see(pixels), ids, mask)


class CrossEncoder(Reward):
    """A learned reward read from a folder: config.json, model.safetensors and the files of a tokenizer.

    Range: z-scores over the images and prompts it was trained on; 0 is average there
    Size: the model's own, squeezed (antialiased bicubic); 32 embedded
    Gradient: yes

    Args:
        model: the folder; the embedded model by default.

    Raises:
        OSError: files are missing, incomplete or unreadable, or describe something else.
        ValueError: the weights do not fit the network that config.json describes.
    """

    modality = "image"
    differentiable = True
    needs_prompt = True

    def __init__(self, model: str | Path = EMBEDDED) -> None:
        super().__init__()
        name, path = str(model), Path(expand(str(model)))
        with loading(name, "a CrossEncoder's config.json (network, mean, std), model.safetensors and tokenizer"):
            config = json.loads((path / "config.json").read_text())
            self.network, self.mean, self.std = Network(**config["network"]), config["mean"], config["std"]
            weights = read_weights(path / "model.safetensors")
        self.size, self.length = config["network"]["size"], config["network"]["length"]
        self.tokenizer = pretrained_tokenizer(name)
        fill(self.network, weights, name)
        self.tokens: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()  # prompts repeat at every step of a run
        self.freeze()

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Padded ids and mask, (B,L) each, remembered a text."""
        for text in set(texts) - self.tokens.keys():
            warn_if_cut(self.name, text, len(self.tokenizer(text, verbose=False)["input_ids"]), self.length)
            out = self.tokenizer(
                text, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
            )
            self.tokens[text] = (out.input_ids[0], out.attention_mask[0].bool())
        ids, masks = zip(*(self.tokens[text] for text in texts), strict=True)
        while len(self.tokens) > REMEMBERED:
            self.tokens.popitem(last=False)
        return torch.stack(ids), torch.stack(masks)

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        """(B,) z-scores."""
        return (self.network(*self.inputs(media, prompts)) - self.mean) / self.std

    def embed(self, media: Tensor, prompts: list[Prompt]) -> Features:
        pixels, ids, mask = self.inputs(media, prompts)
        joint = self.network.join(self.network.see(pixels), ids, mask)
        return Features(joint, joint[:, :0])

    def inputs(self, media: Tensor, prompts: list[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
        """What the network reads: pixels, token ids and their mask."""
        media = media.float() if media.dtype in (torch.float16, torch.bfloat16) else media  # bicubic needs it
        if media.shape[-2:] != (self.size, self.size):
            media = F.interpolate(media, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        ids, mask = (t.to(media.device) for t in self.tokenize([p.text for p in prompts]))
        return media.to(self.network.place.dtype), ids, mask
