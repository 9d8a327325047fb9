"""Laws of the loop: rows are independent, replays are exact, windows cut graphs where they say, runs can be stopped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from samplers import (
    CPS,
    DDIM,
    FREE,
    ODE,
    BestOfN,
    Clean,
    Consistency,
    DanceSDE,
    FlowSDE,
    Interrupted,
    NoiseBank,
    SeededNoise,
    Steering,
    always,
    last,
    never,
    only,
    random_truncation,
    rollout,
    to_clean,
)
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from tests.conftest import Linear, build_pipeline, saved_bytes

F64 = torch.float64
T = 5
KERNELS = [ODE(), DDIM(1.0), DDIM(0.5, noisy_steps=[True, False, True, False, True]), CPS(0.7), Consistency()]
FLOWS = [FlowSDE(0.7), DanceSDE(0.3), CPS(0.7)]


def mixture(frame: str = "vp") -> GaussianPolicy:
    return GaussianPolicy([[1.0, -1.0], [0.0, 2.0]], [0.5, 0.7], [0.4, 0.6], frame=frame)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory) -> StableDiffusion:
    return StableDiffusion(build_pipeline(tmp_path_factory.mktemp("sd")))


def seeded(policy, seeds, shape=(2,)) -> SeededNoise:
    return SeededNoise(seeds, shape, dtype=policy.dtype)


def replay(policy, kernel, run, i, cond=None) -> Tensor:
    """The log-probability of step i, recomputed from the recorded states alone."""
    x = run.latents[:, i]
    with torch.no_grad():
        clean = policy.denoise(x, run.levels[i], cond or run.cond)
        return kernel(clean, x, run.levels, i).log_prob(run.latents[:, i + 1])


# Rows are independent


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_rows_alone_equal_rows_in_a_batch_bitwise(kernel):
    policy, seeds = mixture(), [4, 1, 9, 7, 3]
    cond, levels = policy.encode([""] * 5), policy.levels(T)
    together = rollout(policy, kernel, cond, levels, seeded(policy, seeds), record="path")
    for rows in ([0], [3], [2, 4], [4, 2, 1]):
        part = rollout(policy, kernel, cond[rows], levels, seeded(policy, [seeds[r] for r in rows]), record="path")
        assert torch.equal(part.latents, together.latents[rows])
        assert torch.equal(part.log_prob, together.log_prob[rows])


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_rows_alone_equal_rows_in_a_batch_on_a_network(diffusion, guidance):
    cond = diffusion.encode(["cat", "red dog", "a"]).with_guidance(guidance)
    levels, shape = diffusion.levels(4), diffusion.shape((16, 16))
    together = rollout(diffusion, DDIM(1.0), cond, levels, seeded(diffusion, [0, 1, 2], shape)).x0
    for row in range(3):
        alone = rollout(diffusion, DDIM(1.0), cond[row], levels, seeded(diffusion, [row], shape)).x0
        assert float((alone - together[row : row + 1]).abs().max()) < 1e-5 * float(together.abs().max())


@pytest.mark.parametrize("particles", [1, 3])
def test_one_condition_a_prompt_is_one_a_row(diffusion, particles):
    cond, levels = diffusion.encode(["cat", "red dog"]), diffusion.levels(2)
    noise = seeded(diffusion, range(2 * particles), diffusion.shape((16, 16)))
    short = rollout(diffusion, DDIM(1.0), cond, levels, noise, particles=particles)
    full = rollout(diffusion, DDIM(1.0), cond.repeat(particles), levels, noise, particles=particles)
    assert torch.equal(short.x0, full.x0)
    assert len(short.cond) == 2 * particles
    assert short.log_w.shape == (2, particles)
    blocks = [
        rollout(
            diffusion, DDIM(1.0), cond[p], levels, noise[p * particles : (p + 1) * particles], particles=particles
        ).x0
        for p in range(2)
    ]
    torch.testing.assert_close(short.x0, torch.cat(blocks), rtol=1e-4, atol=1e-3)


# What is recorded


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_path_holds_every_state_from_noise_to_data(kernel):
    policy = mixture()
    noise = seeded(policy, [1, 2, 3])
    cond, levels = policy.encode([""] * 3), policy.levels(T)
    run = rollout(policy, kernel, cond, levels, noise, record="path")
    assert run.latents.shape == (3, T + 1, 2)
    assert run.log_prob.shape == (3, T)
    assert torch.equal(run.latents[:, 0], noise(0))
    assert torch.equal(run.latents[:, -1], run.x0)
    assert torch.equal(run.stochastic, kernel.stds(levels) > 0)
    assert torch.equal(run.log_prob != 0, run.stochastic.expand(3, T))
    for i in range(T):  # each state is the kernel's sample from the one before it, with that step's noise
        x = run.latents[:, i]
        law = kernel(policy.denoise(x, levels[i], cond), x, levels, i)
        assert torch.equal(law.sample(noise(i + 1)), run.latents[:, i + 1])
    final = rollout(policy, kernel, cond, levels, noise)
    assert final.latents is None
    assert final.log_prob is None
    assert torch.equal(final.x0, run.x0)


@pytest.mark.parametrize(
    ("frame", "kernel"), [("vp", k) for k in KERNELS[1:]] + [("flow", k) for k in FLOWS], ids=lambda v: repr(v)
)
def test_replayed_log_probability_is_the_recorded_one_bitwise(frame, kernel):
    policy = mixture(frame)
    run = rollout(policy, kernel, policy.encode([""] * 4), policy.levels(T), seeded(policy, range(4)), record="path")
    for i in range(T):
        if run.stochastic[i]:
            assert torch.equal(replay(policy, kernel, run, i), run.log_prob[:, i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_replays_are_exact_on_a_network_in_any_precision(tmp_path, dtype, guidance):
    """Recorded states are the stored ones, so the first ratio of policy gradients is exactly 1."""
    policy = StableDiffusion(build_pipeline(tmp_path)).to(dtype)
    cond, kernel = policy.encode(["cat", "red dog"]).with_guidance(guidance), DDIM(1.0)
    noise = SeededNoise([0, 1], policy.shape((16, 16)))
    run = rollout(policy, kernel, cond, policy.levels(3), noise, record="path")
    assert run.latents.dtype == run.x0.dtype == dtype
    assert run.log_prob.dtype == torch.float32
    assert bool(run.log_prob.isfinite().all())
    for i in range(3):
        assert torch.equal(replay(policy, kernel, run, i), run.log_prob[:, i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_with_one_level_a_row_are_exact_too(tmp_path, dtype):
    """Training shuffles steps: the rows of a batch sit at different levels. The network, called alike, gives ratio 1."""
    policy, kernel = StableDiffusion(build_pipeline(tmp_path)).to(dtype), DDIM(1.0)
    noise = SeededNoise([0, 1], policy.shape((16, 16)))
    run = rollout(policy, kernel, policy.encode(["cat", "dog"]), policy.levels(3), noise, record="path")
    for i in range(3):
        x, rows = run.latents[:, i], torch.tensor([i, i])
        with torch.no_grad():
            law = kernel(policy.denoise(x, run.levels[rows], run.cond), x, run.levels, rows)
        assert torch.equal(law.log_prob(run.latents[:, i + 1]), run.log_prob[:, i])


class Shuffle(Steering):
    """Selects rows at random within each group at given steps."""

    def __init__(self, steps) -> None:
        self.steps = steps

    def select(self, ctx):
        if ctx.step not in self.steps:
            return None
        generator = torch.Generator().manual_seed(ctx.step)
        return torch.randint(0, ctx.particles, (ctx.groups, ctx.particles), generator=generator)


@pytest.mark.parametrize("steps", [{0}, {2}, {1, 2, 4}, {T}, {0, 1, 2, 3, 4, T}], ids=str)
def test_a_path_follows_its_lineage_through_selections(steps):
    policy, kernel = mixture(), DDIM(1.0)
    noise = seeded(policy, range(8))
    cond, levels = policy.encode(["", ""]), policy.levels(T)
    run = rollout(policy, kernel, cond, levels, noise, particles=4, steering=Shuffle(steps), record="path")
    assert set(run.selected_at) == steps
    assert run.ancestors.shape == (2, len(steps), 4)
    assert torch.equal(run.latents[:, -1], run.x0)
    for i in range(T):
        if run.stochastic[i]:
            torch.testing.assert_close(replay(policy, kernel, run, i), run.log_prob[:, i], rtol=1e-12, atol=1e-12)
    origin = (run.lineage + torch.tensor([[0], [4]])).flatten()
    assert torch.equal(run.latents[:, 0], noise(0)[origin])
    assert run.unique_ancestors.tolist() == [len(set(row.tolist())) for row in run.lineage]


def test_groups_never_mix():
    policy, noise = mixture(), seeded(mixture(), range(8))
    levels = policy.levels(T)

    def steered(rows, prompts):
        cond = policy.encode([""] * prompts)
        return rollout(policy, DDIM(1.0), cond, levels, noise[rows], particles=4, steering=Shuffle({1, 3})).lineage

    both = steered(slice(0, 8), 2)
    assert int(both.max()) < 4
    assert torch.equal(both[:1], steered(slice(0, 4), 1))


# Graphs


def by_hand(policy, kernel, cond, levels, tensors, inside) -> list[Tensor]:
    """The states, by a loop that detaches wherever a window says no."""
    states = [tensors[0]]
    for i in range(levels.steps):
        x = states[-1] if inside(i) else states[-1].detach()
        clean = policy.denoise(x, levels[i], cond)
        x = kernel(clean, x, levels, i).sample(tensors[i + 1])
        states.append(x if inside(i) else x.detach())
    return states


WINDOWS = [
    ("always", lambda: always, lambda i: True),
    ("last(1)", lambda: last(1), lambda i: i == T - 1),
    ("last(3)", lambda: last(3), lambda i: i >= T - 3),
    ("last(T)", lambda: last(T), lambda i: True),
    ("only(last)", lambda: only(T - 1), lambda i: i == T - 1),
    ("truncated", lambda: random_truncation(torch.Generator().manual_seed(0), 2, 2), lambda i: i >= T - 2),
]


@pytest.mark.parametrize("frame", ["vp", "flow"])
@pytest.mark.parametrize(("name", "window", "inside"), WINDOWS, ids=[w[0] for w in WINDOWS])
def test_gradient_of_a_window_is_that_of_detaching_by_hand(name, window, inside, frame):
    policy = mixture(frame).requires_grad_()
    cond, levels, kernel = policy.encode([""] * 3), policy.levels(T), CPS(0.5)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 2, generator=generator, dtype=F64) for _ in range(T + 1)]
    gradients = []
    for ours in (True, False):
        bank = NoiseBank(tensors, range(T + 1))
        if ours:
            x0 = rollout(policy, kernel, cond, levels, bank, grad=window()).x0
        else:
            x0 = by_hand(policy, kernel, cond, levels, list(bank.tensors), inside)[-1]
        leaves = [policy.network.means, *bank.tensors]
        found = torch.autograd.grad(x0.square().sum(), leaves, allow_unused=True)
        gradients.append([torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)])
    assert float(gradients[1][0].abs().max()) > 1e-3
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("i", range(T))
def test_after_a_window_the_graph_goes_on_around_the_network(i):
    """A window in the middle: later network outputs are constants, later states still depend on earlier ones."""
    policy = GaussianPolicy([[0.5, 0.2], [-1.0, 0.3]], [0.8, 0.3], [0.6, 0.4], prediction="eps").requires_grad_()
    cond, levels, kernel = policy.encode([""] * 3), policy.levels(T), DDIM(1.0)
    noise = seeded(policy, range(3))
    run = rollout(policy, kernel, cond, levels, noise, grad=only(i))
    (ours,) = torch.autograd.grad(run.x0.square().sum(), policy.network.means)
    x = noise(0)
    for j in range(T):
        output = policy.output(x, levels[j], cond)
        clean = to_clean(policy.prediction, output if j == i else output.detach(), x, levels[j])
        x = kernel(clean, x, levels, j).sample(noise(j + 1))
    (theirs,) = torch.autograd.grad(x.square().sum(), policy.network.means)
    assert float(ours.abs().max()) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_recorded_log_probabilities_carry_the_gradient_of_their_step():
    policy = mixture().requires_grad_()
    levels, noise = policy.levels(T), seeded(mixture(), range(3))
    run = rollout(policy, DDIM(1.0), policy.encode([""] * 3), levels, noise, grad=only(1), record="path")
    (ours,) = torch.autograd.grad(run.log_prob.sum(), policy.network.means)
    x = run.latents[:, 1].detach()
    law = DDIM(1.0)(policy.denoise(x, levels[1], run.cond), x, levels, 1)
    (theirs,) = torch.autograd.grad(law.log_prob(law.sample(noise(2))).sum(), policy.network.means)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_graph_outside_the_window():
    policy = mixture().requires_grad_()
    bank = NoiseBank([torch.ones(2, 2, dtype=F64)] * (T + 1), range(T + 1))
    cond, levels = policy.encode([""] * 2), policy.levels(T)
    seen: list[bool] = []
    run = rollout(
        policy, DDIM(1.0), cond, levels, bank, record="path", watch=lambda ctx: seen.append(ctx.clean.x0.requires_grad)
    )
    assert not run.x0.requires_grad
    assert not any(seen)
    assert not run.log_prob.requires_grad
    seen.clear()
    rollout(
        policy, DDIM(1.0), cond, levels, bank, grad=last(2), watch=lambda ctx: seen.append(ctx.clean.x0.requires_grad)
    )
    assert seen == [False, False, False, True, True, True]


def test_memory_of_a_window_does_not_grow_with_the_steps(diffusion):
    noise = SeededNoise([0], diffusion.shape((16, 16)))
    cond = diffusion.encode(["cat"])
    diffusion.network.requires_grad_(True)
    try:
        totals = []
        for steps in (3, 6, 12):
            with saved_bytes() as kept:
                rollout(diffusion, DDIM(1.0), cond, diffusion.levels(steps), noise, grad=last(2))
            totals.append(sum(kept))
        x = noise(0)
        with saved_bytes() as kept:
            diffusion.denoise(x, diffusion.levels(3)[0], cond)
        assert totals[0] == totals[1] == totals[2] > 0
        assert totals[0] < 0.05 * sum(kept)  # two checkpointed steps keep next to nothing of one network call
    finally:
        diffusion.network.requires_grad_(False)


def test_checkpointing_recomputes_the_network_on_the_way_back(diffusion):
    calls: list[bool] = []
    hook = diffusion.network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    diffusion.network.requires_grad_(True)
    try:
        noise = SeededNoise([0], diffusion.shape((16, 16)))
        run = rollout(diffusion, DDIM(1.0), diffusion.encode(["cat"]), diffusion.levels(4), noise, grad=last(2))
        assert calls == [False, False, True, True]
        run.x0.sum().backward()
        assert len(calls) == 6
    finally:
        hook.remove()
        diffusion.network.requires_grad_(False)
        diffusion.zero_grad(set_to_none=True)


def test_random_truncation_is_uniform_and_constant_within_a_run():
    window, steps, runs = random_truncation(torch.Generator().manual_seed(0), 2, 6), 8, 5000
    counts = dict.fromkeys(range(1, 8), 0)
    for _ in range(runs):
        inside = [window(i, steps) for i in range(steps)]
        assert inside == sorted(inside)  # no, …, no, yes, …, yes: one suffix
        counts[sum(inside)] += 1
    assert counts[1] == counts[7] == 0
    expected = runs / 5
    assert sum((counts[k] - expected) ** 2 / expected for k in range(2, 7)) < 23.5  # χ²₄ at 10⁻⁴


def test_random_truncation_reaches_all_steps_by_default_and_draws_once_a_run():
    a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    window = random_truncation(a)
    lengths = {sum(window(i, 4) for i in range(4)) for _ in range(200)}
    assert lengths == {1, 2, 3, 4}
    assert {int(torch.randint(1, 5, (), generator=b)) for _ in range(200)} == lengths
    policy, c = mixture(), torch.Generator().manual_seed(2)
    rollout(policy, ODE(), policy.encode([""]), policy.levels(1), seeded(policy, [0]), grad=random_truncation(c))
    d = torch.Generator().manual_seed(2)
    torch.randint(1, 2, (), generator=d)
    assert torch.equal(c.get_state(), d.get_state())


# Refusals, before the network runs


@pytest.mark.parametrize(
    ("rows", "conds", "prompts", "particles", "message"),
    [
        (4, 3, 0, 1, r"cond needs one row a prompt \(4\) or one a sample \(4\); got 3"),
        (4, 4, 3, 1, r"prompts needs one entry a prompt \(4\) or a sample \(4\); got 3"),
        (4, 1, 0, 2, r"cond needs one row a prompt \(2\) or one a sample \(4\); got 1"),
        (4, 2, 3, 2, r"prompts needs one entry a prompt \(2\) or a sample \(4\); got 3"),
        (5, 5, 0, 2, "5 rows, which 2 particles a prompt do not divide"),
        (4, 4, 0, 0, "particles must be ≥ 1; got 0"),
    ],
)
def test_rows_that_do_not_fit_together(rows, conds, prompts, particles, message):
    policy = mixture()
    calls: list[int] = []
    policy.network.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        rollout(
            policy,
            DDIM(1.0),
            policy.encode([""] * conds),
            policy.levels(T),
            seeded(policy, range(rows)),
            particles=particles,
            prompts=["x"] * prompts,
        )
    assert not calls


def test_a_mask_of_another_length_is_refused():
    policy = mixture()
    with pytest.raises(ValueError, match="got 3 for 5 steps"):
        rollout(policy, DDIM(noisy_steps=[True] * 3), policy.encode([""]), policy.levels(T), seeded(policy, [0]))


# Stopping, watching, counting


@pytest.mark.parametrize("at", [0, 2, T - 1, T])
def test_a_stopped_run_hands_over_its_clean_estimates(at):
    policy, noise = mixture(), seeded(mixture(), range(4))
    cond, levels = policy.encode([""] * 2), policy.levels(T)

    def stop(ctx):
        if ctx.step == at:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=f"stopped at step {at} of {T}: interrupted") as caught:
        rollout(policy, DDIM(1.0), cond, levels, noise, particles=2, watch=stop)
    run = caught.value.trajectory
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)
    assert run.stopped_at == at
    assert run.log_w.shape == (2, 2)
    assert run.ledger.counts["network"] == 4 * min(at + 1, T)
    full = rollout(policy, DDIM(1.0), cond, levels, noise, particles=2, record="path")
    assert full.stopped_at is None
    expected = full.x0 if at == T else policy.denoise(full.latents[:, at], levels[at], full.cond).x0
    assert torch.equal(run.x0, expected)
    assert not run.x0.requires_grad


@pytest.mark.parametrize("call", [0, 1, T - 1])
def test_a_run_stopped_inside_the_network_hands_over_the_last_estimates_it_had(call):
    policy, calls = mixture(), []
    noise, cond, levels = seeded(policy, [0, 1]), policy.encode([""] * 2), policy.levels(T)
    full = rollout(policy, DDIM(1.0), cond, levels, noise, record="path").latents

    def stop(*_):
        calls.append(1)
        if len(calls) == call + 1:
            raise KeyboardInterrupt

    hook = policy.network.register_forward_hook(stop)
    with pytest.raises(Interrupted) as caught:
        rollout(policy, DDIM(1.0), cond, levels, noise)
    hook.remove()
    run, known = caught.value.trajectory, max(call - 1, 0)
    assert run.stopped_at == known
    expected = (
        policy.denoise(full[:, known], levels[known], cond).x0 if call else noise(0)
    )  # before any estimate, the state
    assert torch.equal(run.x0, expected)


def test_watch_sees_every_step_and_the_end():
    policy, noise = mixture(), seeded(mixture(), range(2))
    seen: list[tuple[int, Clean]] = []
    run = rollout(
        policy,
        DDIM(1.0),
        policy.encode([""] * 2),
        policy.levels(T),
        noise,
        watch=lambda ctx: seen.append((ctx.step, ctx.clean)),
    )
    assert [step for step, _ in seen] == [*range(T), T]
    assert torch.equal(seen[-1][1].x0, run.x0)


@pytest.mark.parametrize(("guidance", "branches"), [(1.0, 1), (5.0, 2)])
def test_the_ledger_counts_samples_through_the_network(diffusion, guidance, branches):
    noise = SeededNoise(range(4), diffusion.shape((16, 16)))
    cond = diffusion.encode(["cat", "dog"]).with_guidance(guidance)
    rows: list[int] = []
    hook = diffusion.network.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    run = rollout(diffusion, DDIM(1.0), cond, diffusion.levels(3), noise, particles=2)
    hook.remove()
    assert run.ledger.counts == {"network": 3 * 4 * branches, "decode": 0, "reward": 0, "gradient": 0}
    assert sum(rows) == run.ledger.counts["network"]
    assert run.ledger.seconds["network"] > 0


def test_the_ledger_counts_decodes_and_rewards():
    policy = mixture()
    noise = seeded(policy, range(6))
    run = rollout(
        policy, DDIM(1.0), policy.encode([""] * 2), policy.levels(T), noise, particles=3, steering=BestOfN(Linear(1.0))
    )
    assert run.ledger.counts == {"network": 6 * T, "decode": 6, "reward": 6, "gradient": 0}


def test_an_unsteered_run_has_flat_weights_and_no_evidence():
    policy, noise = mixture(), seeded(mixture(), range(6))
    run = rollout(policy, DDIM(1.0), policy.encode([""] * 2), policy.levels(T), noise, particles=3, steering=FREE)
    assert torch.equal(run.weights, torch.full((2, 3), 1 / 3, dtype=F64))
    assert bool(run.log_z.isnan().all())
    assert run.lineage.tolist() == [[0, 1, 2]] * 2
    assert run.unique_ancestors.tolist() == [3, 3]
    assert run.rewards is None
    draws = torch.stack([run.draw(torch.Generator().manual_seed(s)) for s in range(60)])
    assert {0, 1, 2} == set(draws[:, 0].tolist()) == set(draws[:, 1].tolist())


def test_a_run_without_a_graph_is_the_run_with_one():
    policy, noise = mixture(), seeded(mixture(), range(3))
    cond, levels = policy.encode([""] * 3), policy.levels(T)
    policy.network.requires_grad_()
    runs = [rollout(policy, DDIM(1.0), cond, levels, noise, grad=grad).x0 for grad in (never, always, last(2), only(0))]
    for run in runs[1:]:
        assert torch.equal(run, runs[0])
