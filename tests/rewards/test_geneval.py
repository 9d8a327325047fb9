"""GenEval: the rules on boxes made by hand, the detector and the colours against transformers and PIL.

The rules were run beside the released `evaluate` and `relative_position` of GenEval and `evaluate_reward` of flow_grpo's server on
40000 random scenes and agreed in every one; the numbers here are from those runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from align.prompts import read_prompts
from rewards import GenEval, Prompt, Scores
from rewards.geneval import CLASSES, COLORS, Found, Mask2Former, benchmark, judge, relations
from tests.rewards import tiny
from tests.rewards.tiny_geneval import save_mask2former


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_mask2former(tmp_path_factory.mktemp("mask2former")))


def square(x: float, y: float, side: float = 10) -> tuple[float, float, float, float]:
    return (x, y, x + side, y + side)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (square(0, 0), square(50, 0), {"left of"}),
        (square(50, 0), square(0, 0), {"right of"}),
        (square(0, 0), square(0, 50), {"above"}),
        (square(0, 50), square(0, 0), {"below"}),
        (square(0, 0), square(50, 50), {"left of", "above"}),
        (square(0, 0), square(50, 20), {"left of"}),
        (square(0, 0), square(2, 0), set()),  # the margin is 0.1 (10 + 10) = 2
        (square(0, 0), square(3.9, 0), set()),  # (3.9 - 2) / 3.9 is less than half
        (square(0, 0), square(4.1, 0), {"left of"}),
        (square(0, 0), square(0, 0), set()),
        (square(0, 0, 40), square(30, 0, 40), {"left of"}),  # they overlap
    ],
)
def test_positions_are_the_published_ones(a: tuple, b: tuple, expected: set[str]) -> None:
    assert relations(a, b) == expected


def ruled(clauses: dict, *objects: tuple, tag: str = "") -> tuple[bool, bool, float]:
    """Verdict on objects given as (class, score, box, colour)."""
    found = [Found(*row[:3]) for row in objects]
    colour = {id(one): row[3] for one, row in zip(found, objects, strict=True)}
    verdict = judge(found, {"tag": tag, **clauses}, lambda group: [colour[id(one)] for one in group])
    return verdict.correct, verdict.strict, round(verdict.dense, 4)


def dogs(number: int, score: float = 0.8, color: str = "brown") -> list[tuple]:
    return [("dog", score - 0.001 * i, square(20 * i, 0), color) for i in range(number)]


def asks(name: str, count: int, **more) -> dict:
    return {"class": name, "count": count, **more}


def test_numbers() -> None:
    two = {"include": [asks("dog", 2)]}
    assert ruled(two, *dogs(2)) == (True, True, 1)
    assert ruled(two, *dogs(1)) == (False, False, 0.5)
    assert ruled(two, *dogs(3)) == (True, False, 0.5)  # published: the two surest are taken
    assert ruled(two, *dogs(5)) == (True, False, -0.5)
    assert ruled(two) == (False, False, 0)
    exact = {**two, "exclude": [asks("dog", 3)]}
    assert ruled(exact, *dogs(3)) == (False, False, 0.5)
    assert ruled(exact, *dogs(2)) == (True, True, 1)
    assert ruled({**two, "exclude": [asks("cat", 1)]}, *dogs(2)) == (True, True, 1)


def test_sure_enough_objects_count_up_to_sixteen() -> None:
    one = {"include": [asks("dog", 1)]}
    assert ruled(one, ("dog", 0.3, square(0, 0), "red")) == (False, False, 0)
    assert ruled(one, ("dog", 0.31, square(0, 0), "red")) == (True, True, 1)
    assert ruled(one, ("dog", 0.9, square(0, 0), "red"), tag="counting") == (False, False, 0)
    assert ruled(one, ("dog", 0.91, square(0, 0), "red"), tag="counting") == (True, True, 1)
    assert ruled({"include": [asks("dog", 16)]}, *dogs(20)) == (True, True, 1)
    assert ruled({"include": [asks("dog", 17)]}, *dogs(20)) == (False, False, round(16 / 17, 4))


def test_colours() -> None:
    red = {"include": [asks("dog", 2, color="red")]}
    assert ruled(red, *dogs(2, color="red")) == (True, True, 1)
    assert ruled(red, *dogs(1, color="red"), *dogs(1, 0.5)) == (False, False, 0.75)  # 1 and then 1/2
    assert ruled(red, *dogs(2)) == (False, False, 0.5)
    assert ruled(red, *dogs(1, color="red")) == (False, False, 0.25)  # 1/2 and then 0
    surest = [*dogs(2, 0.9, "red"), *dogs(1, 0.5, "blue")]
    assert ruled(red, *surest) == (True, False, 0.25)


def test_places() -> None:
    left = {"include": [asks("cat", 1), asks("dog", 1, position=["left of", 0])]}
    cat = ("cat", 0.8, square(60, 0), "black")
    assert ruled(left, cat, *dogs(1)) == (True, True, 1)
    assert ruled(left, ("cat", 0.8, square(0, 60), "black"), *dogs(1)) == (False, False, round(2 / 3, 4))
    assert ruled(left, *dogs(1)) == (False, False, round(1 / 3, 4))  # no target: 0, 1, 0
    assert ruled(left, cat) == (False, False, round(1 / 3, 4))
    every = {"include": [asks("cat", 1), asks("dog", 3, position=["left of", 0])]}
    assert ruled(every, cat, *dogs(3)) == (True, True, 1)
    assert ruled(every, ("cat", 0.8, square(20, 0), "black"), *dogs(3)) == (False, False, round(2 / 3, 4))
    both = {"include": [asks("cat", 1), asks("dog", 1, color="red", position=["left of", 0])]}
    assert ruled(both, cat, *dogs(1)) == (False, False, round(2 / 3, 4))  # 1, 1, 0: a wrong colour ends it
    assert ruled(both, cat) == (False, False, round(1 / 3, 4))  # 1, 0, one 0 for both


def test_overall_is_the_mean_over_tags() -> None:
    prompts = [Prompt("p", meta={"tag": tag}) for tag in ("colors", "colors", "colors", "counting")]
    table = benchmark(torch.tensor([1.0, 1.0, 0.0, 0.0]), prompts)
    assert table == pytest.approx({"colors": 2 / 3, "counting": 0, "overall": 1 / 3})
    for wrong in (prompts[:3], [*prompts[:3], Prompt("p")]):
        with pytest.raises(ValueError, match="one prompt an image, each with its tag"):
            benchmark(torch.ones(4), wrong)


def test_the_detector_finds_what_transformers_finds(detector: str) -> None:
    """At 384 x 384 nothing is resized, by either; transformers then keeps the 10 likeliest of all queries and classes."""
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    images = (255 * tiny.natural(2, 384, 384)).round().byte()
    processor = AutoImageProcessor.from_pretrained(detector)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector).eval()
    with torch.no_grad():
        found = Mask2Former(detector, torch.float32, 384).eval()(images.float() / 255)
        out = model(**processor(list(images), return_tensors="pt"))
    sizes = [(384, 384)] * 2
    expected = processor.post_process_instance_segmentation(
        out, threshold=0.3, target_sizes=sizes, return_binary_maps=True
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert len(theirs["segments_info"]) > 3
        for segment, mask in zip(theirs["segments_info"], theirs["segmentation"].bool(), strict=True):
            same = [one for one in mine if abs(one.score - segment["score"]) < 1e-4]
            assert [one.name for one in same] == [CLASSES[segment["label_id"]]]
            assert (same[0].mask != mask).sum() <= 2
            rows, columns = same[0].mask.nonzero().unbind(1)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert same[0].box == tuple(int(side) for side in box)


def test_the_detectors_input_keeps_the_shape_of_the_image(detector: str) -> None:
    found = Mask2Former(detector, torch.float32, 64)
    seen = []
    found.network.register_forward_pre_hook(lambda _, args, given: seen.append(given["pixel_values"]), with_kwargs=True)
    with torch.no_grad():
        found(torch.ones(1, 3, 50, 100))
        found(torch.ones(1, 3, 10, 100))
    assert [tuple(x.shape[-2:]) for x in seen] == [(64, 128), (32, 128)]  # 53 x 107 and 11 x 107, then multiples of 32
    assert (seen[0][0, :, 53:] == 0).all()
    assert (seen[0][0, :, :53, 107:] == 0).all()
    assert (seen[0][0, :, :53, :107] > 1).all()


def test_colours_are_named_as_published(clip_folder: str) -> None:
    """PIL's composite and crop, transformers' pixels and features, clip_benchmark's classifier."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    images = (255 * tiny.natural(1, 80, 90)).round().byte()
    masks = tiny.natural(6, 80, 90, seed=5)[:, 0] > 0.5
    boxes = [(3, 5, 70, 66), (0, 0, 90, 80), (10, 20, 50, 77), (30, 2, 88, 43), (1, 1, 40, 40), (50, 40, 90, 80)]
    group = [Found("car", 0.9, box, mask) for box, mask in zip(boxes, masks, strict=True)]
    image, blank = to_pil_image(images[0]), Image.new("RGB", (90, 80), "#999")
    crops = [Image.composite(image, blank, to_pil_image(one.mask.byte() * 255)).crop(one.box) for one in group]
    clip, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)

    def unit(output) -> Tensor:
        features = output if isinstance(output, Tensor) else output.pooler_output
        return features / features.norm(dim=-1, keepdim=True)

    with torch.no_grad():
        rows = []
        for color in COLORS:
            texts = [f"a photo of a {color} car", f"a photo of a {color}-colored car", f"a photo of a {color} object"]
            rows.append(unit(clip.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt"))).mean(0))
        classifier = torch.stack([row / row.norm() for row in rows])
        pixels = AutoImageProcessor.from_pretrained(clip_folder)(crops, return_tensors="pt")
        choice = (unit(clip.get_image_features(**pixels)) @ classifier.T).argmax(1)
        reward = GenEval(detector=lambda image: [], clip=clip_folder)
        torch.testing.assert_close(reward.classifier("car"), classifier, rtol=0, atol=1e-5)
        assert reward.colours(images[0].float() / 255, group) == [COLORS[i] for i in choice]


SCENE = {
    "tag": "position",
    "include": [asks("cat", 1), asks("dog", 1, position=["left of", 0])],
    "prompt": "a photo of a dog left of a cat",
}


def shown(image: Image.Image) -> list[tuple]:
    """A dog at the left; a cat at the right where the image is bright."""
    cat = [("cat", 0.9, (20, 0, 28, 8), None)] if image.getpixel((0, 0)) == (255, 255, 255) else []
    return [("dog", 0.9, (0, 0, 8, 8), None), *cat]


def test_metadata_files_are_read_as_they_are_and_parts_tell_the_kinds(clip_folder: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(SCENE) + "\n")
    prompts = read_prompts([str(tmp_path / "evaluation_metadata.jsonl")])
    media = torch.stack([torch.ones(3, 16, 32), torch.zeros(3, 16, 32)])
    expected = {"correct": [1, 0], "strict": [1, 0], "dense": [1, 1 / 3], "count": [1, 0.5], "position": [1, 0]}
    for variant in ("correct", "strict", "dense"):
        scores: Scores = GenEval(variant, shown, clip_folder).score(media, prompts * 2)
        assert scores.total.equal(scores.parts[variant])
        for name, values in expected.items():
            assert scores.parts[name].tolist() == pytest.approx(values)
        assert scores.parts["color"].isnan().all()
        assert scores.parts["exclude"].isnan().all()


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, r"needs the clauses .* in its meta.*'a photo'"),
        ({"include": [{"class": "dog"}]}, "a class of COCO and a count of at least 1"),
        ({"include": [asks("dog", 0)]}, "a count of at least 1"),
        ({"include": [asks("unicorn", 1)]}, "a class of COCO"),
        ({"include": [asks("dog", 1, color="grey")]}, "color must be one of red, orange"),
        ({"include": [asks("dog", 1, position=["near", 0])]}, "position must be one of left of"),
        ({"include": [asks("dog", 1, position=["above", 0])]}, "the number of an earlier clause"),
    ],
)
def test_clauses_that_cannot_be_judged_are_errors(detector: str, clip_folder: str, meta: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenEval("correct", detector, clip_folder)(torch.ones(1, 3, 16, 16), [Prompt("a photo", meta=meta)])


def test_a_detector_without_weights_is_refused(detector: str, tmp_path: Path) -> None:
    folder = shutil.copytree(detector, tmp_path / "detector")
    weights = load_file(folder / "model.safetensors")
    del weights["class_predictor.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OSError, match=r"the weights lack class_predictor\.bias\n"):
        GenEval(detector=str(folder))


def test_another_detector_is_refused_by_its_classes(tmp_path: Path, clip_folder: str) -> None:
    with pytest.raises(ValueError, match=r"COCO's 80 classes; .* knows 5"):
        GenEval(detector=str(save_mask2former(tmp_path, 5)), clip=clip_folder)
    with pytest.raises(ValueError, match="variant must be correct, strict or dense"):
        GenEval("loose")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot import 'nowhere\.find'"):
        GenEval(detector="nowhere.find", clip=clip_folder)
