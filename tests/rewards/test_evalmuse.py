"""EvalMuse against released code, on a tiny random checkpoint in the published layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rewards import EvalMuse
from tests.rewards import tiny, tiny_encoders

PROMPTS = ["A red cat.", "two dog on the house", "the blue bird", "photo of a car"]
IMAGES = (255 * tiny.natural(4, 28, 28)).round() / 255  # of the model's size, so that no resize blurs a comparison


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoders.save_evalmuse(tmp_path_factory.mktemp("evalmuse")).parent


@pytest.fixture(scope="module")
def reward(folder: Path) -> EvalMuse:
    return EvalMuse(str(folder / "fga_blip2.pth"), str(folder))


def test_scores_are_those_of_released_code(reward: EvalMuse) -> None:
    """Goldens: RE-N-Y/imscore at cb28b8b, its networks and `score` of EvalMuse with these sizes, given these weights, pixels and
    the ids of the cleaned prompts padded to 32; the names and the formula are those of DYEvaLab/EvalMuse at 0fa141b."""
    expected = torch.tensor([4.59918594, 4.50731993, 4.35831690, 4.49979305])
    torch.testing.assert_close(reward(IMAGES, PROMPTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bias", "rating"), [((0.0, 50.0), 5.0), ((50.0, 0.0), 1.0), ((0.0, 0.0), 3.0)])
def test_the_score_is_a_rating(folder: Path, tmp_path: Path, bias: tuple[float, float], rating: float) -> None:
    head = {"itm_head.weight": torch.zeros(2, 64), "itm_head.bias": torch.tensor(bias)}
    torch.save({**tiny_encoders.evalmuse_weights(), **head}, tmp_path / "other.pth")
    reward = EvalMuse(str(tmp_path / "other.pth"), str(folder))
    torch.testing.assert_close(reward(IMAGES, PROMPTS), torch.full((4,), rating))


def test_prompts_are_cleaned_as_lavis_does(reward: EvalMuse) -> None:
    assert reward.caption(' A "Red"  CAT, on: the (house)!\n') == "a red cat, on the house"
    assert torch.equal(reward(IMAGES[:1], ["A Red; Cat!"]), reward(IMAGES[:1], ["a red cat"]))
    with pytest.warns(UserWarning, match="EvalMuse reads 50 words: the last 10 of 60 are cut"):
        assert reward.caption("cat " * 60) == " ".join(["cat"] * 50)


def test_padding_is_masked(reward: EvalMuse) -> None:
    alone = reward(IMAGES[:1], PROMPTS[:1])
    beside = reward(IMAGES[[0, 0]], [PROMPTS[0], "a red cat and two blue bird on the house of a car"])[:1]
    torch.testing.assert_close(alone, beside, rtol=0, atol=1e-6)


def test_plain_names_in_safetensors(folder: Path, tmp_path: Path, reward: EvalMuse) -> None:
    weights = {
        k: v.contiguous() for k, v in tiny_encoders.evalmuse_weights().items() if not k.startswith("Qformer.cls")
    }
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(
        EvalMuse(str(tmp_path / "model.safetensors"), str(folder))(IMAGES, PROMPTS), reward(IMAGES, PROMPTS)
    )


def test_a_low_precision_tower_gives_float32_scores(folder: Path, reward: EvalMuse) -> None:
    low = EvalMuse(str(folder / "fga_blip2.pth"), str(folder), dtype="bfloat16")
    assert (low.vision.dtype, low.qformer.dtype) == (torch.bfloat16, torch.float32)
    scores = low(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores - reward(IMAGES, PROMPTS)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Qformer.bert.pooler.dense.weight": torch.zeros(64, 64)}, r"has unknown qformer\.pooler\.dense\.weight"),
        ({"ln_vision.bias": None}, r"lacks vision\.post_layernorm\.bias"),
        ({"query_tokens": None}, r"EvalMuse needs the keys visual_encoder.* lacks 'query_tokens'"),
    ],
)
def test_a_key_that_does_not_fit_is_named(folder: Path, tmp_path: Path, change, message: str) -> None:
    weights = {**tiny_encoders.evalmuse_weights(), **change}
    torch.save({k: v for k, v in weights.items() if v is not None}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        EvalMuse(str(tmp_path / "other.pth"), str(folder))
