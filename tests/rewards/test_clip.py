"""Dual encoders against transformers' own pipelines, on tiny random models loaded from disk."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards import CLIPScore, OpenCLIPScore, PickScore
from rewards.clip import patches, pooled, reads_lowercase
from rewards.dual import projected, unit
from rewards.preprocess import from_image_processor
from tests.rewards import tiny, tiny_encoders

PROMPTS = ["a red cat", "two dog on the house", "the blue bird", "photo of a car"]
IMAGES = tiny.natural(4, 50, 61)


def eight_bit(images: Tensor) -> Tensor:
    return (255 * images).round().byte()


def official(folder: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' own pixels and the diagonal of its logits."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(list(eight_bit(images)), return_tensors="pt")
    padding = True if model.config.model_type == "clip" else "max_length"
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=padding, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return pixels["pixel_values"], model(**pixels, **tokens).logits_per_image.diagonal()


def fed(reward: CLIPScore, images: Tensor, padded: Tensor) -> Tensor:
    """The pixels that the network gets; for NaFlex in the layout of its padded ones."""
    pixels = reward.preprocess(images)
    if not reward.naflex:
        return pixels
    rows = patches(pixels, reward.preprocess.factor)["pixel_values"]
    return torch.cat([rows, padded[:, rows.shape[1] :]], dim=1)


@pytest.fixture(params=["clip", "siglip", "siglip2"])
def folder(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(params=["clip", "siglip", "siglip2", "open_clip"])
def reward(request: pytest.FixtureRequest):
    if request.param == "open_clip":
        return OpenCLIPScore(f"local-dir:{request.getfixturevalue('open_clip_folder')}")
    return CLIPScore(request.getfixturevalue(f"{request.param}_folder"))


def test_logits_are_transformers_own(folder: str) -> None:
    """Without a resize the pixels are the same, so only the networks are compared."""
    images = eight_bit(tiny.natural(4, 36, 40) if "siglip" not in folder else tiny.natural(4, 32, 32)) / 255
    pixels, logits = official(folder, images)
    reward = CLIPScore(folder)
    torch.testing.assert_close(fed(reward, images, pixels), pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(reward(images, PROMPTS), logits, rtol=0, atol=1e-3)  # logits span 50; float32


@pytest.mark.parametrize("shape", [(50, 61), (90, 33), (20, 31)])
def test_resized_pixels_are_transformers_own_to_one_level(folder: str, shape) -> None:
    images = eight_bit(tiny.natural(4, *shape)) / 255
    pixels, _ = official(folder, images)
    std = torch.tensor(CLIPScore(folder).preprocess.std).view(3, 1, 1) if pixels.ndim == 4 else 0.5
    for quantize, tolerance in (("hard", 1.01), ("none", 1.2)):
        ours = fed(CLIPScore(folder, quantize=quantize), images, pixels)
        error = 255 * std * (ours - pixels).abs()
        assert error.max() < tolerance
        assert error.mean() < 0.35


def test_score_of_a_row_depends_on_that_row_only(reward) -> None:
    scores = reward(IMAGES, PROMPTS)
    order = [2, 0, 3, 1]
    shuffled = reward(IMAGES[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(shuffled, scores[order], rtol=0, atol=1e-3)
    single = torch.cat([type(reward).forward(reward, IMAGES[i : i + 1], [PROMPTS[i]]) for i in range(4)])
    torch.testing.assert_close(single, scores, rtol=0, atol=1e-3)


def test_neighbours_in_the_text_batch_do_not_matter(reward) -> None:
    alone = reward.text_features(["a red cat"]).clone()
    reward.remembered.clear()
    together = reward.text_features(["a photo of a red car", "a red cat"])[1:]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_prompts_matter(reward) -> None:
    scores = torch.stack([reward(IMAGES, [prompt] * 4) for prompt in PROMPTS])
    assert (scores[0] - scores[1:]).abs().min() > 1e-3
    assert (reward(IMAGES, PROMPTS) - scores.diagonal()).abs().max() < 1e-3


def test_each_prompt_passes_the_text_tower_once(reward, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = reward.encode_text
    monkeypatch.setattr(reward, "encode_text", lambda texts: [seen.extend(texts), encode(texts)][1])
    first = reward(IMAGES, ["a cat", "a dog", "a cat", "a bird"])
    assert seen == ["a cat", "a dog", "a bird"]
    second = reward(IMAGES, ["a cat", "a dog", "a cat", "a bird"])
    assert seen == ["a cat", "a dog", "a bird"]
    assert torch.equal(first, second)
    reward(IMAGES[:1], ["a car"])
    assert seen[3:] == ["a car"]
    reward.double()  # features of another precision are forgotten
    reward(IMAGES[:1], ["a car"])
    assert seen[4:] == ["a car"]


def test_the_oldest_prompts_are_forgotten(reward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.dual.REMEMBERED", 2)
    reward(IMAGES[:2], ["a cat", "a dog"])
    reward(IMAGES[:2], ["a cat", "a bird"])
    assert list(reward.remembered) == ["a cat", "a bird"]
    assert reward(IMAGES, PROMPTS).isfinite().all()  # more prompts than are remembered


def test_features_computed_in_inference_mode_serve_a_later_gradient(reward) -> None:
    with torch.inference_mode():
        reward(IMAGES.clone(), PROMPTS)
    x = IMAGES.clone().requires_grad_()
    reward(x, PROMPTS).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_gradient_is_the_slope_in_double_precision(reward) -> None:
    reward.double()
    x = (0.1 + 0.8 * IMAGES[:2]).double().requires_grad_()

    def measure(media: Tensor) -> Tensor:
        image = unit(reward.encode_image(reward.preprocess(media)))
        return reward.spell(reward.similarity(image, reward.text_features(PROMPTS[:2]))).sum()

    (gradient,) = torch.autograd.grad(measure(x), x)
    for seed in range(3):
        direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            slope = (measure(x + 1e-6 * direction) - measure(x - 1e-6 * direction)) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad for p in reward.parameters())


def test_variants_are_one_cosine(folder: str) -> None:
    get = lambda variant: CLIPScore(folder, variant)(IMAGES, PROMPTS)  # noqa: E731
    reward, cosine = CLIPScore(folder), get("cosine")
    logit = reward.scale * cosine + reward.bias
    assert cosine.abs().max() <= 1
    torch.testing.assert_close(get("logit"), logit)
    torch.testing.assert_close(get("logit/100"), logit / 100)
    torch.testing.assert_close(get("clipscore"), 2.5 * cosine.clamp(min=0))
    torch.testing.assert_close(get("torchmetrics"), 100 * cosine.clamp(min=0))
    torch.testing.assert_close(get("sigmoid"), logit.sigmoid())
    assert (reward.bias != 0) == ("siglip" in folder)


def test_the_cosine_is_clipped_only_where_published(clip_folder: str) -> None:
    reward = CLIPScore(clip_folder, "clipscore")
    assert reward.spell(torch.tensor([-0.3, 0.2])).tolist() == pytest.approx([0, 0.5])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_towers_give_float32_scores_near_the_full_ones(folder: str, dtype) -> None:
    full, low = CLIPScore(folder, "cosine"), CLIPScore(folder, "cosine", dtype=dtype)
    assert low.tower_dtype == getattr(torch, dtype)
    assert low.scale == full.scale  # read before the cast
    scores = low(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores.to(low.tower_dtype).float() != scores).any()  # the cosine was not rounded to the tower's type
    assert (scores - full(IMAGES, PROMPTS)).abs().max() < 0.02
    x = IMAGES.clone().requires_grad_()
    low(x, PROMPTS).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_long_prompts_warn_and_short_ones_do_not(reward) -> None:
    with pytest.warns(UserWarning, match=r"the last \d+ of \d+ are cut"):
        reward(IMAGES[:1], ["a " * 30 + "cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(IMAGES[:1], ["a cat"])
        reward(IMAGES[:1], ["a " * 30 + "cat"])  # once a prompt


def test_the_number_of_cut_tokens(clip_folder: str) -> None:
    with pytest.warns(UserWarning, match="CLIPScore reads 12 tokens: the last 3 of 15 are cut"):
        CLIPScore(clip_folder)(IMAGES[:1], ["a " * 12 + "cat"])


def test_lowercase_is_an_option(siglip_folder: str) -> None:
    plain, lower = CLIPScore(siglip_folder), CLIPScore(siglip_folder, lowercase=True)
    torch.testing.assert_close(lower(IMAGES[:1], ["A Red CAT"]), plain(IMAGES[:1], ["a red cat"]))
    assert (plain(IMAGES[:1], ["A Red CAT"]) - plain(IMAGES[:1], ["a red cat"])).abs() > 1e-3


def test_hard_quantisation_has_no_gradient_and_says_so(clip_folder: str) -> None:
    with pytest.raises(RuntimeError, match="CLIPScore is not differentiable"):
        CLIPScore(clip_folder, quantize="hard")(IMAGES.clone().requires_grad_(), PROMPTS)
    x = IMAGES.clone().requires_grad_()
    CLIPScore(clip_folder, quantize="ste")(x, PROMPTS).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_goal_baseline_projection_by_hand() -> None:
    """Spec values: image e1, goal (.6, .8, 0), baseline (0, .6, .8)."""
    image, goal, base = (torch.tensor(v) for v in ([[1.0, 0, 0]], [[0.6, 0.8, 0]], [0, 0.6, 0.8]))
    for alpha, expected in [(0.0, 0.6), (0.5, 0.897692), (1.0, 0.996923)]:
        assert projected(image, goal, base, alpha).item() == pytest.approx(expected, abs=1e-6)
    assert projected(image, base[None], base, 0.5).isnan().all()


def test_goal_baseline_reward(folder: str) -> None:
    plain = CLIPScore(folder)(IMAGES, PROMPTS)
    off = CLIPScore(folder, baseline=["a photo"], alpha=0.0)(IMAGES, PROMPTS)
    torch.testing.assert_close(off, plain, rtol=0, atol=1e-3)
    on = CLIPScore(folder, baseline=["a photo", "photo of the"], alpha=1.0)
    assert (on(IMAGES, PROMPTS) - plain).abs().min() > 1e-3
    x = IMAGES.clone().requires_grad_()
    on(x, PROMPTS).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"variant": "dot"}, {"dtype": "int8"}, {"alpha": 1.5}, {"baseline": []}, {"baseline": "a photo"}]
)
def test_wrong_arguments_raise_before_anything_is_loaded(wrong) -> None:
    with pytest.raises(ValueError, match="must be"):
        CLIPScore("/nowhere", **wrong)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(OSError, match=r"cannot load '/no/such/folder'.*(?s:.)*no such folder"):
        CLIPScore("/no/such/folder")
    with pytest.raises(OSError, match="cannot load 'local-dir:/no/such'"):
        OpenCLIPScore("local-dir:/no/such")
    with pytest.raises(OSError, match="cannot load"):
        OpenCLIPScore("ViT-Q-99")


def copied(folder: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_a_half_downloaded_folder_is_named_with_what_it_holds(clip_folder: str, tmp_path: Path, name: str) -> None:
    folder = copied(clip_folder, tmp_path)
    (folder / name).unlink()
    if name == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(OSError, match=r"cannot load .*(?s:.)*Needed: .*Found: the folder holds .*delete what is there"):
        CLIPScore(str(folder))


def test_a_tokenizer_without_merges_is_an_error(clip_folder: str, tmp_path: Path) -> None:
    folder = copied(clip_folder, tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate("abcdefghijklmnop")}))
    with pytest.raises(OSError, match="cannot load"):
        CLIPScore(str(folder))


def test_a_truncated_checkpoint_is_an_error(clip_folder: str, open_clip_folder: Path, tmp_path: Path) -> None:
    folder = copied(clip_folder, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(OSError, match="cannot load"):
        CLIPScore(str(folder))
    other = Path(shutil.copytree(open_clip_folder, tmp_path / "open"))
    (other / "open_clip_model.safetensors").unlink()
    with pytest.raises(OSError, match="cannot load"):
        OpenCLIPScore(f"local-dir:{other}")


def test_missing_weights_are_never_random_weights(clip_folder: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(clip_folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"the weights lack visual_projection\.weight"):
        CLIPScore(str(folder))


def test_another_kind_of_model_is_refused(clip_folder: str, tmp_path: Path) -> None:
    from transformers import CLIPModel

    CLIPModel.from_pretrained(clip_folder).vision_model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError), match=r"dual encoder|cannot load"):
        CLIPScore(str(tmp_path))


def test_naflex_keeps_the_aspect_ratio_and_needs_no_padding(siglip2_folder: str) -> None:
    """15 of 16 patches: transformers pads one and masks it."""
    images = eight_bit(tiny.natural(4, 24, 40)) / 255
    pixels, logits = official(siglip2_folder, images)
    reward = CLIPScore(siglip2_folder)
    given = patches(reward.preprocess(images), 8)
    assert given["spatial_shapes"].tolist() == [[3, 5]] * 4
    assert given["pixel_values"].shape == (4, 15, 192)
    assert pixels.shape == (4, 16, 192)
    torch.testing.assert_close(reward(images, PROMPTS), logits, rtol=0, atol=1e-3)


def test_siglip_2_is_read_in_lower_case(siglip2_folder: str, siglip_folder: str) -> None:
    lower = CLIPScore(siglip2_folder)
    torch.testing.assert_close(lower(IMAGES[:1], ["A Red CAT"]), lower(IMAGES[:1], ["a red cat"]))
    config = CLIPScore(siglip_folder).model.config
    assert not reads_lowercase(config)
    config.text_config.vocab_size = 256_000  # Gemma's, which only SigLIP 2 reads
    assert reads_lowercase(config)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_fine_tune_without_a_folder(folder: str, tmp_path: Path, prefix: str) -> None:
    """imscore's files put `model.` before every name; older ones hold position ids."""
    from safetensors.torch import load_file, save_file

    weights = load_file(f"{folder}/model.safetensors")
    weights["logit_scale"] = weights["logit_scale"] + 0.1
    weights["text_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file({prefix + key: value for key, value in weights.items()}, tmp_path / "tuned.safetensors")
    plain, tuned = CLIPScore(folder), CLIPScore(folder, weights=str(tmp_path / "tuned.safetensors"))
    logits = (plain(IMAGES, PROMPTS) - plain.bias) * torch.tensor(0.1).exp() + plain.bias
    torch.testing.assert_close(tuned(IMAGES, PROMPTS), logits, rtol=0, atol=1e-3)
    save_file({"model.logit_scale": weights["logit_scale"]}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not hold the weights of .*: it lacks"):
        CLIPScore(folder, weights=str(tmp_path / "other.safetensors"))


def test_both_forms_of_transformers_features() -> None:
    class Output:
        pooler_output = torch.ones(2, 3)

    assert torch.equal(pooled(torch.ones(2, 3)), pooled(Output()))


@pytest.mark.parametrize(
    "change",
    [{"resample": 0}, {"do_normalize": False}, {"do_center_crop": False}, {"crop_size": {"height": 32, "width": 30}}],
)
def test_image_processors_that_no_policy_matches_are_refused(clip_folder: str, change) -> None:
    config = json.loads((Path(clip_folder) / "preprocessor_config.json").read_text())
    assert from_image_processor(config, "none").size == 32
    with pytest.raises(ValueError, match="not understood"):
        from_image_processor({**config, **change}, "none")


def test_pickscores_are_those_of_the_released_code(clip_folder: str, tmp_path: Path) -> None:
    """Goldens: `calc_probs` of yuvalkirstain/PickScore at f79607f, one image and prompt at a time, given these weights, 8-bit
    images and token ids; transformers 4.36.2."""
    folder = copied(clip_folder, tmp_path)
    tiny_encoders.redraw(folder / "model.safetensors")
    images = (255 * tiny.natural(4, 36, 36)).round() / 255  # no resize, so that only the networks are compared
    expected = torch.tensor([-18.39780045, 15.55841541, 7.29717255, 26.02651596])
    torch.testing.assert_close(PickScore(str(folder), str(folder))(images, PROMPTS), expected, rtol=0, atol=1e-4)


def test_pickscore_is_the_logit_with_another_processor(clip_folder: str) -> None:
    torch.testing.assert_close(
        PickScore(clip_folder, clip_folder)(IMAGES, PROMPTS), CLIPScore(clip_folder)(IMAGES, PROMPTS)
    )
