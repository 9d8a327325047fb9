"""What the loop costs beside the networks: wall time of `align.steer` over the time of its network, decoder and reward calls.

The bare run makes exactly the calls that the steered run's ledger counts, in the same batches, and nothing else. Both alternate in
one process; the ratio is the median over pairs.

    python benchmarks/overhead.py [--particles 8] [--repeats 7]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import align
from rewards import CrossEncoder, as_prompts
from samplers import FeynmanKac, SeededNoise

PROMPT = "a red circle left of a blue square"
RESULTS = Path(__file__).parent / "results"


def steered(policy, reward, particles: int):
    """One call as a user makes it."""
    return align.steer(policy, PROMPT, FeynmanKac(reward, beta=0.2), particles=particles, plain=False, gold=None)


def bare(policy, reward, particles: int) -> None:
    """The same network, decoder and reward calls with nothing in between."""
    levels, prompts = policy.levels(policy.steps, policy.size), as_prompts([PROMPT] * particles)
    x = SeededNoise(range(particles), policy.shape(policy.size))(0)
    doubled = torch.cat([x, x])
    embeddings = policy.encode([PROMPT]).repeat(particles).both().positive["encoder_hidden_states"]
    with torch.no_grad():
        for i in range(levels.steps):
            at = levels[i].t.float().expand(2 * particles)
            policy.network(doubled, at, encoder_hidden_states=embeddings, return_dict=False)
            reward.measure(policy.decode(x), prompts)
        reward.measure(policy.decode(x), prompts)


def timed(call, *arguments) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    policy, reward = align.load_policy(), CrossEncoder()
    counts = steered(policy, reward, options.particles).ledger
    bare(policy, reward, options.particles)
    pairs = []
    for _ in range(options.repeats):
        ours = timed(steered, policy, reward, options.particles)
        pairs.append((ours, timed(bare, policy, reward, options.particles)))
    ratio = statistics.median(a / b for a, b in pairs)
    result = {
        "particles": options.particles,
        "steps": policy.steps,
        "threads": torch.get_num_threads(),
        "steer_seconds": statistics.median(a for a, _ in pairs),
        "bare_seconds": statistics.median(b for _, b in pairs),
        "ratio": ratio,
        "ratios": sorted(a / b for a, b in pairs),
        "counts": {k: v for k, v in counts.items() if isinstance(v, int)},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"steer {result['steer_seconds']:.3f} s, bare {result['bare_seconds']:.3f} s, ratio {ratio:.4f}")


if __name__ == "__main__":
    main()
