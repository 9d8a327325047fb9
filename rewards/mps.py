"""MPS, the multi-dimensional preference score: CLIP's image tokens look at the words of the prompt that a condition is about.

    i         CLIP's image tokens, t its text tokens, c those of the condition, all projected into the joint space
    m_j       max_k t_j · c_k, divided by its largest value over j
    i'        four layers of cross-attention from i to the t_j with m_j > threshold, and attention among i
    score     exp(logit scale) cos(i' at the class token, t at the end token)

Source: Zhang et al., "Learning Multi-dimensional Human Preference for Text-to-Image Generation", CVPR 2024, arXiv 2405.14705, and
its released code. The layers of cross-attention are those of PaLM: queries of many heads share one key and value, the feed-forward
runs beside the attention, and positions are rotary (Chowdhery et al., 2022, arXiv 2204.02311).

Deviations: the released code divides m by its largest value over the whole batch, which makes a score depend on its neighbours;
here it is over each prompt, the same as for a batch of one, as the code evaluates. It runs in half precision; here the choice is
free. Two thresholds are published: 0.01 in the model, with which it was trained, and 0.3 in the evaluation scripts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Prompt, Reward
from .loading import expand, fill, find, loading, precision, pretrained_tokenizer, read_weights, unfilled, warn_if_cut
from .preprocess import Quantize, pretrained_preprocess

__all__ = ["MPS"]

# What the released model ("overall") is conditioned on; Kwai-Kolors/MPS, MIT licence.
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
REMEMBERED = 256  # prompts; 77 tokens of 1024 floats each make 80 MB
RENAMED = {
    "mps.model.": "clip.",
    "mps.cross_model.layers.": "cross.",
    "model.": "clip.",
    "cross_model.layers.": "cross.",
}
UNREAD = [r".*\.position_ids", r".*\.rotary_emb\.inv_freq"]


class MPS(Reward):
    """MPS, the multi-dimensional preference score: overall preference for an image given its prompt.

    Range: about 5 to 20
    Size: 224, the shorter side fitted and the centre cut
    Gradient: unless `quantize` is "hard"
    Weights: RE-N-Y/mpsv1, on laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    Licence: MIT (code and weights)

    Compare within one prompt.

    Args:
        weights: a state dict of the released model, or owner/name/file on the hub. The released file itself is a pickled module, of
            which nothing is read: save its `state_dict()`.
        model: folder or hub id of the CLIP it was built on, for sizes, tokenizer and image processor.
        threshold: share of the best word's agreement with the condition from which on a word is read, below 1.
        condition: what the words of a prompt should be about; the released model knows only this one.
        dtype: type the CLIP runs in; cross-attention and score are always float32.
        quantize: whether pixels are rounded to 8 bits as published tables did: "hard" (no gradient), "ste" or "none".

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the weights have another layout, or `threshold` lets no word pass.
    """

    def __init__(
        self,
        weights: str = "RE-N-Y/mpsv1/model.safetensors",
        model: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        threshold: float = 0.01,
        condition: str = OVERALL,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        kind = precision(dtype)
        if not threshold < 1:
            raise ValueError(f"threshold must be below 1, where the best word of a prompt is; got {threshold}")
        from transformers import CLIPConfig, CLIPModel

        self.threshold, self.condition = threshold, condition
        self.tokenizer: Any = pretrained_tokenizer(model)
        with loading(model, "config.json"), unfilled():
            self.clip = CLIPModel(CLIPConfig.from_pretrained(expand(model)))
        with loading(weights, "the state dict of an MPS, or owner/name/file of one on the hub"):
            found = renamed(read_weights(find(weights)))
        self.cross = layers(found, weights)
        fill(self, found, weights, UNREAD)
        self.scale = self.clip.logit_scale.double().exp().item()
        self.preprocess = pretrained_preprocess(model, quantize)
        self.differentiable = self.preprocess.differentiable
        self.clip.to(kind)
        self.remembered: OrderedDict[str, tuple[Tensor, Tensor, Tensor]] = OrderedDict()
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        tokens, ends, read = map(torch.stack, zip(*self.texts([p.text for p in prompts]), strict=True))
        pixels = self.preprocess(media).to(self.clip.dtype)
        image = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).last_hidden_state)
        image = image.to(tokens.dtype)
        for attend, mix in self.cross:  # type: ignore[misc]
            image = image + attend(image, tokens, read)
            image = image + mix(image)
        return self.scale * F.cosine_similarity(image[:, 0], ends, dim=-1)

    def texts(self, texts: list[str]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each text: its tokens (T, D), the end token (D,), and which tokens are read (T,), True at one at least."""
        missing = [text for text in dict.fromkeys(texts) if text not in self.remembered]
        if missing:
            with torch.no_grad():
                about, _ = self.encode([self.condition])
                tokens, ends = self.encode(missing)
                close = (tokens @ about[0].T).amax(dim=-1)
                read = close / close.amax(dim=-1, keepdim=True) > self.threshold
            self.remembered.update((text, (tokens[i].clone(), ends[i], read[i])) for i, text in enumerate(missing))
        result = [self.remembered[text] for text in texts]
        while len(self.remembered) > REMEMBERED:
            self.remembered.popitem(last=False)
        return result

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Projected tokens (B, T, D) and the end token (B, D) of texts; padding counts as tokens, as in training."""
        length = self.clip.text_model.config.max_position_embeddings
        for text, whole in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True):
            warn_if_cut(self.name, text, len(whole), length)
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids = ids["input_ids"].to(self.clip.logit_scale.device)
        tokens = self.clip.text_projection(self.clip.text_model(input_ids=ids).last_hidden_state)
        tokens = tokens.to(next(self.cross.parameters()).dtype)
        # the end token has the largest id; transformers may look for the one its config names
        return tokens, tokens[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.remembered.clear()  # what was computed on another device or in another precision
        return super()._apply(fn, recurse)


class Gate(nn.Module):
    """SwiGLU: one half of the numbers, gated by the other."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class CrossAttention(nn.Module):
    """Attention to a context, beside a feed-forward layer.

    Args:
        width: of the tokens.
        heads: of the queries.
        head: width of a head.
        wide: inner width of the feed-forward layer.
    """

    def __init__(self, width: int, heads: int, head: int, wide: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(heads * head, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 2 * wide, bias=False), Gate(), nn.Linear(wide, width, bias=False))

    def forward(self, x: Tensor, context: Tensor, read: Tensor) -> Tensor:
        """(B, N, D) tokens, (B, T, D) context, (B, T) which of it is read -> (B, N, D)."""
        x = self.norm(x)
        key, value = self.to_kv(context).chunk(2, dim=-1)
        attended = shared_attention(self.to_q(x), key, value, self.heads, read[:, None, None])
        return self.to_out(attended) + self.ff(x)


class SelfAttention(nn.Module):
    """Attention among tokens in order, beside a feed-forward layer; arguments as in `CrossAttention`."""

    def __init__(self, width: int, heads: int, head: int, wide: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, (heads * head, head, head, 2 * wide)
        self.norm = nn.LayerNorm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head, width, bias=False)
        self.ff_out = nn.Sequential(Gate(), nn.Linear(wide, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, wide = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        turned = rotated(query.unflatten(-1, (self.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
        return self.attn_out(shared_attention(turned, rotated(key), value, self.heads)) + self.ff_out(wide)


def shared_attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention of many heads with one key and value: (B, N, heads*d), (B, T, d) twice -> (B, N, heads*d)."""
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, d)
    key, value = (x[:, None].expand(-1, heads, -1, -1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions along the last but one dimension: (..., N, d) -> (..., N, d)."""
    half = x.shape[-1] // 2
    rates = 10000 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None] * rates
    sine, cosine = angles.sin(), angles.cos()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of the released module, or of its conversion, to those of this one."""
    result = {}
    for key, value in weights.items():
        old = next((prefix for prefix in RENAMED if key.startswith(prefix)), "")
        result[RENAMED.get(old, "") + key.removeprefix(old).replace(".fn.", ".")] = value
    return result


def layers(weights: Mapping[str, Tensor], name: str) -> nn.ModuleList:
    """Empty layers of cross-attention of the size of the weights.

    Raises:
        ValueError: the weights hold none.
    """
    first = {part: weights.get(f"cross.0.0.{part}.weight") for part in ("to_q", "to_kv", "ff.2")}
    query, key, out = first.values()
    if query is None or key is None or out is None:
        held = ", ".join(list(weights)[:4])
        raise ValueError(
            f"MPS needs the keys model.* and cross_model.layers.*, or the same behind mps.; {name} holds {held}..."
        )
    head = len(key) // 2
    sizes = (query.shape[1], len(query) // head, head, out.shape[1])
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("cross."))
    return nn.ModuleList(nn.ModuleList([CrossAttention(*sizes), SelfAttention(*sizes)]) for _ in range(depth))
