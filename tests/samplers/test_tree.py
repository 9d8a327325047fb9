"""Trees of paths against enumeration and the exact law of chains; published backups, and the weights that repair their bias."""

import itertools
import math

import pytest
import torch

from samplers import (
    DDIM,
    ODE,
    Interrupted,
    Kernel,
    Levels,
    Problem,
    SeededNoise,
    TreeSampling,
    Unmask,
    run,
)
from samplers.families.gaussian import GaussianPolicy
from samplers.tree import Node
from tests.conftest import Linear, Table, TokenReward
from tests.oracles import (
    MIXTURE,
    cosine_levels,
    ddim_coefficients,
    gaussian_chain,
    mixture_tilted_linear,
    tilted_law,
    tilted_linear,
    unmasking_law,
)


class Kept(TreeSampling):
    """Lets a test look at the trees."""

    def _draw(self, problem, found, trees, iterate):
        self.trees = trees
        super()._draw(problem, found, trees, iterate)


def nodes(node):
    yield node
    for child in node.children:
        yield from nodes(child)


def gaussian(steps=6, groups=1, particles=4, kernel=None, seeds=None, **options):
    """A problem on Gaussian data, and the mean and variance its sampler ends with."""
    alpha, sigma = cosine_levels(steps)
    exact = gaussian_chain(alpha, sigma, 0.5, 0.8, ddim_coefficients(alpha, sigma, 1.0))
    policy, levels = GaussianPolicy([0.5], [0.8]), Levels(torch.linspace(1, 0, steps + 1), alpha, sigma)
    seeds = range(groups * particles) if seeds is None else seeds
    options = {"particles": particles, "prompts": ["a"] * groups, "batch": 999, **options}
    one = Problem(
        policy, kernel or DDIM(1.0), policy.encode(["a"] * groups), levels, SeededNoise(seeds, (1,)), **options
    )
    return one, float(exact.mean[-1]), float(exact.var[-1])


def z_score(values, expected):
    return float((values.mean() - expected) / (values.std() / len(values) ** 0.5))


def coins(groups, particles):
    """A problem on them, a reward, and the exact evidence and tilted law."""
    policy = Table(2, 2, seed=1)  # a binary tree of depth two
    values = torch.tensor([[0.0, 0.5], [1.0, 0.2]], dtype=torch.float64)
    levels, g = policy.levels(2), torch.Generator().manual_seed(0)
    first = torch.full((groups * particles, 2), 2)
    normals = [torch.randn(groups * particles, 2, 3, generator=g) for _ in range(2)]
    one = Problem(
        policy, Unmask(), policy.encode(["a"] * groups), levels, lambda i: normals[i - 1] if i else first,
        particles=particles, prompts=["a"] * groups, batch=999,
    )  # fmt: skip
    reward = TokenReward({state: values[state].item() for state in itertools.product(range(2), repeat=2)})
    return one, reward, *tilted_law(unmasking_law(policy.table, levels.alpha), values, 1.0)


@pytest.fixture(scope="module")
def grown():
    """Eight trees of 180 rollouts each, on coins."""
    one, reward, log_z, tilted = coins(8, 30)
    steering = Kept(reward, beta=1.0, rounds=6)
    return run(one, steering), steering.trees, log_z, tilted


def test_values_of_a_binary_tree_are_those_of_enumeration(grown):
    found, trees, log_z, _ = grown
    assert abs(found.history["value"][-1].mean() - log_z) < 1e-2
    assert abs(found.log_z.mean() - log_z) < 1e-2
    assert all(abs(tree.root.value - log_z) < 0.1 for tree in trees)


def test_leaves_of_a_binary_tree_follow_the_tilted_law(grown):
    found, trees, log_z, tilted = grown
    for first, second in itertools.product(range(2), repeat=2):
        mass = torch.tensor(
            [
                sum(math.exp(w) for leaf, w in walks if leaf.state.tolist() == [first, second]) / len(walks)
                for _, walks in trees
            ],
            dtype=torch.float64,
        )
        assert abs(z_score(mass / math.exp(log_z), float(tilted[first, second]))) < 4
    drawn = (found.x0 * torch.tensor([2, 1])).sum(1).bincount(minlength=4) / len(found.x0)
    assert torch.allclose(drawn.double(), tilted.flatten(), atol=0.1)


def test_a_backup_that_sums_counts_branching_as_reward(monkeypatch):
    one, reward, log_z, _ = coins(2, 20)
    monkeypatch.setattr("samplers.tree.soft_mean", lambda values, beta: beta * torch.logsumexp(values / beta, 0))
    assert (run(one, TreeSampling(reward, beta=1.0, rounds=10)).history["value"][-1] > log_z + 1).all()


def test_walks_weigh_leaves_without_the_bias_of_backed_up_values():
    """Both at once, on one set of trees: the root is low by many standard errors, the walks are right."""
    one, mean, var = gaussian(steps=4, groups=100, particles=8)
    found = run(one, TreeSampling(Linear(), beta=0.5, rounds=4))
    log_z, tilted_mean, _ = tilted_linear(mean, var, 2.0)
    root = found.history["value"][-1][:, 0]
    assert abs(z_score((found.log_z - log_z).exp(), 1.0)) < 4
    assert z_score((root - log_z).exp(), 1.0) < -5
    steered = (found.log_z - log_z).exp() * found.rewards.mean(1)
    assert abs(z_score(steered, tilted_mean)) < 4


class Exact(Kernel):
    """The exact reverse kernel of a mixture in one dimension, by its inverse distribution function."""

    stochastic = False  # no log-probabilities

    def __init__(self, data):
        super().__init__()
        self.data = data

    def std(self, now, to):
        return torch.ones_like(to.sigma)

    def law(self, clean, x, now, to, std):
        pi, mu, s2 = self.data
        ratio = now.alpha / to.alpha
        before, after = (at.alpha**2 * s2 + at.sigma**2 for at in (now, to))
        log_share = pi.log() - 0.5 * ((x - now.alpha * mu) ** 2 / before + before.log())
        self.share = log_share.softmax(-1)
        self.mean = to.alpha * mu + ratio * after / before * (x - now.alpha * mu)
        self.scale = (after - ratio**2 * after**2 / before).sqrt()
        return self

    def sample(self, noise):
        low, high, wanted = (torch.full_like(noise, v) for v in (-9.0, 9.0, 0.0))
        wanted = torch.special.ndtr(noise)
        for _ in range(60):
            middle = (low + high) / 2
            below = (self.share * torch.special.ndtr((middle - self.mean) / self.scale)).sum(-1, keepdim=True) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low


def test_a_mixture_is_tilted_exactly():
    policy = GaussianPolicy(MIXTURE.means[:, None], MIXTURE.variances.sqrt(), MIXTURE.weights)
    groups, particles = 60, 8
    alpha, sigma = cosine_levels(4)
    levels, noise = Levels(torch.linspace(1, 0, 5), alpha, sigma), SeededNoise(range(480), (1,), dtype=torch.float64)
    how = {"particles": particles, "prompts": ["a"] * groups, "batch": 480}
    one = Problem(policy, Exact(MIXTURE), policy.encode(["a"] * groups), levels, noise, **how)
    found = run(one, TreeSampling(Linear(), beta=1 / 1.5, rounds=4))
    log_z, tilted = mixture_tilted_linear(MIXTURE, 1.5)
    assert math.isclose(float(log_z), 1.2412445, abs_tol=1e-6)
    ratio = (found.log_z - log_z).exp()
    assert abs(z_score(ratio, 1.0)) < 4
    x = found.x0.reshape(groups, particles)
    assert abs(z_score(ratio * x.mean(1), float(tilted.mean))) < 4
    assert abs(z_score(ratio * (x > -0.5).double().mean(1), 0.9848979)) < 4


def test_an_infinite_temperature_samples_the_model():
    one, mean, _ = gaussian(steps=3, groups=30, particles=8)
    steering = Kept(Linear(), beta=math.inf, rounds=4)
    found = run(one, steering)
    assert torch.equal(found.log_z, torch.zeros(30, dtype=torch.float64))
    assert {weight for tree in steering.trees for _, weight in tree.walks} == {0.0}
    everything = torch.tensor([[leaf.value for leaf, _ in tree.walks[:32]] for tree in steering.trees]).double().mean(1)
    assert abs(z_score(everything, mean)) < 4


def test_the_first_iterate_is_the_plain_sample_and_nothing_better_is_lost():
    one, _, _ = gaussian(groups=2)
    plain = run(gaussian(groups=2)[0])
    found = run(one, TreeSampling(Linear(), rounds=4))
    assert torch.equal(found.history["reward"][0].flatten(), plain.x0.flatten().float().double())
    assert (found.history["best"].diff(dim=0) >= 0).all()


def test_greedy_draws_take_the_best():
    found = run(gaussian(groups=3)[0], TreeSampling(Linear(), beta=0.0, rounds=4))
    assert torch.equal(found.rewards, found.history["best"][-1].amax(1, keepdim=True).expand(3, 4))
    assert torch.equal(found.history["value"][-1], found.rewards)
    assert found.log_z.isnan().all()


def test_search_returns_the_leaves_of_the_heaviest_branches():
    steering = Kept(Linear(), beta=0.5, walk="ucb", rounds=8)
    found = run(gaussian(groups=2)[0], steering)
    for tree, rewards in zip(steering.trees, found.rewards.tolist(), strict=True):
        node = tree.root
        while node.children:
            node = max(node.children, key=lambda child: child.value)
        assert rewards[0] == node.value
        assert len(set(rewards)) == 4
    visits = [child.visits for child in steering.trees[0].root.children]
    assert sum(visits) <= steering.trees[0].root.visits
    assert max(visits) > min(visits), "the bound prefers some branches"


@pytest.mark.parametrize("kernel", [DDIM(1.0), DDIM(1.0, noisy_steps=[False, True, False, True, False, False]), ODE()])
def test_every_network_call_is_counted_and_none_is_made_twice(kernel):
    one, _, _ = gaussian(kernel=kernel)
    steering = Kept(Linear(), rounds=6)
    found = run(one, steering)
    forks = [i for i, std in enumerate(kernel.stds(one.levels).tolist()) if std > 0]
    below = {node.step for node in nodes(steering.trees[0].root)}
    assert below == {-1, *forks, 6}
    calls = 0
    for node in nodes(steering.trees[0].root):
        if node.parent is not None:
            calls += node.step - max(node.parent.step, 0)
    assert found.ledger.counts["network"] == calls
    assert found.ledger.counts["reward"] == 6 * 4
    assert (calls < 6 * 4 * 6) == bool(forks)


@pytest.mark.parametrize("walk", ["softmax", "ucb"])
def test_neither_batches_nor_other_prompts_change_a_tree(walk):
    steering = TreeSampling(Linear(), beta=0.3, walk=walk, rounds=4)
    together = run(gaussian(groups=2)[0], steering)
    for size in (1, 3):
        parts = run(gaussian(groups=2, batch=size)[0], steering)
        torch.testing.assert_close(parts.x0, together.x0)
    for group in range(2):
        alone = run(gaussian(seeds=range(4 * group, 4 * group + 4))[0], steering)
        torch.testing.assert_close(alone.x0, together.x0[4 * group : 4 * group + 4])


def test_widening_bounds_the_children():
    steering = Kept(Linear(), rounds=40, width=2.0, growth=0.5)
    run(gaussian()[0], steering)
    for node in nodes(steering.trees[0].root):
        assert len(node.children) <= max(1, 2.0 * node.visits**0.5 + 1)
    assert len(steering.trees[0].root.children) >= 2 * steering.trees[0].root.visits ** 0.5 - 1


def test_where_the_widening_lets_nothing_grow_the_root_does(monkeypatch):
    """A third child needs 2⁵⁰ visits here, so that walks would go on for ever."""
    monkeypatch.setattr("samplers.tree.PATIENCE", 20)
    steering = Kept(Linear(), rounds=10, growth=0.02)
    found = run(gaussian(steps=2, particles=1)[0], steering)
    assert len(found.history["reward"]) == 10
    assert len(steering.trees[0].root.children) > 2


def test_long_paths_have_leaves():
    root = Node()
    last = root
    for i in range(5000):
        last = Node(last, i, torch.zeros(1))
        last.value = 0.0
    assert list(root.leaves) == [last]


class Moody(Linear):
    """Cannot judge what is negative."""

    def measure(self, media, prompts):
        scores = super().measure(media, prompts)
        return scores.masked_fill(scores < 0, torch.nan)


def test_what_cannot_be_judged_is_counted_and_never_drawn():
    steering = Kept(Moody(), beta=0.5, rounds=8)
    found = run(gaussian(groups=2)[0], steering)
    unjudged = int(found.history["reward"].isnan().sum())
    assert found.failures == {"Moody": unjudged} and unjudged > 0
    assert (found.rewards >= 0).all()
    assert all(math.isfinite(weight) for tree in steering.trees for _, weight in tree.walks)


def test_ctrl_c_keeps_what_the_tree_says():
    def stop(iterate):
        if iterate.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="after 3 of 9") as caught:
        run(gaussian(seen=stop)[0], TreeSampling(Linear(), rounds=9))
    assert torch.equal(caught.value.trajectory.rewards, run(gaussian()[0], TreeSampling(Linear(), rounds=3)).rewards)


@pytest.mark.parametrize(
    "arguments",
    [
        {"beta": -1.0},
        {"growth": 0.0},
        {"growth": 1.5},
        {"width": 0.0},
        {"exploration": -1.0},
        {"rounds": 0},
        {"walk": "x"},
    ],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TreeSampling(Linear(), **arguments)


def test_a_reward_is_needed():
    with pytest.raises(ValueError, match="needs a reward"):
        run(gaussian()[0], TreeSampling())
