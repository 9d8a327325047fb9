"""Every training configuration of configs/tiny on the embedded model: does the gold reward, which none optimises, rise?

Each trains from the same weights for at most three minutes on two cores, then both the base and the final weights sample all
held-out prompts twice from the same seeds. A gain counts if it exceeds three standard errors over prompts, paired.

    python benchmarks/tiny_configs.py [--only alignprop ddpo] [--results]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import align
from align.evaluation import paired_gain

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p for p in (ROOT / "configs" / "tiny").glob("*.yaml") if p.stem != "steer")
SAMPLES = 2


def prove(config: Path, out: Path) -> dict[str, float | str]:
    """Trains a configuration as it stands, and judges its last weights on all held-out prompts."""
    begin = time.perf_counter()
    heldout = [str(ROOT / "assets" / "prompts" / "heldout.jsonl")]
    result = align.train(
        config, out=str(out), eval_prompts=heldout, eval_samples=SAMPLES, eval_every=0, tracker=None, save_every=10**6
    )
    row: dict[str, float | str] = {"config": config.stem, "updates": len(result.log)}
    row["train_seconds"] = sum(r["seconds"] for r in result.log)
    row["total_seconds"] = time.perf_counter() - begin
    before, after = result.evaluations[0][1], result.evaluations[-1][1]
    for name in ("CrossEncoder", "gold"):
        if name in before.scores:
            gain, error = paired_gain(before.scores[name], after.scores[name], SAMPLES)
            row |= {
                f"{name}_before": float(before.scores[name].nanmean()),
                f"{name}_gain": gain,
                f"{name}_error": error,
            }
    last = result.log[-1]
    row |= {"kl": after.kl, "diversity": after.diversity - before.diversity}
    row |= {"reward_calls": last["reward_calls"], "network_calls": last["network_calls"]}
    return row


def table(rows: list[dict]) -> str:
    """Markdown."""
    head = (
        "config | updates | seconds | reward queries | network evaluations | gold before | gain ± s.e. | KL | diversity"
    )
    lines = [f"| {head} |", "| " + " | ".join(["---"] * (head.count("|") + 1)) + " |"]
    for r in rows:
        cells = [r["config"], r["updates"], f"{r['train_seconds']:.0f}", r["reward_calls"], r["network_calls"]]
        cells += [f"{r['gold_before']:.3f}", f"{r['gold_gain']:+.3f} ± {r['gold_error']:.3f}"]
        lines.append("| " + " | ".join(str(c) for c in [*cells, f"{r['kl']:.1f}", f"{r['diversity']:+.3f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of configurations")
    parser.add_argument(
        "--results", action="store_true", help="write benchmarks/results/tiny_configs.*; others are kept"
    )
    options = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "tiny_configs.json"
    known = {r["config"]: r for r in json.loads(path.read_text())} if path.is_file() else {}
    for config in (c for c in CONFIGS if not options.only or c.stem in options.only):
        with tempfile.TemporaryDirectory() as folder:
            known[config.stem] = prove(config, Path(folder) / "run")
        print(table([known[config.stem]]).splitlines()[-1], flush=True)
        if options.results:
            rows = [known[c.stem] for c in CONFIGS if c.stem in known]
            path.write_text(json.dumps(rows, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
