"""`LocalJudge` against the stock pipelines of transformers, on tiny random models of four families."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards import Ask, LocalJudge
from rewards.localjudge import Draws
from tests.rewards import tiny

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
YES, NO = ("Yes", "yes"), ("No", "no")


def levels(x: Tensor) -> Tensor:
    return (255 * x).round() / 255


PICTURES = levels(tiny.natural(3, 56, 84))
CLIP = levels(tiny.natural(4, 44, 61, seed=3))
ASKS = [
    Ask("is it good?", (PICTURES[0],)),
    Ask(
        "is <media> better than <media>, or is the house in the photo a great deal worse?", (PICTURES[1], CLIP), seed=1
    ),
    Ask("what does this show?", seed=2),
    Ask("Rate it.", (PICTURES[2],), system="You are a judge.", start="The quality of the image is", seed=3),
]


def judge(folders: dict[str, Path], kind: str, **options: Any) -> LocalJudge:
    return LocalJudge(str(folders[kind]), **{"dtype": "float32", **options})


def stock(folder: Path, ask: Ask) -> tuple[Any, Any, dict[str, Tensor]]:
    """Model, processor and input as transformers' documentation makes them, for a question with its media in front."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    pictures = [Image.fromarray((255 * m).round().byte().permute(1, 2, 0).numpy()) for m in ask.media]
    content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": ask.text}]
    chat = [{"role": "user", "content": content}]
    return model, processor, processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_odds_are_those_of_the_next_token(vlm_folders: dict[str, Path], kind: str) -> None:
    model, processor, inputs = stock(vlm_folders[kind], ASKS[0])
    with torch.no_grad():
        probabilities = model(**inputs).logits[0, -1].softmax(dim=-1)
    one = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("Yes", "yes")]
    other = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("No", "no")]
    odds = judge(vlm_folders, kind, quantize="hard").odds(ASKS[:1], [YES, NO])
    expected = torch.stack([probabilities[one].sum(), probabilities[other].sum()]).log()
    torch.testing.assert_close(odds[0], expected, rtol=0, atol=1e-2 if kind == "qwen3_vl" else 1e-5)  # it alone resizes


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_what_else_is_asked(vlm_folders: dict[str, Path], kind: str) -> None:
    together = judge(vlm_folders, kind)
    odds = together.odds(ASKS, [YES, NO])
    greedy = together.write(ASKS, max_tokens=8)
    drawn = together.write(ASKS, max_tokens=8, temperature=1.0)
    assert odds.dtype == torch.float32
    assert len(set(greedy + drawn)) == 8
    for i, ask in enumerate(ASKS):
        torch.testing.assert_close(together.odds([ask], [YES, NO])[0], odds[i], rtol=0, atol=1e-5)
        assert together.write([ask], max_tokens=8) == [greedy[i]]
        assert together.write([ask], max_tokens=8, temperature=1.0) == [drawn[i]]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_words_are_those_of_generate(vlm_folders: dict[str, Path], kind: str) -> None:
    model, processor, inputs = stock(vlm_folders[kind], ASKS[0])
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert judge(vlm_folders, kind, quantize="hard").write(ASKS[:1], max_tokens=8) == [expected]


def test_settings_of_the_checkpoint_do_not_bend_the_words(vlm_folders: dict[str, Path], tmp_path: Path) -> None:
    """Published Qwens bring a repetition penalty, a temperature and a top_p."""
    shutil.copytree(vlm_folders["qwen2_vl"], tmp_path / "qwen")
    file = tmp_path / "qwen" / "generation_config.json"
    own = json.loads(file.read_text())
    file.write_text(
        json.dumps(own | {"do_sample": True, "repetition_penalty": 9.0, "temperature": 0.1, "top_p": 0.001})
    )
    plain, bent = judge(vlm_folders, "qwen2_vl"), judge({"bent": tmp_path / "qwen"}, "bent")
    for temperature in (0.0, 1.0):
        words = plain.write(ASKS, max_tokens=12, temperature=temperature)
        assert bent.write(ASKS, max_tokens=12, temperature=temperature) == words


def test_draws_follow_the_softmax_and_their_seeds() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    seeds = list(range(4000))
    words = Draws(0.5, seeds, torch.device("cpu"))(torch.zeros(4000, 1), logits.expand(4000, -1)).argmax(dim=-1)
    shares = words.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, (logits / 0.5).softmax(dim=-1), rtol=0, atol=0.02)
    again = Draws(0.5, seeds[7:9], torch.device("cpu"))(torch.zeros(2, 1), logits.expand(2, -1)).argmax(dim=-1)
    assert again.equal(words[7:9])


def test_global_randomness_is_left_alone(vlm_folders: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    judge(vlm_folders, "qwen2_vl").write(ASKS[:2], max_tokens=3, temperature=1.0)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_gradient_is_the_slope_in_double_precision(vlm_folders: dict[str, Path], kind: str) -> None:
    asked = judge(vlm_folders, kind).double()

    def log_odds(image: Tensor, video: Tensor) -> Tensor:
        odds = asked.odds([Ask("is it good?", (image,)), Ask("is it <media> good?", (video,))], [YES, NO])
        return (odds[:, 0] - odds[:, 1]).sum()

    media = [0.1 + 0.8 * x.double() for x in (tiny.natural(1, 50, 61)[0], tiny.natural(3, 50, 61))]
    for x in media:
        x.requires_grad_()
    gradients = torch.autograd.grad(log_odds(*media), media)
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in media]
    with torch.no_grad():
        up, down = (log_odds(*(x + s * d for x, d in zip(media, along, strict=True))) for s in (1e-3, -1e-3))
    exact = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
    torch.testing.assert_close(exact, (up - down) / 2e-3, rtol=2e-2, atol=1e-5)  # norms and rotations stay in float32


def test_a_gradient_where_there_is_none_is_an_error(vlm_folders: dict[str, Path]) -> None:
    for kind, quantize in (("llava_onevision", "none"), ("qwen2_vl", "hard")):
        asked = judge(vlm_folders, kind, quantize=quantize)
        assert not asked.differentiable
        with pytest.raises(RuntimeError, match="choose a model of the Qwen-VL family"):
            asked.odds([Ask("good?", (PICTURES[0].clone().requires_grad_(),))], [YES, NO])
    assert judge(vlm_folders, "qwen2_vl").differentiable


def test_spellings_count_by_the_token_that_can_follow(vlm_folders: dict[str, Path]) -> None:
    asked = judge(vlm_folders, "qwen2_vl")
    yes, five, the = asked.processor.tokenizer.convert_tokens_to_ids(["Yes", "5", "Ġthe"])
    assert asked.first_tokens("assistant\n", [["Yes", "Yes, it is"], ["5"]]) == [[yes], [five]]
    assert asked.first_tokens("It is", [[" the"]]) == [[the]]
    with pytest.raises(ValueError, match=r"\['Yes'\] and \['Yes', 'No'\] begin with the same token 'Yes'"):
        asked.odds(ASKS[:1], [["Yes"], ["Yes", "No"]])
    with pytest.raises(ValueError, match="try them with a space before"):
        asked.odds([Ask("Well?", start="It is re")], [["d"], ["x"]])  # would make "red" of "re"


def test_probabilities_of_all_tokens_are_one(vlm_folders: dict[str, Path]) -> None:
    asked = judge(vlm_folders, "qwen2_vl")
    text = asked.text(ASKS[0])
    spellings = [[c] for c in "abcdefghij"]
    assert asked.odds(ASKS[:1], spellings).exp().sum() < 1
    logits = asked.logits(ASKS[:1], [text])
    mass = asked.odds(ASKS[:1], spellings).logsumexp(dim=-1)
    tokens = [t for (t,) in asked.first_tokens(text, spellings)]
    torch.testing.assert_close(mass, logits.log_softmax(dim=-1)[:, tokens].logsumexp(dim=-1), rtol=0, atol=1e-5)


def test_a_model_without_videos_is_shown_the_frames(vlm_folders: dict[str, Path]) -> None:
    asked = judge(vlm_folders, "llava_onevision")
    assert asked.text(Ask("good?", (CLIP,))).count("<video>") == 1
    asked.processor.video_processor = None
    assert asked.text(Ask("good?", (CLIP,))).count("<image>") == 4
    assert asked.odds([Ask("good?", (CLIP,))], [YES, NO]).isfinite().all()


def test_a_mapped_network_stays_where_it_was_put(vlm_folders: dict[str, Path]) -> None:
    mapped = judge(vlm_folders, "qwen2_vl", device_map="cpu")
    assert not list(mapped.parameters())
    mapped.double()
    assert mapped.network.dtype == torch.float32
    assert mapped.odds(ASKS, [YES, NO]).equal(judge(vlm_folders, "qwen2_vl").odds(ASKS, [YES, NO]))


def test_a_budget_of_pixels_is_kept(vlm_folders: dict[str, Path]) -> None:
    asked = judge(vlm_folders, "qwen2_vl", max_pixels=28 * 28)
    assert asked.inputs(ASKS[:1], [asked.text(ASKS[0])], "right")["image_grid_thw"].tolist() == [[1, 2, 2]]


def test_errors_say_what_to_do(vlm_folders: dict[str, Path], tmp_path: Path) -> None:
    asked = judge(vlm_folders, "qwen2_vl")
    with pytest.raises(ValueError, match="<media>"):
        asked.odds([Ask("<media> or <media>?", (PICTURES[0],))], [YES, NO])
    with pytest.raises(ValueError, match=r"\(3,H,W\) or \(F,3,H,W\); got \(56, 84\)"):
        asked.odds([Ask("good?", (PICTURES[0, 0],))], [YES, NO])
    with pytest.raises(ValueError, match=r"need a model of the Qwen-VL family; .* is a llava_onevision"):
        judge(vlm_folders, "llava_onevision", max_pixels=100)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        judge(vlm_folders, "qwen2_vl", batch=0)
    with pytest.raises(OSError, match="cannot load"):
        judge({"x": tmp_path}, "x")
    shutil.copytree(vlm_folders["qwen2_vl"], tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        judge({"x": tmp_path / "mute"}, "x")
