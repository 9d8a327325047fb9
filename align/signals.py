"""Stopping on request: Ctrl-C, SIGTERM, or a call."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stop", "StopRequested"]


ECHO = 5.0  # seconds


class StopRequested(Exception):
    """The run was asked to stop."""


class Stop:
    """A request to stop, noticed at the next safe moment.

    Args:
        at_once: whether `check` may raise between any two pieces of work; several processes can only stop together.
    """

    def __init__(self, at_once: bool = True) -> None:
        self.at_once = at_once
        self.reason: str | None = None

    def request(self, reason: str = "asked to stop") -> None:
        """Asks; safe from any thread."""
        self.reason = reason

    def check(self, *_: Any) -> None:
        """Raises `StopRequested` if a stop was asked for and this process may stop alone."""
        if self.reason is not None and self.at_once:
            raise StopRequested(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGINT and SIGTERM as requests; a second one acts as it always does. Only the main thread can listen.

        With several processes the terminal and the launcher both pass a Ctrl-C on, so what follows at once is no second one.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for s, handler in before.items():
                signal.signal(s, handler or signal.SIG_DFL)

        first: list[float] = []

        def asked(number: int, frame: Any) -> None:
            now = time.monotonic()
            if not first:
                first.append(now)
                self.request("interrupted" if number == signal.SIGINT else "terminated")
            elif self.at_once or now - first[0] > ECHO:
                restore()
                signal.raise_signal(number)

        try:
            for s in before:
                signal.signal(s, asked)
            yield
        finally:
            restore()
