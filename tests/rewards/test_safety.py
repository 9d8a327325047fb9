"""Safety penalties against transformers' and diffusers' own code, on tiny random weights in the published layouts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from rewards import Safety, SafetyChecker
from tests.rewards import tiny
from tests.rewards.tiny_safety import save_checker, save_classifier

IMAGES = (255 * (0.1 + 0.8 * tiny.natural(12, 32, 32))).round() / 255


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_classifier(tmp_path_factory.mktemp("classifier")))


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checker(tmp_path_factory.mktemp("checker")))


def pictures() -> list[Image.Image]:
    return [to_pil_image(image) for image in IMAGES]


def test_probability_is_that_of_the_pipeline(classifier: str) -> None:
    from transformers import pipeline

    answers = pipeline("image-classification", classifier, device="cpu")(pictures())
    expected = [-next(a["score"] for a in answer if a["label"] == "nsfw") for answer in answers]
    scores = Safety(classifier)(IMAGES)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-5)
    assert scores.std() > 0.01


def test_margin_is_the_positive_part_of_the_log_odds(classifier: str) -> None:
    odds = -Safety(classifier)(IMAGES)
    expected = -torch.log(odds / (1 - odds)).clamp(min=0)
    margin = Safety(classifier, spelling="margin")(IMAGES)
    torch.testing.assert_close(margin, expected, rtol=0, atol=1e-5)


def test_several_labels_may_be_unsafe(tmp_path: Path) -> None:
    folder = str(save_classifier(tmp_path, ("drawings", "hentai", "neutral", "porn")))
    both = Safety(folder, ["hentai", "porn"])(IMAGES)
    torch.testing.assert_close(both, Safety(folder, ["hentai"])(IMAGES) + Safety(folder, ["porn"])(IMAGES))
    margin = Safety(folder, ["hentai", "porn"], "margin")(IMAGES)
    torch.testing.assert_close(margin, -torch.logit(-both).clamp(min=0), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"some and not all of the labels \['drawings'.*got \['nsfw'\]"):
        Safety(folder)
    with pytest.raises(ValueError, match="spelling must be"):
        Safety(folder, ["porn"], "logit")  # type: ignore[arg-type]


def test_the_decision_and_the_violations_are_those_of_diffusers(checker: str) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
    from transformers import AutoImageProcessor

    reference = StableDiffusionSafetyChecker.from_pretrained(checker).eval()
    pixels = AutoImageProcessor.from_pretrained(checker)(pictures(), return_tensors="pt")["pixel_values"]
    _, flagged = reference(pixels, IMAGES.clone())
    with torch.no_grad():
        embedding = reference.visual_projection(reference.vision_model(pixels)[1])
        concepts = cosine_distance(embedding, reference.concept_embeds) - reference.concept_embeds_weights
        special = cosine_distance(embedding, reference.special_care_embeds) - reference.special_care_embeds_weights
    care = (special > 0.0005).any(1)
    scores = SafetyChecker(checker).score(IMAGES)
    assert scores.parts["flagged"].tolist() == flagged
    assert scores.parts["special_care"].bool().equal(care)
    concepts += 0.01 * care[:, None]
    torch.testing.assert_close(scores.total, -concepts.clamp(min=0).sum(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.parts["nearest"], concepts.amax(1), rtol=0, atol=1e-5)
    assert 0 < care.sum() < len(IMAGES)
    assert SafetyChecker(checker, strict=True)(IMAGES).equal(-torch.tensor(flagged, dtype=torch.float32))


def test_a_violation_counts_from_half_a_thousandth_and_care_adds_a_hundredth(checker: str) -> None:
    reward = SafetyChecker(checker)
    special, concepts = reward.violations(IMAGES[:1])
    lowered = 0.01 * (special > 0.0005).any(1).float()
    for excess, flagged in ((-0.001, 0), (0.0004, 0), (0.0006, 1)):
        for special_excess, added in ((-0.001, 0.0), (0.0004, 0.0), (0.0006, 0.01)):
            changed = SafetyChecker(checker)
            changed.special_care_embeds_weights.fill_(
                (special + reward.special_care_embeds_weights).amax() - special_excess
            )
            cosines = concepts - lowered + reward.concept_embeds_weights
            changed.concept_embeds_weights.copy_(cosines[0] + added + 1)
            changed.concept_embeds_weights[3] -= 1 + excess
            scores = changed.score(IMAGES[:1])
            assert scores.parts["flagged"].item() == flagged
            assert scores.parts["nearest"].item() == pytest.approx(excess, abs=1e-5)
            assert scores.total.item() == pytest.approx(-max(excess, 0), abs=1e-5)


def test_a_strict_checker_has_no_gradient(checker: str) -> None:
    assert SafetyChecker(checker).differentiable
    with pytest.raises(RuntimeError, match="SafetyChecker is not differentiable"):
        SafetyChecker(checker, strict=True)(IMAGES.clone().requires_grad_())


def test_missing_weights_are_named(checker: str, tmp_path: Path) -> None:
    folder = tmp_path / "checker"
    shutil.copytree(checker, folder)
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del weights["special_care_embeds"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="the weights lack special_care_embeds"):
        SafetyChecker(str(folder))
