"""The kit itself: each law catches the fault it is about, and lets a sound reward pass."""

from __future__ import annotations

import warnings

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from align.cli import main
from rewards import Brightness, Prompt, Reward, Scores
from rewards.contract import LAWS, check
from rewards.specimens import DAMAGE, example


class Sound(Reward):
    """Luminance near the prompt's length.

    Range: any
    Size: any
    Gradient: yes
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.3, 0.6, 0.1]))
        self.freeze()

    def lengths(self, media: Tensor, prompts: list[Prompt]) -> Tensor:
        return media.new_tensor([len(p.text) for p in prompts])

    def luminance(self, media: Tensor) -> Tensor:
        return torch.einsum("bchw,c->b", media, self.weights.to(media)) / media[0, 0].numel()

    def measure(self, media: Tensor, prompts: list[Prompt]) -> Tensor | Scores:
        media = media if media.dtype == torch.float64 else media.float()
        return (self.luminance(media) - self.lengths(media, prompts) / 20) ** 2

    def __init_subclass__(cls) -> None:
        cls.__doc__ = cls.__doc__ or Sound.__doc__


class Undescribed(Sound):
    """Says nothing about its range."""


class Constant(Sound):
    def measure(self, media, prompts):
        return 0 * super().measure(media, prompts) + 1


class FirstPromptForAll(Sound):
    def lengths(self, media, prompts):
        return media.new_tensor([len(prompts[0].text)] * len(prompts))


class BatchMean(Sound):
    def measure(self, media, prompts):
        scores = super().measure(media, prompts)
        return scores - scores.mean()


class Positional(Sound):
    def measure(self, media, prompts):
        return super().measure(media, prompts) + torch.arange(len(media)).to(media)


class LongestPrompt(Sound):
    def measure(self, media, prompts):
        return super().measure(media, prompts) * max(max(len(p.text) for p in prompts) / 40, 1)


class Blind(Sound):
    def lengths(self, media, prompts):
        return media.new_full((len(media),), 10.0)


class SecretReader(Sound):
    needs_prompt = False

    def lengths(self, media, prompts):
        return media.new_tensor([len(p.text) for p in prompts] or [10.0] * len(media))


class Permissive(Sound):
    def check(self, media):
        return None


class Restless(Sound):
    def measure(self, media, prompts):
        return super().measure(media, prompts) + torch.rand(len(media)).to(media)


class Trainable(Sound):
    def freeze(self):
        return self


class SilentlyDetached(Sound):
    def measure(self, media, prompts):
        return super().measure(media.detach(), prompts).requires_grad_(media.requires_grad)


class FirstSampleOnly(Sound):
    def luminance(self, media):
        return super().luminance(torch.cat([media[:1], media[1:].detach()]))


class WrongSlope(Sound):
    def luminance(self, media):
        x = super().luminance(media)
        return x.detach() + 2 * (x - x.detach())


class Counting(Sound):
    def luminance(self, media):
        return super().luminance(media) * media[0, 0].numel() / 128**2


class Rounded(Sound):
    def luminance(self, media):  # magnifies what rounding to 8 bits takes away
        return super().luminance(media) + 50 * torch.sin(media * 255 * torch.pi).mean((1, 2, 3))


class Fussy(Sound):
    def measure(self, media, prompts):
        return super().measure(media, prompts) + (media.dtype != torch.float32)


class Glad(Sound):
    """Luminance, which damage hardly changes, though it claims quality.

    Range: any
    Size: any
    Gradient: yes
    """

    claims_quality = True

    needs_prompt = False

    def measure(self, media, prompts):
        return self.luminance(media.double())


FAULTS = {  # and all laws that each breaks
    Undescribed: {"described"},
    Constant: {"scores", "gradient", "slope", "prompt"},
    FirstPromptForAll: {"order", "batches", "broken samples"},
    BatchMean: {"batches", "padding", "broken samples", "gradient", "slope"},
    Positional: {"order", "batches", "broken samples"},
    LongestPrompt: {"padding", "batches"},
    Blind: {"prompt"},
    SecretReader: {"prompt"},
    Permissive: {"refusals"},
    Trainable: {"frozen"},
    SilentlyDetached: {"gradient", "slope"},
    FirstSampleOnly: {"gradient"},
    WrongSlope: {"slope"},
    Counting: {"sizes"},
    Fussy: {"precision"},
    Glad: {"quality"},
}
RESTLESS = {Restless: "seed", Rounded: "rounding"}  # break one law by breaking many


def broken(reward: Reward) -> set[str]:
    media, prompts = example(reward)
    prompts = [Prompt(p.text * (i + 1)) for i, p in enumerate(prompts)]
    media = 0.1 + 0.8 * media + 0.001 * torch.rand(media.shape, generator=torch.Generator().manual_seed(0))
    return {f.law for f in check(reward, media, prompts, size=0.3, rounding=0.3) if f.holds is False}


def test_a_sound_reward_breaks_no_law() -> None:
    assert broken(Sound()) == set()


@pytest.mark.parametrize("fault", [*FAULTS, *RESTLESS], ids=lambda f: f.__name__)
def test_each_fault_is_caught(fault: type[Reward]) -> None:
    if fault in FAULTS:
        assert broken(fault()) == FAULTS[fault]
    else:
        assert RESTLESS[fault] in broken(fault())


def test_every_law_is_tried_by_a_fault_or_needs_a_gpu() -> None:
    assert set().union(*FAULTS.values(), RESTLESS.values()) == set(LAWS) - {"cost", "device"}


def test_a_law_that_cannot_be_tried_does_not_hold() -> None:
    class Fails(Sound):
        def measure(self, media, prompts):
            if media.dtype == torch.float64:
                raise NotImplementedError("no float64")
            return super().measure(media, prompts)

    assert {"precision"} <= broken(Fails())


def test_damage_is_graded_and_stays_in_range() -> None:
    media, _ = example(Brightness())
    for harm in DAMAGE.values():
        gaps = [(harm(media, s) - media).square().mean().item() for s in (1, 2, 3)]
        assert 0 < gaps[0] < gaps[1] < gaps[2]
        assert all(harm(media, s).min() >= 0 and harm(media, s).max() <= 1 for s in (1, 2, 3))


def test_the_kit_leaves_the_reward_as_it_was() -> None:
    reward = Sound()
    reward.half()
    before = {k: v.clone() for k, v in reward.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken(reward)
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in reward.state_dict().items())


def test_the_command_reports_and_fails_as_the_laws_do(capsys, tmp_path) -> None:
    assert main(["check-reward", "Brightness"]) == 0
    assert "0 are broken" in capsys.readouterr().out
    assert main(["check-reward", "Brightness", "--images", "a.png"]) == 2
    assert main(["check-reward", "Sharpness", "--size", "0.01"]) == 1
    assert "sizes           BROKEN" in capsys.readouterr().out
    for i, size in enumerate(((40, 30), (40, 30), (50, 30))):
        tiny_picture(i, size).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    assert main(["check-reward", "Brightness", "--images", *files[:2], "--prompts", "a", "b"]) == 0
    assert main(["check-reward", "Brightness", "--images", *files, "--prompts", "a", "b", "c"]) == 2
    assert "40 x 30 and 50 x 30" in capsys.readouterr().err.replace("\n", " ")


def tiny_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 40 + 20 * seed).convert("RGB")
