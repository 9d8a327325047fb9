"""Aesthetic predictors against computations by hand and released code, on tiny random encoders and published layouts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rewards import Aesthetic, ShadowAesthetic
from rewards.aesthetic import read_head
from tests.rewards import tiny, tiny_encoders

IMAGES = 0.1 + 0.8 * tiny.natural(4, 50, 61)


def embeddings(folder: str, images: Tensor) -> Tensor:
    """Unit embeddings of transformers' own pixels and model."""
    from transformers import AutoImageProcessor, CLIPModel

    pixels = AutoImageProcessor.from_pretrained(folder)(list((255 * images).round().byte()), return_tensors="pt")
    with torch.no_grad():
        features = CLIPModel.from_pretrained(folder).eval().get_image_features(**pixels)
    features = features if isinstance(features, Tensor) else features.pooler_output
    return features / features.norm(dim=-1, keepdim=True)


def test_v2_is_the_published_formula(clip_folder: str, aesthetic_head: Path) -> None:
    weights = torch.load(aesthetic_head, weights_only=True)
    x = embeddings(clip_folder, IMAGES)
    for layer in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    scores = Aesthetic(clip_folder, str(aesthetic_head), quantize="hard")(IMAGES)
    torch.testing.assert_close(scores, x[:, 0], rtol=0, atol=2e-2)  # PIL's rounding: see test_clip
    assert scores.std() > 0.05
    assert ((scores > 1) & (scores < 10)).all()


def test_without_a_resize_nothing_is_lost(clip_folder: str, aesthetic_head: Path) -> None:
    images = (255 * tiny.natural(4, 36, 40)).round() / 255
    weights = torch.load(aesthetic_head, weights_only=True)
    x = embeddings(clip_folder, images)
    for layer in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    torch.testing.assert_close(Aesthetic(clip_folder, str(aesthetic_head))(images), x[:, 0], rtol=0, atol=1e-5)


def test_v1_is_one_layer_and_safetensors_are_read(clip_folder: str, tmp_path: Path) -> None:
    weights = {"weight": torch.randn(1, 16), "bias": torch.tensor([5.0])}
    torch.save(weights, tmp_path / "v1.pth")
    save_file(weights, tmp_path / "v1.safetensors")
    images = (255 * tiny.natural(4, 36, 40)).round() / 255
    expected = embeddings(clip_folder, images) @ weights["weight"][0] + 5
    for file in ("v1.pth", "v1.safetensors"):
        torch.testing.assert_close(Aesthetic(clip_folder, str(tmp_path / file))(images), expected, rtol=0, atol=1e-5)


def test_gradient_is_the_slope_in_double_precision(clip_folder: str, aesthetic_head: Path) -> None:
    reward = Aesthetic(clip_folder, str(aesthetic_head)).double()
    x = IMAGES[:2].double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.measure(x, []).sum(), x)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = (reward.measure(x + 1e-6 * direction, []) - reward.measure(x - 1e-6 * direction, [])).sum() / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-8)
    assert not any(p.requires_grad for p in reward.parameters())


def test_it_keeps_no_text_tower_and_needs_no_tokenizer(clip_folder: str, aesthetic_head: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    for file in folder.glob("token*"):
        file.unlink()
    reward = Aesthetic(str(folder), str(aesthetic_head))
    assert not any("text" in name for name, _ in reward.named_parameters())
    assert reward(IMAGES, ["a cat", "a dog", "a bird", "a car"]).equal(reward(IMAGES))


def test_a_low_precision_tower_gives_float32_scores(clip_folder: str, aesthetic_head: Path) -> None:
    full = Aesthetic(clip_folder, str(aesthetic_head))(IMAGES)
    low = Aesthetic(clip_folder, str(aesthetic_head), dtype="bfloat16")
    assert low.projection.weight.dtype == torch.bfloat16
    assert low.head[0].weight.dtype == torch.float32
    scores = low(IMAGES)
    assert scores.dtype == torch.float32
    assert (scores - full).abs().max() < 0.1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"mlp.0.weight": torch.ones(1, 16)}, r"holds weight and bias \(v1\), or layers\.N.*holds mlp\.0\.weight"),
        ({}, "an aesthetic head holds"),
        ({"weight": torch.ones(1, 768), "bias": torch.ones(1)}, r"should read 16 numbers: the encoder's.*\(1, 768\)"),
        ({"layers.0.weight": torch.ones(1, 16)}, r"layer 0 of .* should read 16 numbers.*\{'weight': \(1, 16\)\}"),
        ({"weight": torch.ones(4, 16), "bias": torch.ones(4)}, "ends in one number; .* ends in 4"),
    ],
)
def test_a_wrong_head_is_named(clip_folder: str, tmp_path: Path, weights: dict[str, Tensor], message: str) -> None:
    torch.save(weights, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=message):
        Aesthetic(clip_folder, str(tmp_path / "head.pth"))


def test_missing_and_unreadable_files_are_named(clip_folder: str, aesthetic_head: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="absent"):
        Aesthetic(clip_folder, str(tmp_path / "absent.pth"))
    (tmp_path / "broken.pth").write_bytes(b"not a head")
    with pytest.raises(OSError, match=r"cannot load .*broken.pth"):
        Aesthetic(clip_folder, str(tmp_path / "broken.pth"))
    with pytest.raises(OSError, match="cannot load"):
        Aesthetic(str(tmp_path), str(aesthetic_head))


def test_the_hub_is_asked_for_a_file_of_a_repository(
    clip_folder: str, aesthetic_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: [asked.append(a), str(aesthetic_head)][1])
    scores = Aesthetic(clip_folder)(IMAGES)
    assert asked == [("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")]
    assert scores.equal(Aesthetic(clip_folder, str(aesthetic_head))(IMAGES))


@pytest.mark.parametrize(
    ("layers", "prefix", "expected"),
    [
        (
            {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)},
            "layers",
            [-0.18836848, -0.17164278, -0.20073535, -0.19277146],
        ),
        (
            {0: (1152, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 8: (16, 1)},
            "scoring_head",
            [-0.52492785, -0.51158464, -0.50998038, -0.51636314],
        ),
    ],
)
def test_the_published_heads_are_those_of_the_released_code(tmp_path: Path, layers, prefix: str, expected) -> None:
    """Goldens: christophschuhmann/improved-aesthetic-predictor at 6934dd8, `MLP(768)` of `normalized` embeddings, and
    discus0434/aesthetic-predictor-v2-5 at c0e1556, `AestheticPredictorV2_5Head` of such, given these weights and embeddings."""
    weights = tiny_encoders.aesthetic_weights(layers)
    torch.save({f"{prefix}.{key}": value for key, value in weights.items()}, tmp_path / "head.pth")
    width = layers[0][0]
    head = read_head(str(tmp_path / "head.pth"), width)
    embedding = torch.randn(4, width, generator=torch.Generator().manual_seed(9))
    scores = head(torch.nn.functional.normalize(embedding, dim=-1)).squeeze(-1)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-6)


def test_v2_5_reads_the_pooled_output_of_a_siglip(siglip_folder: str, tmp_path: Path) -> None:
    from transformers import SiglipVisionModel

    layers = {0: (32, 24), 2: (24, 12), 4: (12, 8), 6: (8, 4), 8: (4, 1)}
    weights = {f"scoring_head.{k}": v for k, v in tiny_encoders.aesthetic_weights(layers).items()}
    torch.save(weights, tmp_path / "aesthetic_predictor_v2_5.pth")
    images = (255 * tiny.natural(4, 32, 32)).round() / 255
    with torch.no_grad():
        x = SiglipVisionModel.from_pretrained(siglip_folder).eval()(2 * images - 1).pooler_output
    x = x / x.norm(dim=-1, keepdim=True)
    for layer in layers:
        x = x @ weights[f"scoring_head.{layer}.weight"].T + weights[f"scoring_head.{layer}.bias"]
    reward = Aesthetic(siglip_folder, str(tmp_path / "aesthetic_predictor_v2_5.pth"))
    torch.testing.assert_close(reward(images), x[:, 0], rtol=0, atol=1e-5)
    assert not any("text" in name for name, _ in reward.named_parameters())


def test_any_image_encoder_with_a_pooled_output_takes_a_head(tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = Dinov2Model(Dinov2Config(**shape)).eval()
    model.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    torch.save({"weight": torch.ones(1, 16), "bias": torch.ones(1)}, tmp_path / "head.pth")
    reward = Aesthetic(str(tmp_path), str(tmp_path / "head.pth"))
    images = tiny.natural(4, 32, 32)
    with torch.no_grad():
        pooled = model(reward.preprocess(images)).pooler_output
    torch.testing.assert_close(
        reward(images), (pooled / pooled.norm(dim=-1, keepdim=True)).sum(1) + 1, rtol=0, atol=1e-5
    )


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_encoders.save_shadow(tmp_path_factory.mktemp("shadow")))


def test_shadow_is_the_probability_that_a_pipeline_reports(classifier: str) -> None:
    from torchvision.transforms.functional import to_pil_image
    from transformers import pipeline

    reward = ShadowAesthetic(classifier)
    images = (255 * tiny.natural(4, 32, 32)).round() / 255
    answers = pipeline("image-classification", model=classifier, device="cpu")(
        [to_pil_image(image) for image in images]
    )
    expected = [next(a["score"] for a in answer if a["label"] == "hq") for answer in answers]
    torch.testing.assert_close(reward(images), torch.tensor(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(ShadowAesthetic(classifier, spelling="logit")(images).sigmoid(), reward(images))
    torch.testing.assert_close(ShadowAesthetic(classifier, "lq")(images), 1 - reward(images))


def test_a_classifier_without_the_label_is_refused(classifier: str) -> None:
    with pytest.raises(ValueError, match=r"got 'good', it has \['hq', 'lq'\]"):
        ShadowAesthetic(classifier, "good")
    with pytest.raises(ValueError, match="spelling must be"):
        ShadowAesthetic(classifier, spelling="odds")  # pyright: ignore[reportArgumentType]
