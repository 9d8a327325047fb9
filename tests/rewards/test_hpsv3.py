"""HPSv3 against the released forward pass, put together by hand from stock parts, on a tiny random one in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards import HPSv3
from rewards.judging import published
from rewards.preprocess import smart_size
from tests.rewards import tiny, tiny_vlm

AREA = 56 * 84
IMAGES = (255 * (0.1 + 0.8 * tiny.natural(3, 90, 61))).round() / 255
PROMPTS = ["a red cat", "two dog on the house {x}", "the blue bird"]


@pytest.fixture(scope="module")
def qwen(vlm_folders: dict[str, Path]) -> str:
    return str(vlm_folders["qwen2_vl"])


@pytest.fixture(scope="module")
def checkpoint(qwen: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlm.save_hpsv3(tmp_path_factory.mktemp("hpsv3"), Path(qwen))


def by_hand(qwen: str, checkpoint: Path) -> Tensor:
    """(mu, s) of the released code: pictures resized in PIL, the stock processor, positions plainly counted, the head."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(qwen)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    weights = load_file(checkpoint)
    network: Any = AutoModelForImageTextToText.from_pretrained(qwen).eval()
    network.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    network.get_input_embeddings().weight.data = weights["model.embed_tokens.weight"]
    rows = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        height, width = smart_size(*image.shape[-2:], 28, AREA, AREA)
        picture = Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).resize((width, height))
        text = published("hpsv3", "image").replace("{prompt}", prompt)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        rendered = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
        inputs = processor(text=[rendered], images=[picture], return_tensors="pt", images_kwargs={"size": size})
        with torch.no_grad():
            states = network.get_input_embeddings()(inputs["input_ids"])
            seen = network.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            states = states.masked_scatter((inputs["input_ids"] == network.config.image_token_id)[..., None], seen)
            states = network.model.language_model(inputs_embeds=states).last_hidden_state
            (x,) = states[inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|Reward|>")]
            for layer in (0, 3, 5):
                x = F.linear(x, weights[f"rm_head.{layer}.weight"], weights[f"rm_head.{layer}.bias"])
                x = x if layer == 5 else x.relu()
        rows.append(x)
    return torch.stack(rows)


def test_it_is_the_released_forward_pass(qwen: str, checkpoint: Path) -> None:
    expected = by_hand(qwen, checkpoint)
    scores = HPSv3(str(checkpoint), qwen, dtype="float32", quantize="hard", pixels=AREA).score(IMAGES, PROMPTS)
    torch.testing.assert_close(scores.total, expected[:, 0], rtol=0, atol=2e-3)  # a level of 8 bits here and there
    torch.testing.assert_close(scores.parts["sigma"], expected[:, 1].exp(), rtol=0, atol=2e-3)
    assert scores.total.std() > 1e-2


def test_the_published_area_is_448_squared() -> None:
    area = 256 * 28 * 28
    assert [smart_size(*s, 28, area, area) for s in ((512, 512), (1024, 512))] == [(448, 448), (616, 308)]


def test_both_namings_and_low_precision_load(qwen: str, checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint)
    new = {
        k if k.startswith(("rm_head.", "lm_head.")) else f"model.{k}" if k.startswith("visual.") else
        k.replace("model.", "model.language_model.", 1): v.to(torch.bfloat16)
        for k, v in weights.items()
    }  # fmt: skip
    save_file(new, tmp_path / "new.safetensors")
    full = HPSv3(str(checkpoint), qwen, dtype="float32", pixels=AREA)
    low = HPSv3(str(tmp_path / "new.safetensors"), qwen, pixels=AREA)
    assert low.network.dtype == torch.bfloat16
    assert low.head[0].weight.dtype == torch.float32
    scores = low(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores - full(IMAGES, PROMPTS)).abs().max() < 0.2


def test_a_prompt_with_the_token_in_it_is_read_to_the_end(qwen: str, checkpoint: Path) -> None:
    """A caption cannot move the place where the score is read: what it says behind a token of its own still counts."""
    reward = HPSv3(str(checkpoint), qwen, dtype="float32", pixels=AREA)
    one, other = reward(IMAGES[:1].expand(2, -1, -1, -1), ["a <|Reward|> cat", "a <|Reward|> dog"])
    assert (one - other).abs() > 1e-4


def test_wrong_weights_are_named(qwen: str, checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint)
    for change, message in (
        (lambda w: w.pop("visual.merger.ln_q.weight"), r"lacks visual\.merger\.ln_q\.weight"),
        (lambda w: w.update({"model.extra": torch.ones(1)}), r"has unknown language_model\.extra"),
        (lambda w: w.pop("rm_head.3.weight"), "head of the layers 0, 3, 5 from 32 numbers to 2"),
        (lambda w: w.pop("rm_head.3.bias"), r"lacks 3\.bias"),
    ):
        changed = dict(weights)
        change(changed)
        save_file(changed, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=message):
            HPSv3(str(tmp_path / "wrong.safetensors"), qwen)
    with pytest.raises(OSError, match="a file of HPSv3's weights"):
        HPSv3(str(tmp_path / "absent.safetensors"), qwen)
