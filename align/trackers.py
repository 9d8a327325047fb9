"""Where numbers go besides the run's own files: accelerate's trackers, by name.

A tracker is company, not a dependency: what is wrong with its name or package is said before any work, and what goes wrong with it
later is a warning.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["Tracker", "flatten"]

logger = logging.getLogger("kilter")
# The modules a tracker needs, any of them, and what to install.
PACKAGES = {
    "aim": (("aim",), "aim"),
    "clearml": (("clearml",), "clearml"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dvclive": (("dvclive",), "dvclive"),
    "mlflow": (("mlflow",), "mlflow"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
PROJECT = "kilter"
LONGEST = 250  # characters of a configuration value; some services refuse longer ones


class Tracker:
    """One tracker, started when the first number arrives.

    Args:
        name: of accelerate's trackers, or one registered with `accelerate.tracking.register_tracker_class`.
        out: the run's folder; what is kept on this machine goes under out/tracker.
        description: the run's configuration.

    Raises:
        ValueError: there is no such tracker, or its package is missing.
    """

    def __init__(self, name: str, out: Path, description: Mapping[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        if name not in LOGGER_TYPE_TO_CLASS:
            near = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"tracker must be one of {sorted(LOGGER_TYPE_TO_CLASS)} or null; got {name!r}{hint}")
        modules, package = PACKAGES.get(name, ((), ""))
        if modules and not any(find_spec(module) for module in modules):
            raise ValueError(f"tracker {name!r} is not installed: pip install {package}, or set tracker to null")
        self.name, self.out, self.description = name, out, description
        self.start_at = 0
        self.backend: Any = None
        self.works = True

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends numbers; those that are not finite stay behind."""
        known = {k: float(v) for k, v in values.items() if math.isfinite(v)}
        self._try(lambda backend: backend.log(known, step=step))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Sends a picture to a tracker that takes any."""

        def send(backend: Any) -> None:
            if not hasattr(backend, "log_images"):
                return
            pixels = np.asarray(image)
            if self.name == "tensorboard":
                backend.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            else:  # some take a list, some one image
                backend.log_images({name: pixels if self.name in ("aim", "clearml") else [pixels]}, step=step)

        self._try(send)

    def finish(self) -> None:
        """Sends what is left and ends; the next number starts it anew."""
        if self.backend is not None:
            self._try(lambda backend: backend.finish())
            self.backend = None

    def _try(self, act: Callable[[Any], object]) -> None:
        """Whatever goes wrong is said once, and ends the tracking but not the run."""
        if not self.works:
            return
        try:
            if self.backend is None:
                self.backend = self._start()
            act(self.backend)
        except Exception as error:
            self.works = False
            logger.warning(
                "tracker %s failed and is off from here on (%s: %s); log.jsonl has every number",
                self.name, type(error).__name__, error,
            )  # fmt: skip

    def _start(self) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's own messages ask for it
        kind, folder = LOGGER_TYPE_TO_CLASS[self.name], self.out / "tracker"
        folder.mkdir(parents=True, exist_ok=True)
        where, run = str(folder), self.out.resolve().name
        project = "" if self.name == "tensorboard" else PROJECT  # there, a folder under `where`
        given = {
            "dvclive": {"dir": where},
            "mlflow": {"run_name": run},
            "swanlab": {"logdir": where, "experiment_name": run},
            "tensorboard": {"purge_step": self.start_at or None},
            "trackio": {"name": run},
            "wandb": {"dir": where, "name": run},
        }.get(self.name, {})
        backend = kind(project, where, **given) if kind.requires_logging_directory else kind(project, **given)
        backend.main_process_only = False  # only the first process has a tracker
        backend.start()
        backend.store_init_configuration(flatten(self.description))
        return backend


def flatten(description: Any, at: str = "") -> dict[str, Any]:
    """A description as one level of numbers and words: {"train.learning_rate": 0.0003, "objective": "align.….DRaFT"}."""
    if isinstance(description, Mapping):
        flat: dict[str, Any] = {}
        for key, value in description.items():
            inner = at if key in ("class_path", "init_args") else f"{at}.{key}".lstrip(".")
            flat |= flatten(value, inner)
        return flat
    if description is None:
        return {}
    if isinstance(description, (bool, int, float, str)):
        return {at: description[:LONGEST] if isinstance(description, str) else description}
    return {at: json.dumps(description, default=str)[:LONGEST]}
