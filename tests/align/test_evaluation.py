"""Laws of evaluation: paired, repeatable, the same however it is cut, and its three numbers in closed form."""

from __future__ import annotations

import math

import pytest
import torch

import align.evaluation
from align.batches import Batch, Paths
from align.evaluation import MOST, Evaluator, diversity, judged_prompts, paired_gain
from align.evidence import law
from align.sampling import Sampling
from align.world import World
from rewards import Prompt
from samplers import DDIM, ODE
from samplers.noise import mix
from tests.align.objectives.rows import trainable
from tests.align.runs import Near

WORLD = World(cpu=True)
PROMPTS = [Prompt(text) for text in ("a", "b", "c")]


def evaluator(policy, samples: int = 4, kernel=None, rows: int = 64, prompts=PROMPTS, **how) -> Evaluator:
    sampling = Sampling.of(policy, kernel or DDIM(eta=1.0), 4, rows=rows)
    return Evaluator(prompts, samples, {"Near": Near(**how)}, sampling, seed=3)


def test_gains_are_paired():
    """The difficulty of a prompt cancels, however large; samples of a prompt are averaged before the error is taken."""
    before, gain = torch.tensor([0.0, 2.0, 100.0, 102.0]), torch.tensor([1.0, 1.0, 2.0, 4.0])
    mean, error = paired_gain(before, before + gain, samples=2)
    assert mean == pytest.approx(2.0)
    assert error == pytest.approx(torch.tensor([1.0, 3.0]).std().item() / 2**0.5)
    before[3] = math.nan  # its other sample stands for the prompt
    assert paired_gain(before, before + gain, 2)[0] == pytest.approx(1.5)
    before[2] = math.nan
    assert paired_gain(before, before + gain, 2) == (1.0, pytest.approx(math.nan, nan_ok=True))


def test_an_evaluation_repeats_and_leaves_the_policy_alone():
    policy = trainable(0.5)
    one, other = (evaluator(policy)(policy, WORLD) for _ in range(2))
    assert torch.equal(one.scores["Near"], other.scores["Near"])
    assert torch.equal(one.media, other.media)
    assert (one.kl, one.diversity) == (other.kl, other.diversity)
    assert policy.network.means.grad is None and policy.network.means.requires_grad


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_how_many_are_in_flight_changes_nothing(rows):
    policy = trainable(0.5)
    whole, cut = evaluator(policy)(policy, WORLD), evaluator(policy, rows=rows)(policy, WORLD)
    torch.testing.assert_close(cut.media, whole.media, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut.scores["Near"], whole.scores["Near"])
    assert cut.kl == pytest.approx(whole.kl)


def test_scores_are_those_of_the_media_prompt_by_prompt():
    policy = trainable(0.5)
    found = evaluator(policy)(policy, WORLD)
    torch.testing.assert_close(found.scores["Near"], Near()(found.media).float())
    one = evaluator(policy, prompts=PROMPTS[:1])(policy, WORLD)
    torch.testing.assert_close(found.media[:4], one.media)
    means = found.means()
    assert means == {
        "Near": pytest.approx(found.scores["Near"].mean().item()),
        "kl": found.kl,
        "diversity": found.diversity,
    }


def test_samples_that_cannot_be_judged_are_nan_and_left_out():
    policy = trainable(0.5)
    found = evaluator(policy, samples=16, fails=0.5)(policy, WORLD)
    failed = found.scores["Near"].isnan()
    assert 0 < failed.sum() < len(failed)
    assert found.means()["Near"] == pytest.approx(found.scores["Near"][~failed].mean().item())


def test_the_weights_asked_for_are_judged():
    policy = trainable(0.5)
    policy.remember("ema")
    expected = evaluator(policy)(policy, WORLD)
    with torch.no_grad():
        policy.network.means += 1
    assert torch.equal(evaluator(policy)(policy, WORLD, "ema").media, expected.media)
    assert not torch.equal(evaluator(policy)(policy, WORLD).media, expected.media)


def test_divergence_is_zero_for_the_reference_itself():
    assert evaluator(policy := trainable(0.0))(policy, WORLD).kl == 0.0


def test_divergence_is_that_of_paths():
    """Its mean over seeds is Σ_t KL of the steps along the policy's own paths: here all steps are added up exactly."""
    policy = trainable(0.6)
    judge = evaluator(policy, samples=400)
    s = judge.sampling
    seeds = [mix(judge.seed, p, k) for p in range(3) for k in range(400)]
    path = s.roll(policy, [p for p in PROMPTS for _ in range(400)], seeds, record="path")
    batch = Batch(Paths(path.latents, path.cond, s.kernel, s.levels))
    noisy = (s.kernel.stds(s.levels) > 0).nonzero().flatten()
    rows = batch.steps(noisy.expand(len(batch), -1)).rows
    with torch.no_grad():
        mine = law(policy, rows)
        with policy.acting_as("reference"):
            exact = mine.kl(law(policy, rows)).reshape(len(batch), -1).sum(1)
    assert judge(policy, WORLD).kl == pytest.approx(float(exact.mean()), rel=0.1)


def test_divergence_asks_every_step_equally_often(monkeypatch):
    """However few the rows are: late steps can make up most of the sum, and must not be missed by chance."""
    asked, real = [], align.evaluation.law

    def seen(policy, rows):
        asked.extend(rows.step.tolist())
        return real(policy, rows)

    monkeypatch.setattr(align.evaluation, "law", seen)
    judge = evaluator(policy := trainable(0.5))
    noisy = (judge.sampling.kernel.stds(judge.sampling.levels) > 0).nonzero().flatten().tolist()
    judge.prompts, judge.samples = judge.prompts[:1], 2 * len(noisy)
    judge(policy, WORLD)
    assert sorted(asked) == sorted(4 * noisy), "twice each, by the policy and the reference"


def test_deterministic_paths_have_no_divergence():
    assert math.isnan(evaluator(policy := trainable(0.5), kernel=ODE())(policy, WORLD).kl)


def test_diversity_by_hand():
    """Root mean square distance of the pixels of two samples of a prompt, averaged over prompts."""
    media = torch.zeros(4, 3, 2, 2)
    media[1] = 0.5  # prompt one: all pixels 0.5 apart; prompt two: alike
    assert diversity(media, 2) == pytest.approx(0.25)
    assert diversity(media, 4) == pytest.approx((3 * 0.25 / 6) ** 0.5)
    assert math.isnan(diversity(media, 1))


def test_what_is_judged_on(tmp_path):
    """Prompts given, else those held out from the model's world, else the source's own, each once and evenly thinned."""
    own = [Prompt(f"{i}") for i in range(100)]
    (tmp_path / "p.txt").write_text("x\ny\n")
    assert [p.text for p in judged_prompts([str(tmp_path / "p.txt"), "z"], "shapes", own)] == ["x", "y", "z"]
    held = judged_prompts([], "shapes", own)
    assert len(held) == MOST
    assert not {p.text for p in held} & {p.text for p in own}
    thinned = [p.text for p in judged_prompts([], "", own * 2)]
    assert thinned == [str(3 * i) for i in range(MOST)]
    with pytest.raises(ValueError, match="nothing to evaluate on: set eval_prompts"):
        judged_prompts([], "", [])
