"""Laws of windows: where they are, what is stochastic and trained, and the methods they stand for."""

from __future__ import annotations

import pytest
import torch

from align.batches import Steps
from align.objectives import AdjointMatching, PolicyGradient
from align.sampling import Sampling
from align.sources import Rollouts, Run
from align.trainer import Trainer
from align.windows import Window
from align.world import World
from samplers import DDIM, ODE, FlowSDE, Ledger
from samplers.families.gaussian import GaussianPolicy
from tests.align.runs import Near, config_of

STEPS = 6
PROMPTS = ["a", "b"]


def flow() -> GaussianPolicy:
    return GaussianPolicy([[0.4, -0.3], [-0.5, 0.6]], [0.6, 0.8], [0.5, 0.5], frame="flow", prediction="flow")


def run_of(kernel=None, seed: int = 3) -> Run:
    policy = flow()
    return Run(policy, Sampling.of(policy, kernel or FlowSDE(0.7), STEPS), World(cpu=True), seed, 8, Ledger())


def noisy(window: Window, iteration: int, kernel=None, seed: int = 0) -> list[int]:
    levels = flow().levels(STEPS)
    return [i for i, n in enumerate(window.on(kernel or FlowSDE(), levels, iteration, seed).noisy_steps or ()) if n]


def test_a_progressive_window_moves_from_noise_to_data_and_stays_there():
    window = Window(2, every=3, stride=2)
    assert [noisy(window, i) for i in (0, 2, 3, 6, 8, 9, 99)] == [
        [0, 1],
        [0, 1],
        [2, 3],
        [4, 5],
        [4, 5],
        [4, 5],
        [4, 5],
    ]


def test_a_random_window_is_anywhere_it_may_be_and_a_function_of_the_seed():
    window = Window(2, every=2, order="random", first=1, last=4)
    drawn = [tuple(noisy(window, i)) for i in range(60)]
    assert set(drawn) == {(1, 2), (2, 3), (3, 4)}
    assert drawn[::2] == drawn[1::2]
    assert drawn == [tuple(noisy(window, i)) for i in range(60)]
    assert drawn != [tuple(noisy(window, i, seed=1)) for i in range(60)]


def test_steps_the_kernel_keeps_quiet_stay_quiet():
    kernel = FlowSDE(0.7, [True] * (STEPS - 1) + [False])
    assert noisy(Window(2, every=1), 99, kernel) == [4]
    assert kernel.noisy_steps == (True,) * (STEPS - 1) + (False,), "the run's own kernel is as it was"


def test_only_steps_in_the_window_are_noisy_and_trained():
    """Samples of a group are one until the window begins, and follow the ODE once it is over."""
    window, run = Window(2, every=1), run_of()
    source = Rollouts(PROMPTS, group=4, shared_start=True, window=window).bind(Near())
    source.check(run)
    batch = source.collect(run, 2)
    paths = batch.rows.latents.reshape(2, 4, STEPS + 1, 2)
    apart = (paths - paths[:, :1]).abs().amax((0, 1, 3)) > 0
    assert apart.tolist() == [False] * 3 + [True] * 4
    trained = source.choose(batch.having(item=torch.arange(8)), 0).rows
    assert isinstance(trained, Steps)
    assert sorted(set(trained.step.tolist())) == [2, 3]
    clean = run.policy.denoise(batch.rows.latents[:, 4], batch.rows.levels[4], batch.rows.cond)
    law = ODE()(clean, batch.rows.latents[:, 4], batch.rows.levels, 4)
    torch.testing.assert_close(law.mean, batch.rows.latents[:, 5], rtol=1e-12, atol=1e-12)


def test_a_window_over_all_steps_is_no_window():
    one, other = (Rollouts(PROMPTS, group=4, window=w).bind(Near()).collect(run_of(), 1) for w in (None, Window(STEPS)))
    assert torch.equal(one.rows.latents, other.rows.latents)
    assert torch.equal(one.columns["old"], other.columns["old"])


def test_replayed_ratios_begin_at_one():
    run = run_of()
    source = Rollouts(PROMPTS, group=4, window=Window(2, every=1, order="random")).bind(Near())
    batch = source.choose(source.collect(run, 0).having(item=torch.arange(8)), 0)
    run.policy.network.means.requires_grad_(True)
    _, metrics = PolicyGradient().loss(run.policy, batch)
    assert float(metrics["ratio_max_deviation"]) == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 0}, "width must be ≥ 1"),
        ({"every": 0}, "every must be ≥ 1"),
        ({"stride": 0}, "stride must be ≥ 1"),
        ({"first": -1}, "first must be ≥ 0"),
        ({"order": "decay"}, "order must be progressive or random"),
        ({"width": 3, "first": 2, "last": 3}, "a window of 3 does not fit between steps 2 and 3"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        Window(**given)


@pytest.mark.parametrize(
    ("window", "kernel", "message"),
    [
        (Window(7), None, "does not fit into 6 steps"),
        (Window(2, last=6), None, "does not fit into 6 steps"),
        (Window(1, order="random"), FlowSDE(0.7, [True] * 5 + [False]), "leaves no stochastic step to train on"),
        (Window(2), ODE(), "leaves no stochastic step to train on"),
    ],
)
def test_windows_that_do_not_fit_are_refused_before_any_network_runs(window, kernel, message):
    with pytest.raises(ValueError, match=message):
        Rollouts(PROMPTS, window=window).bind(Near()).check(run_of(kernel))


def test_a_window_leaves_adjoint_matching_without_its_process(tmp_path):
    source = Rollouts(PROMPTS, group=2, window=Window(2), advantage="none")
    with pytest.raises(ValueError, match="stochastic at every step"):
        Trainer(
            flow(), AdjointMatching().bind(Near()), source.bind(Near()), config_of(tmp_path / "run", kernel=DDIM(1.0))
        )
