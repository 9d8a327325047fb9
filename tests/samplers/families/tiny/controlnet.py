"""Stable Diffusion and Stable Diffusion XL with a ControlNet beside them."""

from __future__ import annotations

from tests.samplers.families.tiny.sdxl import build, build_controlled_sd

VARIANTS = {"with a ControlNet": build_controlled_sd, "XL with a ControlNet": lambda: build(controlled=True)}
