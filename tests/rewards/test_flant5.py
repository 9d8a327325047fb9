"""CLIP-FlanT5 against the released forward pass, put together by hand from stock parts, on a tiny random one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewards import CLIPFlanT5
from tests.rewards import tiny, tiny_vlm

IMAGES = (255 * (0.1 + 0.8 * tiny.natural(3, 21, 28))).round() / 255  # padded, not resized
PROMPTS = ["a red cat", "two dog on the house", "the blue bird of the car"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Weights, tokenizer, CLIP."""
    path = tmp_path_factory.mktemp("flant5")
    tiny_vlm.save_clip_flant5(path / "model", path / "clip")
    return str(path / "model"), str(tiny_vlm.save_t5_tokenizer(path / "tokenizer")), str(path / "clip")


def by_hand(folders: tuple[str, str, str]) -> list[Tensor]:
    """exp of minus the loss of "Yes", its end included, of the stock FlanT5 on text, projected patches, text."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    model, tokenizer, clip = folders
    weights = load_file(f"{model}/model.safetensors")
    tokens: Any = AutoTokenizer.from_pretrained(tokenizer)
    network = T5ForConditionalGeneration(T5Config.from_pretrained(model)).eval()
    assert not network.config.scale_decoder_outputs
    network.load_state_dict(weights, strict=False)
    network.lm_head = nn.Linear(32, len(tokens), bias=False)
    network.lm_head.weight.data = weights["lm_head.weight"][: len(tokens)]
    network.shared.weight.data = weights["shared.weight"]
    network.config.vocab_size = len(tokens)
    tower = CLIPVisionModel.from_pretrained(clip).eval()
    resize = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    scores = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        picture = Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())
        square = Image.new("RGB", (28, 28), tuple(int(255 * m) for m in resize.image_mean))
        square.paste(picture, (0, (28 - 21) // 2))
        chat = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
            f'polite answers to the user\'s questions. USER: <image>\nDoes this figure show "{prompt}"? Please answer yes or no. '
            "ASSISTANT: "
        )
        with torch.no_grad():
            patches = tower(**resize(square, return_tensors="pt"), output_hidden_states=True).hidden_states[-2][:, 1:]
            seen = nn.functional.linear(patches, weights["mm_projector.0.weight"], weights["mm_projector.0.bias"])
            seen = nn.functional.gelu(seen)
            seen = nn.functional.linear(seen, weights["mm_projector.2.weight"], weights["mm_projector.2.bias"])
            first, last = (
                network.shared(tokens(part, return_tensors="pt")["input_ids"]) for part in chat.split("<image>")
            )
            labels = tokens("Yes", return_tensors="pt")["input_ids"]
            assert labels.shape == (1, 2)
            loss = network(inputs_embeds=torch.cat([first, seen, last], dim=1), labels=labels).loss
        scores.append((-loss).exp())
    return scores


def test_it_is_the_released_forward_pass(folders: tuple[str, str, str]) -> None:
    scores = CLIPFlanT5(*folders, dtype="float32", quantize="hard").score(IMAGES, PROMPTS)
    torch.testing.assert_close(scores.total, torch.stack(by_hand(folders)), rtol=1e-4, atol=0)
    assert scores.total.std() > 0.01 * scores.total.mean()
    assert (scores.parts["yes"] >= scores.total.square()).all()


def test_the_published_clip_stands_in_for_a_missing_one(folders: tuple[str, str, str], tmp_path: Path) -> None:
    tiny_vlm.save_clip_flant5(tmp_path / "model", tmp_path / "clip", with_tower=False)
    other = CLIPFlanT5(str(tmp_path / "model"), *folders[1:], dtype="float32")
    assert other(IMAGES, PROMPTS).equal(CLIPFlanT5(*folders, dtype="float32")(IMAGES, PROMPTS))


def test_shards_of_pickled_tensors_load_too(folders: tuple[str, str, str], tmp_path: Path) -> None:
    weights = load_file(f"{folders[0]}/model.safetensors")
    (tmp_path / "config.json").write_text(Path(folders[0], "config.json").read_text())
    names, files = sorted(weights), ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    for half, file in enumerate(files):
        torch.save({k: weights[k] for k in names[half::2]}, tmp_path / file)
    index = ", ".join(f'"{k}": "{files[i % 2]}"' for i, k in enumerate(names))
    (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    scores = CLIPFlanT5(str(tmp_path), *folders[1:], dtype="float32")(IMAGES, PROMPTS)
    assert scores.equal(CLIPFlanT5(*folders, dtype="float32")(IMAGES, PROMPTS))


def test_wrong_weights_are_named(folders: tuple[str, str, str], tmp_path: Path) -> None:
    weights = load_file(f"{folders[0]}/model.safetensors")
    (tmp_path / "config.json").write_text(Path(folders[0], "config.json").read_text())
    for lost in ("lm_head.weight", "vision_tower.vision_tower.vision_model.pre_layrnorm.bias", "mm_projector.2.bias"):
        save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="lacks"):
            CLIPFlanT5(str(tmp_path), *folders[1:])
    with pytest.raises(OSError, match=r"or pytorch_model\.bin likewise"):
        CLIPFlanT5(str(tmp_path / "absent"), *folders[1:])
