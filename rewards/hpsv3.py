"""HPSv3: which image people prefer for a prompt, by a Qwen2-VL that ends in a distribution of scores.

The network reads picture, instruction and caption. The hidden state h of the token `<|Reward|>` after them goes through a small
head in float32,

    (mu, s) = W3 relu(W2 relu(W1 h + b1) + b2) + b3,        sigma = exp(s),

which was trained as the mean and the deviation of a normal distribution: of two images one beats the other with the probability
that its draw is higher. The score is mu.

Source: Ma et al., "HPSv3: Towards Wide-Spectrum Human Preference Score", 2025, arXiv 2508.03789; instruction
(`questions/hpsv3.json`) and layout of the released code. That code calls the language model without the coordinates of the
patches, in training too, so positions count the tokens one by one here as there.

Deviations: pixels are resized by antialiased bicubic as in the released code's PIL path, also where a gradient is asked for (there
bilinear); with `quantize="none"` they are not rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from .base import Features, Prompt, Reward, Scores
from .judging import published
from .loading import fill, find, loading, precision, read_weights
from .preprocess import Quantize
from .qwen import Reader, backbone, hidden, native, render

__all__ = ["HPSv3"]

TOKEN = "<|Reward|>"
AREA = 256 * 28 * 28  # pixels, at least and at most, in training and in the released code


class HPSv3(Reward):
    """Human Preference Score v3 (Ma et al. 2025, arXiv 2508.03789).

    Range: about -5 to 15; good models get 8 to 11
    Size: 448 x 448 or as many pixels in another shape, sides multiples of 28
    Gradient: unless `quantize` is "hard"
    Weights: MizzenAI/HPSv3 and Qwen/Qwen2-VL-7B-Instruct (config, tokenizer, processor)
    Licence: MIT (code), Apache-2.0 (Qwen2-VL), none stated for the weights

    8 billion weights, 17 GB in bfloat16. `parts` holds sigma, the head's own uncertainty.

    Args:
        checkpoint: file of the weights, or owner/name/file on the hub.
        model: folder or hub id of the Qwen2-VL they were tuned from.
        dtype: type the network runs in; the head and the score are always float32.
        quantize: whether pixels are rounded to 8 bits as in the released code: "hard" (no gradient), "ste" or "none".
        pixels: area that images are resized to.

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the weights have another layout, or were made for another model.
    """

    claims_quality = True

    def __init__(
        self,
        checkpoint: str = "MizzenAI/HPSv3/HPSv3.safetensors",
        model: str = "Qwen/Qwen2-VL-7B-Instruct",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        quantize: Quantize = "none",
        pixels: int = AREA,
    ) -> None:
        super().__init__()
        kind = precision(dtype)
        network, self.processor = backbone(model, [TOKEN])
        with loading(checkpoint, "a file of HPSv3's weights, or owner/name/file of one on the hub"):
            weights = native(read_weights(find(checkpoint)))
        head = {k.removeprefix("rm_head."): v.float() for k, v in weights.items() if k.startswith("rm_head.")}
        self.head = read_head(head, network.config.get_text_config().hidden_size, checkpoint)
        rest = {k: v for k, v in weights.items() if not k.startswith("rm_head.")}
        fill(network, rest, checkpoint, ignore=[r"lm_head\.weight"])
        self.network = network.to(kind)
        self.reader = Reader(self.processor, "qwen2_vl", quantize=quantize, min_pixels=pixels, max_pixels=pixels)
        self.token = self.processor.tokenizer.convert_tokens_to_ids(TOKEN)
        self.question = published("hpsv3", "image")
        self.differentiable = quantize != "hard"
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        state = self.embed(media, prompts).joint
        mu, s = self.head(state.to(next(self.head.parameters()).dtype)).unbind(dim=-1)
        return Scores(mu, {"sigma": s.exp()})

    def embed(self, media: Tensor, prompts: list[Prompt]) -> Features:
        asked = [self.question.replace("{prompt}", prompt.text) for prompt in prompts]
        texts = [render(self.processor, [{"type": "image"}, {"type": "text", "text": text}]) for text in asked]
        inputs = self.reader(texts, [[image] for image in media])
        states = hidden(self.network, inputs, sequential=True)
        places = torch.arange(states.shape[1], device=states.device)
        last = (places * (inputs["input_ids"] == self.token)).amax(dim=1)
        state = states[torch.arange(len(states), device=states.device), last]
        return Features(state, state[:, :0])


def read_head(weights: Mapping[str, Tensor], width: int, name: str) -> nn.Sequential:
    """The head that its weights describe.

    Args:
        weights: of the linear layers 0, 3 and 5.
        width: of the states it must read.
        name: of the checkpoint, for the error.
    """
    shapes = {k: tuple(v.shape) for k, v in weights.items() if k.endswith("weight") and v.ndim == 2}
    if (
        set(shapes) != {"0.weight", "3.weight", "5.weight"}
        or shapes["0.weight"][1] != width
        or shapes["5.weight"][0] != 2
    ):
        raise ValueError(
            f"{name} needs a head of the layers 0, 3, 5 from {width} numbers to 2 under rm_head.; got {shapes}"
        )
    (first, _), (second, _) = shapes["0.weight"], shapes["3.weight"]
    layers = (
        nn.Linear(width, first),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, 2),
    )
    head = nn.Sequential(*layers)
    fill(head, weights, name)
    return head
