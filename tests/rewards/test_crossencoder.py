"""The cross-attention reward: loading, gradients, and independence of the batch. Its skill is measured in tests/assets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rewards.crossencoder import CrossEncoder, Network

TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny-sd" / "tokenizer"
TEXTS = ["a red circle", "three green stars", "a red circle on the left and a blue square on the right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random small model on disk."""
    path = tmp_path_factory.mktemp("reward")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(path)
    config = dict(vocab=len(tokenizer), length=20, size=16, width=32, heads=2, image_layers=1, text_layers=2)
    torch.manual_seed(0)
    save_file({k: v.half() for k, v in Network(**config).state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"network": config, "mean": 0.5, "std": 2.0}))
    return path


@pytest.fixture(scope="module")
def reward(folder):
    return CrossEncoder(folder)


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_scores_are_z_scores_of_the_network(reward, images):
    out = reward.tokenizer(TEXTS, padding="max_length", max_length=20, return_tensors="pt")
    raw = reward.network(images, out.input_ids, out.attention_mask.bool())
    torch.testing.assert_close(reward(images, TEXTS), (raw - 0.5) / 2)


def test_padding_carries_nothing(reward, images):
    ids, mask = reward.tokenize(TEXTS)
    other = torch.where(mask, ids, torch.full_like(ids, 7))
    torch.testing.assert_close(reward.network(images, other, mask), reward.network(images, ids, mask))


def test_prompt_and_image_both_matter(reward, images):
    scores = reward(images[:1].repeat(3, 1, 1, 1), TEXTS)
    assert scores.unique().numel() == 3
    assert reward(images, [TEXTS[0]] * 3).unique().numel() == 3


def test_batch_and_order_do_not_matter(reward, images):
    whole = reward(images, TEXTS)
    torch.testing.assert_close(torch.cat([reward(images[i : i + 1], TEXTS[i : i + 1]) for i in range(3)]), whole)
    torch.testing.assert_close(reward(images.flip(0), TEXTS[::-1]), whole.flip(0))


def test_gradient_is_the_finite_difference(folder, images):
    reward = CrossEncoder(folder).double()
    pixels = images.double().requires_grad_()
    ids, mask = reward.tokenize(TEXTS)

    def total(x):
        seen = reward.network.see(x)
        text = reward.network.words(ids) + reward.network.order
        for block in reward.network.text:
            text = block(text, mask, seen)
        return reward.network.head(text[:, 0]).sum()  # before the cast to float32

    (gradient,) = torch.autograd.grad(total(pixels), pixels)
    step = 1e-5 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    change = (total(pixels + step) - total(pixels - step)).item() / 2
    assert change == pytest.approx((gradient * step).sum().item(), rel=1e-4)


def test_gradient_passes_the_resize_to_every_pixel(reward):
    pixels = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(3)).requires_grad_()
    reward(pixels, TEXTS[:1]).sum().backward()
    assert (pixels.grad.abs().sum(1) > 0).float().mean() > 0.9
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())


def test_weights_must_fit_exactly(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights.pop("place")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it lacks place"):
        CrossEncoder(tmp_path)


def test_prompts_are_tokenized_once(reward, images):
    reward(images, TEXTS)
    known = len(reward.tokens)
    reward(images, TEXTS)
    assert len(reward.tokens) == known


def test_another_folder_is_an_error_that_says_what_is_needed(tmp_path, folder, clip_folder):
    with pytest.raises(
        OSError, match=r"KeyError: 'network'(?s:.)*Needed: a CrossEncoder's config.json.*the folder holds"
    ):
        CrossEncoder(clip_folder)
    with pytest.raises(OSError, match="no such folder"):
        CrossEncoder(tmp_path / "missing")
    shutil.copytree(folder, tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    weights.pop("head.3.bias")
    save_file(weights, tmp_path / "torn" / "model.safetensors")
    with pytest.raises(ValueError, match=r"it lacks head\.3\.bias"):
        CrossEncoder(tmp_path / "torn")


def test_a_bounded_number_of_prompts_is_remembered(reward, images, monkeypatch):
    monkeypatch.setattr("rewards.crossencoder.REMEMBERED", 2)
    before = reward(images, TEXTS)
    assert len(reward.tokens) == 2
    torch.testing.assert_close(reward(images, TEXTS), before)
