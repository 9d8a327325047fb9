"""MPS against the released code, on a tiny random checkpoint in the published layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards import MPS
from rewards.mps import OVERALL, rotated
from tests.rewards import tiny, tiny_encoders

PROMPTS = ["a red cat", "two dog on the house", "the blue bird", "photo of a car"]
CONDITION = "a red photo of the house"
IMAGES = (255 * tiny.natural(4, 36, 36)).round() / 255  # of the size that is cut, so that no resize blurs a comparison


@pytest.fixture(scope="module")
def file(clip_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_encoders.save_mps(tmp_path_factory.mktemp("mps") / "mps.safetensors", clip_folder))


@pytest.fixture(scope="module")
def reward(file: str, clip_folder: str) -> MPS:
    return MPS(file, clip_folder, condition=CONDITION, threshold=0.3)


@pytest.mark.parametrize(
    ("threshold", "expected", "read"),
    [
        (0.01, [-50.98759842, 23.43864822, -24.19881058, -38.54875183], [12, 12, 12, 12]),
        (0.3, [-51.29982376, 20.17809868, -25.46566010, -40.69113159], [6, 7, 6, 5]),
        (0.9, [-51.40756226, -5.30869055, -24.06324959, -44.03494263], [1, 1, 1, 2]),
    ],
)
def test_scores_are_those_of_the_released_code(file: str, clip_folder: str, threshold, expected, read) -> None:
    """Goldens: Kwai-Kolors/MPS at be9027f, its XCLIPModel and Cross_model with these sizes in float32, one image at a time as
    `infer_one_sample` does, given these weights, pixels and token ids; transformers 4.36.2."""
    reward = MPS(file, clip_folder, condition=CONDITION, threshold=threshold)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), torch.tensor(expected), rtol=0, atol=1e-4)
    assert [int(passed.sum()) for _, _, passed in reward.texts(PROMPTS)] == read


def test_neighbours_do_not_decide_which_words_are_read(reward: MPS) -> None:
    """The released code divides by the largest agreement of the batch."""
    alone = [reward(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)]
    reward.remembered.clear()
    torch.testing.assert_close(reward(IMAGES, PROMPTS), torch.cat(alone), rtol=0, atol=1e-4)


def test_the_released_names_load_as_the_converted_ones(reward: MPS, clip_folder: str, tmp_path: Path) -> None:
    plain = tiny_encoders.save_mps(tmp_path / "plain.safetensors", clip_folder, prefix="")
    other = MPS(str(plain), clip_folder, condition=CONDITION, threshold=0.3)
    assert torch.equal(other(IMAGES, PROMPTS), reward(IMAGES, PROMPTS))


def test_the_condition_matters(reward: MPS, file: str, clip_folder: str) -> None:
    other = MPS(file, clip_folder, condition="two blue bird", threshold=0.3)
    assert (other(IMAGES, PROMPTS) - reward(IMAGES, PROMPTS)).abs().max() > 0.1
    assert OVERALL.count(",") == 21  # 22 words
    assert OVERALL.endswith("things.")


def test_a_word_that_is_not_read_does_not_matter(reward: MPS) -> None:
    tokens, end, read = reward.texts(PROMPTS[:1])[0]
    before = reward(IMAGES[:1], PROMPTS[:1])
    for where, same in ((~read, True), (read, False)):
        reward.remembered[PROMPTS[0]] = (torch.where(where[:, None], tokens + 1, tokens), end, read)
        moved = (reward(IMAGES[:1], PROMPTS[:1]) - before).abs().item()
        assert moved < 1e-4 if same else moved > 1e-2
    reward.remembered.clear()


def test_rotations_keep_lengths_and_know_distances_only() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 8, generator=generator, dtype=torch.float64).expand(2, 6, 8)
    turned = rotated(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    products = turned[0] @ turned[0].T
    for distance in range(6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_prompts_pass_the_text_tower_once(reward: MPS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.mps.REMEMBERED", 2)
    reward.remembered.clear()
    seen: list[str] = []
    encode = reward.encode
    monkeypatch.setattr(reward, "encode", lambda texts: [seen.extend(texts), encode(texts)][1])
    reward(IMAGES[:3], ["a cat", "a dog", "a cat"])
    reward(IMAGES[:2], ["a dog", "a cat"])
    assert seen == [CONDITION, "a cat", "a dog"]
    assert reward(IMAGES, PROMPTS).isfinite().all()  # more prompts than are remembered
    assert list(reward.remembered) == PROMPTS[2:]


def test_texts_encoded_in_inference_mode_serve_a_later_gradient(reward: MPS) -> None:
    reward.remembered.clear()
    with torch.inference_mode():
        reward(IMAGES.clone(), PROMPTS)
    x = IMAGES.clone().requires_grad_()
    reward(x, PROMPTS).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    reward.remembered.clear()


def test_a_low_precision_tower_gives_float32_scores(reward: MPS, file: str, clip_folder: str) -> None:
    low = MPS(file, clip_folder, condition=CONDITION, threshold=0.3, dtype="bfloat16")
    assert low.clip.dtype == torch.bfloat16
    assert next(low.cross.parameters()).dtype == torch.float32
    assert low.scale == reward.scale
    scores = low(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores - reward(IMAGES, PROMPTS)).abs().max() < 0.05 * reward.scale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mps.model.text_model.extra": torch.ones(1)}, r"has unknown clip\.text_model\.extra"),
        ({"mps.cross_model.layers.1.1.fn.attn_out.weight": None}, r"lacks cross\.1\.1\.attn_out\.weight"),
        ({"mps.cross_model.layers.0.0.fn.to_q.weight": None}, r"needs the keys model\.\* and cross_model\.layers"),
    ],
)
def test_a_key_that_does_not_fit_is_named(
    file: str, clip_folder: str, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    weights = {**load_file(file), **change}
    save_file({k: v for k, v in weights.items() if v is not None}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        MPS(str(tmp_path / "other.safetensors"), clip_folder)


def test_a_pickled_module_is_not_read(clip_folder: str, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(OSError, match=r"cannot load .*MPS_overall_checkpoint\.pth(?s:.)*weights_only"):
        MPS(str(tmp_path / "MPS_overall_checkpoint.pth"), clip_folder)


def test_a_threshold_that_lets_nothing_pass_is_an_error() -> None:
    with pytest.raises(ValueError, match="threshold must be below 1"):
        MPS(threshold=1.0)
