"""MJ-VIDEO: 28 criteria of a video, weighted by what the prompt makes important.

An InternVL2 reads eight frames and the prompt. With h the last hidden state at the final token and g that where the answer begins,

    r = M W h                                            one reward a criterion (M is the identity as published)
    w_k = scale softmax(gate(g)_k / T)    k in aspect    weights of the criteria within each of five aspects
    s_a = sum_{k in a} w_k r_k                           score of an aspect
    score = sum_a v_a s_a,   v = scale' softmax(gate'(g) / T)

with two gates of three hidden layers with ReLU. T is in the code's config, not in the weights: 1 in all released scripts.

Source: Tong et al., "MJ-VIDEO: Fine-Grained Benchmarking and Rewarding Video Preferences in Video Generation", 2025,
arXiv 2502.01719; released code, github.com/aiming-lab/MJ-Video.

The released pipeline puts the patches of all frames in the place of the first frame's placeholder and leaves "<image>" in words at
the others. Trained so, it is fed so here.

The checkpoint is of InternVL's own classes; its weights are renamed, and the fused attention of InternLM2 is cut, for the InternVL
of transformers with a Llama, which computes the same. InternLM2's tokenizer exists upstream as code only: give one that has been
converted to tokenizer.json, whose ids are checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import Prompt, Reward, Scores
from .loading import expand, fill, find, loading, precision, read_weights
from .preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, Quantize

__all__ = ["Experts", "Gate", "MJVideo"]

ASPECTS = {  # criteria by aspect, in the released scripts
    "alignment": range(5),
    "safety": range(5, 11),
    "fineness": range(11, 16),
    "coherence and consistency": range(16, 23),
    "bias and fairness": range(23, 28),
}
SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
ANSWER = "<|im_end|><|im_start|>assistant\n"  # where the gates read
ANSWER_IDS = [92542, 92543, 525, 11353, 364]  # of the published vocabulary
VOCABULARY = 92553


class Gate(nn.Module):
    """A network that weighs experts: logits from hidden layers with ReLU, then a scaled softmax.

    Args:
        width: of the states it reads.
        experts: how many there are.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        temperature: divides the logits.
    """

    def __init__(self, width: int, experts: int, hidden: int = 1024, depth: int = 3, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.logit_scale = nn.Parameter(torch.ones(1))
        widths = [width, *[hidden] * depth, experts]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, states: Tensor, groups: list[list[int]] | None = None) -> Tensor:
        """Weights of the experts, (B, width) -> (B, experts); they sum to the scale within each group, or all together."""
        x = states
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        logits = self.layers[-1](x) / self.temperature
        if groups is None:
            return self.logit_scale * logits.softmax(dim=-1)
        weights = torch.zeros_like(logits)
        for group in groups:
            weights[:, group] = logits[:, group].softmax(dim=-1)
        return self.logit_scale * weights


class Experts(nn.Module):
    """Rewards of criteria, summed by gates within aspects and over them.

    Args:
        width: of the states it reads.
        groups: the criteria of each aspect; together all criteria once.
        hidden: width of the gates' hidden layers.
        depth: number of the gates' hidden layers.
        temperature: of the gates.
    """

    def __init__(
        self, width: int, groups: list[list[int]], hidden: int = 1024, depth: int = 3, temperature: float = 1.0
    ) -> None:
        super().__init__()
        criteria = sum(map(len, groups))
        if sorted(k for group in groups for k in group) != list(range(criteria)):
            raise ValueError(f"groups must hold the criteria 0 to {criteria - 1} once each; got {groups}")
        self.groups = groups
        self.regression_layer = nn.Linear(width, criteria, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(criteria))
        self.aspect_gating = Gate(width, len(groups), hidden, depth, temperature)
        self.criteria_gating = Gate(width, criteria, hidden, depth, temperature)

    def forward(self, last: Tensor, gating: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From two states (B, width) each: the score (B,), those of the aspects (B, A), and the rewards of the criteria (B, K)."""
        rewards = self.regression_layer(last) @ self.reward_transform_matrix
        weighted = rewards * self.criteria_gating(gating, self.groups)
        aspects = torch.stack([weighted[:, group].sum(dim=1) for group in self.groups], dim=1)
        return (aspects * self.aspect_gating(gating)).sum(dim=1), aspects, rewards


class MJVideo(Reward):
    """MJ-VIDEO: alignment, safety, fineness, coherence and fairness of a video, weighed by the prompt.

    Range: about -1 to 1; above 0 is good
    Size: 8 frames of 448 x 448, squeezed
    Gradient: unless `quantize` is "hard"
    Weights: the model.safetensors that github.com/aiming-lab/MJ-Video points to; config of OpenGVLab/InternVL2-2B
    Licence: none stated for MJ-Video; MIT (InternVL2)

    The parts are the scores of the five aspects.

    Args:
        checkpoint: file of the weights, or owner/name/file on the hub.
        tokenizer: folder or hub id with InternLM2's tokenizer as tokenizer.json, with InternVL's special tokens.
        base: folder or hub id of the InternVL2 it was made of, of which config.json is read.
        frames: how many are read.
        temperature: of the gates.
        dtype: type the network runs in; head and score are in float32.
        quantize: whether pixels are rounded to 8 bits as those of decoded videos: "hard" (no gradient), "ste" or "none".

    Raises:
        OSError: files are missing, incomplete or unreadable.
        ValueError: the weights have another layout, or the tokenizer is of another model.
    """

    modality = "video"

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str,
        base: str = "OpenGVLab/InternVL2-2B",
        *,
        frames: int = 8,
        temperature: float = 1.0,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        quantize: Quantize = "none",
    ) -> None:
        super().__init__()
        run_in = precision(dtype)
        if frames < 1 or temperature <= 0:
            raise ValueError(f"frames must be at least 1 and temperature above 0; got {frames} and {temperature}")
        from transformers import PretrainedConfig, PreTrainedTokenizerFast

        with loading(base, "config.json of an InternVL2"):
            config = PretrainedConfig.get_config_dict(expand(base))[0]
        with loading(tokenizer, "tokenizer.json"):
            self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(expand(tokenizer))
        with loading(checkpoint, "a file of MJ-VIDEO's weights, or owner/name/file of one on the hub"):
            weights = read_weights(find(checkpoint))
        self.answer = self.ids(ANSWER, tokenizer, config["llm_config"]["vocab_size"])
        self.image = self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        mine = {k: v for k, v in weights.items() if not k.startswith("model.")}
        self.head = read_experts(mine, checkpoint, temperature)
        network = skeleton(config, self.image)
        renamed = native({k.removeprefix("model."): v for k, v in weights.items() if k not in mine}, config)
        fill(network, renamed, checkpoint, ignore=(r"language_model\.output\.weight",))
        self.network = network.to(run_in)
        size = config.get("force_image_size") or config["vision_config"]["image_size"]
        self.preprocess = Preprocess("squash", size, IMAGENET_MEAN, IMAGENET_STD, quantize=quantize)
        self.tokens = int((size // config["vision_config"]["patch_size"]) ** 2 * config["downsample_ratio"] ** 2)
        self.frames = frames
        self.differentiable = self.preprocess.differentiable
        self.freeze()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Scores:
        step = (media.shape[1] - 1) / self.frames
        frames = media[:, [int(i * step) for i in range(self.frames)]]
        pixels = self.preprocess(frames.flatten(0, 1))
        rows = [self.read(prompt.text) for prompt in prompts]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(media.device)
        length = torch.tensor([len(row) for row in rows], device=media.device)
        mask = (torch.arange(ids.shape[1], device=media.device) < length[:, None]).long()
        states = self.network(
            input_ids=ids, attention_mask=mask, pixel_values=pixels.to(self.network.dtype), use_cache=False
        ).last_hidden_state.to(self.head.regression_layer.weight.dtype)
        row = torch.arange(len(rows), device=media.device)
        score, aspects, _ = self.head(states[row, length - 1], states[row, length - len(self.answer)])
        return Scores(score, dict(zip(ASPECTS, aspects.unbind(dim=1), strict=True)))

    def read(self, prompt: str) -> list[int]:
        """Token ids of the chat.

        Raises:
            ValueError: the prompt holds a placeholder of pixels.
        """
        if "<IMG_CONTEXT>" in prompt:
            raise ValueError("a prompt holds <IMG_CONTEXT>, which stands for pixels: remove it")
        shown = f"<img>{'<IMG_CONTEXT>' * (self.tokens * self.frames)}</img>"
        places = "".join(f"Frame{i + 1}: {shown if i == 0 else '<image>'}\n" for i in range(self.frames))
        text = f"<|im_start|>system\n{SYSTEM}<|im_end|><|im_start|>user\n{places}{prompt}{ANSWER}"
        return [self.tokenizer.bos_token_id, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def ids(self, text: str, name: str, vocabulary: int) -> list[int]:
        """Token ids of a text that the gates look for.

        Raises:
            ValueError: they are not those of the published vocabulary.
        """
        found = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if (vocabulary == VOCABULARY and found != ANSWER_IDS) or self.tokenizer.bos_token_id is None:
            raise ValueError(
                f"the tokenizer of {name!r} is another model's: {text!r} should be {ANSWER_IDS}; got {found}"
            )
        return found


def read_experts(weights: Mapping[str, Tensor], name: str, temperature: float) -> Experts:
    """The head that its weights describe, in float32.

    Raises:
        ValueError: they are not those of such a head.
    """
    layers = [v for k, v in sorted(weights.items()) if re.fullmatch(r"aspect_gating\.layers\.\d+\.weight", k)]
    if len(layers) < 2 or "regression_layer.weight" not in weights:
        raise ValueError(f"{name} needs regression_layer, aspect_gating and criteria_gating; got {sorted(weights)[:4]}")
    width = weights["regression_layer.weight"].shape[1]
    groups = [list(criteria) for criteria in ASPECTS.values()]
    head = Experts(width, groups, len(layers[0]), len(layers) - 1, temperature)
    fill(head, {k: v.float() for k, v in weights.items()}, name)
    return head


def skeleton(config: Mapping[str, Any], image: int) -> Any:
    """transformers' InternVL without weights, on the meta device, for the config of an InternVL2 on InternLM2.

    Raises:
        ValueError: it has another language model, or vision that is not understood.
    """
    from accelerate import init_empty_weights
    from transformers import InternVLConfig, InternVLModel, LlamaConfig

    seen, told = config["vision_config"], config["llm_config"]
    if told.get("architectures", [""])[0] != "InternLM2ForCausalLM" or config.get("ps_version") != "v2":
        raise ValueError(f"MJ-VIDEO needs an InternVL2 on InternLM2; got {told.get('architectures')}")
    if (
        seen.get("norm_type", "layer_norm") != "layer_norm"
        or seen.get("qk_normalization")
        or config.get("select_layer", -1) != -1
    ):
        raise ValueError(
            "MJ-VIDEO needs the InternViT of InternVL2-2B: layer_norm, no qk_normalization, select_layer -1"
        )
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = {k: seen[k] for k in (*sizes, "image_size", "patch_size")}
    vision |= {"attention_bias": seen["qkv_bias"], "layer_norm_eps": seen["layer_norm_eps"]}
    text = {
        k: told[k] for k in (*sizes, "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps")
    }
    rope = {
        "rope_type": "default",
        "rope_theta": told["rope_theta"],
    }  # its dynamic scaling begins beyond max_position_embeddings
    text = LlamaConfig(**text, rope_parameters=rope, attention_bias=told.get("bias", False)).to_dict()
    with init_empty_weights(include_buffers=False):
        return InternVLModel(
            InternVLConfig(
                vision_config=vision,
                text_config=text,
                image_token_id=image,
                downsample_ratio=config["downsample_ratio"],
            )
        )


NAMES = {
    r"vision_model\.embeddings\.class_embedding": "vision_tower.embeddings.cls_token",
    r"vision_model\.embeddings\.position_embedding": "vision_tower.embeddings.position_embeddings",
    r"vision_model\.embeddings\.patch_embedding\.": "vision_tower.embeddings.patch_embeddings.projection.",
    r"vision_model\.encoder\.layers\.(\d+)\.ls([12])": r"vision_tower.encoder.layer.\1.lambda_\2",
    r"vision_model\.encoder\.layers\.(\d+)\.norm1\.": r"vision_tower.encoder.layer.\1.layernorm_before.",
    r"vision_model\.encoder\.layers\.(\d+)\.norm2\.": r"vision_tower.encoder.layer.\1.layernorm_after.",
    r"vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.": r"vision_tower.encoder.layer.\1.attention.projection_layer.",
    r"vision_model\.encoder\.layers\.(\d+)\.": r"vision_tower.encoder.layer.\1.",
    r"mlp1\.0\.": "multi_modal_projector.layer_norm.",
    r"mlp1\.1\.": "multi_modal_projector.linear_1.",
    r"mlp1\.3\.": "multi_modal_projector.linear_2.",
    r"language_model\.model\.tok_embeddings\.": "language_model.embed_tokens.",
    r"language_model\.model\.": "language_model.",
    r"\.attention\.wo\.": ".self_attn.o_proj.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
}  # InternVL's own names and transformers', in the order they are replaced


def native(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of an InternVL2 on InternLM2 by the names of transformers' `InternVLModel`, fused projections cut."""
    told = config["llm_config"]
    grouped = told["num_attention_heads"] // told["num_key_value_heads"]
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key
        for pattern, new in NAMES.items():
            name = re.sub(pattern, new, name)
        if ".attn.qkv." in name:
            for part, cut in zip("qkv", value.chunk(3), strict=True):
                found[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = cut
        elif ".attention.wqkv." in name:  # for each key-value head: its queries, its key, its value
            rows = value.unflatten(0, (told["num_key_value_heads"], grouped + 2, -1))
            cuts = {"q": rows[:, :grouped], "k": rows[:, grouped], "v": rows[:, grouped + 1]}
            for part, cut in cuts.items():
                found[name.replace(".attention.wqkv.", f".self_attn.{part}_proj.")] = cut.reshape(-1, *value.shape[1:])
        else:
            found[name] = value
    return found
