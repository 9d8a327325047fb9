"""VideoScore against transformers' own networks and processors on tiny checkpoints of both published kinds.

With the same tiny weights and inputs the published class on Idefics2 (TIGER-AI-Lab/Mantis, under transformers 4.45.2) gave the
ratings of this implementation to 7e-4, what the rounding of resized pixels makes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import VideoScore
from rewards.judging import published
from rewards.videoscore import ASPECTS, taken, within
from tests.rewards import tiny, tiny_video

CLIPS = ((255 * tiny.natural(10, 84, 98)).round() / 255).unflatten(0, (2, 5))
PROMPTS = ["a red cat", "two dog on the house, and a photo of it"]
QUESTIONS = [published("videoscore", "regression").replace("{prompt}", prompt) for prompt in PROMPTS]
MAKERS = {"qwen": tiny_video.save_videoscore_qwen, "idefics": tiny_video.save_videoscore_idefics}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: str(make(tmp_path_factory.mktemp(kind))) for kind, make in MAKERS.items()}


def load(folder: str, **options: Any) -> VideoScore:
    return VideoScore(folder, **{"dtype": "float32", "max_pixels": 84 * 84, **options})


def rated(states: Tensor) -> Tensor:
    head = tiny_video.score_head()
    return states[:, -1] @ head["score.weight"].T + head["score.bias"]


def ratings(reward: VideoScore) -> Tensor:
    return torch.stack(list(reward.score(CLIPS, PROMPTS).parts.values()), dim=1)


def test_qwen_is_read_as_transformers_reads_it(folders: dict[str, str]) -> None:
    from transformers import Qwen2VLProcessor

    reward = load(folders["qwen"], quantize="hard")
    processor = Qwen2VLProcessor.from_pretrained(folders["qwen"])
    expected = []
    for clip, question in zip(CLIPS, QUESTIONS, strict=True):
        chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        video = (255 * clip[[0, 1, 3, 4]]).round().byte()  # 4 of 5 frames at 8 a second
        inputs = processor(text=[text], videos=[video], return_tensors="pt")
        places = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
        with torch.no_grad():
            expected.append(rated(reward.network(**inputs, position_ids=places).last_hidden_state))
    torch.testing.assert_close(ratings(reward), torch.cat(expected), rtol=0, atol=2e-3)


def test_idefics_is_read_as_transformers_reads_it(folders: dict[str, str]) -> None:
    from torchvision.transforms.functional import to_pil_image
    from transformers import Idefics2Processor

    reward = load(folders["idefics"], quantize="hard")
    processor = Idefics2Processor.from_pretrained(folders["idefics"])
    expected = []
    for clip, question in zip(CLIPS, QUESTIONS, strict=True):
        frames = [to_pil_image((255 * frame).round().byte()) for frame in clip]
        inputs = processor(text=[question + "<image> " * 5], images=[frames], return_tensors="pt")
        with torch.no_grad():
            expected.append(rated(reward.network(**inputs).last_hidden_state))
    torch.testing.assert_close(ratings(reward), torch.cat(expected), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_the_score_is_the_mean_of_the_aspects_asked_for(kind: str, folders: dict[str, str]) -> None:
    parts = load(folders[kind]).score(CLIPS, PROMPTS).parts
    assert tuple(parts) == ASPECTS
    score = load(folders[kind], aspects=["dynamic degree", "visual quality"])(CLIPS, PROMPTS)
    torch.testing.assert_close(score, (parts["dynamic degree"] + parts["visual quality"]) / 2)


def test_a_grey_frame_is_a_frame(folders: dict[str, str]) -> None:
    """Idefics2 drops frames whose normalised pixels are all zero."""
    clips = CLIPS.clone()
    clips[0, 2] = 0.5
    assert load(folders["idefics"])(clips, PROMPTS).isfinite().all()


def test_frames_and_sizes() -> None:
    assert taken(5, 16) == [0, 1, 2, 3, 4]
    assert taken(40, 16) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]
    assert within(512, 512, 378, 980) == (512, 512)
    assert within(1024, 1024, 378, 980) == (980, 980)
    assert within(1080, 1920, 378, 980) == (551, 980)
    assert within(1920, 1080, 378, 980) == (980, 551)
    assert within(240, 320, 378, 980) == (378, 378)


def test_checkpoints_of_another_kind_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    def changed(kind: str, file: str, **values: Any) -> str:
        path = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folders[kind], path)
        config = json.loads((path / file).read_text())
        config.get("image_processor", config).update(values)
        (path / file).write_text(json.dumps(config))
        return str(path)

    for model, match in (
        (changed("qwen", "config.json", score_type="special_token"), "special_token"),
        (changed("qwen", "config.json", model_type="llava"), "llava"),
        (changed("idefics", "processor_config.json", do_image_splitting=True), "splitting"),
        (
            changed("qwen", "model.safetensors.index.json", weight_map={"x": "model-00001-of-00002.safetensors"}),
            "score",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            load(model)
    missing = changed("qwen", "config.json")
    (Path(missing) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="shards"):
        load(missing)


def test_wrong_arguments_are_refused(folders: dict[str, str]) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"aspects": ["beauty"]}, "aspects"),
        ({"aspects": []}, "aspects"),
        ({"fps": 0}, "fps"),
        ({"frames": 1}, "frames"),
    )
    for arguments, match in wrong:
        with pytest.raises(ValueError, match=match):
            load(folders["qwen"], **arguments)
    with pytest.raises(ValueError, match="<image>"):
        load(folders["idefics"])(CLIPS, ["<image>", "a cat"])
    with pytest.raises(RuntimeError, match="not differentiable"):
        load(folders["idefics"], quantize="hard")(CLIPS.clone().requires_grad_(), PROMPTS)
