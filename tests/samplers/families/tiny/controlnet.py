"""Stable Diffusion and Stable Diffusion XL with a ControlNet beside them."""

from __future__ import annotations

from tests.samplers.families.tiny.sdxl import build, build_controlled_sd

VARIANTS = {"SD": build_controlled_sd, "SDXL": lambda: build(controlled=True)}
