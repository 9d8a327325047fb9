"""What the loop costs beside the networks: wall time of `align.steer` over the time of its network, decoder and reward calls.

The bare run makes exactly the calls that the steered run's ledger counts, in the same batches, and nothing else. Both alternate in
one process; the ratio is that of the fastest of each, for one prompt and for four at a time.

    python benchmarks/overhead.py [--particles 8] [--repeats 9]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import align
from rewards import CrossEncoder, as_prompts
from samplers import FeynmanKac, SeededNoise

PROMPTS = ["a red circle left of a blue square", "three green stars", "a yellow ring", "a cross above a circle"]
RESULTS = Path(__file__).parent / "results"


def steered(policy, reward, prompts: list[str], particles: int):
    """One call as a user makes it."""
    return align.steer(policy, prompts, FeynmanKac(reward), particles=particles, plain=False, gold=None)


def bare(policy, reward, prompts: list[str], particles: int) -> None:
    """The same network, decoder and reward calls with nothing in between."""
    levels, rows = policy.levels(policy.steps, policy.size), len(prompts) * particles
    texts = as_prompts([text for text in prompts for _ in range(particles)])
    x = SeededNoise(range(rows), policy.shape(policy.size))(0)
    doubled = torch.cat([x, x])
    embeddings = policy.encode(prompts).repeat(particles).both().positive["encoder_hidden_states"]
    with torch.no_grad():
        for i in range(levels.steps):
            at = levels[i].t.float().expand(2 * rows)
            policy.network(doubled, at, encoder_hidden_states=embeddings, return_dict=False)
            reward.measure(policy.decode(x), texts)
        reward.measure(policy.decode(x), texts)


def timed(call, *arguments) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


def compare(policy, reward, prompts: list[str], particles: int, repeats: int) -> dict:
    """The fastest of each, alternating, after one round of warming up; the bare run must make the counted calls."""
    counts = steered(policy, reward, prompts, particles).ledger
    steps, rows = policy.steps, len(prompts) * particles
    assert counts["network_evaluations"] == 2 * rows * steps
    assert counts["decodes"] == counts["reward_calls"] == rows * (steps + 1)
    bare(policy, reward, prompts, particles)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(timed(steered, policy, reward, prompts, particles))
        theirs.append(timed(bare, policy, reward, prompts, particles))
    calls = {k: v for k, v in counts.items() if isinstance(v, int)}
    times = {"steer_seconds": sorted(ours), "bare_seconds": sorted(theirs)}
    return {"prompts": len(prompts), "particles": particles, "ratio": min(ours) / min(theirs), **calls, **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    policy, reward = align.load_policy(), CrossEncoder()
    rows = [compare(policy, reward, PROMPTS[:n], options.particles, options.repeats) for n in (1, 4)]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(
        json.dumps({"threads": torch.get_num_threads(), "runs": rows}, indent=1) + "\n"
    )
    for row in rows:
        print(f"{row['prompts']} prompt(s) × {row['particles']} particles: {row['ratio']:.3f} of the bare calls")


if __name__ == "__main__":
    main()
