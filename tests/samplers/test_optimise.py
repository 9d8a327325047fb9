"""Noise optimisation: closed-form optima, the published loops step by step, exact gradients, and what may go wrong."""

import math

import pytest
import torch

import align
from align.prompts import read_prompts
from rewards import CrossEncoder, Reward, Shapes
from samplers import DDIM, DNO, DOODL, ODE, Consistency, DFlow, Problem, ReNO, SeededNoise, Trajectory, run
from samplers.families.gaussian import GaussianPolicy
from samplers.families.sd import StableDiffusion
from tests.conftest import Faint, Linear, Quadratic, build_pipeline, saved_bytes
from tests.oracles import cosine_levels, ddim_coefficients, gaussian_chain, gaussian_continuation

STEPS, WIDTH = 4, 6
METHODS = [ReNO, DNO, DFlow, DOODL]


def gaussian(few_step=True, width=WIDTH):
    policy = GaussianPolicy(torch.full((width,), 0.5), [0.8])
    policy.few_step, policy.checkpointing = few_step, "none"
    return policy


def problem(kernel=None, policy=None, seeds=(0, 1, 2, 3), particles=2, steps=STEPS, **options):
    policy = policy or gaussian()
    prompts = options.pop("prompts", ["a cat", "a dog", "a cow"][: len(seeds) // particles])
    noise = SeededNoise(seeds, policy.shape(policy.size), dtype=torch.promote_types(policy.dtype, torch.float32))
    how = {"particles": particles, "prompts": prompts, **options}
    return Problem(policy, kernel or DDIM(1.0), policy.encode(prompts), policy.levels(steps, policy.size), noise, **how)


def visited(method, task) -> tuple[Trajectory, torch.Tensor]:
    """The result, and the first noise of every iterate, (rounds, B, …)."""
    points = []
    task.watch = lambda ctx: points.append(ctx.x.detach().clone()) if ctx.step == 0 else None
    found = run(task, method)
    return found, torch.cat(points).reshape(-1, task.rows, *points[0].shape[1:])


def best(found: Trajectory) -> torch.Tensor:
    """(P, K) rewards of the result."""
    assert found.rewards is not None
    return found.rewards


def recorded(cls):
    """A method that keeps the gradients it was given."""

    class Recorded(cls):
        def bounded(self, gradient):
            self.__dict__.setdefault("gradients", []).append(gradient)
            return super().bounded(gradient)

    return Recorded


# Where they end


def generator(steps=STEPS):
    """(slope, offset) of the linear generator x0 = slope·z + offset that an ODE makes of Gaussian data."""
    alpha, sigma = cosine_levels(steps)
    slope, offset, _ = gaussian_continuation(
        gaussian_chain(alpha, sigma, 0.5, 0.8, ddim_coefficients(alpha, sigma, 0.0))
    )
    return float(slope[0]), float(offset[0])


@pytest.mark.parametrize(
    "method",
    [ReNO(Quadratic(0.5, 3.0), 100, 0.3, clip=1e6, weight=0.2), DFlow(Quadratic(0.5, 3.0), weight=0.2)],
    ids=["ReNO", "DFlow"],
)
def test_a_linear_generator_has_the_optimum_of_the_stationarity_equation(method):
    """x = a·z + c, r = −|x − b|²/2: a(a·z + c − b) + w(1 − (d − 1)/|z|²)·z = 0, so z = ρ along (b − c)·1, where
    (a² + w)ρ² − a(b − c)·sqrt(d)·ρ − w(d − 1) = 0."""
    a, c = generator()
    lead, half, last = a**2 + 0.2, a * (3.0 - c) * math.sqrt(WIDTH) / 2, 0.2 * (WIDTH - 1)
    rho = (half + math.sqrt(half**2 + lead * last)) / lead
    _, z = visited(method, problem(ODE()))
    torch.testing.assert_close(z[-1], torch.full_like(z[-1], rho / math.sqrt(WIDTH)), rtol=3e-4, atol=1e-4)


@pytest.mark.parametrize("method", [ReNO(Linear(0.0), 120, 0.05, clip=1e6, weight=1.0), DFlow(Linear(0.0), weight=1.0)])
def test_the_regulariser_alone_leads_to_the_likeliest_radius_without_turning(method):
    _, z = visited(method, problem(ODE()))
    torch.testing.assert_close(
        z[-1].norm(dim=1), torch.full((4,), math.sqrt(WIDTH - 1), dtype=z.dtype), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(z[-1] / z[-1].norm(dim=1, keepdim=True), z[0] / z[0].norm(dim=1, keepdim=True))


def test_doodl_climbs_to_the_top_of_its_sphere():
    """On |z| = |z₀| a linear reward is highest along 1."""
    _, z = visited(DOODL(Linear(), 100, clip=0.03, jitter=0.0), problem(ODE(), steps=2))
    radius = z[0].norm(dim=1, keepdim=True)
    torch.testing.assert_close(z.norm(dim=2), radius[:, 0].expand(100, 4))
    torch.testing.assert_close(z[-1], (radius / math.sqrt(WIDTH)).expand_as(z[-1]), rtol=1e-4, atol=1e-4)


def test_dno_climbs_in_all_noises_that_matter():
    """Of a linear reward the gradient at every noise is the sampler's slope; the last step of DDIM has no noise."""
    alpha, sigma = cosine_levels(STEPS)
    chain = gaussian_chain(alpha, sigma, 0.5, 0.8, ddim_coefficients(alpha, sigma, 1.0))
    slope, _, _ = gaussian_continuation(chain)
    method = recorded(DNO)(Linear(), 2)
    run(problem(), method)
    expected = torch.cat([slope[:1], slope[1:-1] * chain.noise[:-1].sqrt()])  # the initial noise, then steps 1 … T − 1
    assert method.moving(problem()) == [0, 1, 2, 3]
    for v, value in enumerate(expected):
        torch.testing.assert_close(-method.gradients[0][:, v], value.expand(4, WIDTH), rtol=1e-6, atol=1e-9)


# The published loops


def alone(task, row, reward, z):
    """The loss that reference loops differentiate: one row, by itself."""
    noise = [n[row : row + 1] for n in task.bank()]
    noise[: len(z)] = z
    made = task.sample(noise, torch.tensor([row]), grad=lambda i, steps: True)
    return -reward(made.x0).sum()


def test_reno_is_the_authors_loop_for_every_row():
    """SGD with Nesterov momentum on one latent, gradient clipped with its regulariser, by torch.optim."""
    reward, task = Quadratic(0.3, 2.0), problem()
    _, z = visited(ReNO(reward, 8), task)
    for row in range(4):
        latent = task.bank()[0][row : row + 1].clone().requires_grad_()
        optimiser = torch.optim.SGD([latent], lr=5.0, momentum=0.9, nesterov=True)
        for j in range(8):
            torch.testing.assert_close(z[j, row], latent.detach()[0], rtol=1e-6, atol=1e-8)
            optimiser.zero_grad()
            norm = latent.norm()
            loss = alone(task, row, reward, [latent]) + 0.01 * (0.5 * norm**2 - (WIDTH - 1) * norm.log())
            loss.backward()
            torch.nn.utils.clip_grad_norm_([latent], 0.1)
            optimiser.step()


def test_dno_is_the_authors_loop_for_every_row():
    """AdamW on the stack of all noises, its gradient clipped as a whole, by torch.optim, with the weight decay they meant."""
    reward, task = Quadratic(0.3, 2.0), problem()
    _, z = visited(DNO(reward, 8, rate=0.05), task)
    for row in range(4):
        stack = torch.stack([n[row] for n in task.bank()[:4]]).requires_grad_()
        optimiser = torch.optim.AdamW([stack], lr=0.05, weight_decay=0.0)
        for j in range(8):
            torch.testing.assert_close(z[j, row], stack.detach()[0], rtol=1e-6, atol=1e-8)
            optimiser.zero_grad()
            alone(task, row, reward, list(stack.unsqueeze(1))).backward()
            torch.nn.utils.clip_grad_norm_([stack], 1.0)
            optimiser.step()


def test_doodl_is_the_authors_loop_for_every_row():
    reward, task = Quadratic(0.3, 2.0), problem(ODE())
    _, z = visited(DOODL(reward, 8, jitter=0.0, clip=0.02), task)
    for row in range(4):
        latent, momentum = task.bank()[0][row : row + 1], 0.0
        norm = latent.norm()
        for j in range(8):
            torch.testing.assert_close(z[j, row], latent[0], rtol=1e-6, atol=1e-8)
            latent = latent.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(alone(task, row, reward, [latent]), latent)
            momentum = 0.9 * momentum - gradient.clip(-0.02, 0.02)
            latent = latent.detach() + momentum
            latent = latent * norm / latent.norm()


def test_doodl_jitters_by_the_row_alone():
    _, calm = visited(DOODL(Linear(), 3, jitter=0.0), problem(ODE()))
    _, z = visited(DOODL(Linear(), 3, jitter=1e-3), problem(ODE()))
    _, part = visited(DOODL(Linear(), 3, jitter=1e-3), problem(ODE(), batch=1))
    torch.testing.assert_close(z, part)
    assert 3e-4 < (z[1] - calm[1]).std() < 3e-3


# Gradients


@pytest.mark.parametrize("last", [None, 2])
def test_gradients_are_finite_differences_at_common_noise(last):
    reward, task = Quadratic(0.3, 2.0), problem()
    method = recorded(DNO)(reward, 2, last=last)
    run(task, method)
    moving, h = method.moving(task), 1e-5
    assert moving == ([0, 1, 2, 3] if last is None else [2, 3])
    assert method.gradients[0].shape == (4, len(moving), WIDTH)
    for v, i in enumerate(moving):
        for d in range(WIDTH):
            change = []
            for sign in (1, -1):
                noise = task.bank()
                noise[i] = noise[i].clone()
                noise[i][:, d] += sign * h
                change.append(-0.3 * (task.sample(noise).x0 - 2.0).square().sum(1))
            numeric = (change[0] - change[1]) / (2 * h)
            torch.testing.assert_close(-method.gradients[0][:, v, d], numeric, rtol=1e-5, atol=1e-7)


def test_only_the_steps_that_carry_a_gradient_are_paid_for():
    task = problem()
    run(task, DNO(Linear(), 3, last=1))
    assert task.ledger.counts["network"] == 3 * 4 * STEPS
    assert task.ledger.counts["gradient"] == 2 * 4 * 2  # steps 2 and 3; no gradient at the last iterate
    assert task.ledger.counts["reward"] == 3 * 4


@pytest.mark.parametrize("checkpointing", ["step", "block"])
def test_checkpointing_changes_no_bit(diffusion, checkpointing):
    gradients = []
    for mode in ("none", checkpointing):
        diffusion.checkpointing = mode
        method = recorded(DNO)(Bright(), 3)
        run(problem(DDIM(1.0), diffusion, particles=1, seeds=(0, 1), steps=3), method)
        gradients.append(torch.stack(method.gradients))
    diffusion.checkpointing = "step"
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_memory_does_not_grow_with_the_steps(diffusion):
    """Beyond a few latents a step, which are the noises themselves and the states."""
    totals = []
    for steps in (2, 6):
        task = problem(DDIM(1.0), diffusion, particles=1, seeds=(0,), steps=steps)
        leaves = [n.requires_grad_() for n in task.bank()]
        with saved_bytes() as kept:
            task.sample(leaves, grad=lambda i, steps: True)
        totals.append(sum(kept))
    latent = 4 * leaves[0].numel()
    assert totals[1] - totals[0] < 4 * 16 * latent
    diffusion.checkpointing = "none"
    with saved_bytes() as kept:
        task.sample([n.requires_grad_() for n in task.bank()], grad=lambda i, steps: True)
    diffusion.checkpointing = "step"
    assert sum(kept) > 10 * totals[1]


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))


class Opaque(Quadratic):
    """The same reward without a gradient."""

    differentiable = False


@pytest.mark.parametrize("kernel", [ODE(), DDIM(1.0)], ids=["ode", "sde"])
def test_the_hybrid_gradient_points_up(kernel):
    """On a quadratic reward of a linear generator with 256 draws."""
    exact, hybrid = (
        recorded(DNO)(Quadratic(0.3, 2.0), 2),
        recorded(DNO)(Opaque(0.3, 2.0), 2, gradient="hybrid", perturbations=256),
    )
    run(problem(kernel), exact)
    task = problem(kernel)
    run(task, hybrid)
    assert cosine(exact.gradients[0], hybrid.gradients[0]).min() > 0.9
    assert task.ledger.counts["reward"] == 4 * (256 + 2)
    assert task.ledger.counts["gradient"] == 4 * STEPS


def test_the_hybrid_gradient_does_not_depend_on_the_batch():
    paths = [
        visited(DNO(Opaque(0.3, 2.0), 5, 0.1, gradient="hybrid", perturbations=8), problem(batch=b)) for b in (1, 3, 64)
    ]
    for found, _ in paths[1:]:
        assert torch.equal(found.x0, paths[0][0].x0)
    history = paths[0][0].history["reward"]
    assert (history[-1] > history[0]).all()


# Rows


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_separate_runs(method):
    together, z = visited(method(Quadratic(0.3, 2.0), 6), problem())
    for row in range(4):
        one, path = visited(method(Quadratic(0.3, 2.0), 6), problem(seeds=(row,), particles=1))
        assert torch.equal(path[:, 0], z[:, row])
        assert torch.equal(one.x0[0], together.x0[row])


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(method):
    results = [run(problem(batch=batch), method(Quadratic(0.3, 2.0), 4)) for batch in (1, 3, 4)]
    assert torch.equal(results[0].x0, results[1].x0)
    assert torch.equal(results[0].x0, results[2].x0)


def test_micro_batches_of_a_real_model_change_nothing(diffusion):
    results = []
    for batch in (1, 4):
        task = problem(Consistency(), diffusion, seeds=range(4), steps=2, batch=batch)
        results.append(run(task, DNO(Bright(), 3)))
    torch.testing.assert_close(results[0].x0, results[1].x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_one_round_is_the_plain_sample(method):
    plain, one = run(problem()), run(problem(), method(Linear(), 1))
    assert torch.equal(one.x0, plain.x0)
    assert one.ledger.counts == plain.ledger.counts | {"decode": 4, "reward": 4}


@pytest.mark.parametrize("method", METHODS)
def test_the_best_is_kept_with_its_noise_and_is_never_worse_than_the_start(method):
    task = problem()
    found = run(task, method(Quadratic(1.0, 0.4), 25, rate=50.0))
    rewards = found.history["reward"]
    assert torch.equal(best(found), rewards.amax(0))
    assert (best(found) >= rewards[0]).all()
    torch.testing.assert_close(task.sample(list(found.noise)).x0, found.x0)


def test_the_gradient_is_clipped_a_row():
    gradient = torch.randn(3, 2, 4) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    for method, bound in ((ReNO(), 0.1), (DNO(), 1.0)):
        for row, clipped in zip(gradient, method.bounded(gradient), strict=True):
            leaf = torch.zeros_like(row).requires_grad_()
            leaf.grad = row.clone()
            torch.nn.utils.clip_grad_norm_([leaf], bound)
            torch.testing.assert_close(clipped, leaf.grad)
    assert DOODL().bounded(gradient).abs().max() == 1e-3


def test_history_tells_penalty_and_scale():
    found, z = visited(ReNO(Linear(), 5), problem(ODE()))
    norms = z.norm(dim=2).reshape(5, 2, 2)
    torch.testing.assert_close(found.history["scale"], norms / math.sqrt(WIDTH))
    torch.testing.assert_close(found.history["penalty"], norms.square() / 2 - (WIDTH - 1) * norms.log())


@pytest.mark.parametrize("regulariser", ["concentration", "whiteness"])
def test_any_method_takes_any_regulariser(regulariser, diffusion, monkeypatch):
    monkeypatch.setattr("samplers.whiteness.ORDERS", 2)
    for method in (DNO, DFlow):
        task = problem(ODE(), diffusion, seeds=(0, 1), particles=1, steps=2)
        found = run(task, method(Bright(), 2, regulariser=regulariser, weight=1.0))
        assert found.history["penalty"].isfinite().all()


def test_concentration_holds_the_noise_back(monkeypatch):
    """Climbing without end, noise under the regulariser keeps its scale."""
    monkeypatch.setattr("samplers.whiteness.ORDERS", 2)
    task = {"policy": gaussian(width=256), "particles": 1, "seeds": (0, 1)}
    free, held = (run(problem(**task), DNO(Linear(), 40, 0.05, weight=w)) for w in (0.0, 30.0))
    assert free.history["scale"][-1].min() > 1.5
    assert held.history["scale"][-1].max() < 1.2


# What may go wrong


class Cliff(Linear):
    """Linear up to a height; beyond, either reward or gradient is not finite."""

    def __init__(self, height, beyond):
        super().__init__()
        self.height, self.beyond = height, beyond

    def measure(self, media, prompts):
        total = super().measure(media, prompts)
        slip = torch.where(total < self.height, 1.0, self.beyond)
        if math.isnan(self.beyond):
            return Slip.apply(total, slip)
        return torch.where(total < self.height, total, slip.to(total))


class Slip(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, by):
        ctx.save_for_backward(by)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


@pytest.mark.parametrize("beyond", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("method", [ReNO(None, 40, 1.0, clip=0.5), DFlow(None, 20, weight=0.0), DNO(None, 40, 0.3)])
def test_a_step_over_a_cliff_is_undone(method, beyond):
    """The rate is halved and the step counted, a row at a time."""
    task = problem(DDIM(1.0) if isinstance(method, DNO) else ODE())
    found = run(task, method.bind(Cliff(8.0, beyond)))
    undone = found.history["undone"]
    assert undone[0].sum() == 0
    assert undone.sum(0).min() >= 2
    assert (best(found) > 7.0).all()
    assert task.failures == {}


class Moody(Linear):
    """Cannot judge the first row of some calls."""

    def __init__(self, silent):
        super().__init__()
        self.silent, self.calls = silent, 0

    def measure(self, media, prompts):
        scores = super().measure(media, prompts) * torch.ones(len(media))
        if self.calls in self.silent:
            scores = scores.index_fill(0, torch.tensor([0]), torch.nan)
        self.calls += 1
        return scores


@pytest.mark.parametrize("method", [ReNO(), DNO(), DFlow(), DOODL(jitter=0.0)])
def test_a_row_that_was_not_judged_stays_and_is_counted(method):
    method.rounds = 6
    moody, z = visited(method.bind(Moody({2})), problem())
    _, path = visited(method.bind(Moody(())), problem())
    assert torch.equal(z[3, 0], z[2, 0])
    torch.testing.assert_close(z[3:, 0], path[2:5, 0])
    torch.testing.assert_close(z[:, 1:], path[:, 1:])
    assert moody.failures == {"Moody": 1}
    assert moody.history["reward"][2, 0, 0].isnan()
    assert moody.history["undone"].sum() == 0


def test_a_row_that_is_never_judged_has_no_result_and_harms_no_other():
    found = run(problem(), ReNO(Moody(range(9)), 5))
    assert best(found)[0, 0] == -torch.inf
    assert (found.history["reward"][-1].flatten()[1:] > found.history["reward"][0].flatten()[1:]).all()


def test_a_batch_of_which_nothing_was_judged_stays():
    """Then there is no graph at all."""

    class Silent(Moody):
        def measure(self, media, prompts):
            scores = super().measure(media, prompts)
            return torch.full_like(scores.detach(), torch.nan) if bool(scores.isnan().any()) else scores

    for method in (ReNO, DNO, DOODL):
        found, z = visited(method(Silent({2}), 5), problem())
        assert torch.equal(z[3], z[2])
        assert not torch.equal(z[4], z[3])
        assert found.failures == {"Silent": 4}


def test_many_step_models_are_told_of_dno():
    with pytest.raises(ValueError, match=r"many-step.*4 steps.*DNO, DFlow"):
        run(problem(policy=gaussian(few_step=False)), ReNO(Linear()))
    run(problem(policy=gaussian(few_step=False)), DNO(Linear(), 1))


@pytest.mark.parametrize("method", METHODS)
def test_rewards_without_gradient_are_told_of_what_can_be_done(method):
    with pytest.raises(ValueError, match=r"hybrid.*RandomSearch.*BestOfN.*FeynmanKac"):
        run(problem(), method(Opaque(1.0, 0.0)))
    with pytest.raises(ValueError, match="needs a reward"):
        run(problem(), method())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ReNO(rounds=0), "rounds"),
        (lambda: ReNO(rate=0.0), "rate"),
        (lambda: ReNO(weight=-1.0), "weight"),
        (lambda: DNO(last=0), "last"),
        (lambda: DNO(perturbations=0), "perturbations"),
        (lambda: DFlow(history=0), "history"),
    ],
)
def test_arguments_out_of_range(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_whiteness_needs_rows_and_columns():
    with pytest.raises(ValueError, match="rows and columns"):
        run(problem(), DNO(Linear(), regulariser="whiteness", weight=1.0))


def test_concentration_needs_a_vector_of_numbers():
    small = {"policy": gaussian(width=3), "kernel": ODE()}
    with pytest.raises(ValueError, match="vectors of 4 numbers"):
        run(problem(**small), DNO(Linear(), weight=1.0))
    run(problem(**small), DNO(Linear(), 1))
    run(problem(policy=gaussian(width=3)), DNO(Linear(), 2, weight=1.0))  # four noises of three numbers


# Models


class Bright(Reward):
    """Mean brightness."""

    needs_prompt = False

    def measure(self, media, prompts):
        return media.mean((1, 2, 3))


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    policy = StableDiffusion(build_pipeline(tmp_path_factory.mktemp("sd")))
    policy.size = (16, 16)
    return policy


def test_small_gradients_survive_half_precision(diffusion, tmp_path):
    """Of pixels they are some 1e-7, of which float16 keeps nothing on its way through decoder and network."""
    half = StableDiffusion(build_pipeline(tmp_path).to(torch.float16))
    half.size, methods = diffusion.size, [recorded(DNO)(Faint(), 2), recorded(DNO)(Faint(), 2)]
    for policy, method in zip((diffusion, half), methods, strict=True):
        run(problem(DDIM(1.0), policy, particles=1, seeds=(0, 1), steps=2), method)
    full, half = (method.gradients[0] for method in methods)
    assert half.dtype == torch.float32
    assert (half - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("method", [DNO(rounds=4, rate=0.05), DFlow(rounds=4), DOODL(rounds=4, clip=1.0)])
def test_a_real_model_climbs(method, diffusion):
    task = problem(DDIM(1.0), diffusion, seeds=(0, 1), particles=1, steps=2)
    found = run(task, method.bind(Bright()))
    assert (best(found).flatten() > found.history["reward"][0].flatten()).all()


@pytest.fixture(scope="module")
def prompts():
    """Held-out prompts of every task of the embedded world."""
    return read_prompts(["assets/prompts/heldout.jsonl"])[5::24]


def climbed(method, model, prompts, steps):
    """Proxy and gold of every iterate, and gold of the best so far: (rounds,) each, means over prompts."""
    policy, gold, curves = align.load_policy(model, device="cpu"), Shapes(), {"gold": [], "gold of best": []}

    def seen(iterate):
        for name, media in (("gold", iterate.found.last[2]), ("gold of best", iterate.found.media)):
            curves[name].append(gold(media, prompts).mean())

    kernel = policy.kernel if policy.few_step else ODE()
    seeds = [1000 * p for p in range(len(prompts))]
    task = problem(kernel, policy, seeds, 1, steps, prompts=prompts, seen=seen)
    found = run(task, method.bind(CrossEncoder()))
    assert (best(found) >= found.history["reward"][0]).all()
    proxies = {name: found.history[name].mean((1, 2)).float() for name in ("reward", "best")}
    return proxies | {name: torch.stack(curve) for name, curve in curves.items()}


@pytest.mark.slow
def test_reno_raises_proxy_and_gold_until_it_is_let_loose(prompts):
    """Unregularised and unclipped it finds higher rewards still, of worse pictures, at noises of no Gaussian."""
    kept = climbed(ReNO(rounds=25), "tiny-turbo", prompts, 2)
    loose = climbed(ReNO(rounds=25, weight=0.0, clip=1.0), "tiny-turbo", prompts, 2)
    print({name: (v[0].item(), v[-1].item(), loose[name][-1].item()) for name, v in kept.items()})
    assert kept["best"][-1] > kept["best"][0] + 0.3
    assert kept["gold of best"][-1] > kept["gold of best"][0]
    assert loose["best"][-1] > kept["best"][-1]
    assert loose["gold of best"][-1] < kept["gold of best"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("method", [DNO(rounds=5), DFlow(rounds=5), DOODL(rounds=5, clip=0.02)])
def test_many_step_methods_raise_the_proxy(method, prompts):
    curves = climbed(method, "tiny-sd", prompts[:3], 10)
    print({name: (v[0].item(), v[-1].item()) for name, v in curves.items()})
    assert curves["best"][-1] > curves["best"][0] + 0.1
