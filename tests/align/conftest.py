"""What the tests of training share."""

from __future__ import annotations

import pytest

from tests.align import runs


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Preferences, likes and captions on disk."""
    return runs.feedback(tmp_path_factory.mktemp("feedback"))


@pytest.fixture
def plain(monkeypatch):
    """Runs without curves, and without waiting for the disk: both take longer than the training of these tests."""
    monkeypatch.setattr("align.reports.draw_curves", lambda *args, **how: None)
    monkeypatch.setattr("rewards.files.os.fsync", lambda descriptor: None)
