"""Bad input: each kind is an error that says what came and what to do, or NaN that is counted; never a number, never a crash.

What holds for every class alone (range, types, a broken neighbour, missing prompts) is in the battery; here it is seen as a user
meets it, through `align.score` and `align.score_set` where they are concerned.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import align
import rewards
from rewards import Prompt, Reward
from rewards.loading import fill
from tests.rewards import tiny
from tests.rewards.cases import collect
from tests.rewards.scribe import Scribe

CASES = collect()
KINDS = ["CLIPScore", "CrossEncoder", "GenEval", "ImageReward", "JPEGSize", "Weighted"]
READERS = ["CLIPScore", "CrossEncoder", "HPSv2", "ImageReward", "MPS"]  # of text, up to a limit


def built(name: str, request: pytest.FixtureRequest) -> tuple[Reward, torch.Tensor, list[Prompt]]:
    case = CASES[name]
    return case.build(request), case.show(), rewards.as_prompts(case.prompts)


@pytest.mark.parametrize("name", KINDS)
def test_images_outside_the_range(name: str, request: pytest.FixtureRequest) -> None:
    reward, images, prompts = built(name, request)
    with pytest.raises(ValueError, match=re.escape(reward.name) + r".*spanning \[-.*\]: pass \(media \+ 1\) / 2"):
        reward.score(2 * images - 1, prompts)
    with pytest.raises(ValueError, match=r"values in \[0,1\]; got float32 \(4, 3, .*spanning \[.*, 2\d\d\]"):
        reward.score(255 * images / images.max(), prompts)


@pytest.mark.parametrize("name", KINDS)
def test_bytes(name: str, request: pytest.FixtureRequest) -> None:
    reward, images, prompts = built(name, request)
    with pytest.raises(TypeError, match=r"got uint8 \(4, 3, .*: divide by 255"):
        align.score(reward, (255 * images).byte(), prompts)


@pytest.mark.parametrize("name", KINDS)
def test_pixels_that_are_not_finite(name: str, request: pytest.FixtureRequest) -> None:
    reward, images, prompts = built(name, request)
    expected = align.score(reward, images, prompts).total
    images[1, 0, 3, 5], images[2, 2, 0, 0] = torch.nan, torch.inf
    total = align.score(reward, images, prompts).total
    assert total.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(total[[0, 3]], expected[[0, 3]], rtol=0, atol=1e-3)


def test_files_that_are_not_rgb(clip_folder: str, tmp_path: Path) -> None:
    reward = rewards.CLIPScore(clip_folder)
    image = Image.fromarray((255 * tiny.natural(1, 40, 50)[0].permute(1, 2, 0)).byte().numpy())
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear).convert("RGB")
    pairs = {"grey": (image.convert("L"), image.convert("L").convert("RGB")), "clear": (clear, white)}
    pairs["palette"] = (image.quantize(16), image.quantize(16).convert("RGB"))
    pairs["two"] = (image.convert("1"), image.convert("1").convert("RGB"))
    for name, (given, _) in pairs.items():
        given.save(tmp_path / f"{name}.png")
    files = [tmp_path / f"{name}.png" for name in pairs]
    scores = align.score(reward, files, "a red cat").total
    for column in zip(*pairs.values(), strict=True):  # the same in memory
        torch.testing.assert_close(align.score(reward, column, "a red cat").total, scores)
    image.convert("CMYK").save(tmp_path / "ink.jpg")
    for ink in (tmp_path / "ink.jpg", image.convert("CMYK")):
        with pytest.raises(ValueError, match=r"is in colour mode CMYK.*convert it to RGB with its colour profile"):
            align.score(reward, [ink], "a red cat")
    scored = align.score_set(
        reward, [*map(str, files), str(tmp_path / "ink.jpg")], tmp_path / "out", prompts="a red cat"
    )
    assert (scored.rows, scored.errors, scored.failed) == (5, 1, {"CLIPScore": 1})


@pytest.mark.parametrize("name", READERS)
def test_another_number_of_prompts(name: str, request: pytest.FixtureRequest) -> None:
    reward, images, prompts = built(name, request)
    for wrong in (prompts[:3], [*prompts, prompts[0]], []):
        with pytest.raises(ValueError, match=f"needs one prompt a sample: got {len(wrong)} prompts for 4 samples"):
            reward.score(images, wrong)
    with pytest.raises(ValueError, match="got 3 prompts for 4 images: pass one for each, or one for all"):
        align.score(reward, images, prompts[:3])
    with pytest.raises(ValueError, match="needs prompts: pass one for each image, or one for all"):
        align.score(reward, images)


@pytest.mark.parametrize("name", READERS)
def test_an_empty_prompt_is_a_prompt(name: str, request: pytest.FixtureRequest) -> None:
    reward, images, prompts = built(name, request)
    total = reward(images, [Prompt(""), *prompts[1:]])
    assert total.isfinite().all()
    torch.testing.assert_close(total[1:], reward(images, prompts)[1:], rtol=0, atol=1e-3)


def test_a_prompt_that_asks_nothing_of_a_rule(clip_folder: str) -> None:
    images = torch.ones(2, 3, 16, 16)
    assert rewards.OCRAccuracy(lambda image: [("cat", 1.0)])(images, ["", 'a "cat"']).isnan().tolist() == [True, False]
    assert rewards.Shapes()(images, ["", "a red circle"]).isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match=r"GenEval needs the clauses of a prompt.*'' has none"):
        rewards.GenEval(detector=lambda image: [], clip=clip_folder)(images, ["", ""])


@pytest.mark.parametrize("name", READERS)
def test_prompts_of_two_thousand_tokens(name: str, request: pytest.FixtureRequest) -> None:
    reward, images, prompts = built(name, request)
    long = "a red cat on the house " * 400
    with pytest.warns(UserWarning, match=r"reads \d+ tokens: the last \d+ of \d{4} are cut in 'a red cat"):
        total = reward(images, [Prompt(long), *prompts[1:]])
    assert total.isfinite().all()
    torch.testing.assert_close(total[1:], reward(images, prompts)[1:], rtol=0, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert reward(images, [Prompt(long), *prompts[1:]]).equal(total)


@pytest.mark.parametrize("name", KINDS)
def test_one_pixel(name: str, request: pytest.FixtureRequest) -> None:
    reward, _, prompts = built(name, request)
    assert reward(torch.full((1, 3, 1, 1), 0.5), prompts[:1]).isfinite().all()


def test_an_image_too_small_for_a_rule() -> None:
    with pytest.raises(ValueError, match="Sharpness needs images of 3 x 3 pixels or more; got 1 x 7"):
        rewards.Sharpness()(torch.ones(1, 3, 1, 7))


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", ["CLIPScore", "HPSv2", "ImageReward"])
def test_twenty_megapixels_take_little_more_than_the_image(name: str, request: pytest.FixtureRequest) -> None:
    reward, _, prompts = built(name, request)
    image = torch.full((1, 3, 4000, 5000), 0.5)
    image[..., 1000:2000] = 0.8
    peak, done = [before := resident()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert reward(image, prompts[:1]).isfinite().all()
    finally:
        done.set()
        watcher.join()
    assert peak[0] - before < 3 * image.nbytes


def test_a_checkpoint_that_lacks_weights(clip_folder: str, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    lost = sorted(key for key in weights if "fc1" in key)
    save_file(
        {k: v for k, v in weights.items() if k not in lost}, tmp_path / "clip" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises((OSError, ValueError), match=lost[0].replace(".", r"\.")) as error:
        rewards.CLIPScore(str(tmp_path / "clip"))
    assert all(key in str(error.value) for key in lost)


def test_a_checkpoint_of_something_else() -> None:
    layer = torch.nn.Linear(3, 2)
    wrong = {"weight": torch.ones(2, 3), "bias": torch.ones(3), "scale": torch.ones(1), "shift": torch.ones(1)}
    with pytest.raises(
        ValueError,
        match=r"x\.bin does not hold .* Linear: it has unknown scale, shift; differs .* bias \(3,\) for \(2,\)",
    ):
        fill(layer, wrong, "x.bin")
    with pytest.raises(ValueError, match="it lacks bias; has unknown scale, shift"):
        fill(layer, {k: v for k, v in wrong.items() if k != "bias"}, "x.bin")


def test_a_judge_that_answers_in_prose(tmp_path: Path) -> None:
    judge = Scribe(lambda ask: "Score: 7" if "dog" in ask.text else "What a lovely picture, nearly a 9!")
    reward = rewards.Written(judge, "How well does the image show {prompt}?")
    images = tiny.natural(3, 16, 16)
    assert reward(images, ["a cat", "a dog", "a bird"]).isnan().tolist() == [True, False, True]
    for i, image in enumerate(images):
        Image.fromarray((255 * image.permute(1, 2, 0)).byte().numpy()).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    scored = align.score_set(reward, files, tmp_path / "out", prompts=["a cat", "a dog", "a bird"])
    assert (scored.rows, scored.failed) == (3, {"Written": 2})


@pytest.mark.parametrize(
    "make",
    [
        lambda: rewards.YesNo("Qwen/Qwen2.5-VL-7B-Instruct"),  # type: ignore[arg-type]
        lambda: rewards.Written(rewards.Brightness(), "How bright?"),  # type: ignore[arg-type]
        lambda: rewards.WinRate(rewards.Brightness()),  # type: ignore[arg-type]
        lambda: rewards.Critique(Scribe(lambda _: None)),  # type: ignore[arg-type]
        lambda: rewards.Weighted(["CLIPScore"]),  # type: ignore[arg-type]
        lambda: rewards.Batched("CLIPScore"),  # type: ignore[arg-type]
    ],
    ids=["YesNo", "Written", "WinRate", "Critique", "Weighted", "Batched"],
)
def test_a_part_of_another_kind_is_refused_when_it_is_given(make) -> None:
    with pytest.raises(TypeError, match=r"such as .*; got (str|Brightness|Scribe)"):
        make()


@pytest.mark.parametrize(
    ("options", "said"),
    {
        "aggregate": ({"aggregate": "avg"}, "aggregate must be one of mean, median"),
        "form": ({"form": "xml"}, "form must be text or json; got 'xml'"),
        "modality": ({"modality": "audio"}, "modality must be one of image, video; got 'audio'"),
    }.values(),
)
def test_an_unknown_way_of_asking_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rewards.Written(Scribe(lambda _: None), "How bright?", **options)


@pytest.mark.parametrize("text", ["a <media> cat", "<media><media>"])
def test_a_prompt_cannot_move_the_media(text: str) -> None:
    judge, images = Scribe(lambda _: "Score: 5"), tiny.natural(2, 8, 8)
    for reward in (rewards.Written(judge, "How like {prompt} is <media>?"), rewards.UnifiedReward(judge)):
        reward.score(images, [text, "a cat"])
        assert all(len(ask.pieces) == 2 for ask in judge.asks)
    plain = rewards.Written(judge, "How like {prompt}?")
    plain.score(images, [text, "a cat"])
    assert judge.asks[0].pieces[0] == "" and judge.asks[0].pieces[1].startswith("How like")
