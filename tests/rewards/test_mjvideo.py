"""MJ-VIDEO's gates in closed form, and the whole on a tiny checkpoint in the released names.

With weights, token ids and pixels of such a checkpoint the released code (aiming-lab/MJ-Video, under transformers 4.45.2) gave the
scores of this implementation to 6e-6.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards import MJVideo
from rewards.mjvideo import ANSWER_IDS, ASPECTS, VOCABULARY, Experts, Gate, native
from tests.rewards import tiny, tiny_mjvideo

CLIPS = (0.1 + 0.8 * tiny.natural(20, 40, 50)).unflatten(0, (2, 10))
PROMPTS = ["a red cat", "two dog on the house, and a photo of it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mjvideo.save_mjvideo(tmp_path_factory.mktemp("mjvideo"))


def load(folder: Path, **options: Any) -> MJVideo:
    paths = {"checkpoint": "mjvideo.safetensors", "tokenizer": "tokenizer", "base": "."}
    return MJVideo(**{**{k: str(folder / v) for k, v in paths.items()}, "dtype": "float32", **options})


def test_a_gate_that_knows_nothing_weighs_all_alike() -> None:
    gate = Gate(3, 5, hidden=4, depth=2)
    for parameter in gate.layers.parameters():
        torch.nn.init.zeros_(parameter)
    states = torch.randn(2, 3)
    torch.testing.assert_close(gate(states), torch.full((2, 5), 0.2))
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2]]).expand(2, -1)
    torch.testing.assert_close(gate(states, [[0, 1, 2], [3, 4]]), expected)
    gate.logit_scale.data.fill_(3.0)
    torch.testing.assert_close(gate(states).sum(dim=1), torch.full((2,), 3.0))


def test_a_gate_is_a_softmax_at_its_temperature() -> None:
    gate = Gate(2, 3, hidden=2, depth=1, temperature=2.0)
    hidden, out = gate.layers
    hidden.weight.data, hidden.bias.data = torch.eye(2), torch.zeros(2)
    out.weight.data, out.bias.data = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.zeros(3)
    # relu(1, -1) = (1, 0): logits 2, 0, 0 over a temperature of 2
    e = torch.e
    expected = torch.tensor([[e, 1.0, 1.0]]) / (e + 2)
    torch.testing.assert_close(gate(torch.tensor([[1.0, -1.0]])), expected)


def test_experts_are_sums_within_and_over_aspects() -> None:
    experts = Experts(4, [[0, 2], [1]], hidden=3, depth=1)
    torch.manual_seed(0)
    with torch.no_grad():
        experts.reward_transform_matrix.add_(0.1 * torch.randn(3, 3))
        last, gating = torch.randn(2, 4), torch.randn(2, 4)
        score, aspects, rewards = experts(last, gating)
        w, v = experts.criteria_gating(gating, experts.groups), experts.aspect_gating(gating)
    torch.testing.assert_close(rewards, last @ experts.regression_layer.weight.T @ experts.reward_transform_matrix)
    for row in range(2):
        first = w[row, 0] * rewards[row, 0] + w[row, 2] * rewards[row, 2]
        torch.testing.assert_close(aspects[row], torch.stack([first, rewards[row, 1]]))
        torch.testing.assert_close(score[row], v[row, 0] * first + v[row, 1] * rewards[row, 1])
    with pytest.raises(ValueError, match="once each"):
        Experts(4, [[0, 1], [1]])


def test_fused_attention_is_cut_as_it_was_laid_out() -> None:
    """Two key-value heads of size 1 with two queries each; three parts of the vision's attention."""
    config = {"llm_config": {"num_attention_heads": 4, "num_key_value_heads": 2}}
    fused = {"language_model.model.layers.0.attention.wqkv.weight": torch.arange(8.0)[:, None]}
    cut = {k.split(".")[-2]: v.flatten().tolist() for k, v in native(fused, config).items()}
    assert cut == {"q_proj": [0, 1, 4, 5], "k_proj": [2, 6], "v_proj": [3, 7]}
    vision = native({"vision_model.encoder.layers.3.attn.qkv.bias": torch.arange(6.0)}, config)
    assert {k: v.tolist() for k, v in vision.items()} == {
        f"vision_tower.encoder.layer.3.attention.{x}_proj.bias": [2.0 * i, 2.0 * i + 1] for i, x in enumerate("qkv")
    }


def test_the_chat_is_the_released_one(folder: Path) -> None:
    reward = load(folder, frames=2)
    text = reward.tokenizer.decode(reward.read("a red cat"))
    assert text.startswith("<s><|im_start|>system\n你是由上海人工智能实验室")
    patches = "<IMG_CONTEXT>" * 8  # 4 x 4 patches, merged by 2 x 2, of two frames
    end = f"Frame1: <img>{patches}</img>\nFrame2: <image>\na red cat<|im_end|><|im_start|>assistant\n"
    assert text.endswith("<|im_start|>user\n" + end)


def test_scores_are_the_experts_at_the_two_states(folder: Path) -> None:
    reward = load(folder)
    scores = reward.score(CLIPS, PROMPTS)
    assert tuple(scores.parts) == tuple(ASPECTS)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([reward.read(prompt)])
        pixels = reward.preprocess(CLIPS[row, [0, 1, 2, 3, 4, 5, 6, 7]])  # every 9/8th of ten frames, rounded down
        with torch.no_grad():
            states = reward.network(input_ids=ids, pixel_values=pixels).last_hidden_state[0]
            score, aspects, _ = reward.head(states[-1:], states[-len(reward.answer)][None])
        torch.testing.assert_close(scores.total[row], score[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.stack([p[row] for p in scores.parts.values()]), aspects[0], rtol=1e-4, atol=1e-5
        )
    assert (scores.total - reward(CLIPS, PROMPTS[::-1])).abs().max() > 1e-3


def test_temperature_evens_the_weights(folder: Path) -> None:
    parts = load(folder, temperature=1e6).score(CLIPS, PROMPTS)
    scale = load_file(folder / "mjvideo.safetensors")["aspect_gating.logit_scale"].item()
    mean = torch.stack(list(parts.parts.values())).mean(dim=0)
    torch.testing.assert_close(parts.total, scale * mean, rtol=1e-4, atol=1e-5)


def test_other_models_are_refused(folder: Path, tmp_path: Path) -> None:
    def changed(where: str, **values: Any) -> Path:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, path)
        config = json.loads((path / "config.json").read_text())
        (config[where] if where else config).update(values)
        (path / "config.json").write_text(json.dumps(config))
        return path

    for path, match in (
        (changed("llm_config", architectures=["Qwen2ForCausalLM"]), "InternLM2"),
        (changed("vision_config", qk_normalization=True), "InternViT"),
        (changed("", ps_version="v1"), "InternLM2"),
        (changed("llm_config", vocab_size=VOCABULARY), str(ANSWER_IDS[0])),
    ):
        with pytest.raises(ValueError, match=match):
            load(path)
    weights = load_file(folder / "mjvideo.safetensors")
    for key, match in (
        ("regression_layer.weight", "regression_layer"),
        ("criteria_gating.layers.0.bias", "criteria_gating"),
        ("model.mlp1.0.bias", "multi_modal_projector"),
    ):
        save_file({k: v for k, v in weights.items() if k != key}, tmp_path / "lacking.safetensors")
        with pytest.raises(ValueError, match=match):
            load(folder, checkpoint=str(tmp_path / "lacking.safetensors"))


def test_wrong_arguments_are_refused(folder: Path) -> None:
    for options in ({"frames": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="frames must be at least 1 and temperature above 0"):
            load(folder, **options)
    with pytest.raises(ValueError, match="stands for pixels"):
        load(folder)(CLIPS, ["<IMG_CONTEXT>", "a cat"])
