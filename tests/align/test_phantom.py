"""What follows from integers is known without data: texts have the lengths that they have."""

from __future__ import annotations

import pytest
import torch

import align
from align.footprint import LiveBytes
from align.planning.phantom import Phantom
from align.planning.targets import Target
from align.planning.walks import steering_walk
from rewards import Brightness, Prompt
from samplers import BestOfN
from tests.samplers.families.tiny import lumina2, qwen_image, z_image

PROMPTS = [Prompt("a cat", negative="blurry"), Prompt("two dogs and one red bird")]


def test_masks_are_known_and_states_are_not():
    with Phantom(Target()):
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to("meta").bool()
        states = torch.empty(2, 3, 5, device="meta")
        assert mask.sum(1).tolist() == [2, 1]
        assert states[mask].shape == (3, 5) and states[0][mask[0]].shape == (2, 5)
        assert mask.nonzero().shape == (3, 2) and bool(mask.any()) and not bool(mask.all())
        mask[0] = False
        assert int(mask.count_nonzero()) == 1
        assert states[states > 0].shape == (30,)  # of what is unknown every number is a half
        assert float(states.sum()) == 0.5
        drawn = torch.randint(5, (4,), device="meta")
        assert drawn.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("family", [qwen_image, z_image, lumina2], ids=lambda f: f.__name__.rpartition(".")[2])
def test_texts_are_as_long_as_they_are(family, tmp_path):
    family.pipeline().save_pretrained(tmp_path)
    policy, hollow = (
        align.load_policy(tmp_path, device="cpu"),
        align.load_policy(tmp_path, device="meta", dtype="float32"),
    )
    how = {"particles": 2, "steps": 3, "guidance": 4.0, "size": (4 * policy.multiple, 4 * policy.multiple)}
    walk = steering_walk(hollow, PROMPTS, BestOfN(Brightness()), Target(), **how)
    held = sum(t.untyped_storage().nbytes() for t in (*policy.parameters(), *policy.buffers()))
    with LiveBytes() as live:
        align.steer(policy, PROMPTS, BestOfN(Brightness()), gold=None, plain=False, **how)
    assert abs(walk.peak / (held + live.peak) - 1) < 0.05
