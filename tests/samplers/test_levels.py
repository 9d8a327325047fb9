"""Laws of the noise levels: every prediction determines the same (x0, eps), in every frame, one level or one a row."""

from __future__ import annotations

import math

import pytest
import torch

from samplers import Levels, diffuse, to_clean

ANGLE = torch.tensor([0.5, 0.49, 0.3, 0.11, 0.01], dtype=torch.float64) * math.pi
TIME = torch.tensor([1.0, 0.97, 0.5, 0.2, 0.02], dtype=torch.float64)
FRAMES = {"vp": Levels(ANGLE, ANGLE.cos(), ANGLE.sin()), "flow": Levels(TIME, 1 - TIME, TIME)}
FRAMES["vp"].alpha[0] = 0.0  # cos(π/2) in floating point is not quite zero
OUTPUTS = {
    "eps": lambda x0, eps, alpha, sigma: eps,
    "x0": lambda x0, eps, alpha, sigma: x0,
    "v": lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,  # dx/dangle on the circle
    "flow": lambda x0, eps, alpha, sigma: eps - x0,  # dx/dt on the straight line
}
PAIRS = [("vp", "eps"), ("vp", "v"), ("vp", "x0"), ("flow", "eps"), ("flow", "flow"), ("flow", "x0")]
CLOSE = {"rtol": 0, "atol": 1e-12}


def draw(rows: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def usable(frame: str, kind: str) -> list[int]:
    """Steps at which the kind says something about x0: an eps needs signal."""
    return list(range(1 if kind == "eps" else 0, len(FRAMES[frame].t)))


@pytest.mark.parametrize(("frame", "kind"), PAIRS)
def test_exact_output_gives_back_what_was_diffused(frame, kind):
    x0, eps = draw(4)
    for i in usable(frame, kind):
        at = FRAMES[frame][i]
        clean = to_clean(kind, OUTPUTS[kind](x0, eps, at.alpha, at.sigma), diffuse(x0, eps, at), at)
        torch.testing.assert_close(clean.x0, x0, **CLOSE)
        torch.testing.assert_close(clean.eps, eps, **CLOSE)


@pytest.mark.parametrize(("frame", "kind"), PAIRS)
def test_one_level_a_row_equals_each_level_alone(frame, kind):
    steps = torch.tensor(usable(frame, kind)).flip(0)
    at = FRAMES[frame][steps]
    x0, eps = draw(len(steps))
    alpha, sigma = at.alpha[:, None, None], at.sigma[:, None, None]
    x, output = diffuse(x0, eps, at), OUTPUTS[kind](x0, eps, alpha, sigma)
    clean = to_clean(kind, output, x, at)
    torch.testing.assert_close(clean.x0, x0, **CLOSE)
    torch.testing.assert_close(clean.eps, eps, **CLOSE)
    for row, step in enumerate(steps.tolist()):
        one = slice(row, row + 1)
        alone = to_clean(kind, output[one], x[one], FRAMES[frame][step])
        assert torch.equal(alone.x0, clean.x0[one])
        assert torch.equal(alone.eps, clean.eps[one])


@pytest.mark.parametrize(("frame", "kind"), PAIRS)
def test_any_output_is_split_into_parts_that_make_up_the_state(frame, kind):
    output, x = draw(3, seed=1)
    for i in usable(frame, kind):
        at = FRAMES[frame][i]
        torch.testing.assert_close(diffuse(*to_clean(kind, output, x, at), at), x, rtol=1e-12, atol=1e-12)


def test_consistency_is_the_boundary_formula_of_latent_consistency_models():
    output, x = draw(5, seed=2)
    t = torch.tensor([0.03, 0.2, 1.0, 259.0, 999.0], dtype=torch.float64)
    angle = torch.linspace(0.05, 1.5, 5, dtype=torch.float64)
    clean = to_clean("consistency", output, x, Levels(t, angle.cos(), angle.sin()))
    for row in range(5):
        s, alpha, sigma = float(t[row]) / 0.1, math.cos(angle[row]), math.sin(angle[row])  # 2310.04378, section 4
        skip, out = 0.5**2 / (s**2 + 0.5**2), s / math.sqrt(s**2 + 0.5**2)
        expected = skip * x[row] + out * (x[row] - sigma * output[row]) / alpha
        torch.testing.assert_close(clean.x0[row], expected, **CLOSE)
        torch.testing.assert_close(alpha * clean.x0[row] + sigma * clean.eps[row], x[row], **CLOSE)


def test_consistency_is_the_identity_at_time_zero():
    output, x = draw(2, seed=3)
    errors = []
    for t in (1e-2, 1e-4, 1e-6):
        at = Levels(*(torch.tensor(v, dtype=torch.float64) for v in (t, math.sqrt(1 - t**2), t)))
        errors.append(float((to_clean("consistency", output, x, at).x0 - x).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("kind", ["eps", "consistency"])
def test_no_signal_no_answer_from_noise_predictions(kind):
    output, x = draw(5)
    with pytest.raises(ValueError, match="without signal"):
        to_clean(kind, output, x, FRAMES["vp"][0])
    with pytest.raises(ValueError, match="without signal"):
        to_clean(kind, output, x, FRAMES["vp"][torch.tensor([3, 2, 0, 1, 4])])


@pytest.mark.parametrize(("frame", "kind"), [("vp", "flow"), ("flow", "v")])
def test_a_velocity_of_another_frame_is_refused_not_misread(frame, kind):
    output, x = draw(5)
    with pytest.raises(ValueError, match=f"{kind} prediction belongs to"):
        to_clean(kind, output, x, FRAMES[frame][2])


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match="eps, v, flow, x0, consistency, logits; got 'epsilon'"):
        to_clean("epsilon", *draw(1), FRAMES["vp"][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("frame", "kind"), [*PAIRS, ("vp", "consistency")])
@pytest.mark.parametrize("rows", [False, True])
def test_half_precision_is_converted_in_float32(frame, kind, dtype, rows):
    output, x = draw(4, dtype)
    at = FRAMES[frame][torch.tensor([1, 2, 3, 4])] if rows else FRAMES[frame][2]
    half, full = to_clean(kind, output, x, at), to_clean(kind, output.float(), x.float(), at)
    for ours, theirs in zip(half, full, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_logits_become_log_probabilities():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).half()
    logits[0, 0, 1] = -torch.inf
    clean = to_clean("logits", logits, torch.zeros(2, 3, dtype=torch.long), FRAMES["flow"][1])
    assert clean.eps is None
    assert clean.x0.dtype == torch.float32
    assert clean.x0[0, 0, 1] == -torch.inf
    torch.testing.assert_close(clean.x0.exp().sum(-1), torch.ones(2, 3))


def test_table_is_float64_on_the_cpu_and_outside_every_graph():
    t = torch.linspace(1, 0, 4, dtype=torch.float32, requires_grad=True)
    levels = Levels(t, 1 - t, t)
    for part in (levels, levels[1], levels[torch.tensor([0, 2])], levels[1:]):
        for value in (part.t, part.alpha, part.sigma):
            assert value.dtype == torch.float64
            assert value.device.type == "cpu"
            assert not value.requires_grad
    assert levels.steps == 3


def test_indexing_by_number_rows_and_slice():
    levels = FRAMES["flow"]
    for i in (0, 2, -1):
        assert levels[i].sigma.shape == ()
        assert levels[i].sigma == TIME[i]
        assert levels[i].alpha == 1 - TIME[i]
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(levels[rows].t, TIME[rows])
    assert torch.equal(levels[1:4].alpha, 1 - TIME[1:4])
    assert levels[1:4].steps == 2
    with pytest.raises(IndexError):
        levels[len(TIME)]


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"one shape; got \(3,\), \(3,\), \(2,\)"):
        Levels(torch.zeros(3), torch.zeros(3), torch.zeros(2))
