"""ImageReward and its family against the released code, on tiny random checkpoints in the published layouts."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards import CycleReward, ImageReward, IterComp, Prompt
from tests.rewards import tiny, tiny_encoders

PROMPTS = ["a red cat", "two dog on the house", "the blue bird", "photo of a car"]
IMAGES = (255 * tiny.natural(4, 32, 32)).round() / 255  # of the model's size, so that no resize blurs a comparison


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_encoders.bert_tokenizer(tmp_path_factory.mktemp("blip"))
    tiny_encoders.save_imagereward(path / "ImageReward.pt")
    tiny_encoders.save_imagereward(path / "attribute.pt", "module.")
    tiny_encoders.save_cyclereward(path / "CycleReward-Combo.pth")
    return path


@pytest.fixture(scope="module")
def reward(folder: Path) -> ImageReward:
    return ImageReward(str(folder / "ImageReward.pt"), str(folder))


def broken(folder: Path, tmp_path: Path, **change: Tensor | None) -> str:
    """The checkpoint with keys added, replaced, or taken out by None."""
    weights = {**torch.load(folder / "ImageReward.pt"), **change}
    torch.save({k: v for k, v in weights.items() if v is not None}, tmp_path / "other.pt")
    return str(tmp_path / "other.pt")


def test_scores_are_those_of_the_released_code(folder: Path, reward: ImageReward) -> None:
    """Goldens: THUDM/ImageReward at c1392c6 (its ImageReward, BLIP_Pretrain and MLP with these sizes; transformers 4.36.2, timm
    0.6.13) and hjbahng/cyclereward at 36e1077 (its MLP on the same BLIP), given these weights, pixels and token ids."""
    expected = torch.tensor([0.95675993, 0.18232977, 1.01152146, 0.95850748])
    torch.testing.assert_close(reward(IMAGES, PROMPTS), expected, rtol=0, atol=1e-5)
    cycle = CycleReward(str(folder / "CycleReward-Combo.pth"), str(folder))
    expected = torch.tensor([-0.20236152, -0.25195634, -0.21031851, -0.25659135])
    torch.testing.assert_close(cycle(IMAGES, PROMPTS), expected, rtol=0, atol=1e-5)


def test_a_collapsed_head_scores_the_published_constant(folder: Path, tmp_path: Path) -> None:
    zero = {f"mlp.layers.7.{part}": torch.zeros(shape) for part, shape in (("weight", (1, 16)), ("bias", (1,)))}
    scores = ImageReward(broken(folder, tmp_path, **zero), str(folder))(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, torch.full((4,), -0.1617800), rtol=0, atol=1e-7)


def test_itercomp_drops_the_prefix_of_distributed_training(folder: Path, reward: ImageReward) -> None:
    itercomp = IterComp(str(folder / "attribute.pt"), str(folder))
    assert torch.equal(itercomp(IMAGES, PROMPTS), reward(IMAGES, PROMPTS))


def test_the_tokens_are_blips(reward: ImageReward) -> None:
    """[CLS] words [SEP], padded to 35; [DEC] and [ENC] are the last two of the vocabulary and never at the start."""
    ids, mask = reward.tokens(Prompt("a red cat"))
    assert ids == [2, 5, 10, 13, 3] + [0] * 30
    assert mask == [1] * 5 + [0] * 30
    assert reward.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [19, 20]


def test_padding_is_masked(reward: ImageReward) -> None:
    ids, mask = reward.tokens(Prompt("a red cat"))
    image = reward.vision(pixel_values=reward.preprocess(IMAGES[:1])).last_hidden_state
    short = [torch.tensor([row[:5]]) for row in (ids, mask)]
    full = [torch.tensor([row]) for row in (ids, mask)]
    states = [
        reward.text(i, attention_mask=m, encoder_hidden_states=image).last_hidden_state[:, 0] for i, m in (short, full)
    ]
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


def test_the_image_is_fitted_by_its_shorter_side_and_cut(reward: ImageReward) -> None:
    """Against torchvision's own pipeline on 8-bit images, as the released code runs it."""
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    images = (255 * tiny.natural(2, 50, 61)).round() / 255
    crop = lambda x: CenterCrop(32)(Resize(32, InterpolationMode.BICUBIC)(to_pil_image(x)))  # noqa: E731
    expected = torch.stack([pil_to_tensor(crop(image)) / 255 for image in images])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (reward.preprocess.mean, reward.preprocess.std))
    assert (reward.preprocess(images) * std + mean - expected).abs().max() < 1.2 / 255


def test_long_prompts_warn_once(folder: Path, reward: ImageReward) -> None:
    words = "a red cat " * 12  # 36 words and two marks
    with pytest.warns(UserWarning, match="ImageReward reads 35 tokens: the last 3 of 38 are cut"):
        first = reward(IMAGES[:1], [words])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(reward(IMAGES[:1], [words]), first)
        CycleReward(str(folder / "CycleReward-Combo.pth"), str(folder))(IMAGES[:1], [words])  # reads 128
    with pytest.warns(UserWarning, match="the last 4 of 39"):
        assert torch.equal(reward(IMAGES[:1], [words + "dog"]), first)


def test_the_oldest_prompts_are_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.imagereward.REMEMBERED", 2)
    reward = ImageReward(str(folder / "ImageReward.pt"), str(folder))
    reward(IMAGES, PROMPTS)
    assert list(reward.remembered) == PROMPTS[2:]


def test_a_low_precision_tower_gives_float32_scores(folder: Path, reward: ImageReward) -> None:
    low = ImageReward(str(folder / "ImageReward.pt"), str(folder), dtype="bfloat16")
    assert (low.vision.dtype, low.text.dtype, low.head[0].weight.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    scores = low(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores - reward(IMAGES, PROMPTS)).abs().max() < 0.2 * scores.std()


def test_what_pretraining_leaves_behind_is_not_read(folder: Path, tmp_path: Path, reward: ImageReward) -> None:
    left = {
        "blip.visual_encoder_m.cls_token": torch.zeros(1, 1, 128),
        "blip.text_proj_m.weight": torch.zeros(256, 64),
        "blip.image_queue": torch.zeros(256, 8),
        "blip.queue_ptr": torch.zeros(1),
        "blip.temp": torch.zeros(()),
        "blip.text_encoder.embeddings.position_ids": None,  # newer libraries leave it out
    }
    other = ImageReward(broken(folder, tmp_path, **left), str(folder))
    assert torch.equal(other(IMAGES, PROMPTS), reward(IMAGES, PROMPTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blip.text_encoder.pooler.dense.weight": torch.zeros(64, 64)}, r"has unknown text\.pooler\.dense\.weight"),
        ({"blip.visual_encoder.norm.bias": None}, r"lacks vision\.post_layernorm\.bias"),
        ({f"mlp.layers.{i}.{p}": None for i in (0, 2, 4, 6, 7) for p in ("weight", "bias")}, r"lacks 'head\.\*'"),
        ({"blip.visual_encoder.pos_embed": None}, r"lacks 'vision\.embeddings\.position_embedding'"),
        ({"mlp.layers.2.bias": torch.zeros(7)}, r"differs in shape at head\.2\.bias \(7,\) for \(128,\)"),
    ],
)
def test_a_key_that_does_not_fit_is_named(folder: Path, tmp_path: Path, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageReward(broken(folder, tmp_path, **change), str(folder))


def test_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"ImageReward needs the keys blip\.visual_encoder\.\*, .*other\.pt lacks .* and holds weight"
    ):
        ImageReward(str(tmp_path / "other.pt"), str(folder))
    with pytest.raises(OSError, match=r"cannot load .*absent\.pt"):
        ImageReward(str(tmp_path / "absent.pt"), str(folder))
    with pytest.raises(OSError, match="cannot load"):
        ImageReward(str(folder / "ImageReward.pt"), str(tmp_path))


def test_a_larger_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"knows 27 words, but .* 21"):
        ImageReward(str(folder / "ImageReward.pt"), str(tmp_path))
