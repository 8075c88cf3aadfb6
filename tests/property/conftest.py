"""What holds for all property tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_power_cuts() -> Iterator[None]:
    """Nobody pulls a plug here: waiting for the drive would be most of the time that thousands of turns take."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: None)
        yield
