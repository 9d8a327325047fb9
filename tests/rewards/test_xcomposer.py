"""`XComposerReward` runs code of a checkpoint, so it runs only when told to."""

from __future__ import annotations

import pytest
import torch

from rewards import XComposerReward
from tests.rewards import tiny
from tests.rewards.cases.xcomposer import build
from tests.rewards.tiny_xcomposer import save_xcomposer


def test_code_runs_only_when_told_to(tmp_path):
    with pytest.raises(ValueError, match=r"runs code of its authors.*trust_remote_code=True"):
        XComposerReward(str(save_xcomposer(tmp_path)))


def test_scores_are_those_of_the_authors_code(request, tmp_path):
    """On the 8-bit picture, in the dialogue as told, through a file."""
    from torchvision.transforms.functional import to_pil_image

    reward = build(request)
    media = tiny.natural(2, 20, 28)
    to_pil_image((255 * media[1]).round().byte()).save(tmp_path / "picture.png")
    chat = [{"role": "user", "content": "Describe the image."}, {"role": "assistant", "content": "a red cat"}]
    expected = reward.network.get_score(chat, [str(tmp_path / "picture.png")])
    assert reward(media, ["a dog", "a red cat"])[1].item() == pytest.approx(expected, rel=1e-6)


def test_other_dialogues(request):
    reward = build(request)
    media = tiny.natural(1, 20, 28)
    first = reward(media, ["a red cat"])
    reward.question, reward.answer = "{prompt} ?", "two dog"
    assert not torch.equal(reward(media, ["a red cat"]), first)
    assert not torch.equal(reward(media, ["a blue cat"]), reward(media, ["a red cat"]))


def test_errors(request, tmp_path, clip_folder):
    with pytest.raises(ValueError, match=r"must hold \{prompt\}"):
        XComposerReward(str(tmp_path), answer="It is good.", trust_remote_code=True)
    with pytest.raises(OSError, match="CLIPModel has no method get_score"):
        XComposerReward(clip_folder, trust_remote_code=True)
