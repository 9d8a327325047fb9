"""Laws of stopping: a signal is a request, noticed where it is safe; a second one is an order."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from align import signals
from align.signals import Stop, StopRequested


@pytest.fixture(autouse=True)
def as_from_a_shell():
    """Background processes may be deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_is_a_request(number, word):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stop = Stop()
    with stop.listening():
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(StopRequested, match=word):
            stop.check()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_one_acts_at_once():
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_echo_of_a_launcher_is_no_second_one(monkeypatch):
    """A terminal signals every process, and the launcher passes the signal on."""
    stop, clock = Stop(at_once=False), [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        stop.check()  # several processes can only stop together
        assert stop.reason == "interrupted"
        clock[0] = signals.ECHO + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_cannot_listen_but_may_ask():
    stop, seen = Stop(), []

    def elsewhere():
        with stop.listening():
            stop.request("from a notebook")
            seen.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen
    with pytest.raises(StopRequested, match="from a notebook"):
        stop.check()
