"""Laws of HyperNoise: the gradient is that of the whole composition, its optimum is where reward and distance balance."""

from __future__ import annotations

import math

import pytest
import torch

import align
from align.batches import Batch, Starts
from align.objectives import HyperNoise
from align.steering import row_seed
from rewards import Prompt
from samplers import ODE, Consistency, SeededNoise, ShiftedNoise, always, rollout
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from samplers.hypernoise import noise_shift
from tests.align.objectives.rows import gradient
from tests.align.objectives.test_backprop import Detector, Fickle, Pixels
from tests.align.runs import Near, trainer_of
from tests.conftest import Faint, Linear, Quadratic, build_pipeline
from tests.samplers.test_hypernoise import fill, moved, student  # noqa: F401

F64 = torch.float64


def starts(policy, kernel=None, steps=2, rows=6, shape=(2,)) -> Batch:
    cond, prompts = policy.encode(["cat"] * rows), tuple(Prompt(str(i)) for i in range(rows))
    return Batch(
        Starts(torch.arange(rows) + 3, cond, kernel or Consistency(), policy.levels(steps), shape), {}, prompts
    )


def slope(policy, kernel, steps):
    """a of the generator x_0 = a·z + …, the product of its steps' slopes."""
    levels, std = policy.levels(steps), kernel.stds(policy.levels(steps))
    a = torch.ones((), dtype=F64)
    for i in range(steps):
        gain = levels.alpha[i] * 0.64 / (0.64 * levels.alpha[i] ** 2 + levels.sigma[i] ** 2)
        weight = kernel.noise_weight(levels[i], levels[i + 1], std[i])
        a = a * (levels.alpha[i + 1] * gain + weight * (1 - levels.alpha[i] * gain) / levels.sigma[i])
    return a


@pytest.mark.parametrize(("kernel", "steps"), [(Consistency(), 1), (Consistency(), 2), (ODE(), 3)], ids=str)
@pytest.mark.parametrize(
    ("reward", "weight"), [(Linear(3.0), 0.5), (Quadratic(0.4, 1.5), 0.7)], ids=["linear", "quadratic"]
)
def test_the_optimum_in_closed_form(kernel, steps, reward, weight):
    """x_0 = a·(z + Δz) + b: where a·E[∇r(x_0)] = w·Δz, so Δz = a·c/w for r = c·x, and for −c·|x − t|² what solves it linearly."""
    policy = moved(0.0)
    batch = starts(policy, kernel, steps, rows=40)
    objective = HyperNoise(weight, "sum", reward)
    a, rows = slope(policy, kernel, steps), batch.rows
    noise = SeededNoise(rows.seeds.tolist(), (2,), dtype=F64)
    middle = rollout(policy, kernel, rows.cond, rows.levels, noise).x0.mean(0)
    if isinstance(reward, Quadratic):
        want = 2 * 0.4 * a * (1.5 - middle) / (weight + 2 * 0.4 * a**2)
    else:
        want = (a * 3.0 / weight).expand(2)
    optimiser = torch.optim.LBFGS([policy.network.means], max_iter=50, tolerance_grad=1e-13, tolerance_change=0)

    def closure():
        optimiser.zero_grad()
        loss, _ = objective.loss(policy, batch)
        loss.backward()
        return loss.detach()

    optimiser.step(closure)
    found = noise_shift(policy, noise(0), rows.levels, rows.cond).detach()
    torch.testing.assert_close(found, want.expand(40, 2), rtol=1e-6, atol=1e-8)
    assert float(want.abs().min()) > 0.01


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradient_are_those_of_the_whole_composition(reduction):
    policy, reward, weight = moved(0.4), Quadratic(0.5, 2.0), 0.6
    batch = starts(policy)
    loss, metrics = HyperNoise(weight, reduction, reward).loss(policy, batch)
    rows, reference = batch.rows, GaussianPolicy([[0.4, -0.3]], [0.8])
    noise = SeededNoise(rows.seeds.tolist(), (2,), dtype=F64)
    shift = noise_shift(policy, noise(0), rows.levels, rows.cond)
    start = noise(0) + shift
    x0 = rollout(
        reference, rows.kernel, rows.cond, rows.levels, lambda i: start if i == 0 else noise(i), grad=always
    ).x0
    kl = 0.5 * shift.square().sum(1) / (2 if reduction == "mean" else 1)
    want = (weight * kl - reward.measure(x0, [])).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, want), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(metrics["kl"], kl.mean().detach())
    assert float(metrics["reward"]) == pytest.approx(float(reward.measure(x0, []).mean().detach()), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.2])
@pytest.mark.parametrize("checkpointing", ["none", "step", "block"])
def test_what_is_recomputed_is_recomputed_without_the_adapter(student, checkpointing, scale):  # noqa: F811
    """A network with a LoRA against one graph of everything, kept in memory."""
    policy, reward = student, Pixels()
    fill(policy, scale)
    batch = starts(policy, Consistency(), rows=2, shape=policy.shape((16, 16)))
    weights = [p for name, p in policy.network.named_parameters() if "lora" in name]

    policy.checkpointing = "none"
    rows, noise = batch.rows, SeededNoise(batch.rows.seeds.tolist(), batch.rows.shape)
    shift = noise_shift(policy, noise(0), rows.levels, rows.cond)
    start = noise(0) + shift
    with policy.acting_as("reference"):
        x0 = rollout(
            policy, rows.kernel, rows.cond, rows.levels, lambda i: start if i == 0 else noise(i), grad=always
        ).x0
    want = (0.5 * shift.square().flatten(1).mean(1) - reward(policy.decode(x0), list(batch.prompts))).mean()
    wanted = torch.autograd.grad(want, weights)

    policy.checkpointing = "step" if checkpointing == "step" else "none"
    if checkpointing == "block":
        policy.network.enable_gradient_checkpointing()
    try:
        loss, metrics = HyperNoise(reward=reward).loss(policy, batch)
        found = torch.autograd.grad(loss, weights)
    finally:
        policy.network.disable_gradient_checkpointing()
    torch.testing.assert_close(loss, want)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-8)
    assert any(bool(g.any()) for g in found)
    if scale == 0:
        with torch.no_grad():
            plain = rollout(policy, rows.kernel, rows.cond, rows.levels, noise).x0
            before = reward(policy.decode(plain), list(batch.prompts)).mean()
        assert float(metrics["kl"]) == 0
        assert torch.equal(loss.detach(), -before)


def test_rows_without_a_score_keep_their_distance_only():
    policy = moved(0.3)
    batch = starts(policy, rows=12)
    loss, metrics = HyperNoise(reward=Fickle()).loss(policy, batch)
    share = float(metrics["reward_failed"])
    assert 0 < share < 1
    judged = 1 - share
    torch.testing.assert_close(loss.detach(), metrics["kl"] - judged * metrics["reward"])
    assert bool(gradient(policy, loss).isfinite().all())


def test_samples_that_are_not_finite_are_never_judged():
    class Breaks(GaussianPolicy):
        def decode(self, x0, frames=None):
            assert bool(x0.isfinite().all())
            return x0

        def predict(self, x, at, cond):
            x0 = super().predict(x, at, cond)
            return torch.where(cond.positive["row"] > 0, x0 / 0, x0)

    policy = Breaks([[0.4, -0.3]], [0.8])
    policy.network.means.requires_grad_(True)
    policy.remember("reference")
    batch = starts(policy, rows=4)
    batch.rows.cond.positive["row"][1] = 1.0
    _, _, slopes = HyperNoise(reward=Linear())._generated(
        policy, batch.rows, SeededNoise(range(4), (2,), dtype=F64), batch.prompts
    )
    assert torch.equal(slopes[1], torch.zeros(2, dtype=F64))
    assert bool(slopes[0].ne(0).all())
    batch.rows.cond.positive["row"][:] = 1.0
    _, metrics = HyperNoise(reward=Linear()).loss(policy, batch)
    assert float(metrics["reward_failed"]) == 1


def test_small_gradients_survive_half_precision(tmp_path):
    """Of pixels they are some 1e-7, of which float16 keeps nothing on its way through decoder and network."""
    slopes = []
    for dtype in (torch.float32, torch.float16):
        policy = StableDiffusion(build_pipeline(tmp_path).to(dtype))
        policy.remember("reference")
        batch = starts(policy, steps=1, rows=2, shape=policy.shape((16, 16)))
        noise = SeededNoise(batch.rows.seeds.tolist(), batch.rows.shape)
        slopes.append(HyperNoise(reward=Faint())._generated(policy, batch.rows, noise, batch.prompts)[2])
    assert slopes[1].dtype == torch.float32
    assert (slopes[1] - slopes[0]).norm() < 0.1 * slopes[0].norm()


def test_where_nothing_is_judged_only_the_distance_is_left():
    """Then there is no graph at all, as where a detector fails on every sample."""

    class Silent(Linear):
        def measure(self, media, prompts):
            return torch.full((len(media),), torch.nan)

    policy = moved(0.3)
    loss, metrics = HyperNoise(reward=Silent()).loss(policy, starts(policy))
    assert float(metrics["reward_failed"]) == 1
    torch.testing.assert_close(loss.detach(), metrics["kl"])


def test_micro_batches_add_up():
    policy, objective = moved(0.4), HyperNoise(reward=Quadratic(0.5, 2.0))
    batch = starts(policy)
    parts = [(len(p), gradient(policy, objective.loss(policy, batch.take(p))[0])) for p in ([0, 1, 2, 3], [4, 5])]
    whole = gradient(policy, objective.loss(policy, batch)[0])
    torch.testing.assert_close(sum(n / 6 * g for n, g in parts), whole, rtol=1e-10, atol=1e-12)


def test_a_run_judges_what_will_be_used(tmp_path):
    """Evaluations sample by moved noise, and so does `steer`, whose plain arm is the generator without the adapter."""
    trainer = trainer_of("HyperNoise", tmp_path / "run", tmp_path)
    policy, sampling = trainer.policy, trainer.evaluator.sampling
    assert sampling.shifted
    assert not trainer.sampling.shifted
    with torch.no_grad():
        policy.network.means += 0.5
    prompts = [Prompt("one"), Prompt("two")]
    seeds = [row_seed(7, i, 0) for i in range(2)]
    judged = sampling.roll(policy, prompts, seeds).x0
    steered = align.steer(policy, prompts, ShiftedNoise(Near()), kernel=sampling.kernel, steps=3, particles=1, seed=7)
    arms = {arm: torch.stack([s.pixels for s in steered.arm(arm)]) for arm in ("plain", "steered")}
    torch.testing.assert_close(arms["steered"], judged, rtol=1e-6, atol=1e-6)
    with policy.acting_as("reference"):
        plain = trainer.sampling.roll(policy, prompts, seeds).x0
    torch.testing.assert_close(arms["plain"], plain, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(judged, plain)
    evaluation = trainer.evaluator(policy, trainer.world)
    assert math.isnan(evaluation.kl)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="kl_weight must be > 0"):
        HyperNoise(0.0)
    with pytest.raises(ValueError, match="is not differentiable, and HyperNoise"):
        HyperNoise(reward=Detector()).check(moved())
    loaded = moved()
    loaded.adapter = "runs/one"
    with pytest.raises(ValueError, match="runs/one is loaded: merge it"):
        HyperNoise(reward=Linear()).check(loaded)
