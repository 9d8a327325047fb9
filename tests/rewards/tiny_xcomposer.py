"""A model folder with code of its own and the interface of InternLM-XComposer2.5-Reward."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.rewards import tiny

CODE = """
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, resize
from transformers import PretrainedConfig, PreTrainedModel


class TinyRewardConfig(PretrainedConfig):
    model_type = "tiny_internlmxcomposer2"

    def __init__(self, vocab=32, width=16, **rest):
        self.vocab, self.width = vocab, width
        super().__init__(**rest)


class TinyReward(PreTrainedModel):
    config_class = TinyRewardConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokenizer = None
        self.words = nn.Embedding(config.vocab, config.width)
        self.vision = nn.Linear(3 * 8 * 8, config.width)
        self.score = nn.Linear(config.width, 1, bias=False)
        self.post_init()

    def get_score(self, chat, images, max_length=None, hd_num=9):
        assert [turn["role"] for turn in chat] == ["user", "assistant"] and hd_num == 9
        text = " ".join(turn["content"] for turn in chat)
        ids = torch.tensor(self.tokenizer(text)["input_ids"], device=self.device)
        picture = pil_to_tensor(Image.open(images[0]).convert("RGB")).to(self.device).float() / 255
        seen = self.vision(resize(picture, [8, 8], antialias=True).flatten().to(self.dtype))
        return self.score(torch.tanh(self.words(ids).mean(0) + seen)).item()
"""


def save_xcomposer(folder: Path) -> Path:
    """The code, its weights and a tokenizer of a few words."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny_xcomposer_code.py").write_text(CODE)
    generator = torch.Generator().manual_seed(4)
    shapes = {"words.weight": (32, 16), "vision.weight": (16, 192), "vision.bias": (16,), "score.weight": (1, 16)}
    weights = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        '{"model_type": "tiny_internlmxcomposer2", "auto_map": {"AutoConfig": "tiny_xcomposer_code.TinyRewardConfig", '
        '"AutoModel": "tiny_xcomposer_code.TinyReward"}, "vocab": 32, "width": 16}'
    )
    tiny.word_tokenizer(folder, 64, ["input_ids"])
    return folder
