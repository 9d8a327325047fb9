"""Search: fresh draws are best of N, neighbours stay on the sphere, renoised paths keep their law; the battery of all
methods that vary noises or paths."""

import copy
import itertools
import math

import pytest
import torch

import align
from samplers import (
    DDIM,
    ODE,
    PCN,
    PCNL,
    BestOfN,
    Budget,
    Interrupted,
    NoiseBank,
    PathSearch,
    Problem,
    RandomSearch,
    RewardFailed,
    SeededNoise,
    Unmask,
    ZeroOrder,
    run,
)
from samplers.families.gaussian import GaussianPolicy
from samplers.levels import diffuse_again
from samplers.search import neighbour
from tests.conftest import Linear, Table, build_pipeline, z_score
from tests.oracles import cosine_levels, ddim_coefficients, gaussian_chain

STEPS, MEAN, STD, SIZE = 5, 0.5, 0.8, 3
METHODS = [
    RandomSearch(Linear(), rounds=4),
    RandomSearch(Linear(), rounds=4, draws=2, growth=2, noises="initial"),
    ZeroOrder(Linear(), rounds=5, neighbours=3),
    ZeroOrder(Linear(), rounds=5, neighbours=3, noises="initial"),
    PathSearch(Linear(), branches=3, begin=0.5, back=0.3, forth=0.5),
    PCN(Linear(), 1.0, rounds=5, burn_in=2),
    PCNL(Linear(), 1.0, rounds=5, burn_in=2),
]
KERNELS = [ODE(), DDIM(1.0), DDIM(1.0, noisy_steps=[True, True, False, True, False])]


def problem(prompts=("a", "b"), particles=2, kernel=None, seeds=None, **options):
    policy = GaussianPolicy([[MEAN] * SIZE], [STD])
    seeds = seeds or [1000 * p + k for p in range(len(prompts)) for k in range(particles)]
    noise, levels = SeededNoise(seeds, (SIZE,)), policy.levels(STEPS, ())
    options = {"particles": particles, "prompts": prompts, **options}
    return Problem(policy, kernel or DDIM(1.0), policy.encode(prompts), levels, noise, **options)


def judging(method, reward):
    """The method with another reward."""
    changed = copy.copy(method)
    changed.reward = reward
    return changed


every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


@every_method
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_the_first_iterate_is_the_plain_sample_and_the_best_is_kept(method, kernel):
    ended = run(problem(kernel=kernel), method)
    rewards, best = ended.history["reward"], ended.history["best"]
    assert len(rewards) == method.rounds
    plain = run(problem(kernel=kernel))
    torch.testing.assert_close(rewards[0].flatten(), plain.x0.sum(1))
    assert torch.equal(best, rewards.cummax(0).values)
    assert bool((best[-1] > best[0]).any())
    assert torch.equal(ended.rewards, best[-1] if method.keeps == "best" else rewards[-1])
    torch.testing.assert_close(ended.rewards.flatten(), ended.x0.sum(1))
    if ended.noise:
        torch.testing.assert_close(problem(kernel=kernel).sample(list(ended.noise)).x0, ended.x0)


@every_method
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_micro_batches_change_nothing(method, batch):
    whole, parts = (run(problem(batch=size), method) for size in (99, batch))
    torch.testing.assert_close(parts.x0, whole.x0)
    torch.testing.assert_close(parts.history["reward"], whole.history["reward"])
    assert parts.ledger.counts == whole.ledger.counts


@every_method
def test_prompts_do_not_know_of_each_other(method):
    both, alone = run(problem(), method), run(problem(["b"], seeds=[1000, 1001]), method)
    torch.testing.assert_close(both.x0[2:], alone.x0)
    torch.testing.assert_close(both.history["reward"][:, 1:], alone.history["reward"])


@every_method
def test_given_noise_will_do(method):
    one = problem()
    one.noise = NoiseBank(problem().bank())
    ended = run(one, method)
    assert bool((ended.history["best"][-1] > ended.history["best"][0]).any())
    assert len(set(ended.history["reward"].flatten().tolist())) > 12


@every_method
def test_a_budget_is_never_exceeded(method):
    """The cost of the next iterate is foreseen: a budget of exactly what so many iterates take is enough for them."""
    costs = []
    run(problem(seen=lambda iterate: costs.append(iterate.ledger.evaluations)), method)
    for n in range(1, len(costs)):
        for spare, iterates in ((0, n + 1), (-1, n)):
            ended = run(problem(budget=Budget(costs[n] + spare, "nfe")), method)
            assert len(ended.history["reward"]) == iterates


@every_method
def test_ctrl_c_keeps_the_best(method):
    def stop(iterate):
        if iterate.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="after 3 of") as caught:
        run(problem(seen=stop), method)
    whole = run(problem(), method).history["best" if method.keeps == "best" else "reward"][2]
    torch.testing.assert_close(caught.value.trajectory.rewards, whole)


class Picky(Linear):
    """Judges nothing whose first number is positive."""

    def measure(self, media, prompts):
        return super().measure(media, prompts).masked_fill(media.flatten(1)[:, 0] > 1.0, torch.nan)


@every_method
def test_what_is_not_judged_is_counted_and_never_best(method):
    ended = run(problem(particles=8), judging(method, Picky()))
    assert ended.failures["Picky"] > 0
    judged = ended.rewards.flatten() > -torch.inf
    assert bool((ended.x0[judged][:, 0] <= 1.0).all())
    assert bool(ended.x0.isfinite().all())


@every_method
def test_a_reward_that_judges_nothing_stops_the_run(method):
    class Mute(Linear):
        def measure(self, media, prompts):
            return super().measure(media, prompts) * torch.nan

    with pytest.raises(Interrupted, match="no sample") as caught:
        run(problem(), judging(method, Mute()))
    assert isinstance(caught.value.__cause__, RewardFailed)


@pytest.mark.parametrize("method", [RandomSearch, ZeroOrder, PathSearch, PCN, PCNL])
def test_a_reward_is_needed(method):
    with pytest.raises(ValueError, match="needs a reward"):
        run(problem(), method())


# Random search


@pytest.mark.parametrize(("chains", "rounds"), [(1, 6), (2, 3), (3, 2)])
def test_fresh_draws_are_best_of_n(chains, rounds):
    """R draws of K chains are the samples of R·K seeds, image for image."""
    policy = GaussianPolicy([[MEAN] * SIZE], [STD])
    how = {"steps": STEPS, "gold": None, "plain": False, "seed": 7}
    many = align.steer(policy, ["a", "b"], BestOfN(Linear()), particles=6, **how)
    few = align.steer(policy, ["a", "b"], RandomSearch(Linear(), rounds), particles=chains, **how)
    for a, b in zip(*([s for s in result.samples if s.best] for result in (many, few)), strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert a.scores == b.scores
    assert few.ledger["network_evaluations"] == many.ledger["network_evaluations"]


@pytest.mark.parametrize("reward", [Linear(), Picky()], ids=["all", "some"])
def test_rounds_may_grow(reward):
    """Every round shows its best draw; any judgement is better than none."""
    ended = run(problem(), RandomSearch(reward, rounds=5, draws=2, growth=2))
    single = run(problem(), RandomSearch(reward, rounds=31)).history["reward"].nan_to_num(-torch.inf)
    assert ended.ledger.counts["reward"] == 4 * (1 + 2 + 4 + 8 + 16)
    expected = [draws.amax(0) for draws in single.split([1, 2, 4, 8, 16])]
    torch.testing.assert_close(ended.history["reward"].nan_to_num(-torch.inf), torch.stack(expected))


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_divergence_of_best_of_n_is_the_closed_form(n):
    """KL = E[log(N·F(x)^(N−1))] over the chosen = log N − (N − 1)/N, F the law of the plain sample."""
    groups, steps = 3000 // n, 3
    policy = GaussianPolicy([MEAN], [STD])
    g = torch.Generator().manual_seed(n)
    seeds = torch.randint(1 << 40, (groups,), generator=g).tolist()
    how = {"prompts": [""] * groups, "batch": groups}
    levels, cond = policy.levels(steps, ()), policy.encode([""] * groups)
    ended = run(
        Problem(policy, DDIM(1.0), cond, levels, SeededNoise(seeds, (1,)), **how), RandomSearch(Linear(), rounds=n)
    )
    alpha, sigma = cosine_levels(steps)
    exact = gaussian_chain(alpha, sigma, MEAN, STD, ddim_coefficients(alpha, sigma, 1.0))
    rank = torch.special.log_ndtr((ended.x0.flatten() - exact.mean[-1]) / exact.var[-1].sqrt())
    assert abs(z_score(math.log(n) + (n - 1) * rank, math.log(n) - (n - 1) / n)) < 4


# Zero order


@pytest.mark.parametrize("cosine", [0.95, 0.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_stay_on_the_sphere_at_their_angle(cosine, dtype):
    g = torch.Generator().manual_seed(0)
    z, w = (torch.randn(3, 4, 16, 16, generator=g, dtype=dtype) for _ in range(2))
    z = z * torch.tensor([0.1, 1.0, 30.0], dtype=dtype)[:, None, None, None]
    near = neighbour(z, w, cosine)
    a, b = z.flatten(1).double(), near.flatten(1).double()
    torch.testing.assert_close(b.norm(dim=1), a.norm(dim=1), rtol=1e-6, atol=0)
    angle = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(angle, torch.full_like(angle, cosine), rtol=0, atol=1e-6)


def test_zero_order_climbs_and_draws_a_new_base_where_it_cannot():
    """The rule replayed from what was judged, each sample once; the neighbours of a move surround its end."""

    class Heard(Linear):
        def __init__(self):
            super().__init__()
            self.scores = []

        def measure(self, media, prompts):
            scores = super().measure(media, prompts)
            self.scores += scores.float().tolist()
            return scores

    reward, noises = Heard(), []
    watched = problem(["a"], 1, seen=lambda iterate: noises.append(torch.cat(iterate.found.last_noise)))
    ended = run(watched, ZeroOrder(reward, rounds=30, neighbours=1))
    judged = iter(reward.scores)
    base, stuck = next(judged), False
    shown, moved = [base], []
    for _ in range(29):
        base = next(judged) if stuck else base
        near = next(judged)
        shown.append(max(near, base) if stuck else near)
        stuck = near <= base
        moved.append(not stuck)
        base = near
    assert ended.history["reward"].flatten().tolist() == shown
    assert ended.history["moved"].flatten().tolist() == moved
    assert 8 < sum(moved) < 22
    assert next(judged, None) is None
    for (here, there), before in zip(itertools.pairwise(noises[1:]), moved, strict=False):
        cosines = torch.cosine_similarity(here, there, dim=1)
        assert torch.allclose(cosines, torch.full_like(cosines, 0.95), atol=1e-5) == before


def test_zero_order_beats_fresh_draws_on_a_slope():
    """In many dimensions a linear reward is climbed faster along the sphere than by new draws."""
    policy, size = GaussianPolicy([[0.0] * 64], [1.0]), 24

    def found(method):
        noise = SeededNoise(range(size), (64,))
        one = Problem(policy, ODE(), policy.encode([""] * size), policy.levels(3, ()), noise, batch=999)
        return run(one, method)

    search, fresh = found(ZeroOrder(Linear(), rounds=11)), found(RandomSearch(Linear(), rounds=41))
    assert search.ledger.counts["reward"] <= fresh.ledger.counts["reward"] * 1.1
    assert search.rewards.mean() > fresh.rewards.mean() + 3 * fresh.rewards.std() / size**0.5


# Paths


def test_the_published_path_on_the_grid_of_a_flow():
    """0.12 → 0.90 → 0.09 → 0.87 → 0.06 → 0.84 → 0.03 → 0.81 → 0 in the time of a flow, which is 1 at the start."""
    search = PathSearch(Linear())
    assert search.rounds == 5
    assert search.levels(100) == [(0, 88), (10, 91), (13, 94), (16, 97), (19, 100)]
    for steps in range(1, 60):
        walked = search.levels(steps)
        assert len(walked) == 5
        assert walked[-1][1] == steps
        for (_, before), (start, end) in itertools.pairwise(walked):
            assert 0 <= start < before <= end <= steps


@pytest.mark.parametrize("frame", ["vp", "flow"])
def test_renoising_keeps_the_marginal_law(frame):
    """Closed form: of x_j = α_j·x0 + σ_j·ε it makes the law of x_i, and their covariance is α_i/α_j·Var(x_j)."""
    policy = GaussianPolicy([MEAN], [STD], frame=frame)
    levels = policy.levels(10, ())
    g = torch.Generator().manual_seed(0)
    for i, j in ((2, 6), (0, 10), (4, 5)):
        now, to = levels[j], levels[i]
        x = now.alpha * (MEAN + STD * torch.randn(40000, 1, generator=g, dtype=torch.float64))
        x = x + now.sigma * torch.randn(40000, 1, generator=g, dtype=torch.float64)
        noisy = diffuse_again(x, torch.randn(40000, 1, generator=g, dtype=torch.float64), now, to)
        var = to.alpha**2 * STD**2 + to.sigma**2
        assert abs(z_score(noisy, to.alpha * MEAN)) < 4
        assert abs(z_score((noisy - to.alpha * MEAN).square(), var)) < 4
        shared = (noisy - to.alpha * MEAN) * (x - now.alpha * MEAN)
        assert abs(z_score(shared, to.alpha / now.alpha * (now.alpha**2 * STD**2 + now.sigma**2))) < 4


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_way_down_has_the_law_of_the_chain(eta):
    """One branch, no choice: forward to level i and down again is Gaussian with the moments the chain gives it."""
    chains, steps, (i, j) = 4000, 10, (3, 8)
    policy = GaussianPolicy([MEAN], [STD])
    levels = policy.levels(steps, ())
    search = PathSearch(Linear(), branches=1, begin=0.8, back=0.5, forth=0.7)
    assert search.levels(steps) == [(0, j), (i, steps)]
    noise = SeededNoise(range(chains), (1,))
    kernel = DDIM(eta) if eta else ODE()
    one = Problem(policy, kernel, policy.encode(["a"]), levels, noise, particles=chains, batch=chains)
    x = run(one, search).history["reward"][1, 0]
    alpha, sigma = levels.alpha, levels.sigma
    chain = gaussian_chain(alpha, sigma, MEAN, STD, ddim_coefficients(alpha, sigma, eta))
    kept = alpha[i] / alpha[j]
    mean, var = kept * chain.mean[j], kept**2 * chain.var[j] + sigma[i] ** 2 - kept**2 * sigma[j] ** 2
    for k in range(i, steps):
        mean, var = chain.slope[k] * mean + chain.offset[k], chain.slope[k] ** 2 * var + chain.noise[k]
    assert abs(z_score(x, mean)) < 4
    assert abs(z_score((x - mean).square(), var)) < 4


def test_path_search_walks_only_what_it_needs():
    ended = run(problem(), PathSearch(Linear(), branches=3, begin=0.6, back=0.4, forth=0.6))
    assert ended.ledger.counts["network"] == 4 * (5 + 3 * 4 + 3 * 3)  # from levels 1 and 2 of 5
    assert ended.ledger.counts["reward"] == 4 * (1 + 3 + 3)


# Bad input and real models


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda: RandomSearch(rounds=0), "rounds"),
        (lambda: RandomSearch(growth=0), "growth"),
        (lambda: ZeroOrder(neighbours=0), "neighbours"),
        (lambda: ZeroOrder(cosine=1.0), "cosine"),
        (lambda: PathSearch(branches=0), "branches"),
        (lambda: PathSearch(begin=1.0), "begin"),
        (lambda: PathSearch(back=0.8, forth=0.8), "forth"),
    ],
)
def test_bad_input(how, message):
    with pytest.raises(ValueError, match=message):
        how()


def test_one_number_has_no_neighbours_and_tokens_no_forward_noise():
    policy = GaussianPolicy([MEAN], [STD])
    one = Problem(policy, ODE(), policy.encode(["a"]), policy.levels(3, ()), SeededNoise([0], (1,)))
    with pytest.raises(ValueError, match="RandomSearch"):
        run(one, ZeroOrder(Linear()))
    tokens = Table()
    masks = SeededNoise([0, 1], (3,), dtype=torch.int64)
    two = Problem(tokens, Unmask(), tokens.encode(["a"]), tokens.levels(3), masks, particles=2)
    with pytest.raises(ValueError, match="tokens have none"):
        run(two, PathSearch(Linear()))
    with pytest.raises(ValueError, match="all masks"):
        run(two, RandomSearch(Linear(), noises="initial"))


@pytest.fixture(scope="module")
def consistent(tmp_path_factory):
    """A random few-step model of the real classes."""
    import diffusers

    folder = tmp_path_factory.mktemp("tiny-lcm")
    how = {"scheduler": diffusers.LCMScheduler(), "guidance_embedding": True}
    build_pipeline(folder, pipeline="LatentConsistencyModelPipeline", **how).save_pretrained(folder / "model")
    return align.load_policy(str(folder / "model"), device="cpu")


@pytest.mark.parametrize("steps", [1, 3])
@every_method
def test_few_step_models_are_searched(method, steps, consistent):
    from rewards import Brightness

    seen = []
    how = {
        "particles": 2,
        "steps": steps,
        "gold": None,
        "seen": lambda iterate: seen.extend(iterate.rewards.flatten().tolist()),
    }
    result = align.steer(consistent, ["a cat"], judging(method, Brightness()), **how)
    plain, steered = ([s.scores["Brightness"] for s in result.arm(arm)] for arm in ("plain", "steered"))
    assert seen[:2] == plain
    assert len(set(seen)) > method.rounds
    if method.keeps == "best":
        assert all(a <= b for a, b in zip(plain, steered, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", [RandomSearch(rounds=9), ZeroOrder(rounds=3), PathSearch(branches=2)], ids=repr)
def test_search_finds_better_pictures_on_the_embedded_few_step_model(method):
    """Nine samples a chain: the reward that is searched by rises, and so does the detector that is not."""
    from rewards import CrossEncoder

    policy = align.load_policy("tiny-turbo", device="cpu")
    prompts = ["an orange ring left of a black square", "three black squares", "a black cross below a green star"]
    result = align.steer(policy, prompts, method.bind(CrossEncoder()), particles=12)
    for name in ("CrossEncoder", "gold"):
        plain, found = (torch.tensor([s.scores[name] for s in result.arm(arm)]) for arm in ("plain", "steered"))
        assert z_score(found - plain, 0.0) > 2.5, name
