"""The battery that every reward exported from `rewards` must pass; a new class fails until it has a `Case` here.

Laws: one finite float32 score a sample; a row's score depends on that row alone (order, neighbours, micro-batches); the
same with and without a graph; frozen and in eval mode; the prompt matters if and only if the class says so; a gradient
exists if and only if the class says so, and is the slope of the score.
"""

from __future__ import annotations

import inspect

import pytest
import torch

import rewards
from rewards import Batched, Reward, facts
from tests.rewards.cases import Case, collect

CASES = collect()


def exported() -> list[str]:
    found = [getattr(rewards, name) for name in rewards.__all__]
    return sorted(
        c.__name__ for c in found if inspect.isclass(c) and issubclass(c, Reward) and not inspect.isabstract(c)
    )


@pytest.fixture(params=exported())
def case(request: pytest.FixtureRequest) -> Case:
    if request.param not in CASES:
        pytest.fail(f"rewards.{request.param} has no Case in tests/rewards/cases: add one")
    return CASES[request.param]


@pytest.fixture
def reward(case: Case, request: pytest.FixtureRequest) -> Reward:
    return case.build(request)


def test_no_case_is_stale() -> None:
    assert set(CASES) <= set(exported())


def test_scores_are_finite_float32_and_of_the_right_shape(case: Case, reward: Reward) -> None:
    scores = reward.score(case.show(), case.prompts)
    for values in (scores.total, *scores.parts.values()):
        assert values.shape == (4,)
        assert values.dtype == torch.float32
    assert scores.total.isfinite().all()  # a part may be NaN: a clause that the prompt does not have
    assert scores.total.std() > 0


def test_a_row_does_not_depend_on_order_or_neighbours(case: Case, reward: Reward) -> None:
    media, prompts = case.show(), case.prompts
    scores = reward(media, prompts)
    order = [2, 0, 3, 1]
    shuffled = reward(media[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, scores[order], rtol=0, atol=case.tolerance)
    for size in (1, 3):
        torch.testing.assert_close(Batched(reward, size)(media, prompts), scores, rtol=0, atol=case.tolerance)


def test_a_graph_changes_no_score(case: Case, reward: Reward) -> None:
    media = case.show()
    plain = reward(media, case.prompts)
    assert not plain.requires_grad
    if reward.differentiable:
        traced = reward(media.requires_grad_(), case.prompts)
        assert traced.requires_grad
        torch.testing.assert_close(traced.detach(), plain, rtol=0, atol=case.tolerance)


def test_the_prompt_matters_if_and_only_if_needed(case: Case, reward: Reward) -> None:
    media, prompts = case.show(), list(case.prompts)
    scores = reward(media, prompts)
    rolled = reward(media, prompts[1:] + prompts[:1])
    if reward.needs_prompt:
        assert (rolled - scores).abs().max() > 10 * case.tolerance
        with pytest.raises(ValueError, match="one prompt a sample"):
            reward(media)
    else:
        assert torch.equal(rolled, scores)
        assert torch.equal(reward(media), scores)


def test_weights_are_frozen_and_eval_mode_stays(case: Case, reward: Reward) -> None:
    torch.nn.ModuleList([reward]).train()
    assert not any(m.training for m in reward.modules())
    assert not any(p.requires_grad for p in reward.parameters())


def test_gradient_is_the_slope_or_a_named_error(case: Case, reward: Reward) -> None:
    media = case.show().requires_grad_()
    if not reward.differentiable:
        with pytest.raises(RuntimeError, match=r"is not differentiable"):
            reward(media, case.prompts)
        return
    (gradient,) = torch.autograd.grad(reward(media, case.prompts).sum(), media)
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()
    # Scores are float32, so the step is as large as curvature allows and runs along the gradient, where it shows most.
    reward, media, gradient = reward.double(), media.detach().double(), gradient.double()
    direction = gradient / gradient.abs().max()
    expected = (gradient * direction).sum()
    slopes = []
    for step in (1e-2, 3e-3, 1e-3, 1e-4):
        up, down = (reward(media + s * direction, case.prompts).double().sum() for s in (step, -step))
        slopes.append((up - down) / (2 * step))
    assert min(abs(slope / expected - 1) for slope in slopes) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type_is_read(case: Case, reward: Reward, dtype: torch.dtype) -> None:
    media = case.show()
    scores = reward(media.to(dtype), case.prompts)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_first_docstring_line_is_a_title(case: Case, reward: Reward) -> None:
    title, _, rest = (inspect.getdoc(type(reward)) or "").partition("\n")
    assert title.endswith(".")
    assert len(title) < 100
    assert rest.startswith("\n")


def test_a_docstring_holds_what_a_user_asks_first(case: Case, reward: Reward) -> None:
    found = facts(type(reward))
    assert all(found.values())
    assert reward.differentiable or found["Gradient"] != "yes"
