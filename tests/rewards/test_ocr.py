"""Reading text: the rule on a stub engine, RapidOCR on rendered text."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from rewards import OCRAccuracy, Prompt
from rewards.ocr import edit_distance, normal, quoted

BLANK = torch.ones(1, 3, 8, 8)


def reads(*lines: str, confidence: float = 0.9):
    return lambda image: [(line, confidence) for line in lines]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Hello World"', "Hello World"),
        ("a sign that says “Hello World”", "Hello World"),
        ('opened “curly", closed straight', "curly"),
        ("German „Guten Tag“, French «Bonjour»", "Guten TagBonjour"),
        ('a cup "HOT" beside a cup "COLD"', "HOTCOLD"),
        ("写着「你好」和『世界』的招牌", "你好世界"),
        ("a dog's bowl of the 'boss'", ""),
        ('nothing in "" here', ""),
        ('an opening " alone', ""),
        ("", ""),
    ],
)
def test_quoted_text(prompt: str, text: str) -> None:
    assert quoted(prompt) == text


def test_distance_is_levenshteins() -> None:
    known = {
        ("kitten", "sitting"): 3,
        ("", "abc"): 3,
        ("abc", ""): 3,
        ("flaw", "lawn"): 2,
        ("", ""): 0,
        ("abc", "abc"): 0,
    }
    for (a, b), distance in known.items():
        assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_texts_are_compared_without_what_ocr_cannot_know() -> None:
    assert normal(" Ｈello\n\tWORLD ") == "helloworld"
    assert normal("Don’t") == normal("don't")


@pytest.mark.parametrize(
    ("read", "score", "strict"),
    [  # the target has 10 letters
        (["Hello World"], 1, 1),
        (["hello", "WORLD"], 1, 1),
        (["Hallo World"], 0.9, 0.9),
        (["xx Hello World yyy"], 1, 1 - 5 / 15),
        (["Hello"], 0.5, 0.5),
        ([], 0, 0),
        (["qqqqqqqqqqqqqqqqqqqq"], 0, 0),
    ],
)
def test_score_is_published(read: list[str], score: float, strict: float) -> None:
    prompt = ['a sign that says "Hello World"']
    assert OCRAccuracy(reads(*read))(BLANK, prompt).tolist() == pytest.approx([score])
    assert OCRAccuracy(reads(*read), strict=True)(BLANK, prompt).tolist() == pytest.approx([strict])


def test_parts_say_whether_it_stands_alone() -> None:
    scores = OCRAccuracy(reads("a Hello")).score(BLANK, ['"Hello"'])
    assert {name: value.item() for name, value in scores.parts.items()} == {"contained": 1, "exact": 0}


def test_no_text_and_no_answer_are_nan_and_the_engine_is_not_asked_for_nothing() -> None:
    asked = []
    reward = OCRAccuracy(lambda image: [asked.append(image.size), []][1])
    media = torch.ones(3, 3, 4, 8)
    assert reward(media, ["no text", 'the "word"', '""']).isnan().tolist() == [True, False, True]
    assert asked == [(8, 4)]
    assert OCRAccuracy(lambda image: None)(BLANK, ['"word"']).isnan().all()


def test_meta_says_the_text_where_quotes_cannot() -> None:
    prompt = Prompt('a "quoted" thing', meta={"text": "other"})
    assert OCRAccuracy(reads("other"))(BLANK, [prompt]).item() == 1


def test_lines_of_little_confidence_are_not_read() -> None:
    assert OCRAccuracy(reads("word", confidence=0.4), confidence=0.5)(BLANK, ['"word"']).item() == 0
    assert OCRAccuracy(reads("word", confidence=0.4))(BLANK, ['"word"']).item() == 1
    with pytest.raises(ValueError, match="confidence must be"):
        OCRAccuracy(reads(), confidence=1.0)


def test_an_engine_may_be_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_engine.py").write_text("def read(image):\n    return [('word', 1.0)]\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert OCRAccuracy("my_engine.read")(BLANK, ['"word"']).item() == 1
    assert sys.path == path
    with pytest.raises(ValueError, match=r"cannot import 'my_engine\.absent'.*package\.module\.name"):
        OCRAccuracy("my_engine.absent")
    with pytest.raises(ValueError, match="engine must be a function"):
        OCRAccuracy(3)  # type: ignore[arg-type]


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match=r"pip install 'kilter\[ocr\]'"):
        OCRAccuracy()


def rendered(*lines: str) -> Tensor:
    image = Image.new("RGB", (320, 160), "white")
    ImageDraw.Draw(image).multiline_text((16, 32), "\n".join(lines), "darkred", ImageFont.load_default(40))
    return pil_to_tensor(image).float() / 255


def test_rapidocr_reads_rendered_text() -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    images = torch.stack([rendered("Hello", "World"), rendered("Halo World"), torch.ones(3, 160, 320)])
    scores = OCRAccuracy().score(images, ['the words "Hello World"'] * 3)
    assert scores.total.tolist() == pytest.approx([1, 0.8, 0])
    assert scores.parts["exact"].tolist() == [1, 0, 0]
