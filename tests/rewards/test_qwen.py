"""The tensor path of the Qwen-VL family against transformers' own processors and networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards.loading import fill, read_weights
from rewards.qwen import FAMILY, Patches, Reader, backbone, hidden, native, render
from tests.rewards import tiny, tiny_vlm

QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LEVEL = 1 / 255 / 0.26  # a level of 8 bits after the smallest deviation


def levels(x: Tensor) -> Tensor:
    return (255 * x).round() / 255


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()


def chats(processor: Any) -> list[str]:
    """One that shows an image, and a longer one that shows a video and an image."""
    image, video = {"type": "image"}, {"type": "video"}
    question = {"type": "text", "text": "Is it good?"}
    return [render(processor, [image, question]), render(processor, [video, question, image, question], "You judge.")]


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("kind", QWENS)
def test_input_is_that_of_the_processor(vlm_folders: dict[str, Path], kind: str, resized: bool) -> None:
    """Text exactly; pixels exactly where nothing is resized, else but for a level of 8 bits here and there, one a pass."""
    factor = 32 if kind == "qwen3_vl" else 28
    height, width = (50, 71) if resized else (2 * factor, 3 * factor)
    processor, _ = load(vlm_folders[kind])
    images, frames = levels(tiny.natural(2, height, width)), levels(tiny.natural(4, height, width, seed=1))
    texts = chats(processor)
    processor.tokenizer.padding_side = "right"
    theirs = processor(
        text=texts,
        images=[pil(images[0]), pil(images[1])],
        videos=[[pil(frame) for frame in frames]],
        padding=True,
        return_tensors="pt",
        do_sample_frames=False,
    )
    ours = Reader(processor, kind, quantize="hard", fps=24.0)(texts, [[images[0]], [frames, images[1]]])
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if name.startswith("pixel_values"):
            gap = (ours[name] - value).abs()
            assert gap.max() <= (2.01 * LEVEL if resized else 1e-6)
            assert gap.mean() < 0.02 * LEVEL
        else:
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


def test_unrounded_pixels_stay_near(vlm_folders: dict[str, Path]) -> None:
    """PIL rounds three times, half a level each."""
    processor, _ = load(vlm_folders["qwen2_vl"])
    image = tiny.natural(1, 50, 71)[0]
    theirs = processor.image_processor(pil(image), return_tensors="pt")["pixel_values"]
    ours, grid = Reader(processor, "qwen2_vl").images(image[None, None])
    assert grid == (1, 4, 6)
    assert (ours[0] - theirs).abs().max() < 1.6 * LEVEL


def test_patches_are_where_they_should_be() -> None:
    """A patch holds one square of each of two frames, and the four patches of a block follow one another."""
    cut = Patches(patch=2, merge=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), min_pixels=1)
    video = torch.rand(1, 3, 3, 4, 8)  # three frames: the last counts twice
    patches, grid = cut(video)
    assert grid == (2, 2, 4)
    assert patches.shape == (1, 16, 3 * 2 * 2 * 2)
    twice = torch.cat([video, video[:, -1:]], dim=1)
    for number, (t, y, x) in enumerate(
        (t, 2 * by + y, 2 * bx + x) for t in (0, 1) for by in (0,) for bx in (0, 1) for y in (0, 1) for x in (0, 1)
    ):
        expected = twice[0, 2 * t : 2 * t + 2, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].transpose(0, 1)
        torch.testing.assert_close(patches[0, number], expected.flatten())


def test_a_budget_is_a_frame_s_or_all_frames(vlm_folders: dict[str, Path]) -> None:
    frame = Patches(patch=14, min_pixels=28 * 28, max_pixels=4 * 28 * 28)
    assert frame.size(8, 100, 100) == (56, 56)
    assert Patches(14, min_pixels=28 * 28, max_pixels=4 * 28 * 28, volume=True).size(4, 100, 100) == (28, 28)
    processor, _ = load(vlm_folders["qwen3_vl"])
    assert Reader(processor, "qwen3_vl").videos.volume
    limited = Reader(processor, "qwen3_vl", max_pixels=64 * 64)
    assert limited.videos.size(8, 200, 200) == limited.images.size(1, 200, 200) == (64, 64)


@pytest.mark.parametrize("kind", QWENS)
def test_states_do_not_depend_on_the_padding(vlm_folders: dict[str, Path], kind: str) -> None:
    processor, network = load(vlm_folders[kind])
    read, texts = Reader(processor, kind), chats(processor)
    media = [[tiny.natural(1, 50, 71)[0]], [tiny.natural(4, 44, 61, seed=1), tiny.natural(1, 60, 30, seed=2)[0]]]
    with torch.no_grad():
        together = read(texts, media)
        states = hidden(network.model, together)
        left = read(texts, media, "left")
        assert left["attention_mask"][0, 0] == 0
        for i in range(2):
            alone = hidden(network.model, read(texts[i : i + 1], media[i : i + 1]))[0]
            torch.testing.assert_close(states[i, : len(alone)], alone, rtol=0, atol=1e-5)
            torch.testing.assert_close(hidden(network.model, left)[i, -len(alone) :], alone, rtol=0, atol=1e-5)


def test_sequential_positions_count_the_tokens(vlm_folders: dict[str, Path]) -> None:
    """As the language model alone counts them, and unlike those that know where a patch is."""
    processor, network = load(vlm_folders["qwen2_vl"])
    texts = chats(processor)[:1]
    inputs = Reader(processor, "qwen2_vl")(texts, [[tiny.natural(1, 60, 60)[0]]])
    with torch.no_grad():
        embedded = network.model.get_input_embeddings()(inputs["input_ids"])
        seen = network.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        embedded = embedded.masked_scatter((inputs["mm_token_type_ids"] == 1)[..., None], seen)
        expected = network.model.language_model(inputs_embeds=embedded).last_hidden_state
        states = hidden(network.model, inputs, sequential=True)
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)
        assert (hidden(network.model, inputs) - states).abs().max() > 1e-2


def test_what_comes_twice_is_cut_once(vlm_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    processor, _ = load(vlm_folders["qwen2_vl"])
    cut, calls = Patches.__call__, []
    monkeypatch.setattr(Patches, "__call__", lambda self, x: calls.append(len(x)) or cut(self, x))
    one, other = tiny.natural(2, 50, 50)
    Reader(processor, "qwen2_vl").patches([one, other, one])
    assert calls == [2]


def test_both_namings_fill_a_bare_network(vlm_folders: dict[str, Path]) -> None:
    folder = vlm_folders["qwen2_vl"]
    old = read_weights(folder / "model.safetensors")
    assert "visual.patch_embed.proj.weight" in old and "model.norm.weight" in old
    processor, network = load(folder)
    inputs = Reader(processor, "qwen2_vl")(chats(processor)[:1], [[tiny.natural(1, 60, 60)[0]]])
    for weights in (old, network.state_dict()):
        bare, _ = backbone(str(folder))
        assert all(p.is_meta for p in bare.parameters())
        fill(bare, native(weights), "tiny", ignore=[r"lm_head\.weight"])
        with torch.no_grad():
            assert hidden(bare.eval(), inputs).equal(hidden(network.model, inputs))


def test_added_tokens_get_a_row_each(vlm_folders: dict[str, Path]) -> None:
    bare, processor = backbone(str(vlm_folders["qwen2_vl"]), ["<|Reward|>"])
    assert bare.get_input_embeddings().weight.shape[0] == len(processor.tokenizer)
    assert processor.tokenizer.tokenize("a <|Reward|> b").count("<|Reward|>") == 1


def test_thoughts_are_switched_off_or_closed(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_vlm.save_qwen2_vl(tmp_path, tiny_vlm.THINKING_CHAT))
    question = [{"type": "text", "text": "Well?"}]
    assert render(processor, question, start="It is").endswith("<|im_start|>assistant\nIt is")
    processor.chat_template = tiny_vlm.THINKING_CHAT.replace(
        "enable_thinking is not defined or enable_thinking", "true"
    )
    assert render(processor, question, start="It is").endswith("assistant\n<think>\n\n</think>\n\nIt is")


def test_errors_say_what_to_do(vlm_folders: dict[str, Path]) -> None:
    processor, _ = load(vlm_folders["qwen2_vl"])
    read, (text, _) = Reader(processor, "qwen2_vl"), chats(processor)
    with pytest.raises(ValueError, match=r"one placeholder for each medium.*remove them from the prompt"):
        read([text + "<|image_pad|>"], [[torch.rand(3, 40, 40)]])
    with pytest.raises(ValueError, match="one placeholder"):
        read([text], [[torch.rand(2, 3, 40, 40)]])
    with pytest.raises(ValueError, match=f"{', '.join(FAMILY)}; got 'llava'"):
        Reader(processor, "llava")
    processor.image_processor.resample = 2
    with pytest.raises(ValueError, match="resample"):
        Reader(processor, "qwen2_vl")
    with pytest.raises(OSError, match="cannot load"):
        backbone("/nowhere/at/all")
