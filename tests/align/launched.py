"""What the processes of `test_distributed` and `test_sharding` run: python -m tests.align.launched WHAT OUT DATA CASES."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

import align.reports
from tests.align.runs import one, trainer_of
from tests.align.sharded import together


def several(name: str, out: Path, data: Path) -> None:
    """For processes started together: a whole run, one that is cut off, and a copy of that one gone on with."""
    one(name, out / "whole" / name, data, {})
    world = one(name, out / "cut" / name, data, {}, cut=3).world
    if world.first:
        shutil.copytree(out / "cut" / name, out / "again" / name)
    world.wait()
    one(name, out / "again" / name, data, {})


def breaking(name: str, out: Path, data: Path) -> None:
    """The second process fails after five updates."""
    trainer = trainer_of(name, out, data, save_every=2)
    loss = trainer.objective.loss

    def failing(policy, batch):
        if trainer.update == 5 and trainer.world.rank == 1:
            raise ArithmeticError("this process fails")
        return loss(policy, batch)

    trainer.objective.loss = failing
    trainer.fit()


def endless(name: str, out: Path, data: Path) -> None:
    """A run for somebody to stop."""
    trainer = trainer_of(name, out, data, updates=100_000, eval_every=0, save_every=100_000)
    sys.exit(130 if trainer.fit().stopped else 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["several", "breaking", "endless", "sharded"])
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("cases", nargs="+", help="names of CASES")
    options = parser.parse_args()
    torch.set_num_threads(1)
    align.reports.draw_curves = lambda *a, **k: None
    for name in options.cases:
        what = {"several": several, "breaking": breaking, "endless": endless, "sharded": together}[options.what]
        what(name, options.out, options.data)


if __name__ == "__main__":
    main()
