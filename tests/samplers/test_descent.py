"""Descent on many problems at once is descent on each: torch's own optimisers, row by row, and exact undoing."""

import pytest
import torch

from samplers.descent import LBFGS, Adam, Momentum

SCALES = torch.tensor([1.0, 3.0, 0.1], dtype=torch.float64)


def valley(z):
    """Rosenbrock's function of each row, scaled; its minimum 0 is at (1, 1)."""
    x, y = z.unbind(-1)
    return SCALES[: len(z)] * ((1 - x).square() + 10 * (y - x.square()).square())


def starts(rows=3):
    return torch.tensor([[-1.0, 1.5], [0.0, 0.5], [2.0, -1.0]], dtype=torch.float64)[:rows]


def descend(method, rounds, z, function=valley, broken=()):
    """The points visited; `broken` are (round, row) where the loss is made not finite."""
    path, no = [z], torch.zeros(len(z), dtype=torch.bool)
    for j in range(rounds):
        leaf = z.detach().requires_grad_()
        loss = function(leaf)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        diverged = no.clone()
        for at, row in broken:
            if at == j:
                diverged[row], gradient[row] = True, torch.nan
        z = method.step(z, loss.detach(), gradient, diverged, no)
        path.append(z)
    return torch.stack(path)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda: Momentum(0.003, 0.9), lambda z: torch.optim.SGD([z], 0.003, momentum=0.9)),
        (lambda: Momentum(0.003, 0.9, True), lambda z: torch.optim.SGD([z], 0.003, momentum=0.9, nesterov=True)),
        (lambda: Adam(0.01), lambda z: torch.optim.AdamW([z], 0.01, weight_decay=0.0)),
    ],
    ids=["momentum", "nesterov", "adam"],
)
def test_first_order_methods_are_those_of_torch(ours, torchs):
    path = descend(ours(), 30, starts())
    z = starts().requires_grad_()
    optimiser = torchs(z)
    for j in range(30):
        torch.testing.assert_close(path[j], z.detach(), rtol=1e-12, atol=1e-12)
        optimiser.zero_grad()
        valley(z).sum().backward()
        optimiser.step()


METHODS = [lambda: Momentum(0.003, 0.9, True), lambda: Adam(0.05), lambda: LBFGS()]


@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_mix(method):
    together = descend(method(), 25, starts())
    for row in range(3):
        alone = descend(method(), 25, starts()[row : row + 1], lambda z, row=row: valley(z) * SCALES[row] / SCALES[0])
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=1e-9, atol=1e-12)


def test_lbfgs_finds_the_bottom_of_a_valley_in_few_evaluations():
    path = descend(LBFGS(), 60, starts())
    assert valley(path[-1]).max() < 1e-12
    theirs = starts(1).requires_grad_()
    optimiser, calls = torch.optim.LBFGS([theirs], max_iter=60, history_size=10, line_search_fn="strong_wolfe"), [0]

    def closure():
        calls[0] += 1
        optimiser.zero_grad()
        loss = valley(theirs).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    reached = [j for j, z in enumerate(path[:, :1]) if valley(z) < 1e-9]
    assert reached[0] <= 1.5 * calls[0]


def test_lbfgs_solves_a_quadratic_of_n_dimensions_in_about_n_steps():
    curvature = torch.linspace(1, 100, 6, dtype=torch.float64)
    path = descend(
        LBFGS(history=10), 25, torch.ones(1, 6, dtype=torch.float64), lambda z: (curvature * z * z).sum(1) / 2
    )
    assert path[-1].abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS[:2])
def test_a_step_that_diverged_is_undone_and_taken_half_as_far(method):
    path = descend(method(), 8, starts(), broken=[(5, 1)])
    whole = descend(method(), 8, starts())
    torch.testing.assert_close(path[:, [0, 2]], whole[:, [0, 2]])
    torch.testing.assert_close(path[:6], whole[:6])
    torch.testing.assert_close(path[6, 1], (path[4, 1] + path[5, 1]) / 2)
    assert not torch.equal(path[8, 1], whole[8, 1])
    assert path.isfinite().all()


def test_a_line_search_backs_off_where_the_function_ends():
    def wall(z):
        return torch.where(z[:, 0] < 1, -z[:, 0], torch.inf)

    z, method, no = torch.zeros(1, 1, dtype=torch.float64), LBFGS(), torch.zeros(1, dtype=torch.bool)
    for _ in range(40):
        loss = wall(z)
        z = method.step(z, loss, -torch.ones_like(z), ~loss.isfinite(), no)
    assert 0.99 < method.at["z"].item() < 1


@pytest.mark.parametrize("method", METHODS)
def test_an_idle_row_stays_and_then_goes_on_as_if_nothing_had_been(method):
    path = descend(method(), 12, starts())
    idle, z, one = torch.tensor([False, True, False]), starts(), method()
    visited = []
    for j in range(13):
        visited.append(z)
        leaf = z.detach().requires_grad_()
        loss = valley(leaf)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        now = idle if j == 6 else torch.zeros_like(idle)
        gradient[now] = torch.nan
        z = one.step(z, loss.detach().where(~now, torch.nan), gradient, torch.zeros_like(idle), now)
    rows = torch.stack(visited)
    torch.testing.assert_close(rows[7, 1], rows[6, 1], rtol=0, atol=0)
    torch.testing.assert_close(rows[7:, 1], path[6:12, 1])
    torch.testing.assert_close(rows[:12, [0, 2]], path[:12, [0, 2]])


@pytest.mark.parametrize("method", METHODS)
def test_a_row_that_never_was_finite_stays(method):
    broken = [(j, 1) for j in range(6)]
    path = descend(method(), 6, starts(), broken=broken)
    assert torch.equal(path[:, 1], starts()[1].expand(7, 2))
