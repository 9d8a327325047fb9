"""Which frames are looked at and what they weigh, against the published numbers and against `Framewise`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewards import Brightness, Colour, Framewise, Prompt, Reward, Sampled, Scores, Segmental, Weighted

CLIPS = torch.rand(3, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_weights_of_the_paper() -> None:
    """F = 16, S = 4, lambda = 1."""
    weights = Segmental(Brightness()).weights([2, 6, 9, 13], 16)
    torch.testing.assert_close(
        4 * weights, torch.tensor([0.00248, 0.1353, 0.3679, 0.00674]).double(), rtol=1e-3, atol=0
    )


def test_segmental_is_its_formula_for_total_and_parts() -> None:
    reward = Segmental(Weighted({"light": Brightness(), "blue": Colour("blue")}, [1.0, 2.0]), index="centre")
    assert reward.chosen(16) == [2, 6, 10, 14]
    light = torch.stack([Brightness()(CLIPS[:, g]) for g in (2, 6, 10, 14)], dim=1)
    blue = torch.stack([Colour("blue")(CLIPS[:, g]) for g in (2, 6, 10, 14)], dim=1)
    weights = torch.exp(-torch.tensor([6.0, 2.0, 2.0, 6.0])) / 4
    scores = reward.score(CLIPS)
    torch.testing.assert_close(scores.total, (light + 2 * blue) @ weights)
    torch.testing.assert_close(scores.parts["light"], light @ weights)


def test_normalised_weights() -> None:
    frames = [2, 6, 9, 13]
    torch.testing.assert_close(
        Segmental(Brightness(), normalise="distance").weights(frames, 16),
        torch.exp(-torch.tensor([0.75, 0.25, 0.125, 0.625], dtype=torch.float64)) / 4,
    )
    assert Segmental(Brightness(), normalise="weights").weights(frames, 16).sum().item() == pytest.approx(1)
    flat = Segmental(Brightness(), segments=16, decay=0.0)
    torch.testing.assert_close(flat(CLIPS), Framewise(Brightness())(CLIPS))


def test_random_frames_stay_in_their_segments_and_depend_on_the_seed_alone() -> None:
    draws = [Segmental(Brightness(), seed=seed).chosen(18) for seed in range(50)]
    assert all(4 * i <= g < 4 * (i + 1) for draw in draws for i, g in enumerate(draw))
    assert {draw[1] for draw in draws} == {4, 5, 6, 7}
    assert Segmental(Brightness(), seed=3).chosen(18) == draws[3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"frames": "all"}, list(range(7))),
        ({}, [0, 2, 4, 6]),
        ({"stride": 3}, [0, 3, 6]),
        ({"frames": "first-middle-last"}, [0, 3, 6]),
        ({"frames": [0, -1]}, [0, -1]),
    ],
)
def test_chosen_frames(arguments: dict[str, Any], expected: list[int]) -> None:
    reward = Sampled(Brightness(), **arguments)
    assert reward.chosen(7) == expected
    torch.testing.assert_close(reward(CLIPS[:, :7]), Framewise(Brightness())(CLIPS[:, :7][:, expected]))


def test_random_choices_are_without_repetition_and_cover_all_frames() -> None:
    draws = [Sampled(Brightness(), "random", count=3, seed=seed).chosen(7) for seed in range(50)]
    assert all(len(set(draw)) == 3 and draw == sorted(draw) for draw in draws)
    assert {i for draw in draws for i in draw} == set(range(7))


def test_a_frame_that_cannot_be_judged_spoils_its_video_alone() -> None:
    class Picky(Reward):
        needs_prompt = False

        def measure(self, media: torch.Tensor, prompts: list[Prompt]) -> Scores:
            light = media.mean(dim=(1, 2, 3))
            return Scores(torch.where(light > 0.9, torch.nan, light))

    clips = CLIPS.clone()
    clips[1, 2] = 1.0
    for reward in (Sampled(Picky()), Segmental(Picky(), index="centre")):
        assert reward(clips).isnan().tolist() == [False, True, False]


def test_wrong_arguments_are_refused() -> None:
    for make, match in (
        (lambda: Sampled(Framewise(Brightness())), "looks at video"),
        (lambda: Sampled(Brightness(), "some"), "frames must be"),  # type: ignore[arg-type]
        (lambda: Sampled(Brightness(), stride=0), "at least 1"),
        (lambda: Sampled(Brightness(), [8])(CLIPS[:, :4]), "needs 9 frames"),
        (lambda: Sampled(Brightness(), "random", count=5)(CLIPS[:, :4]), "needs 5 frames"),
        (lambda: Segmental(Brightness(), 0), "segments"),
        (lambda: Segmental(Brightness(), index="middle"), "index"),  # type: ignore[arg-type]
        (lambda: Segmental(Brightness(), normalise="all"), "normalise"),  # type: ignore[arg-type]
        (lambda: Segmental(Brightness(), 4)(CLIPS[:, :3]), "one a segment"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
