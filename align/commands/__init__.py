"""The sub-commands of `kilter`, one module each: `HELP`, `parser()` and `run(parser, parsed, options) -> exit code`."""

from . import (
    check_model,
    check_reward,
    compare_rewards,
    eval_reward,
    plan,
    score,
    steer,
    train,
    train_reward,
    train_value,
)
from . import list as listing

COMMANDS = {
    "steer": steer,
    "train": train,
    "train-reward": train_reward,
    "train-value": train_value,
    "score": score,
    "check-model": check_model,
    "check-reward": check_reward,
    "compare-rewards": compare_rewards,
    "eval-reward": eval_reward,
    "plan": plan,
    "list": listing,
}
