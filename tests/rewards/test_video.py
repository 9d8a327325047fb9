"""VideoReward against the network it was trained as: peft's wrapper around transformers' Qwen2-VL, fed by transformers' processor.

With the same tiny weights and inputs the released class (VideoAlign at 219ab9d, trainer.py, under its transformers 4.45.2) gave the
scores of this implementation to 2e-6.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import VideoReward
from rewards.qwen import chosen
from rewards.video import TOKENS
from tests.rewards import tiny, tiny_video, tiny_vlm
from tests.rewards.cases.video import QUESTION

CLIPS = ((255 * tiny.natural(8, 84, 84)).round() / 255).unflatten(0, (2, 4))
PROMPTS = ["a red cat", "two dog on the house, and a photo of it"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.save_qwen2_vl(tmp_path_factory.mktemp("qwen") / "base")


@pytest.fixture(scope="module", params=[1, 3])
def rows(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def trained(base: Path, rows: int) -> Any:
    return tiny_video.video_reward(base, rows)


@pytest.fixture(scope="module")
def folder(base: Path, trained: Any, rows: int, tmp_path_factory: pytest.TempPathFactory) -> str:
    state = tiny_video.released(trained.state_dict())
    return str(tiny_video.save_video_reward(tmp_path_factory.mktemp("video") / "model", state, base, rows))


def load(folder: str, question: str | None = QUESTION, **options: Any) -> VideoReward:
    reward = VideoReward(folder, **{"dtype": "float32", **options})
    if question:
        assert reward.question.startswith("\nYou are tasked")
        reward.question = question[: question.index(reward.question[-13:]) + 13]
    return reward


def raw(trained: Any, base: Path, question: str) -> Tensor:
    """What the trained model says of CLIPS and PROMPTS, one by one: (B, 3)."""
    from transformers import Qwen2VLProcessor

    processor = Qwen2VLProcessor.from_pretrained(base)
    processor.tokenizer.add_tokens(list(TOKENS.values()), special_tokens=True)
    found = []
    for clip, prompt in zip(CLIPS, PROMPTS, strict=True):
        text = question.replace("{prompt}", prompt)
        chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        video = (255 * clip).round().byte()
        inputs = processor(text=[text], videos=[video], return_tensors="pt")
        places = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
        with torch.no_grad():
            states = trained.base_model.model.model(**inputs, position_ids=places).last_hidden_state[0]
            read = trained.base_model.model.rm_head(states)
        at = [
            (inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids(t)).nonzero() for t in TOKENS.values()
        ]
        found.append(torch.stack([read[int(p), i % read.shape[1]] for i, p in enumerate(at)]))
    return torch.stack(found)


def test_scores_are_those_of_the_trained_network(folder: str, trained: Any, base: Path) -> None:
    reward = load(folder, None, normalise=False)
    expected = raw(trained, base, reward.question + "\nEND\n")
    scores = reward.score(CLIPS, PROMPTS)
    torch.testing.assert_close(torch.stack(list(scores.parts.values()), 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.total, expected.sum(dim=1), rtol=1e-4, atol=1e-4)
    assert (scores.parts["TA"][0] - scores.parts["TA"][1]).abs() > 0.1


def test_merged_and_unmerged_old_and_new_names_are_one_model(
    folder: str, trained: Any, base: Path, rows: int, tmp_path: Path
) -> None:
    expected = load(folder)(CLIPS, PROMPTS)
    merged = copy.deepcopy(trained).merge_and_unload().state_dict()
    states = {"new": trained.state_dict(), "merged": merged, "both": tiny_video.released(merged)}
    for name, state in states.items():
        path = tiny_video.save_video_reward(tmp_path / name, state, base, rows)
        torch.testing.assert_close(load(str(path))(CLIPS, PROMPTS), expected, rtol=1e-4, atol=1e-4)


def test_quality_and_motion_do_not_know_the_prompt(folder: str) -> None:
    reward = load(folder)
    one, other = (reward.score(CLIPS, prompts).parts for prompts in (PROMPTS, ["", "the blue bird <|VQ_reward|>"]))
    for part in ("VQ", "MQ"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=1e-5)
    assert ((one["TA"] - other["TA"]).abs() > 0.05).all()


def test_parts_alone_are_as_in_the_whole_and_blind_ones_need_no_prompt(folder: str) -> None:
    whole = load(folder).score(CLIPS, PROMPTS)
    blind = load(folder, parts=["MQ", "VQ"])
    assert blind.question.endswith("<|MQ_reward|>")
    assert not blind.needs_prompt
    torch.testing.assert_close(blind(CLIPS), whole.parts["VQ"] + whole.parts["MQ"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load(folder, parts=["TA"])(CLIPS, PROMPTS), whole.parts["TA"])


def test_normalisation_of_the_released_config(folder: str) -> None:
    """Means and deviations of KwaiVGI/VideoReward on raw scores 5, 2 and 4."""
    reward = load(folder)
    reward.head.data = torch.eye(1, 32).expand(len(reward.head), -1).clone()
    ids = torch.tensor([[reward.processor.tokenizer.convert_tokens_to_ids(t) for t in TOKENS.values()]])
    states = torch.zeros(1, 3, 32)
    states[0, :, 0] = torch.tensor([5.0, 2.0, 4.0])
    parts = torch.cat([reward.read(part, states, ids) for part in TOKENS])
    torch.testing.assert_close(parts, torch.tensor([0.589206, 0.604880, 0.473508]), rtol=0, atol=1e-6)
    assert parts.sum().item() == pytest.approx(1.667595, abs=1e-6)


def test_frames_of_the_training_rate_are_read(folder: str) -> None:
    clip = tiny.natural(24, 84, 84)[None]
    reward = load(folder, fps=8.0)
    torch.testing.assert_close(
        reward(clip, PROMPTS[:1]), load(folder, fps=2.0)(clip[:, chosen(24, 8.0, 2.0)], PROMPTS[:1])
    )
    torch.testing.assert_close(load(folder, frames=4)(clip, PROMPTS[:1]), reward(clip[:, [0, 8, 15, 23]], PROMPTS[:1]))


@pytest.mark.parametrize(
    ("total", "fps", "rate", "count", "expected"),
    [
        (16, 8.0, 2.0, None, [0, 5, 10, 15]),
        (5, 8.0, 2.0, None, [0, 1, 3, 4]),
        (81, 16.0, 2.0, None, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (3, 24.0, 2.0, None, [0, 2]),
        (49, 8.0, 2.0, 6, [0, 10, 19, 29, 38, 48]),
        (4, 8.0, 2.0, 12, [0, 1, 2, 3]),
    ],
)
def test_frames_are_chosen_as_qwen_vl_utils_does(
    total: int, fps: float, rate: float, count: int | None, expected: list[int]
) -> None:
    assert chosen(total, fps, rate, count) == expected


def test_the_newest_checkpoint_is_read(folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    old = tmp_path / "model" / "checkpoint-9"
    old.mkdir()
    (old / "model.pth").write_text("an older one")
    torch.testing.assert_close(load(str(tmp_path / "model"))(CLIPS, PROMPTS), load(folder)(CLIPS, PROMPTS))


def test_checkpoints_of_another_kind_are_refused(trained: Any, base: Path, rows: int, tmp_path: Path) -> None:
    state = tiny_video.released(trained.state_dict())

    def saved(name: str, **changes: Any) -> str:
        kept = {k: v for k, v in state.items() if changes.get("without", " ") not in k}
        changes = {k: v for k, v in changes.items() if k != "without"}
        return str(tiny_video.save_video_reward(tmp_path / name, kept, base, rows, **changes))

    for options, match in (
        ({"data_config": {"prompt_template_type": "simple"}}, "detailed_special"),
        ({"model_config": {"use_special_tokens": False}}, "special tokens"),
        ({"inference_config": {"TA_std": None}, "peft_lora_config": {"lora_r": 8}}, "the rank 8"),
        ({"without": "rm_head"}, "rm_head"),
        ({"without": "layers.1.mlp.up_proj.base_layer"}, "up_proj"),
        ({"without": "lora_A"}, "not paired"),
        ({"without": "visual.merger"}, "lacks visual.merger"),
    ):
        with pytest.raises(ValueError, match=match):
            VideoReward(saved(f"{match[:5]}{len(str(options))}", **options))
    path = Path(saved("bare"))
    config = (path / "model_config.json").read_text()
    (path / "model_config.json").write_text(config.replace("inference_config", "other"))
    with pytest.raises(ValueError, match="normalise=False"):
        VideoReward(str(path))
    VideoReward(str(path), normalise=False)
    shutil.rmtree(path / "checkpoint-12")
    with pytest.raises(OSError, match="checkpoint-N"):
        VideoReward(str(path))


def test_wrong_arguments_are_refused(folder: str) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"parts": ["VQ", "QQ"]}, "parts"),
        ({"parts": []}, "parts"),
        ({"fps": 0}, "fps"),
        ({"frames": 1}, "frames"),
    )
    for arguments, match in wrong:
        with pytest.raises(ValueError, match=match):
            VideoReward(folder, **arguments)
    with pytest.raises(ValueError, match="at least 2 frames"):
        load(folder)(CLIPS[:, :1], PROMPTS)
    with pytest.raises(RuntimeError, match="not differentiable"):
        load(folder, quantize="hard")(CLIPS.clone().requires_grad_(), PROMPTS)
