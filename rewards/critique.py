"""`Critique`: a model writes what is good and bad about an answer, and a head on a model reads image, answer and critique.

    r = mean over n critiques c of w·tanh(W h + b) + b',    h the last state of the dialogue (question and answer, c)

The critique is words, so that reasons can be read; the number is a scalar head's, so that it is finer than words. Source: Zhang et
al., "MM-RLHF: The Next Step Forward in Multimodal LLM Alignment", 2025, arXiv 2502.10391; its evaluator prompt is stored word for
word (`questions/mmrlhf.json`).

`MMRLHFJudge` is its released model: LLaVA-OneVision (Qwen2) in the layout of LLaVA-NeXT's code, with `rm_head`. It runs here as
transformers' own LLaVA-OneVision; the names differ, and this file translates them. It judges answers to questions about a given
image, not images made for given words: `Critique` makes a dialogue of the prompt, which nobody has validated on generated images.

Deviations: the released evaluation shows the network the whole picture only, at 384 pixels, because it leaves a dimension out;
training showed it the tiles too, and so does this. The vision tower's config is published elsewhere: it is read off the
weights and the tower's name; its heads are 72 wide as in SigLIP so400m.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from statistics import pstdev
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .answers import vote
from .base import Prompt, Reward, Scores
from .judging import Ask, Judge, checked, prompted, published
from .loading import fill, folder, loading, precision, pretrained_tokenizer, read_model
from .localjudge import LocalJudge
from .preprocess import HALF

__all__ = ["Assessor", "Critique", "MMRLHFJudge"]

HEAD_WIDTH = 72  # of attention in SigLIP so400m
TURN_END = "<|im_end|>\n"
CHAT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{{ {'image': '<image>\n', 'video': '<video>\n'}.get(part.type, part.text) }}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # LLaVA-NeXT's qwen_1_5
NAMES = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.(?=embed_tokens|layers|norm)", "model.language_model."),
)


class Assessor(Judge):
    """A judge that also gives answers a number."""

    @abstractmethod
    def assess(self, asks: Sequence[Ask], answers: Sequence[str | None]) -> Tensor:
        """How good each answer to each question is: (B,) float32, higher is better; NaN where there is no answer."""


class MMRLHFJudge(LocalJudge, Assessor):
    """MM-RLHF-Reward: LLaVA-OneVision that writes critiques and scores them (Zhang et al. 2025, arXiv 2502.10391).

    Args:
        model: folder or hub id of the weights in the released layout.
        dtype: type the network runs in; the head is float32.

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the weights are not those of a LLaVA-OneVision with a reward head.
    """

    def __init__(
        self,
        model: str = "yifanzhang114/MM-RLHF-Reward-7B-llava-ov-qwen",
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    ) -> None:
        Judge.__init__(self)
        kind = precision(dtype)
        from accelerate import init_empty_weights
        from transformers import LlavaOnevisionForConditionalGeneration

        weights = read_model(model)
        for pattern, name in NAMES:
            weights = {re.sub(pattern, name, key): weight for key, weight in weights.items()}
        tokenizer = pretrained_tokenizer(model)
        tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
        config = read_config(model, weights, tokenizer)
        with init_empty_weights(include_buffers=False):
            network: Any = LlavaOnevisionForConditionalGeneration(config)
            width = config.text_config.hidden_size
            self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        names = {"rm_head.dense.": "0.", "rm_head.out_proj.": "2."}
        head = {
            new + k.removeprefix(old): v for k, v in weights.items() for old, new in names.items() if k.startswith(old)
        }
        fill(self.head, head, f"rm_head of {model}")
        fill(network, {k: v for k, v in weights.items() if not k.startswith("rm_head.")}, model)
        network.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(TURN_END.strip())
        self.head.float()
        self.network = network.to(kind).eval().requires_grad_(False)
        self.processor = processor_of(config, tokenizer)
        self.batch, self.fps, self.reader = 1, 2.0, None
        self.differentiable, self.known = False, {}
        self.requires_grad_(False)

    @torch.no_grad()
    def assess(self, asks: Sequence[Ask], answers: Sequence[str | None]) -> Tensor:
        rewards = torch.full((len(asks),), nan)
        for i, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
            if answer is not None:
                text = self.text(replace(ask, start=ask.start + answer)) + TURN_END
                inputs = self.inputs([ask], [text], "right")
                state = self.network.model(**inputs, use_cache=False).last_hidden_state[0, -1]
                rewards[i] = self.head(state.to(self.head[0].weight.dtype)).squeeze()
        return rewards


def read_config(model: str, weights: dict[str, Tensor], tokenizer: Any) -> Any:
    """LLaVA-NeXT's config.json as transformers' `LlavaOnevisionConfig`."""
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    with loading(model, "config.json of a LLaVA-OneVision in LLaVA-NeXT's layout, with is_rm"):
        flat = json.loads((folder(model, "config.json") / "config.json").read_text())
        patches, places = (
            weights[f"model.vision_tower.embeddings.{name}.weight"]
            for name in ("patch_embedding", "position_embedding")
        )
        layers = {int(k.split(".")[4]) for k in weights if k.startswith("model.vision_tower.encoder.layers.")}
        size = int(re.findall(r"-(\d+)$", flat["mm_vision_tower"])[0])  # google/siglip-so400m-patch14-384
        if (size // patches.shape[-1]) ** 2 != len(places):
            raise ValueError(f"{flat['mm_vision_tower']} sees {size} pixels, but there are {len(places)} places")
        vision = SiglipVisionConfig(
            hidden_size=len(patches),
            intermediate_size=len(weights["model.vision_tower.encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=len(layers),
            num_attention_heads=len(patches) // HEAD_WIDTH,
            patch_size=patches.shape[-1],
            image_size=size,
            vision_use_head=False,
        )
        grid = flat["image_grid_pinpoints"]
        if isinstance(grid, str):  # "(1x1),...,(6x6)"
            first, last = re.findall(r"\((\d+)x(\d+)\)", grid)
            grid = [
                [i * size, j * size]
                for i in range(int(first[0]), int(last[0]) + 1)
                for j in range(int(first[1]), int(last[1]) + 1)
            ]
        return LlavaOnevisionConfig(
            vision_config=vision,
            text_config=Qwen2Config.from_dict({**flat, "model_type": "qwen2"}),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=grid,
            vision_aspect_ratio=flat.get("image_aspect_ratio", "anyres_max_9"),
            tie_word_embeddings=flat.get("tie_word_embeddings", False),
        )


def processor_of(config: Any, tokenizer: Any) -> Any:
    """The processor that fits a `LlavaOnevisionConfig`."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    vision = config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    look = {"size": side, "image_mean": list(HALF), "image_std": list(HALF)}  # SigLIP's, not the class's default
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**look, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(**look),
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=CHAT,
    )


class Critique(Reward):
    """The prompt criticised as an answer about the image, and scored (MM-RLHF, arXiv 2502.10391).

    Range: unbounded
    Size: as the judge; 384 and its tiles for MM-RLHF-Reward
    Gradient: no
    Weights: yifanzhang114/MM-RLHF-Reward-7B-llava-ov-qwen
    Licence: Apache-2.0 (code and evaluator prompt); weights: see their page

    The part `spread` is the standard deviation over critiques.

    Args:
        assessor: what reads the critiques, such as `MMRLHFJudge`.
        critic: who writes them; None lets the assessor, as published.
        question: asked about the image in the dialogue; `{prompt}` stands for the prompt.
        answer: what is criticised; likewise.
        samples: critiques a sample, whose scores are averaged; those that fail are left out.
        temperature: at which they are drawn; 0 takes the most probable words.
        max_tokens: length at which a critique is cut.

    Raises:
        ValueError: several samples at temperature 0, or neither text holds `{prompt}`.
    """

    differentiable = False

    def __init__(
        self,
        assessor: Assessor,
        critic: Judge | None = None,
        question: str = "Describe the image.",
        answer: str = "{prompt}",
        *,
        samples: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 4096,
    ) -> None:
        super().__init__()
        if samples < 1 or (samples > 1 and temperature <= 0):
            raise ValueError(f"samples must be 1, or drawn at a temperature above 0; got {samples} at {temperature}")
        if "{prompt}" not in question + answer:
            raise ValueError(f"question or answer must hold {{prompt}}; got {question!r} and {answer!r}")
        if not isinstance(assessor, Assessor):
            raise TypeError(f"assessor must be an Assessor, such as MMRLHFJudge; got {type(assessor).__name__}")
        self.assessor, self.critic = assessor, None if critic is None else checked(critic)
        self.question = published("mmrlhf", "critique").replace("{question}", question).replace("{answer}", answer)
        self.samples, self.temperature, self.max_tokens = samples, temperature, max_tokens
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        asks = [
            Ask(prompted(self.question, prompt.text), (image,), seed=seed)
            for image, prompt in zip(media, prompts, strict=True)
            for seed in range(self.samples)
        ]
        written = (self.critic or self.assessor).write(asks, temperature=self.temperature, max_tokens=self.max_tokens)
        read = self.assessor.assess(asks, [text if text is None else text.strip() for text in written]).tolist()
        known = [None if value != value else value for value in read]
        groups = [known[i : i + self.samples] for i in range(0, len(known), self.samples)]
        found = [[value for value in group if value is not None] for group in groups]
        spread = {"spread": torch.tensor([pstdev(g) if g else nan for g in found], device=media.device)}
        total = torch.tensor([vote(group, "mean") for group in groups], device=media.device)
        return Scores(total, spread if self.samples > 1 else {})
