"""Laws of the training loop, for every objective: what an update is, what goes wrong and how, what is refused."""

from __future__ import annotations

import json
import logging
import math
from itertools import pairwise

import pytest
import torch

from align import checkpoints
from align.config import TrainConfig
from align.objectives import Backprop, MaPO, Objective, PolicyGradient, Rebel
from align.parsing import concrete
from align.sources import Prompts, Rollouts
from align.trainer import Trainer
from rewards import Reward
from samplers import ODE, Consistency, RewardFailed
from samplers.families.gaussian import GaussianPolicy
from tests.align import runs
from tests.align.runs import CASES, Blind, Clip, Near, config_of, trainer_of

pytestmark = pytest.mark.usefixtures("plain")
# A float32 reward in the graph rounds its gradient.
CLOSE = {"Backprop": 1e-8, "Backprop-random": 1e-8, "DirectAlign": 1e-8}


def weights(trainer: Trainer) -> torch.Tensor:
    return trainer.policy.network.means.detach().clone()


def test_every_objective_has_a_case():
    """A new objective gets the whole battery of these files, with the sources that suit it."""
    tested = {type(case.objective()) for case in CASES.values()}
    assert set(concrete(Objective)) <= tested, "add it to CASES in tests/align/runs.py, with a source that suits it"


@pytest.mark.parametrize("name", CASES)
def test_the_table_says_where_batches_come_from(name, data):
    """An objective is met by a source of its natural kind at least once, and makes what it takes."""
    case = CASES[name]
    objective, source = case.objective(), case.source(data)
    assert source.makes in objective.takes
    kinds = {CASES[n].source(data).kind for n in CASES if type(CASES[n].objective()) is type(objective)}
    assert objective.source in kinds


def test_the_reward_that_scores_the_samples_is_the_optimised_one(tmp_path):
    """A source's own reward wins over the run's, unless the objective asks a reward itself."""
    policy, near, far = GaussianPolicy([[0.4, -0.3]]), Near(), runs.Far()
    rolled = Rollouts(runs.PROMPTS, group=2, reward=far)
    trainer = Trainer(policy, PolicyGradient().bind(near), rolled.bind(near), config_of(tmp_path / "a"))
    assert (trainer.reward, trainer.optimised) == (far, "Far")
    prompts = Prompts(runs.PROMPTS).bind(far)
    assert Trainer(policy, Backprop(reward=near), prompts, config_of(tmp_path / "b")).reward is near


def test_a_run_knows_nothing_of_the_one_before(data, tmp_path):
    """The moving average that an earlier run left on the policy is not what a later one without any is judged by."""
    policy = GaussianPolicy(runs.MEANS, [0.6, 0.8], [0.5, 0.5])
    trainer_of("Backprop", tmp_path / "one", data, policy=policy, ema=0.9, updates=2).fit()
    assert trainer_of("Backprop", tmp_path / "two", data, policy=policy, ema=0.0).speaker == "policy"


def test_speakers_that_no_objective_remembers(tmp_path):
    source = Rollouts(runs.PROMPTS, group=2, speaker="old")
    with pytest.raises(ValueError, match=r"PolicyGradient keeps no weights called 'old'.* policy, reference$"):
        Trainer(GaussianPolicy([[0.4, -0.3]]), PolicyGradient(), source.bind(Near()), config_of(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# An update


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_add_up_to_the_batch(name, data, tmp_path):
    """However an update is cut: weights, moving averages, earlier policies, losses and gradient norms agree to rounding."""
    results = []
    for micro in (1000, 5):
        trainer = trainer_of(name, tmp_path / str(micro), data, micro_batch=micro, updates=3, eval_every=0)
        results.append((trainer.fit().log, weights(trainer), trainer.policy.voices))
    close = CLOSE.get(name, 1e-12)
    for log, means, voices in results[1:]:
        torch.testing.assert_close(means, results[0][1], rtol=close, atol=close)
        for who, voice in voices.items():
            torch.testing.assert_close(voice, results[0][2][who], rtol=close, atol=close)
        for row, whole in zip(log, results[0][0], strict=True):
            for metric in ("loss", "grad_norm"):
                assert row[metric] == pytest.approx(whole[metric], rel=max(close, 1e-10) * 100, abs=1e-9)


@pytest.mark.parametrize("name", ["PolicyGradient", "Weighted-softmax"])
def test_samples_do_not_depend_on_how_many_are_in_flight(name, data, tmp_path):
    runs_ = [trainer_of(name, tmp_path / str(n), data, sample_rows=n, updates=3) for n in (64, 5)]
    one, other = [(trainer.fit(), weights(trainer))[1] for trainer in runs_]
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_seed_is_a_run(name, data, tmp_path):
    digests = [
        trainer_of(name, tmp_path / str(i), data, seed=s, updates=2).fit().digest for i, s in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_each_item_of_a_collection_is_used_once_an_epoch(data, tmp_path):
    """And every update of an epoch sees every stratum: here, both halves of each group of two updates."""
    trainer = trainer_of("PolicyGradient", tmp_path / "run", data, batch=6)
    seen = []
    loss = trainer.objective.loss
    trainer.objective.loss = lambda policy, batch: (
        seen.append((trainer.update, batch.columns["item"])),
        loss(policy, batch),
    )[1]
    trainer.fit()
    items = [sorted(set(torch.cat([item for u, item in seen if u == update]).tolist())) for update in range(8)]
    for first, second in zip(items[::2], items[1::2], strict=True):
        assert sorted(first + second) == list(range(12))
        assert [i // 2 for i in first] == list(range(6))
    assert items[0] != items[2], "the second epoch is shuffled afresh"


@pytest.mark.parametrize("every", [1, 3])
def test_the_moving_average(data, tmp_path, every):
    """The average begins at the initial weights; then each is decay·before + (1 − decay)·now, with the usual warm-up."""
    trainer = trainer_of("Backprop", tmp_path / "run", data, ema=0.3, ema_every=every, eval_every=0)
    seen, after = [], trainer._after_update
    trainer._after_update = lambda: (seen.append(weights(trainer)), after())[1]
    trainer.fit()
    average = seen[0]
    for update, now in enumerate(seen[1:]):
        decay = 1.0 if (update + 1) % every else min(0.3, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * now
    torch.testing.assert_close(trainer.policy.voices["ema"]["means"], average, rtol=1e-12, atol=1e-12)
    assert trainer.speaker == "ema"


@pytest.mark.parametrize(
    ("schedule", "middle"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5), ("sqrt", 0.5**0.5)]
)
def test_schedules(schedule, middle):
    config = TrainConfig(updates=24, warmup=4, schedule=schedule)
    rates = [config.rate(update) for update in range(25)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[14] == pytest.approx(middle)
    assert rates[24] == pytest.approx(1.0 if schedule == "constant" else 0.0)
    assert all(a >= b for a, b in pairwise(rates[4:]))


def test_the_optimiser_follows_the_schedule(data, tmp_path):
    trainer = trainer_of("Backprop", tmp_path / "run", data, schedule="linear", warmup=2, updates=4, eval_every=0)
    log = trainer.fit().log
    assert [row["learning_rate"] for row in log] == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_gradients_are_clipped_to_their_norm(data, tmp_path):
    """With an optimiser that has forgotten its scale (AdamW's ε is huge), the step is lr/ε times the clipped gradient."""
    steps = []
    for limit in (1e9, 0.5, 0.25):
        how = {
            "max_grad_norm": limit,
            "epsilon": 1e6,
            "learning_rate": 1e6,
            "schedule": "constant",
            "updates": 1,
            "ema": 0.0,
        }
        trainer = trainer_of("Backprop", tmp_path / str(limit), data, **how)
        before = weights(trainer)
        norm = trainer.fit().log[0]["grad_norm"]
        steps.append((weights(trainer) - before).norm())
    assert norm > 0.5
    assert [float(s) for s in steps] == pytest.approx([norm, 0.5, 0.25], rel=1e-4)


# What goes wrong


def poison(trainer: Trainer, updates: set[int]) -> Trainer:
    loss = trainer.objective.loss

    def poisoned(policy, batch):
        value, metrics = loss(policy, batch)
        return (value * math.nan if trainer.update in updates else value), metrics

    trainer.objective.loss = poisoned
    return trainer


def test_a_loss_that_is_not_finite_is_skipped_and_counted(data, tmp_path, caplog):
    """Nothing moves: not weights, averages or earlier policies, and the optimiser keeps its moments."""
    trainer = poison(
        trainer_of("DiffusionNFT", tmp_path / "run", data, schedule="constant", eval_every=0, save_every=1, keep=9),
        {3, 4},
    )
    with caplog.at_level(logging.WARNING, "kilter"):
        result = trainer.fit()
    assert result.stopped is None
    assert [row["skipped"] for row in result.log] == [0, 0, 0, 1, 1, 0, 0, 0]
    assert "update 4 was skipped: its loss or gradient was not finite" in caplog.text
    states = {int(p.name): checkpoints.read(p)[1] for p in checkpoints.complete(tmp_path / "run")}
    assert states[3]["digest"] == states[4]["digest"] == states[5]["digest"] != states[6]["digest"]
    moments = [states[u]["stepper"]["optimizer"]["state"][0]["exp_avg"] for u in (3, 5, 6)]
    assert torch.equal(moments[0], moments[1])
    assert not torch.equal(moments[1], moments[2])


def test_too_many_skips_in_a_row_end_the_run(data, tmp_path):
    trainer = poison(trainer_of("Backprop", tmp_path / "run", data, max_skipped=2, save_every=1), {1, 3, 4, 5})
    result = trainer.fit()
    assert len(result.log) == 5
    assert result.stopped.startswith(
        "2 updates in a row had a loss or gradient that was not finite: lower the learning rate"
    )
    assert checkpoints.read(checkpoints.latest(tmp_path / "run"))[1]["digest"] == result.digest
    assert Trainer.resume(tmp_path / "run").fit().stopped is None


@pytest.mark.parametrize(
    "name", ["PolicyGradient", "Pairwise-clean", "Weighted-softmax", "Backprop", "AdjointMatching"]
)
def test_samples_that_cannot_be_judged_are_left_out_and_counted(name, data, tmp_path):
    trainer = trainer_of(name, tmp_path / "run", data, Near(fails=0.3))
    result = trainer.fit()
    assert result.stopped is None
    shares = [row["reward_failed"] for row in result.log]
    assert 0 < sum(shares) / len(shares) < 0.7
    assert all(math.isfinite(row["loss"]) and not row["skipped"] for row in result.log if "loss" in row)
    assert weights(trainer).isfinite().all()


@pytest.mark.parametrize("name", ["PolicyGradient", "Backprop", "AdjointMatching", "Weighted-top"])
def test_a_reward_that_judges_nothing_ends_the_run_and_keeps_what_there_is(name, data, tmp_path):
    """Also in the middle of a run, whose last weights are then saved."""
    reward = Near()
    trainer = trainer_of(name, tmp_path / "run", data, reward, eval_every=0, save_every=100)
    collect = trainer.source.collect

    def failing(run, iteration):
        trainer.reward.fails = float(trainer.update >= 4)
        return collect(run, iteration)

    trainer.source.collect = failing
    with pytest.raises(RewardFailed, match=r"could judge none of"):
        trainer.fit()
    saved = checkpoints.latest(tmp_path / "run")
    assert saved.name == "000004"
    assert checkpoints.read(saved)[1]["weights"]["means"].isfinite().all()
    assert Trainer.resume(tmp_path / "run").fit().stopped is None


def test_a_full_disk_does_not_end_training(data, tmp_path, monkeypatch, caplog):
    """A save that fails is tried again after every update; at the end it is an error, and the old checkpoint is still there."""
    full, write = set(range(2, 7)), checkpoints.torch.save
    trainer = trainer_of("PolicyGradient", tmp_path / "run", data, save_every=2, keep=9)

    def save(what, path):
        if trainer.update in full:
            raise OSError(28, "No space left on device")
        write(what, path)

    monkeypatch.setattr(checkpoints.torch, "save", save)
    with caplog.at_level(logging.WARNING, "kilter"):
        assert trainer.fit().stopped is None
    assert [p.name for p in checkpoints.complete(tmp_path / "run")] == ["000000", "000007", "000008"]
    assert caplog.text.count("No space left on device; training goes on and tries again after the next update") == 5
    full |= {11, 12}
    trainer = Trainer.resume(tmp_path / "run", updates=12)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert checkpoints.latest(tmp_path / "run").name == "000010"
    full.clear()
    assert Trainer.resume(tmp_path / "run", updates=12).fit().stopped is None


def test_an_adapter_that_cannot_be_written_leaves_the_one_before(data, tmp_path, monkeypatch, caplog):
    trainer = trainer_of("Backprop", tmp_path / "run", data, updates=4)
    file = tmp_path / "run" / "trainable.safetensors"

    def save(policy, folder, who):
        if trainer.update:
            raise OSError(28, "No space left on device")
        return keep(policy, folder, who)

    from align import trainer as module

    keep = module.save_adapter
    monkeypatch.setattr(module, "save_adapter", save)
    seen = []
    after = trainer._after_update
    trainer._after_update = lambda: (after(), seen.append(file.read_bytes()))[0]
    with caplog.at_level(logging.WARNING, "kilter"), pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert len(seen) == 5 and len(set(seen)) == 1
    assert "the best adapter so far, of update 4, could not be kept" in caplog.text


# What is refused


def make(objective, source, out, reward: Reward | None = None, **how) -> Trainer:
    policy = how.pop("policy", None) or GaussianPolicy(runs.MEANS)
    return Trainer(policy, objective.bind(reward), source.bind(reward), config_of(out, **how))


REFUSED = {
    "non-differentiable": (lambda: (Backprop(), Prompts(["a"]), Blind()), "Blind is not differentiable, and Backprop needs"),
    "wrong modality, source": (lambda: (PolicyGradient(), Rollouts(["a"]), Clip()), "Clip scores video, but the model makes image"),
    "wrong modality, objective": (lambda: (Backprop(), Prompts(["a"]), Clip()), "Clip scores video, but the model makes image"),
    "no reward": (lambda: (PolicyGradient(), Rollouts(["a"]), None), "Rollouts needs a reward"),
    "no gradient reward": (lambda: (Backprop(), Prompts(["a"]), None), "Backprop needs a reward"),
    "rows": (lambda: (PolicyGradient(), Prompts(["a"]), Near()), "takes Steps or Noised rows, but Prompts makes Starts"),
    "members": (lambda: (MaPO(), Rollouts(["a"], evidence="clean"), Near()), "needs items of 2 rows, Rollouts makes items of 1"),
    "groups": (lambda: (PolicyGradient(), Rollouts(["a"], group=5), Near()), "12 items must be whole groups of 5"),
    "no prompts": (lambda: (PolicyGradient(), Rollouts(), Near()), "Rollouts needs prompts"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_do_not_fit_are_refused_before_anything_is_written(name, tmp_path):
    parts, said = REFUSED[name]
    objective, source, reward = parts()
    with pytest.raises(ValueError, match=said):
        make(objective, source, tmp_path / "run", reward)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [{"kernel": ODE()}, {"kernel": Consistency(), "steps": 1}], ids=str)
@pytest.mark.parametrize("parts", [
    lambda: (PolicyGradient(), Rollouts(["a"])), lambda: (Rebel(), Rollouts(["a"], evidence="paths", pairs="all")),
])  # fmt: skip
def test_where_no_step_has_noise_there_is_nothing_to_train_on(parts, how, tmp_path):
    """Deterministic kernels, and one-step sampling of consistency models."""
    with pytest.raises(ValueError, match=r"leaves no stochastic step to train on: .* more steps"):
        make(*parts(), tmp_path / "run", Near(), **how)


def test_one_sample_has_no_group():
    for how in ({"advantage": "group"}, {"advantage": "none", "pairs": "best_worst"}):
        with pytest.raises(ValueError, match="compares the samples of a prompt, so group must be ≥ 2; got 1"):
            Rollouts(["a"], group=1, **how)


def test_a_run_needs_a_judge(data, tmp_path):
    case = CASES["MaPO"]
    with pytest.raises(ValueError, match="no reward can judge this run: name some in panel"):
        make(case.objective(), case.source(data), tmp_path / "run")
    assert make(case.objective(), case.source(data), tmp_path / "run", panel=[Near()], updates=2).fit().judge == "Near"


def test_a_folder_that_holds_a_run_is_not_overwritten(data, tmp_path):
    trainer_of("PolicyGradient", tmp_path / "run", data, updates=1).fit()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(
        FileExistsError, match=r"is not empty: choose another out, or continue .* kilter train --resume .*run"
    ):
        trainer_of("PolicyGradient", tmp_path / "run", data)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("field", "value"),
    [("updates", 0), ("batch", 0), ("learning_rate", 0.0), ("ema", 1.0), ("ema_every", 0), ("keep", 0)],
)
def test_values_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"{field} must .*{value}"):
        TrainConfig(**{field: value})


def test_what_a_run_leaves(data, tmp_path):
    result = trainer_of("PolicyGradient", tmp_path / "run", data, panel=[runs.Far()]).fit()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["update"] for row in log] == list(range(1, 9))
    assert [u for u, _ in result.evaluations] == [0, 4, 8]
    kept = {int(p.name) for p in checkpoints.complete(tmp_path / "run")}
    assert kept == {4, 8} | {result.best}, "the last two, and the best"
