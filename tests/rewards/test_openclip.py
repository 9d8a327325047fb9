"""open_clip's models, HPSv2 and Social Reward against their own pipelines and released code, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rewards import HPSv2, OpenCLIPScore, SocialReward
from rewards.preprocess import from_open_clip
from tests.rewards import tiny, tiny_encoders

PROMPTS = ["a red cat", "two dog on the house", "the blue bird", "photo of a car"]
EIGHT_BIT = (255 * tiny.natural(4, 50, 61)).round().byte()
IMAGES = EIGHT_BIT / 255


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as their authors saved them: HPSv2's under `state_dict`, Social Reward's plain, with OpenAI's width and activation."""
    import open_clip

    folder = tmp_path_factory.mktemp("checkpoints")
    wide = {**tiny.OPEN_CLIP["vision_cfg"], "width": 64, "head_width": 64}
    (folder / "kilter-hps.json").write_text(json.dumps(tiny.OPEN_CLIP))
    (folder / "kilter-social.json").write_text(json.dumps({**tiny.OPEN_CLIP, "vision_cfg": wide, "quick_gelu": True}))
    (folder / "kilter-plain.json").write_text(json.dumps({**tiny.OPEN_CLIP, "vision_cfg": wide}))
    for name in ("hps", "social", "plain"):
        open_clip.add_model_config(folder / f"kilter-{name}.json")
    torch.save({"state_dict": tiny_encoders.open_clip_weights()}, folder / "HPS_v2.1_compressed.pt")
    torch.save(tiny_encoders.open_clip_weights(vision=64), folder / "clip_epoch_9.pth")
    return folder


def test_open_clip_agrees_with_its_own_pipeline(open_clip_folder: Path) -> None:
    import open_clip
    from torchvision.transforms.v2.functional import to_pil_image

    name = f"local-dir:{open_clip_folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    pixels = torch.stack([transform(to_pil_image(image)) for image in EIGHT_BIT])  # pyright: ignore
    with torch.no_grad():
        image, text, scale = model.eval()(pixels, open_clip.get_tokenizer(name)(PROMPTS))
    reward = OpenCLIPScore(name, quantize="hard")
    ours = reward.preprocess(IMAGES)
    assert (ours - pixels).abs().max() < 1.01 / 255 / min(reward.preprocess.std)
    reward.preprocess = lambda _: pixels  # type: ignore[assignment]
    torch.testing.assert_close(reward(IMAGES, PROMPTS), (scale * image @ text.T).diagonal(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(50, 61), (61, 50), (33, 32), (24, 90)])
def test_open_clip_resize_modes(mode: str, shape) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms.v2.functional import to_pil_image

    config = {"size": 32, "resize_mode": mode, "fill_color": 51}
    images = (255 * tiny.natural(1, *shape)).round().byte()
    # Pillow 13 shrinks tall images along the height first, see rewards/preprocess.py: noise-free images hardly notice
    expected = image_transform_v2(PreprocessCfg(**config), is_train=False)(to_pil_image(images[0]))
    defaults = {"mean": PreprocessCfg.mean, "std": PreprocessCfg.std, "interpolation": "bicubic"}
    prepare = from_open_clip({**defaults, **config}, "hard")
    error = (prepare(images / 255)[0] - expected).abs() * torch.tensor(prepare.std).view(3, 1, 1) * 255
    assert error.max() < 2.01
    assert error.mean() < 0.3


def test_hpsv2_is_the_cosine_of_the_padded_image(open_clip_folder: Path) -> None:
    import open_clip

    open_clip.add_model_config(open_clip_folder / "kilter-tiny.json")
    weights = str(open_clip_folder / "open_clip_model.safetensors")
    reward = HPSv2(checkpoint=weights, model_name="kilter-tiny")
    wide = tiny.natural(2, 16, 32)
    padded = torch.zeros(2, 3, 32, 32)
    padded[:, :, 8:24] = wide
    cosine = OpenCLIPScore("kilter-tiny", weights, "cosine")
    torch.testing.assert_close(reward(wide, PROMPTS[:2]), cosine(padded, PROMPTS[:2]), rtol=0, atol=1e-5)
    old = HPSv2(checkpoint=weights, model_name="kilter-tiny", antialias=False)
    large = tiny.natural(2, 90, 70, slope=0.3)
    assert (old(large, PROMPTS[:2]) - reward(large, PROMPTS[:2])).abs().min() > 1e-4
    edge = torch.zeros(1, 3, 10, 16)
    edge[..., 8:] = 1  # enlarged, the cubic kernel overshoots on both sides of it, and the reference keeps that
    white = reward.preprocess(torch.ones(1, 3, 32, 32)).amax()
    assert reward.preprocess(edge).amax() > white + 0.01
    with pytest.raises(ValueError, match=r"version must be one of v2\.1"):
        HPSv2("v3")  # pyright: ignore[reportArgumentType]


def test_hpsv2_scores_are_those_of_the_released_code(checkpoints: Path) -> None:
    """Goldens: tgxs002/HPSv2 at 866735e, its CLIP, `image_transform(resize_longest_max=True)` and tokenizer, given these weights
    and 8-bit images, in float32 with torchvision 0.29, which antialiases."""
    reward = HPSv2(checkpoint=str(checkpoints / "HPS_v2.1_compressed.pt"), model_name="kilter-hps")
    expected = torch.tensor([0.04715330, 0.14200017, 0.12785780, 0.18973666])
    torch.testing.assert_close(reward(IMAGES, PROMPTS), expected, rtol=0, atol=1e-5)


def test_social_reward_scores_are_those_of_the_released_code(checkpoints: Path) -> None:
    """Goldens: the cosine of Picsart-AI-Research/Social-Reward's `validate` at 31ccd0e with openai/CLIP's model at d05afc4 of these
    sizes, given these weights and 8-bit images of the model's size."""
    reward = SocialReward(str(checkpoints / "clip_epoch_9.pth"), model_name="kilter-social")
    images = (255 * tiny.natural(4, 32, 32)).round() / 255
    expected = torch.tensor([-0.45548359, -0.46968812, -0.27806601, -0.35045591])
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=0, atol=1e-5)
    plain = OpenCLIPScore("kilter-plain", str(checkpoints / "clip_epoch_9.pth"), "cosine")
    assert (
        plain(images, PROMPTS) - expected
    ).abs().max() > 1e-3  # which is why it names the architecture with quick GELU


def test_a_missing_checkpoint_is_named_before_a_network_is_built(tmp_path: Path) -> None:
    for cls in (SocialReward, HPSv2):
        with pytest.raises(OSError, match=r"no file .*absent(?s:.)*no such folder or file\. Correct the path"):
            cls(checkpoint=str(tmp_path / "absent.pth"), model_name="no network of this name")
