"""A rollout beside the pipeline's own run from the same noise."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from diffusers import schedulers
from torch import Tensor

from rewards import Prompt
from samplers import ODE, SeededNoise, rollout

PROMPTS = [Prompt("A cat", negative="a blurry thing"), Prompt("two dogs and one red bird", negative="")]


def compare(pipe, policy, guidance: float, size: tuple[int, int], steps: int = 3) -> None:
    """Our latents equal the pipeline's to 1e-5 of their scale, our images to 1e-4.

    A multistep solver is asked for its first-order form, the only one that is a Markov chain.
    """
    noise = SeededNoise([0, 1], policy.shape(size))
    cond, levels = policy.encode(PROMPTS).with_guidance(guidance), policy.levels(steps, size)
    ours = rollout(policy, policy.kernel if policy.few_step else ODE(), cond, levels, noise).x0
    if "solver_order" in pipe.scheduler.config:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, solver_order=1)
    pipe.set_progress_bar_config(disable=True)
    answers = []
    for kind in ("latent", "pt"):
        with drawn(noise):  # asked anew each time: some pipelines change the list of prompts
            answers.append(pipe(**policy.published(PROMPTS, guidance, steps, size, noise(0)), output_type=kind).images)
    theirs, images = answers
    agree(policy.pack(ours), theirs)
    torch.testing.assert_close(policy.decode(ours), images, rtol=0, atol=1e-4)
    assert images.shape == (2, 3, *size)


def hears_row_by_row(policy) -> None:
    """Rows of other texts and times are what each is alone, and differ."""
    cond, levels = policy.encode([*PROMPTS, "a bird"]), policy.levels(4)
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1, 1)
    together = policy.predict(x, levels[torch.tensor([0, 0, 2])], cond)
    alone = [policy.predict(x[:1], levels[i], cond[[row]]) for row, i in enumerate((0, 0, 2))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-2
    assert float((together[2] - policy.predict(x[:1], levels[0], cond[[2]])).abs().max()) > 1e-2


@contextmanager
def drawn(noise):
    """Lets the schedulers of consistency models draw noise(1), noise(2), … where they would draw their own."""
    steps = iter(range(1, 100))
    draw = lambda shape, **kwargs: noise(next(steps))  # noqa: E731
    with ExitStack() as stack:
        for module in (schedulers.scheduling_lcm, schedulers.scheduling_scm):
            stack.enter_context(patch.object(module, "randn_tensor", draw))
        yield


def agree(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the scale of the latents, which say something."""
    assert bool(theirs.isfinite().all()) and float(theirs.std()) > 0.1
    assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
