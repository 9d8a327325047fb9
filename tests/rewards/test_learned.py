"""`Learned`: what a folder must hold, whom it scores for, and that it scores as it was trained to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards import CLIPScore, CrossEncoder, Ensemble, HPSv3, Prompt, as_prompts
from rewards.heads import MLP, PAL
from rewards.learned import Learned, encoded
from tests.rewards import tiny, tiny_vlm
from tests.rewards.tiny_learned import TEXTS, save_learned


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> str:
    return str(clip_folder)


@pytest.fixture(scope="module")
def pal(tmp_path_factory: pytest.TempPathFactory, clip: str) -> str:
    return str(
        save_learned(tmp_path_factory.mktemp("pal"), CLIPScore(clip, "cosine"), clip, PAL(width=16), ("ann", "7"))
    )


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory, clip: str) -> str:
    head = MLP(hidden=(8,), members=3, variance=True)
    return str(save_learned(tmp_path_factory.mktemp("ensemble"), CLIPScore(clip, "cosine"), clip, head))


def changed(folder: str, to: Path, **config: object) -> str:
    shutil.copytree(folder, to)
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | config))
    return str(to)


PICTURES = tiny.natural(16, 40, 40, seed=5)  # by which `save_learned` standardised


def test_scores_have_mean_0_and_spread_1_for_each_member_and_each_person(pal: str, ensemble: str):
    for user in (None, "ann", "7"):
        scores = Learned(pal, user=user)(PICTURES, TEXTS)
        assert scores.mean().item() == pytest.approx(0, abs=1e-4)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    parts = Learned(ensemble).score(PICTURES, TEXTS).parts
    members = torch.stack([parts[f"member_{k}"] for k in range(3)])
    assert torch.allclose(members.mean(1), torch.zeros(3), atol=1e-4)
    assert torch.allclose(parts["spread"], members.std(0))
    assert bool((parts["sigma"] > 0).all())


def test_members_can_be_put_into_an_ensemble(ensemble: str):
    media, texts = PICTURES[:4], TEXTS[:4]
    whole = Learned(ensemble).score(media, texts)
    worst = Ensemble([Learned(ensemble, member=k) for k in range(3)], "worst")
    assert torch.allclose(
        worst(media, texts), torch.stack([whole.parts[f"member_{k}"] for k in range(3)]).amin(0), atol=1e-5
    )
    assert torch.allclose(whole.total, torch.stack([whole.parts[f"member_{k}"] for k in range(3)]).mean(0), atol=1e-6)


def test_the_person_is_the_users_choice_or_the_prompts(pal: str):
    media, asked = PICTURES[:4], ["ann", "7", None, "nobody"]
    prompts = [
        Prompt(t, meta={} if who is None else {"annotator": who}) for t, who in zip(TEXTS[:4], asked, strict=True)
    ]
    scores = Learned(pal)(media, prompts)
    assert scores[0] == pytest.approx(Learned(pal, user="ann")(media, TEXTS[:4])[0].item(), abs=1e-5)
    assert scores[1] == pytest.approx(Learned(pal, user="7")(media, TEXTS[:4])[1].item(), abs=1e-5)
    assert scores[2] == pytest.approx(Learned(pal)(media, TEXTS[:4])[2].item(), abs=1e-5)
    assert scores.isnan().tolist() == [False, False, False, True]
    numbered = [Prompt(TEXTS[1], meta={"annotator": 7})]
    assert Learned(pal)(media[1:2], numbered)[0] == pytest.approx(scores[1].item(), abs=1e-5)
    assert torch.allclose(Learned(pal, user="ann")(media, prompts), Learned(pal, user="ann")(media, TEXTS[:4]))


def test_gradients_reach_the_pixels_for_every_person(pal: str):
    media = PICTURES[:2].clone().requires_grad_()
    Learned(pal, user="ann")(media, TEXTS[:2]).sum().backward()
    assert media.grad is not None and media.grad.abs().max() > 0


def test_strangers_are_named(pal: str, ensemble: str):
    with pytest.raises(ValueError, match="knows no 'eve'; it knows ann, 7"):
        Learned(pal, user="eve")
    with pytest.raises(ValueError, match="alike for everyone"):
        Learned(ensemble, user="ann")
    with pytest.raises(ValueError, match="members 0 to 2"):
        Learned(ensemble, member=3)


def test_another_encoder_is_refused(pal: str, clip: str, siglip_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="not the encoder"):
        Learned(pal, encoder=CLIPScore(str(siglip_folder)))
    other = Path(shutil.copytree(clip, tmp_path / "clip"))
    weights = load_file(other / "model.safetensors")
    save_file(
        {k: v.flip(0) if "projection" in k else v for k, v in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="not the encoder"):
        Learned(pal, encoder=CLIPScore(str(other)))
    moved = Learned(pal, encoder=CLIPScore(clip))
    assert torch.allclose(moved(PICTURES[:2], TEXTS[:2]), Learned(pal)(PICTURES[:2], TEXTS[:2]))


def test_folders_that_do_not_fit_are_refused(pal: str, tmp_path: Path):
    with pytest.raises(OSError, match=r"config\.json and model\.safetensors"):
        Learned(str(tmp_path))
    with pytest.raises(ValueError, match="format 99"):
        Learned(changed(pal, tmp_path / "new", format=99))
    foreign = {"class_path": "os.system", "init_args": {"command": "true"}}
    with pytest.raises(ValueError, match="pass it as encoder="):
        Learned(changed(pal, tmp_path / "foreign", encoder=foreign))
    with pytest.raises(ValueError, match="pass it as encoder="):  # it shows no features, and could import anything
        Learned(
            changed(
                pal, tmp_path / "callable", encoder={"class_path": "rewards.adapters.FromCallable", "init_args": {}}
            )
        )
    with pytest.raises(ValueError, match="head os"):
        Learned(changed(pal, tmp_path / "head", head={"class_path": "os", "init_args": {}}))
    gone = {"class_path": "rewards.clip.CLIPScore", "init_args": {"model": str(tmp_path / "gone")}}
    with pytest.raises(OSError, match="if it lies elsewhere now"):
        Learned(changed(pal, tmp_path / "moved", encoder=gone))
    lost = Path(changed(pal, tmp_path / "lost"))
    weights = load_file(lost / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "head.prototypes"}, lost / "model.safetensors")
    with pytest.raises(ValueError, match="lacks prototypes"):
        Learned(str(lost))


def test_a_head_reads_a_vision_language_model_too(vlm_folders: dict[str, Path], tmp_path: Path):
    """A linear head that copies HPSv3's own first layers scores in its order."""
    qwen = str(vlm_folders["qwen2_vl"])
    checkpoint = str(tiny_vlm.save_hpsv3(tmp_path, Path(qwen)))
    encoder = HPSv3(checkpoint, qwen, dtype="float32", pixels=56 * 84)
    media, prompts = PICTURES[:3], as_prompts(TEXTS[:3])
    state = encoded(encoder, media, prompts).joint
    assert torch.allclose(encoder.head(state)[:, 0], encoder(media, prompts), atol=1e-5)
    folder = save_learned(tmp_path / "learned", encoder, qwen, MLP(hidden=()))
    assert torch.isfinite(Learned(str(folder), encoder=encoder)(media, prompts)).all()


def test_the_embedded_reward_is_an_encoder():
    encoder = CrossEncoder()
    media, prompts = PICTURES[:3], as_prompts(["a red circle", "two stars", "a ring"])
    state = encoded(encoder, media, prompts).joint
    own = (encoder.network.head(state).squeeze(-1) - encoder.mean) / encoder.std
    assert torch.allclose(own, encoder(media, prompts), atol=1e-5)
