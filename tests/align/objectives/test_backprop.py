"""Laws of backpropagation through the sampler: every window is the autograd of a loop written out here, or a closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from align.batches import Batch, Starts
from align.objectives.backprop import Backprop
from rewards import Prompt, Reward
from samplers import CPS, DDIM, ODE, Cond, Consistency, FlowSDE, Levels, Policy, SeededNoise
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from tests.conftest import Linear, Quadratic, build_pipeline

F64 = torch.float64
T, B = 5, 4
KERNELS = [ODE(), DDIM(1.0), CPS(0.7), Consistency(), DDIM(1.0, noisy_steps=[True, False, True, True, False])]


def mixture(frame="vp", checkpointing="none", prediction="x0") -> GaussianPolicy:
    policy = GaussianPolicy([[1.0, -1.0], [0.0, 2.0]], [0.5, 0.7], [0.4, 0.6], frame=frame, prediction=prediction)
    policy.network.means.requires_grad_(True)
    policy.checkpointing = checkpointing
    return policy


def starts(policy, kernel, steps=T, rows=B, draw=0, shape=(2,), noisy_end=False) -> Batch:
    cond, prompts = policy.encode([""] * rows), tuple(Prompt(str(i)) for i in range(rows))
    levels = policy.levels(steps + noisy_end)[: steps + 1]
    return Batch(Starts(torch.arange(rows) + 3, cond, kernel, levels, shape, draw), {}, prompts)


def gradient(objective, policy, batch) -> torch.Tensor:
    loss, _ = objective.loss(policy, batch)
    return torch.autograd.grad(loss, list(policy.trainable.values()))[0]


def unrolled(policy, batch, with_network=lambda i: True, cut=0):
    """The final states by a plain loop, with the graph of the chosen network calls from step `cut` on."""
    rows = batch.rows
    noise = SeededNoise(rows.seeds.tolist(), rows.shape, dtype=F64)
    x, steps = noise(0), rows.levels.steps
    for i in range(steps):
        at = rows.levels[i]
        x = x.detach() if i <= cut else x
        output = policy.output(x, at, rows.cond)
        if i < cut or not with_network(i):
            output = output.detach()
        alpha, sigma = at.alpha, at.sigma
        x0 = {"x0": output, "eps": (x - sigma * output) / alpha, "flow": x - sigma * output}[policy.prediction]
        eps = (x - alpha * x0) / sigma
        to, std = rows.levels[i + 1], rows.kernel.stds(rows.levels)[i]
        weight = rows.kernel.noise_weight(at, to, std)
        x = to.alpha * x0 + weight * eps + std * noise(i + 1)
    return x


def expected(policy, reward, x) -> torch.Tensor:
    return torch.autograd.grad(-reward.measure(x, []).mean(), policy.network.means)[0]


REWARD = Quadratic(0.5, 3.0)


# Windows


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_all_steps_are_autograd_of_the_plain_loop(kernel, prediction):
    policy = mixture(prediction=prediction)
    batch = starts(policy, kernel)
    want = expected(policy, REWARD, unrolled(policy, batch))
    for objective in (Backprop("all", reward=REWARD), Backprop("last", k=T, reward=REWARD)):
        torch.testing.assert_close(gradient(objective, policy, batch), want, rtol=1e-10, atol=1e-12)


def test_all_steps_on_a_flow():
    policy = mixture("flow", prediction="flow")
    batch = starts(policy, FlowSDE(0.7))
    want = expected(policy, REWARD, unrolled(policy, batch))
    torch.testing.assert_close(gradient(Backprop("all", reward=REWARD), policy, batch), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", range(1, T + 1))
def test_the_last_k_steps_start_from_a_held_state(k):
    policy = mixture()
    batch = starts(policy, DDIM(1.0))
    want = expected(policy, REWARD, unrolled(policy, batch, cut=T - k))
    torch.testing.assert_close(gradient(Backprop(k=k, reward=REWARD), policy, batch), want, rtol=1e-10, atol=1e-12)


def test_one_step_differentiates_one_transition_only():
    policy = mixture()
    batch = starts(policy, DDIM(1.0))
    rows, noise = batch.rows, SeededNoise(batch.rows.seeds.tolist(), (2,), dtype=F64)
    short = Backprop("one_step", low=1, high=1)._sample(policy, rows, [False] * (T - 1) + [True]).states[:, 0]
    clean = policy.denoise(short, rows.levels[T - 1], rows.cond)
    law = rows.kernel(clean, short, rows.levels, T - 1)
    want = expected(policy, REWARD, law.sample(noise(T)))
    torch.testing.assert_close(gradient(Backprop(k=1, reward=REWARD), policy, batch), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("truncation", ["last", "random", "per_step", "all", "low_variance", "one_step"])
def test_checkpointing_changes_no_gradient(truncation):
    gradients = []
    for checkpointing in ("none", "step"):
        policy = mixture(checkpointing=checkpointing)
        objective = Backprop(truncation, k=3, reward=REWARD, kl_weight=0.1)
        policy.remember("reference")
        policy.network.means.data += 0.1
        gradients.append(gradient(objective, policy, starts(policy, DDIM(1.0, [True] * T), draw=5, noisy_end=True)))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("draw", range(4))
def test_per_step_drops_the_jacobians_of_its_draw(prediction, draw):
    policy, objective = mixture(prediction=prediction), Backprop("per_step", reward=REWARD)
    batch = starts(policy, DDIM(1.0), draw=draw)
    kept = objective.kept(batch.rows)
    rows = unrolled(policy, batch, with_network=lambda i: kept[i], cut=kept.index(True))
    torch.testing.assert_close(
        gradient(objective, policy, batch), expected(policy, REWARD, rows), rtol=1e-10, atol=1e-12
    )


def test_per_step_with_every_step_kept_is_all():
    policy, objective = mixture(), Backprop("per_step", reward=REWARD)
    draw = next(d for d in range(1000) if all(objective.kept(starts(policy, DDIM(1.0), 3, draw=d).rows)))
    batch = starts(policy, DDIM(1.0), 3, draw=draw)
    assert torch.equal(gradient(objective, policy, batch), gradient(Backprop("all", reward=REWARD), policy, batch))


def test_per_step_keeps_late_steps_more_often():
    rows, count = starts(mixture(), ODE()).rows, 4000
    kept = torch.tensor([Backprop("per_step").kept(replace(rows, draw=d)) for d in range(count)]).double().mean(0)
    chance = torch.arange(1, T + 1) / (T + 1)
    chance = chance / (1 - (1 - chance).prod())  # given that one is kept
    assert float((kept - chance).abs().max()) < 4 * 0.5 / math.sqrt(count)


def test_random_windows_are_uniform_and_agree_between_micro_batches():
    policy, objective = mixture(), Backprop("random", low=2, high=4)
    rows = starts(policy, ODE()).rows
    ks = torch.tensor([sum(objective.kept(replace(rows, draw=d))) for d in range(3000)])
    counts = torch.bincount(ks, minlength=T + 1)
    assert counts[[0, 1, 5]].sum() == 0
    assert int((counts[2:5] - 1000).abs().max()) < 110
    some = rows[torch.tensor([1, 3])]
    assert objective.kept(some) == objective.kept(rows)


def test_gaussian_windows_leave_the_first_step_out_and_have_their_mean():
    levels = GaussianPolicy([[0.0]]).levels(50)
    rows = replace(starts(mixture(), ODE()).rows, levels=levels)
    kept = [Backprop("gaussian", k=8).kept(replace(rows, draw=d)) for d in range(2000)]
    assert not any(k[0] for k in kept) and all(k[-1] for k in kept)
    drawn = torch.tensor([sum(k) for k in kept]).double()
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 5 + 8
    z = z.ceil()[(z.ceil() >= 1) & (z.ceil() < 50)].double()
    assert float((drawn.mean() - z.mean()).abs()) < 5 * 5 / math.sqrt(2000)


# Closed forms


class Toy(Policy):
    """Predicts x0 = θ whatever the state, so that a step is affine: x' = a·x + b·θ."""

    prediction = "x0"
    checkpointing = "none"

    def __init__(self, theta=0.3):
        super().__init__()
        self.network = nn.Linear(1, 1, bias=False, dtype=F64)
        self.network.weight.data.fill_(theta)

    def encode(self, prompts):
        return Cond({"row": torch.zeros(len(prompts), 1)})

    def shape(self, size):
        return (1,)

    def levels(self, steps, size=()):
        sigma = torch.linspace(1, 0.2, steps + 1, dtype=F64)
        return Levels(sigma, 1 - sigma, sigma)

    def predict(self, x, at, cond):
        return self.network(torch.ones_like(x))

    def decode(self, x0, frames=None):
        return x0


@pytest.mark.parametrize("k", range(1, 7))
def test_linear_toy_in_closed_form(k):
    policy, m, steps = Toy(), 2.0, 6
    batch = starts(policy, ODE(), steps, shape=(1,))
    levels = batch.rows.levels
    a = levels.sigma[1:] / levels.sigma[:-1]
    b = levels.alpha[1:] - levels.alpha[:-1] * a
    factor = sum(b[i] * a[i + 1 :].prod() for i in range(steps - k, steps))
    x = unrolled(policy, batch)
    want = (x - m).mean() * factor  # of −r = (x − m)²/2
    got = gradient(Backprop(k=k, reward=Quadratic(0.5, m)), policy, batch)
    torch.testing.assert_close(got, want.detach().reshape(1, 1), rtol=1e-9, atol=1e-12)


def test_expected_reward_of_a_gaussian_in_closed_form():
    """x0 ~ N(μ, s²) in every coordinate whatever the steps, so dE[a·Σx]/dμ = a, up to the prior's remaining signal."""
    policy = GaussianPolicy([[0.5, -1.0]], [0.7], frame="flow")
    policy.network.means.requires_grad_(True)
    got = gradient(Backprop("all", reward=Linear(2.0)), policy, starts(policy, ODE(), 400))
    torch.testing.assert_close(got, torch.full((1, 2), -2.0, dtype=F64), rtol=5e-3, atol=0)


# DRaFT-LV


def test_low_variance_is_the_mean_of_single_draws():
    policy = mixture()
    batch = starts(policy, DDIM(1.0))
    rows = batch.rows
    x0, last = unrolled(policy, batch).detach(), rows.levels[T - 1]
    fresh = SeededNoise(rows.seeds.tolist(), (2,), dtype=F64, stream=1)
    singles = []
    for j in range(3):
        x = last.alpha * x0 + last.sigma * fresh(j)
        singles.append(expected(policy, REWARD, policy.denoise(x, last, rows.cond).x0))
    assert not torch.allclose(singles[0], singles[1])
    got = gradient(Backprop("low_variance", copies=3, reward=REWARD), policy, batch)
    torch.testing.assert_close(got, torch.stack(singles).mean(0), rtol=1e-6, atol=1e-9)


def test_low_variance_noise_averages_out_as_one_over_n():
    """Given the samples, the variance of the gradient over fresh noise falls as 1/n and its mean stays."""
    policy, rows = mixture(), 2000
    last = policy.levels(T)[T - 1]
    x0 = torch.tensor([[0.4, 1.0]], dtype=F64).expand(rows, 2)
    noise = SeededNoise(range(rows), (2,), dtype=F64, stream=1)
    fresh = torch.stack([noise(j) for j in range(4)])

    def gradients(n):
        x = (last.alpha * x0 + last.sigma * fresh[:n]).flatten(0, 1)
        x0_hat = policy.denoise(x, last, policy.encode([""] * len(x))).x0
        means = [
            torch.autograd.grad(REWARD.measure(part, []).mean(), policy.network.means, retain_graph=True)[0]
            for part in x0_hat.reshape(n, rows, 2)[:, :300].unbind(1)
        ]
        return torch.stack(means).flatten(1)

    one, four = gradients(1), gradients(4)
    ratio = one.var(0).sum() / four.var(0).sum()
    assert 3 < float(ratio) < 5.3
    assert float((one.mean(0) - four.mean(0)).abs().max()) < 4 * float(one.std(0).max()) / math.sqrt(300)


# ReFL


def test_one_step_scores_the_estimate_of_its_step():
    policy, reward = mixture(), Linear(2.0)
    for draw in range(6):
        objective = Backprop("one_step", low=1, high=T, scale=0.25, reward=reward)
        batch = starts(policy, DDIM(1.0), draw=draw)
        m = objective.kept(batch.rows).index(True)
        noise = SeededNoise(batch.rows.seeds.tolist(), (2,), dtype=F64)
        x = noise(0)
        with torch.no_grad():
            for i in range(m):
                clean = policy.denoise(x, batch.rows.levels[i], batch.rows.cond)
                x = batch.rows.kernel(clean, x, batch.rows.levels, i).sample(noise(i + 1))
        x0 = policy.denoise(x, batch.rows.levels[m], batch.rows.cond).x0
        ones = torch.full_like(x0, -2.0 * 0.25 / B)  # scale · dr/dx0, backwards through the estimate
        want = torch.autograd.grad(x0, policy.network.means, ones)[0]
        torch.testing.assert_close(gradient(objective, policy, batch), want, rtol=1e-10, atol=1e-12)


def test_one_step_at_the_last_step_is_the_last_window_when_it_ends_clean():
    policy = mixture()
    batch = starts(policy, DDIM(1.0))
    assert float(batch.rows.levels.sigma[-1]) == 0
    one, last = Backprop("one_step", high=1, reward=REWARD), Backprop(k=1, reward=REWARD)
    torch.testing.assert_close(gradient(one, policy, batch), gradient(last, policy, batch), rtol=1e-12, atol=1e-14)


def test_one_step_leaves_out_the_steps_after_it():
    policy, calls = mixture(), []
    policy.network.register_forward_hook(lambda *_: calls.append(1))
    Backprop("one_step", low=3, high=3, reward=REWARD).loss(policy, starts(policy, DDIM(1.0)))
    assert len(calls) == T - 2


def test_a_reward_above_the_threshold_moves_nothing():
    policy = mixture()
    batch = starts(policy, DDIM(1.0))
    assert not gradient(Backprop(threshold=-1e4, reward=REWARD), policy, batch).any()
    below = gradient(Backprop(threshold=1e4, reward=REWARD), policy, batch)
    torch.testing.assert_close(below, gradient(Backprop(reward=REWARD), policy, batch))


def test_a_target_is_approached_from_both_sides():
    policy = mixture()
    batch, plain = starts(policy, DDIM(1.0)), gradient(Backprop(reward=REWARD), mixture(), starts(policy, DDIM(1.0)))
    for target, sign in ((1e4, 1), (-1e4, -1)):
        torch.testing.assert_close(gradient(Backprop(target=target, reward=REWARD), policy, batch), sign * plain)
    loss, metrics = Backprop(target=10.0, scale=0.01, reward=REWARD).loss(policy, batch)
    reward = REWARD.measure(unrolled(policy, batch), []).float()
    torch.testing.assert_close(loss.double(), 0.01 * (reward - 10).abs().mean().double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["reward"], reward.mean().detach())


# KL


@pytest.mark.parametrize("truncation", ["last", "random", "per_step", "all", "low_variance", "one_step"])
def test_kl_is_zero_with_zero_gradient_at_the_reference(truncation):
    policy = mixture()
    policy.remember("reference")
    batch = starts(policy, Consistency(), draw=2, noisy_end=True)
    with_kl = Backprop(truncation, k=3, kl_weight=3.0, reward=REWARD)
    loss, metrics = with_kl.loss(policy, batch)
    assert float(metrics["kl"]) == 0
    without = gradient(Backprop(truncation, k=3, reward=REWARD), policy, batch)
    torch.testing.assert_close(torch.autograd.grad(loss, policy.network.means)[0], without, rtol=1e-12, atol=1e-14)


def test_kl_is_that_of_the_laws_in_the_window():
    policy = mixture()
    policy.remember("reference")
    policy.network.means.data += torch.tensor([[0.1, 0.2], [-0.3, 0.0]], dtype=F64)
    batch, kernel = starts(policy, DDIM(1.0)), DDIM(1.0)
    rows, noise = batch.rows, SeededNoise(batch.rows.seeds.tolist(), (2,), dtype=F64)
    x, total = noise(0), 0
    for i in range(T):
        at, std = rows.levels[i], kernel.stds(rows.levels)[i]
        mean = kernel(policy.denoise(x, at, rows.cond), x, rows.levels, i).mean
        with torch.no_grad(), policy.acting_as("reference"):
            reference = kernel(policy.denoise(x, at, rows.cond), x, rows.levels, i).mean
        if i >= T - 3 and std > 0:
            total = total + ((mean - reference) ** 2).sum(1).mean() / (2 * std**2)
        x = (mean + std * noise(i + 1)).detach()
    loss, metrics = Backprop(k=3, kl_weight=1.0, reduction="sum", reward=Linear(0.0)).loss(policy, batch)
    torch.testing.assert_close(metrics["kl"], total.detach(), rtol=1e-10, atol=0)
    got, want = (torch.autograd.grad(v, policy.network.means)[0] for v in (loss, total))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    mean = Backprop(k=3, kl_weight=1.0, reward=Linear(0.0)).loss(policy, batch)[1]["kl"]
    torch.testing.assert_close(mean, total.detach() / 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("kernel", "k"), [(ODE(), 5), (DDIM(1.0), 1)], ids=repr)
def test_kl_needs_a_stochastic_step(kernel, k):
    policy = mixture()
    with pytest.raises(ValueError, match="kl_weight needs a stochastic step"):
        Backprop(k=k, kl_weight=0.1, reward=REWARD).loss(policy, starts(policy, kernel))


# Rows


class Fickle(Linear):
    """Judges no sample whose first coordinate is positive, and has a gradient without value there."""

    def measure(self, media, prompts):
        odd = media[:, 0] > 0
        return torch.where(odd, torch.nan, media.sum(1)) + torch.where(odd, 0, 0 * torch.sqrt(-media[:, 0]))


def test_rows_without_a_score_contribute_nothing():
    policy = mixture()
    batch = starts(policy, DDIM(1.0), rows=8)
    odd = unrolled(policy, batch)[:, 0] > 0
    assert 0 < int(odd.sum()) < 8
    fine = (~odd).nonzero().flatten()
    loss, metrics = Backprop(k=2, reward=Fickle()).loss(policy, batch)
    part = gradient(Backprop(k=2, reward=Linear()), policy, batch[fine]) * len(fine) / 8
    torch.testing.assert_close(torch.autograd.grad(loss, policy.network.means)[0], part, rtol=1e-6, atol=1e-9)
    assert float(metrics["reward_failed"]) == float(odd.double().mean())
    assert bool(metrics["reward"].isfinite())


@pytest.mark.parametrize("truncation", ["last", "low_variance", "one_step"])
def test_rows_that_are_not_finite_stay_out_of_the_graph(truncation):
    class Breaks(GaussianPolicy):
        def predict(self, x, at, cond):
            return super().predict(x, at, cond) + cond.positive["row"]

    def build(bad):
        policy = Breaks([[1.0, -1.0]], [0.5])
        policy.network.means.requires_grad_(True)
        batch = starts(policy, DDIM(1.0))
        batch.rows.cond.positive["row"][bad] = torch.inf
        return policy, batch

    policy, batch = build([2])
    objective = Backprop(truncation, k=2, high=2, reward=Linear())
    loss, metrics = objective.loss(policy, batch)
    assert float(metrics["reward_failed"]) == 0.25
    fine, _ = objective.loss(policy, batch[[0, 1, 3]])
    got, want = (torch.autograd.grad(v, policy.network.means)[0] for v in (loss, 0.75 * fine))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    policy, batch = build([0, 1, 2, 3])
    loss, metrics = objective.loss(policy, batch)
    assert not torch.autograd.grad(loss, policy.network.means)[0].any()
    assert float(metrics["reward_failed"]) == 1


@pytest.mark.parametrize("truncation", ["last", "random", "gaussian", "per_step", "all", "low_variance", "one_step"])
def test_micro_batches_add_up(truncation):
    policy = mixture()
    policy.remember("reference")
    policy.network.means.data += 0.1
    batch = starts(policy, DDIM(1.0), rows=8, draw=9, noisy_end=True)
    objective = Backprop(truncation, k=3, kl_weight=0.2, reward=Fickle())
    parts = [gradient(objective, policy, batch.take(range(first, first + 2))) for first in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(0), gradient(objective, policy, batch), rtol=1e-6, atol=1e-9)


# Errors


class Detector(Linear):
    differentiable = False


class Pixels(Reward):
    needs_prompt = False

    def measure(self, media, prompts):
        return media.flatten(1).mean(1)


class Ears(Linear):
    modality = "audio"


@pytest.mark.parametrize(
    ("reward", "message"),
    [(None, "needs a reward"), (Detector(), "Detector is not differentiable"), (Ears(), "Ears scores audio")],
)
def test_unfit_rewards_are_named(reward, message):
    with pytest.raises(ValueError, match=message):
        Backprop(reward=reward).check(mixture())


def test_media_outside_the_unit_range_are_refused():
    class Doubled(GaussianPolicy):
        def decode(self, x0, frames=None):
            return (x0.reshape(-1, 1, 1, 2).expand(-1, 3, -1, -1)).sigmoid() * 2 - 1

    policy = Doubled([[1.0, -1.0]])
    policy.network.means.requires_grad_(True)
    with pytest.raises(ValueError, match=r"with values in \[0,1\].*spanning"):
        Backprop(reward=Pixels()).loss(policy, starts(policy, DDIM(1.0)))


@pytest.mark.parametrize(
    "given",
    [{"k": 6}, {"truncation": "random", "high": 6}, {"truncation": "one_step", "low": 6}, {"truncation": "gaussian", "k": 5}],
)  # fmt: skip
def test_windows_longer_than_the_run_are_refused(given):
    policy = mixture()
    with pytest.raises(ValueError, match="the run takes 5"):
        Backprop(reward=REWARD, **given).loss(policy, starts(policy, ODE()))


@pytest.mark.parametrize(
    "given", [{"k": 0}, {"low": 3, "high": 2}, {"copies": 0}, {"target": 1.0, "threshold": 1.0}, {"truncation": "lats"}]
)
def test_settings_are_checked(given):
    with pytest.raises(ValueError, match=r"must be|give one"):
        Backprop(**given)


# A network


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    from peft import LoraConfig

    policy = StableDiffusion(build_pipeline(tmp_path_factory.mktemp("sd")))
    policy.network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, p in policy.trainable.items():
            p.data = torch.randn_like(p) * 0.1 if "lora_B" in name else p.data
    return policy


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("truncation", ["last", "random", "per_step", "low_variance", "one_step"])
def test_the_gradient_reaches_every_adapter(adapted, truncation, guided):
    batch = Batch(
        Starts(
            torch.arange(2), adapted.encode(["cat", "dog"]), DDIM(1.0), adapted.levels(3), adapted.shape((16, 16)), 1
        ),
        {}, (Prompt("cat"), Prompt("dog")),
    )  # fmt: skip
    objective = Backprop(truncation, guided=guided, kl_weight=1e-3, reward=Pixels())
    objective.check(adapted)
    gradients = {}
    for checkpointing in ("none", "step"):
        adapted.checkpointing = checkpointing
        loss, metrics = objective.loss(adapted, batch)
        assert float(metrics["kl"]) > 0
        gradients[checkpointing] = torch.autograd.grad(loss, list(adapted.trainable.values()))
    assert all(bool(g.any()) for g in gradients["none"])
    for one, two in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
