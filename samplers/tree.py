"""Diffusion tree sampling: paths that share their beginnings, and values backed up from finished samples.

A prompt has one tree. Its root stands before the initial noise; a node is a state x_t from which a step draws noise; a leaf
is a finished sample. With V_t(x_t) = β log E[exp(r(x_0)/β) | x_t] the soft value of a state, an iterate

    selects   walks from the root, to a child ~ softmax(v/β) ("softmax"), or argmax v + c·sqrt(log n_parent / n_child) ("ucb"),
              until a node of n visits has fewer than C·n^a children (progressive widening);
    expands   that node by one child from the kernel's own law, and rolls it out to x_0;
    backs up  r(x_0): v ← β log MEAN exp(v_child/β), from the new leaf to the root.

Children are draws from the model already, so the mean needs no weights and the walk no model probability; a sum would count
branching as reward. Intermediate rewards are never asked for. What is drawn from a tree costs no network call.

Source: Diffusion Tree Sampling and Search, 2506.20701 (DTS is "softmax", DTS* is "ucb"). Deviations:

* The paper draws samples by more walks, and v of the root is its evidence. Both are consistent, but biased at any number of
  rollouts: a branch that looks better than it is is visited again and corrected, one that looks worse is not. Here every walk
  of "softmax" weighs the leaf at which it ends by w = exp(r/β)·Π 1/(k·π), over its choices of a child among k with probability
  π: an importance sample of the tree, whatever the v. Rows are drawn by w, and log Z is the log mean of w. (On a Gaussian chain
  of 6 steps and 48 rollouts E[Ẑ]/Z is 0.93 by the root, 1.00 by the walks. Where a tree has grown depends on its values too,
  which leaves a little: on 3 tosses of a coin and 24 rollouts, 4 at a time, it is 0.79 and 1.03.) The published evidence is in
  the history as "value".
* K nodes a prompt are selected before any of them is rolled out, by values that do not know of one another; their visits count
  at once, and the children on their way count as children, so that widening and bound spread them. Every child is still one
  draw from its parent's law.
* The first K children of the root are the samples of the problem's own noise, whatever the widening.
* Runs of steps without noise have no nodes: a node there could have but one child. If no step draws noise, every child is
  the root's, whatever the widening.
* A walk that ends at an old leaf has counted, and another begins, until one finds something to expand; where the widening lets
  none for long, the root has another child.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rewards.base import Reward

from .noise import onward, side_generator
from .outer import Found, Outer, Problem
from .resampling import soft_mean
from .steering import Context

__all__ = ["TreeSampling"]

PATIENCE = 1000  # walks to old leaves, one after another
GROW, DRAW = 1 << 20, 1 << 21  # keys of the generators of the walks that grow a tree and that draw from it


class Node:
    """A state in a tree.

    Attributes:
        step: the step that draws its children: −1 at the root, the number of steps at a leaf.
        state: on the CPU; None at the root, and as long as it is not rolled out.
        value: the soft value of what is below it, in units of the reward; NaN as long as nothing below it has been judged.
        visits: how many walks came by.
    """

    __slots__ = ("children", "parent", "state", "step", "value", "visits")

    def __init__(self, parent: Node | None = None, step: int = -1, state: Tensor | None = None) -> None:
        self.parent, self.step, self.state = parent, step, state
        self.value, self.visits = math.nan, 1
        self.children: list[Node] = []
        if parent is not None:
            parent.children.append(self)

    @property
    def judged(self) -> list[Node]:
        """The children that have a value."""
        return [child for child in self.children if not math.isnan(child.value)]

    @property
    def ancestors(self) -> Iterator[Node]:
        """From its parent up to the root."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    @property
    def leaves(self) -> Iterator[Node]:
        """The judged leaves below it, those of the child of the highest value first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if not node.children:
                yield node
            waiting += sorted(node.judged, key=lambda child: -child.value)[::-1]

    def then(self, step: int, state: Tensor) -> Node:
        """The next node of a path that has come to this one: itself, if it has no state yet."""
        if self.state is not None:
            return Node(self, step, state)
        self.step, self.state = step, state
        return self


class Tree(NamedTuple):
    """A root, and every walk that has ended at a judged leaf, with its log weight."""

    root: Node
    walks: list[tuple[Node, float]]


class TreeSampling(Outer):
    """Grows a tree of paths a prompt and draws from it: the tilted law, or the samples of the most valuable branches.

    "softmax" (DTS) is a sampler: the rows of a prompt are independent draws from its tree, which may coincide. "ucb" (DTS*)
    searches: they are the distinct leaves found by always going to the child of the highest soft value first. The first of
    them is the leaf of the heaviest branch, which need not be the highest reward seen.

    Args:
        reward: what to sample by; None takes the run's.
        beta: temperature of the tilt exp(r/beta), in units of the reward, ≥ 0; 0 backs up the maximum and draws the best,
            infinity samples the model as it is.
        walk: how walks choose among children.
        rounds: iterates, each of K rollouts a prompt; those that begin deep in the tree cost fewer network calls.
        width, growth: C > 0 and a in (0, 1] of the progressive widening.
        exploration: c ≥ 0 of "ucb", in units of the reward.
    """

    keeps = "last"

    def __init__(
        self,
        reward: Reward | None = None,
        beta: float = 0.1,
        walk: Literal["softmax", "ucb"] = "softmax",
        rounds: int = 16,
        width: float = 1.0,
        growth: float = 0.5,
        exploration: float = 1.0,
    ) -> None:
        if not beta >= 0 or not exploration >= 0:
            raise ValueError(f"beta and exploration must be ≥ 0; got {beta} and {exploration}")
        if not width > 0 or not 0 < growth <= 1:
            raise ValueError(f"width must be > 0, and growth lie in (0, 1]; got {width} and {growth}")
        if walk not in ("softmax", "ucb") or rounds < 1:
            raise ValueError(f"walk must be softmax or ucb, and rounds ≥ 1; got {walk!r} and {rounds}")
        self.reward, self.beta, self.rounds = reward, beta, rounds
        self.walk: Literal["softmax", "ucb"] = walk
        self.width, self.growth, self.exploration = width, growth, exploration

    def check(self, ctx: Context) -> None:
        self._need_reward()

    def iterations(self, problem: Problem, found: Found) -> Generator[None]:
        steps, levels = range(problem.levels.steps), problem.levels
        forks = [i for i in steps if problem.kernel.window(i, i + 1).diversifies(levels[i : i + 2])]
        trees = self._plant(problem)
        for i in range(self.rounds):
            grown = [self._grown(problem, group, tree, forks, i) for group, tree in enumerate(trees)]
            children, log_ratios = zip(*itertools.chain(*grown), strict=True)
            leaves = _rolled_out(problem, children, forks, i)
            self._judge(problem, found, leaves)
            self._refuse_unjudged(problem, found)
            for row, leaf in enumerate(leaves):
                if not math.isnan(leaf.value):
                    weight = log_ratios[row] + self._logit(leaf.value)
                    trees[row // problem.particles].walks.append((leaf, weight))
            above = {node for leaf in leaves for node in leaf.ancestors}
            for node in sorted(above, key=lambda node: -node.step):  # from the leaves up: each once, after its children
                node.value = self._soft([child.value for child in node.judged])
            self._draw(problem, found, trees, i)
            yield

    def _logit(self, value: float) -> float:
        """v/β; at infinite β only −∞ counts, and at β = 0 walks have no weights."""
        return value / self.beta if 0 < self.beta < math.inf else -math.inf if value == -math.inf else 0.0

    def _logits(self, values: Sequence[float]) -> Tensor:
        """v/β of all; at β = 0 the highest alone."""
        logits = torch.tensor([self._logit(value) for value in values], dtype=torch.float64)
        if self.beta == 0:
            logits[torch.tensor(values, dtype=torch.float64) < max(values)] = -math.inf
        return logits

    def _soft(self, values: Sequence[float]) -> float:
        """The soft mean of the values of children, NaN of none."""
        if len(values) < 2:
            return values[0] if values else math.nan
        return float(soft_mean(torch.tensor(values, dtype=torch.float64), self.beta))

    @staticmethod
    def _plant(problem: Problem) -> list[Tree]:
        """A root a prompt: before the initial noise, or the initial state itself where it is always the same (tokens)."""
        starts = problem.noise_of(torch.arange(0, problem.rows, problem.particles))(0).cpu()
        return [Tree(Node() if start.is_floating_point() else Node(None, 0, start), []) for start in starts]

    def _grown(
        self, problem: Problem, group: int, tree: Tree, forks: Sequence[int], iterate: int
    ) -> list[tuple[Node, float]]:
        """K children to roll out, of the root at first, then each of where a walk ended; with the log ratios of the walks."""
        if iterate == 0 or not forks:  # without forks, nothing but the root can have children
            tree.root.visits += problem.particles
            return [(Node(tree.root), 0.0) for _ in range(problem.particles)]
        generator = side_generator(problem.noise, group * problem.particles, GROW, iterate)
        walks = (self._walked(tree, problem.levels.steps, generator) for _ in range(problem.particles))
        return [(Node(node), log_ratio) for node, log_ratio in walks]

    def _walked(self, tree: Tree, last: int, generator: torch.Generator) -> tuple[Node, float]:
        """Walks until a node may have another child: that node, and the log of Π 1/(k·π) on the way."""
        for _ in range(PATIENCE):
            node, log_ratio = tree.root, 0.0
            while node.step < last:
                node.visits += 1
                if len(node.children) < self.width * node.visits**self.growth:
                    return node, log_ratio
                node, log_share = self._chosen(node, generator)
                log_ratio -= log_share
            node.visits += 1
            tree.walks.append((node, log_ratio + self._logit(node.value)))
        tree.root.visits += 1
        return tree.root, 0.0

    def _chosen(self, node: Node, generator: torch.Generator) -> tuple[Node, float]:
        """The child to which a walk goes on, and log k·π of that choice."""
        children = node.judged
        if len(children) == 1:
            return children[0], 0.0
        if self.walk == "ucb":
            bound = self.exploration * math.sqrt(math.log(node.visits))
            return max(children, key=lambda child: child.value + bound / math.sqrt(child.visits)), 0.0
        share = self._logits([child.value for child in children]).softmax(0)
        chosen = int(torch.multinomial(share, 1, generator=generator))
        return children[chosen], math.log(share[chosen] * len(children))

    def _judge(self, problem: Problem, found: Found, leaves: Sequence[Node]) -> None:
        """The rewards of new leaves, which are offered as samples."""
        x0 = _states(leaves, problem)
        parts = [problem.judge(x0[rows.to(x0.device)], self._need_reward(), rows) for rows in problem.parts()]
        rewards, media = (torch.cat(part) for part in zip(*parts, strict=True))
        found.offer(rewards, x0, media)
        for leaf, value in zip(leaves, rewards.tolist(), strict=True):
            leaf.value = value

    def _draw(self, problem: Problem, found: Found, trees: Sequence[Tree], iterate: int) -> None:
        """What the trees say by now: K leaves of each, the evidence, and the values of the roots for the history."""
        drawn: list[Node] = []
        log_z, many = torch.full((len(trees),), torch.nan, dtype=torch.float64), problem.particles
        for group, tree in enumerate(trees):
            if self.walk == "ucb":
                drawn += itertools.islice(itertools.cycle(tree.root.leaves), many)
                continue
            weights = torch.tensor([weight for _, weight in tree.walks], dtype=torch.float64)
            if self.beta == 0:
                weights = self._logits([leaf.value for leaf, _ in tree.walks])
            else:
                log_z[group] = soft_mean(weights, 1.0)
            generator = side_generator(problem.noise, group * many, DRAW, iterate)
            chosen = torch.multinomial(weights.softmax(0), many, replacement=True, generator=generator)
            drawn += [tree.walks[i][0] for i in chosen.tolist()]
        value = torch.tensor([tree.root.value for tree in trees], dtype=torch.float64)
        found.last = (torch.tensor([leaf.value for leaf in drawn], dtype=torch.float64), _states(drawn, problem), None)
        found.note(value=value.repeat_interleave(many))
        found.log_z = log_z


def _rolled_out(problem: Problem, children: Sequence[Node], forks: Sequence[int], stream: int) -> list[Node]:
    """Rolls every row's new child out to a leaf, with a node at every step that draws noise.

    Every level is walked once: rows join the batch at the level of their parent.
    """
    last, nodes = problem.levels.steps, list(children)
    starts = torch.tensor([0 if child.parent is None else max(child.parent.step, 0) for child in children])
    x = _beginnings(problem, children, stream)
    for row, child in enumerate(children):
        if child.parent is not None and child.parent.step < 0 and 0 in forks:
            nodes[row] = child.then(0, x[row])
    for begin, end in itertools.pairwise([*sorted(set(starts.tolist())), last]):
        kept = [i for i in (*forks, last) if begin < i <= end]
        for part in problem.parts((starts <= begin).nonzero()[:, 0]):
            noise = onward(torch.stack([x[row] for row in part.tolist()]), problem.noise_of(part, stream), begin)
            path = problem.sample(noise, part, start=begin, stop=end, record="path").latents
            assert path is not None
            for row, states in zip(part.tolist(), path[:, [i - begin for i in kept]].cpu(), strict=True):
                x[row] = states[-1]
                for step, state in zip(kept, states, strict=True):
                    nodes[row] = nodes[row].then(step, state)
    return nodes


def _beginnings(problem: Problem, children: Sequence[Node], stream: int) -> list[Tensor]:
    """The states, on the CPU, from which rows are rolled out: their parents', or an initial noise of their own."""
    parents = [child.parent for child in children]
    roots = [row for row, parent in enumerate(parents) if parent is not None and parent.state is None]
    fresh = problem.noise_of(torch.tensor(roots), stream)(0).to("cpu", problem.policy.dtype) if roots else ()
    drawn = dict(zip(roots, fresh, strict=True))
    return [drawn.get(row, parent.state) for row, parent in enumerate(parents)]  # pyright: ignore


def _states(nodes: Iterable[Node], problem: Problem) -> Tensor:
    """(N, …) the states of nodes, on the policy's device."""
    return torch.stack([node.state for node in nodes if node.state is not None]).to(problem.policy.device)
